"""Multi-head LoRA on GPT-2: sequential against parallel heads; heads × rank × merge interval; which layers are replaced.

    make study NAME=cs744_gpt2                        or  python -m experiments.cs744_gpt2.study
    python -m experiments.cs744_gpt2.study --table    only tables and figures, from the runs there are

A GPT-2 of two layers, width 128, its head tied to the embedding, on the embedded King James text: 300 steps of 8 × 64 tokens.
Every point tries three learning rates on seed 0 (more where the best is at an edge; validation half) and reports on the test
half, sweeps with seed 1, the three kinds of layers and full training with seeds 1-3. Times: ``speed.py``, GPT-2 blocks of the
real width, every side once a round; parameters: counted at the real size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import tasks
from experiments.command import main
from experiments.rates import reported, rounds
from experiments.runs import Job

EPOCHS, STEPS = 2, 150
SEEDS = (1, 2, 3)
TASK = [*tasks.gpt2(), *tasks.length(EPOCHS, STEPS)]
FULL_LR, LTE_LR = 3e-3, 3e-3
LAYERS = (
    ("attention",), ("mlp",), ("head",), ("attention", "mlp"), ("attention", "head"), ("mlp", "head"),
    ("attention", "mlp", "head"),
)  # fmt: skip


class Point(NamedTuple):
    """Which layers have how many heads of which rank, merged every so many steps; no layers: full training."""

    layers: tuple[str, ...] = ("attention",)
    heads: int = 4
    rank: int = 8
    every: int = 10

    def __str__(self) -> str:
        return f"{'+'.join(self.layers)}-h{self.heads}-r{self.rank}-t{self.every}" if self.layers else "full"


FULL = Point(())
HEADS, RANKS, EVERY = (2, 4, 8), (1, 4, 16, 64), (10, 20, 30, 40)
HEADS_BY_RANK = [Point(heads=heads, rank=rank) for heads in HEADS for rank in RANKS]
INTERVALS = [Point(every=every) for every in EVERY]
REPLACED = [Point(layers) for layers in LAYERS]
POINTS = [*dict.fromkeys([FULL, *HEADS_BY_RANK, *INTERVALS, *REPLACED])]
SIDES = [(point, LTE_LR if point.layers else FULL_LR) for point in POINTS]
HEADLINE = (FULL, *REPLACED[:3])
SPEED = Job("speed", [], {"heads": 4, "ranks": [1, 4], "batch": 4, "tokens": 128, "rounds": 5},
            "experiments.cs744_gpt2.speed.measure")  # fmt: skip


def job(point: Point, lr: float, seed: int = 0) -> Job:
    """One run."""
    method = ["method=full"]
    if point.layers:
        method = ["method=lte", f"method.targets=[{','.join(point.layers)}]", f"method.heads={point.heads}",
                  f"method.rank={point.rank}", f"method.merge_every={point.every}"]  # fmt: skip
    return Job(
        f"{point}-lr{lr:g}-seed{seed}", [*TASK, *method, f"optim.lr={lr}", f"seed={seed}"],
        {"point": str(point), "seed": seed, "lr": lr},
    )  # fmt: skip


def final(where: Path) -> dict[tuple[Point, int], Job]:
    """The reported runs by (point, seed).

    Raises:
        Missing: a rate is not chosen yet.
    """
    return reported(SIDES, job, SEEDS, where, HEADLINE)


def stages(where: Path) -> Iterator[tuple[list[Job], int]]:
    """What to run, one stage after another."""
    yield [SPEED], 1
    for jobs in rounds(SIDES, job, where):
        yield jobs, 2
    yield [*final(where).values()], 2


if __name__ == "__main__":
    from experiments.cs744_gpt2.table import write

    main(__doc__, __file__, stages, write)
