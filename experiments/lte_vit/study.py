"""LTE's Observations 1 to 5: can low-rank heads pre-train as full training does, and under which conditions?

    make study NAME=lte_vit                        or  python -m experiments.lte_vit.study
    python -m experiments.lte_vit.study --table    only tables and figures, from the runs there are

Networks of two layers, width 128 unless said, on the embedded images, 16 epochs of 25 steps of 32 images. Every point tries
three learning rates on seed 0 (more where the best is at an edge; validation half) and reports on the test half: headline
comparisons with seeds 1-3, sweeps with seed 1.

1. LoRA's rank and MHLoRA's heads × rank against full training.   2. Effective rank of full training's gradients over time.
3. Sequential against parallel merging.                           4. N·R ≥ width with T = 1 against full; merge interval T.
5. Orthogonality of heads.                                        Then the widths of ViT and MLP-Mixer.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments import tasks
from experiments.command import main
from experiments.rates import reported, rounds
from experiments.runs import Job

EPOCHS, STEPS, BATCH, WIDTH = 16, 25, 32, 128
SEEDS = (1, 2, 3)
LOOK = 20  # steps between two looks at ranks and angles
INTERVALS = (1, 5, 10, 25, 100)
WIDTHS = (64, 128, 192)
CHANNELS = "method.targets=[mlp_channels.fc1,mlp_channels.fc2]"  # a Mixer's matrices over tokens are 16 wide: no head fits


def lora(rank: int) -> list[str]:
    """One adapter a matrix, never merged."""
    return ["method=lora", f"method.rank={rank}"]


def heads(count: int, rank: int, every: int = 10, mode: str = "parallel") -> list[str]:
    """LTE of so many heads; ``joint`` is multi-head LoRA."""
    return ["method=lte", f"method.heads={count}", f"method.rank={rank}", f"method.merge_every={every}", f"method.mode={mode}"]


# point -> what it adds to the task, middle learning rate
POINTS = {
    "full": (["method=full"], 2e-3),
    **{f"lora-r{r}": (lora(r), 4e-3) for r in (4, 16, 64, 128)},
    "mhlora-h4-r4": (heads(4, 4, mode="joint"), 4e-3),
    "mhlora-h4-r32": (heads(4, 32, mode="joint"), 4e-3),
    "sequential-h4-r32": (heads(4, 32, mode="sequential"), 4e-3),
    "lte-h4-r8-t10": (heads(4, 8), 4e-3),
    **{f"lte-h4-r32-t{t}": (heads(4, 32, t), 4e-3) for t in INTERVALS},
    **{f"{net}{width}-full": (["method=full"], 2e-3) for net in ("vit", "mixer") for width in WIDTHS},
    **{f"vit{width}-lte": (heads(4, width // 4), 4e-3) for width in WIDTHS},
    **{f"mixer{width}-lte": ([*heads(4, width // 4), CHANNELS], 4e-3) for width in WIDTHS},
}
POINTS = {name: point for name, point in POINTS.items() if name not in ("vit128-full", "vit128-lte")}  # full, lte-h4-r32-t10
SIDES = [(name, middle) for name, (_, middle) in POINTS.items()]
HEADLINE = ("full", "lora-r128", "mhlora-h4-r32", "sequential-h4-r32", "lte-h4-r32-t1", "lte-h4-r32-t10")
WATCHED = {  # looked at while they are reported; looking changes nothing
    "full": ["method.uses=[effective_rank]", f"+method.gradient_every={LOOK}"],
    "lte-h4-r32-t10": ["method.uses=[lte,effective_rank,orthogonality]", f"+method.orthogonality_every={LOOK}"],
}

UPDATES = Job(
    "updates", [], {"width": WIDTH, "heads": [[1, 32], [4, 8], [4, 32], [16, 32], [64, 32], [1, 128]], "steps": [1, 10]},
    "experiments.lte_vit.updates.cosines",
)  # fmt: skip


def job(point: str, lr: float, seed: int = 0) -> Job:
    """One run."""
    method, _ = POINTS[point]
    net = point.split("-")[0]
    task = tasks.images(batch=BATCH)
    if net.startswith(("vit", "mixer")):
        make = tasks.images if net.startswith("vit") else tasks.mixer
        task = make(int(net.removeprefix("vit").removeprefix("mixer")), BATCH)
    look = WATCHED.get(point, []) if seed else []
    return Job(
        f"{point}-lr{lr:g}-seed{seed}",
        [*task, *tasks.length(EPOCHS, STEPS), *method, *look, f"optim.lr={lr}", f"seed={seed}"],
        {"point": point, "seed": seed, "lr": lr},
    )  # fmt: skip


def final(where: Path) -> dict[tuple[str, int], Job]:
    """The reported runs by (point, seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    return reported(SIDES, job, SEEDS, where, HEADLINE)


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another."""
    yield [UPDATES], 1
    for jobs in rounds(SIDES, job, where):
        yield jobs, 2
    yield [*final(where).values()], 2


if __name__ == "__main__":
    from experiments.lte_vit.table import write

    main(__doc__, __file__, stages, write)
