"""GaLore's memory on LLaMA 1B and ViT-B/L beside AdamW's, and whether its rank matters.

    make study NAME=cs744_galore                        or  python -m experiments.cs744_galore.study
    python -m experiments.cs744_galore.study --table    only tables and figures, from the runs there are

Memory, no data needed: LLaMA 1B, ViT-B and ViT-L as shapes (a real step on the meta device); the shapes' truth checked live,
a process each, on a LLaMA cut to fit and on ViT-B at batch 1. Ranks: a LLaMA of two layers, width 128, on the embedded King
James text, 300 steps of 8 × 64 tokens; every point tries three learning rates on seed 0 (more where the best is at an edge;
validation half) and reports seeds 1-3 on the test half.
"""

from collections.abc import Iterator
from pathlib import Path

from experiments import tasks
from experiments.command import main
from experiments.rates import reported, rounds
from experiments.runs import Job

EPOCHS, STEPS = 2, 150
SEEDS = (1, 2, 3)
TASK = [*tasks.llama(), *tasks.length(EPOCHS, STEPS)]
HERE = "experiments.cs744_galore.memory"


def galore(rank: int, scale: float = 0.25) -> list[str]:
    """Projection to so many dimensions, a basis for 50 steps."""
    return ["method=galore", f"method.rank={rank}", "method.update_proj_gap=50", f"method.scale={scale}"]


# point -> what it adds, middle learning rate; width 128, so rank 64 is the report's 1024 of 2048
POINTS = {
    "adamw": (["method=full"], 3e-3),
    **{f"galore-r{rank}": (galore(rank), 2e-2) for rank in (8, 16, 32, 64, 128)},
    "galore-r64-scale1": (galore(64, 1.0), 5e-3),  # one rate for all weights, as AdamW has it
}
SIDES = [(name, middle) for name, (_, middle) in POINTS.items()]
SHAPES = [
    Job(f"shapes-{network}-{dtype}-r{rank}", [], {"network": network, "dtype": dtype, "rank": rank}, f"{HERE}.shapes")
    for network, dtype, ranks in (
        ("llama1b", "bfloat16", (0, 128, 256, 512, 1024)), ("llama1b", "float32", (0, 1024)),
        ("vit_base", "float32", (0, 64, 256, 512)), ("vit_large", "float32", (0, 64, 256, 512)),
    )
    for rank in ranks
]  # fmt: skip
INPUT = {"batch": 1, "steps": 2, "tokens": 128}
LIVE = [
    Job(f"live-{network}-r{rank}", [], {"network": network, "rank": rank, **INPUT}, f"{HERE}.live")
    for network, ranks in (("llama_cut", (0, 64, 128, 256, 512)), ("vit_base", (0, 64, 256)))
    for rank in ranks
]  # fmt: skip


def job(point: str, lr: float, seed: int = 0) -> Job:
    """One training run."""
    return Job(
        f"{point}-lr{lr:g}-seed{seed}", [*TASK, *POINTS[point][0], f"optim.lr={lr}", f"seed={seed}"],
        {"point": point, "seed": seed, "lr": lr},
    )  # fmt: skip


def final(where: Path) -> dict[tuple[str, int], Job]:
    """The reported runs by (point, seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    return reported(SIDES, job, SEEDS, where)


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another."""
    yield [*SHAPES, *LIVE], 1
    for jobs in rounds(SIDES, job, where):
        yield jobs, 2
    yield [*final(where).values()], 2


if __name__ == "__main__":
    from experiments.cs744_galore.table import write

    main(__doc__, __file__, stages, write)
