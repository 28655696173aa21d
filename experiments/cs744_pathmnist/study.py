"""Fine-tuning by LoRA for PathMNIST: memory by rank for ViT-B and ViT-L; convergence against fine-tuning in full.

    make study NAME=cs744_pathmnist                        or  python -m experiments.cs744_pathmnist.study
    python -m experiments.cs744_pathmnist.study --table    only tables and figures, from the runs there are

Memory: two steps at 224 pixels and batch 1, a process each; no real images needed. Convergence: a ViT of two layers, width 128,
pre-trained on the embedded images (three seeds of fine-tuning start from the one network), then fine-tuned on made images in
PathMNIST's exact format (``made.py``): what it says of speed is about the method, not about tissue. Every side tries three
learning rates on seed 0 (more where the best is at an edge; validation split), reported: seeds 1-3, test split.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from experiments import tasks
from experiments.command import main
from experiments.rates import reported, rounds
from experiments.runs import Job

EPOCHS, STEPS, BATCH = 18, 20, 32
SEEDS, RANKS = (1, 2, 3), (2, 8, 32)
MEMORY_RANKS = (0, 4, 16, 64, 256)  # 0: in full
HERE = "experiments.cs744_pathmnist"
MEMORY = [
    Job(f"memory-{network}-r{rank}", [], {"network": network, "rank": rank, "batch": 1, "steps": 2}, f"{HERE}.memory.live")
    for network in ("vit_base", "vit_large") for rank in MEMORY_RANKS
]  # fmt: skip
MADE = Job("made", [], {"seed": 0}, f"{HERE}.made.write")
PRETRAIN = Job(
    "pretrain", [*tasks.images(batch=BATCH), *tasks.length(12, 40), "data.in_chans=3", "method=full", "optim.lr=2e-3", "seed=0"]
)  # fmt: skip
POINTS = {"full": (["method=full"], 1e-3), **{f"lora-r{r}": (["method=lora", f"method.rank={r}"], 4e-3) for r in RANKS}}
SIDES = [(name, middle) for name, (_, middle) in POINTS.items()]


def task(where: Path) -> list[str]:
    """Fine-tuning from the pre-trained network on the made file."""
    data = ["data=medmnist", f"data.root={where / MADE.name}", "data.size=28", "data.img_size=28", "data.num_workers=0"]
    images = [o for o in tasks.images(batch=BATCH) if not o.startswith("data._target_")]
    start = f"model.pretrained_file={where / PRETRAIN.name / 'export' / 'model.safetensors'}"
    return [*images, *data, start, *tasks.length(EPOCHS, STEPS)]


def job(where: Path, point: str, lr: float, seed: int = 0) -> Job:
    """One fine-tuning."""
    return Job(
        f"{point}-lr{lr:g}-seed{seed}", [*task(where), *POINTS[point][0], f"optim.lr={lr}", f"seed={seed}"],
        {"point": point, "seed": seed, "lr": lr},
    )  # fmt: skip


def final(where: Path) -> dict[tuple[str, int], Job]:
    """The reported runs by (point, seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    return reported(SIDES, partial(job, where), SEEDS, where)


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another."""
    yield MEMORY, 1
    yield [MADE, PRETRAIN], 2
    for jobs in rounds(SIDES, partial(job, where), where):
        yield jobs, 2
    yield [*final(where).values()], 2


if __name__ == "__main__":
    from experiments.cs744_pathmnist.table import write

    main(__doc__, __file__, stages, write)
