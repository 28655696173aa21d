"""Do factored weights keep full training's quality, and what do they cost next to adapters, a narrower model, fewer steps?

    make study NAME=factorize                          or  python -m experiments.factorize.study
    python -m experiments.factorize.study --table      only tables, from the runs there are
    python -m experiments.factorize.study --cells text-128 --sides full "adapters r16" "factored 1/4"

Images (a ViT of two layers) and text (a LLaMA of two layers) at three widths; 20 epochs of 30 steps. Full training tries three
learning rates on seed 0, then three rates of embedding, head and norms over it (more where the best is at an edge), by the
validation half. Low-rank runs keep both, for they branch off a full run; what is theirs to try is the rate of their adapters
or factors over their weight's. A narrower dense model and one that is factored from the first steps try their own two rates.
Reported: seeds 1-3, test half; one run at a time, since time counts.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments import tasks
from experiments.command import main
from experiments.rates import Two, chosen, chosen_two, rounds, rounds_of_two
from experiments.runs import Job

EPOCHS, STEPS = 20, 30
SEEDS, WIDTHS = (1, 2, 3), (128, 192, 256)
TASKS = {"images": tasks.images, "text": tasks.llama}
MIDDLE = {"images": (1e-3, 4.0), "text": (2e-3, 10.0)}  # the matrices' rate, and the rest's over it
MIDDLE_RATIO = 2.0  # the adapters' or factors' over their weight's
PRELORA = ["method=prelora", "method.windows=2", "method.weight_tol=1e-9", "method.warmup=0", "method.rewarm=12"]
FACTORIZE = ["method=prelora_factorize", "method.windows=2", "method.weight_tol=1e-9", "method.rewarm=12"]


def at(share: float) -> list[str]:
    """Switch after this share of the run."""
    return [f"method.latest={max(1, round(share * EPOCHS))}"]


DENSE = {"full": 1.0, "full, 0.8 of the steps": 0.8}  # share of the epochs
OWN_RATES = {  # side -> overrides; the first steps are eight of measuring
    "narrow": ["method=full"],  # 5/8 of the width: the FLOPs of rank 1/4
    "factored from the start": [*FACTORIZE, "method.ranks=[0.25]", "method.window_unit=step", "method.latest=1"],
}
LOW_RANK = {
    "adapters r16": [*PRELORA, "method.ranks=[16]", *at(0.4)],
    "factored 1/2": [*FACTORIZE, "method.ranks=[0.5]", *at(0.4)],
    "factored 1/4": [*FACTORIZE, "method.ranks=[0.25]", *at(0.4)],
    "factored 1/8": [*FACTORIZE, "method.ranks=[0.125]", *at(0.4)],
    "factored, energy .99": [*FACTORIZE, "method.energy=0.99", *at(0.4)],
    "factored 1/4 at 20 %": [*FACTORIZE, "method.ranks=[0.25]", *at(0.2)],
    "factored 1/4 at 60 %": [*FACTORIZE, "method.ranks=[0.25]", *at(0.6)],
    "factored 1/4, PreLoRA's test": [*FACTORIZE, "method.ranks=[0.25]", "method.windows=3", "method.weight_tol=0.01",
                                     *at(0.8)],
}  # fmt: skip
Side = tuple[str, int, str]  # task, width, run
CELLS = tuple((task, width) for width in WIDTHS for task in TASKS)  # one is done whole before the next begins
NAMES = tuple(f"{task}-{width}" for task, width in CELLS)
SIDES = (*DENSE, *OWN_RATES, *LOW_RANK)


def job(side: Side, lr: float, rest: float, ratio: float = 1.0, seed: int = 0) -> Job:
    """Return one run of a side: the matrices' rate, the rest's over it, the factors' over their weight's."""
    task, width, run = side
    overrides = ["method=full"] if run in DENSE else OWN_RATES.get(run) or LOW_RANK[run]
    epochs = round(DENSE.get(run, 1.0) * EPOCHS)
    wide = width * 5 // 8 if run == "narrow" else width
    more = [f"method.adapter_lr={ratio:g}"] if "factored" in run or run in LOW_RANK else []
    name = "".join(letter if letter.isalnum() else "-" for letter in run)
    return Job(
        f"{task}-{width}-{name}-lr{lr:g}-r{rest:g}-a{ratio:g}-seed{seed}",
        [*TASKS[task](width=wide), *tasks.length(epochs, STEPS), *overrides, *more, f"optim.lr={lr:g}",
         f"optim.rest_lr={lr * rest:g}", f"seed={seed}"],
        {"task": task, "width": width, "run": run, "lr": lr, "rest": rest, "ratio": ratio, "seed": seed},
    )  # fmt: skip


def rates_of(where: Path, side: Side) -> Two:
    """Return the rates that a side has chosen: the matrices', and the rest's over it.

    Raises:
        Missing: it has not tried all.
    """
    return chosen_two(side, MIDDLE[side[0]], job, where)


def with_ratio(where: Path, seed: int = 0) -> Callable[[Side, float], Job]:
    """Return what makes a run at the rates of its full run, for another rate of adapters or factors."""

    def made(side: Side, ratio: float) -> Job:
        full = (side[0], side[1], "full")
        return job(side, *rates_of(where, full), ratio, seed)

    return made


def reported(where: Path, side: Side) -> list[Job]:
    """Return the runs of a side that are reported, one for each seed.

    Raises:
        Missing: its rates are not chosen yet.
    """
    if side[2] in OWN_RATES:
        return [job(side, *rates_of(where, side), seed=seed) for seed in SEEDS]
    # full training stopped early keeps full training's rates
    ratio = chosen(side, MIDDLE_RATIO, with_ratio(where), where) if side[2] in LOW_RANK else 1.0
    return [with_ratio(where, seed)(side, ratio) for seed in SEEDS]


def stages(where: Path, cells: Sequence[str] = NAMES, sides: Sequence[str] = SIDES) -> Iterator[tuple[list[Job], int]]:
    """Yield what to run, one stage after another; full training is always among the sides."""
    for task, width in CELLS:
        if f"{task}-{width}" not in cells:
            continue
        own = [(task, width, run) for run in ("full", *OWN_RATES) if run in ("full", *sides)]
        low_rank = [(task, width, run) for run in LOW_RANK if run in sides]
        for jobs in rounds_of_two([(side, MIDDLE[task]) for side in own], job, where):
            yield jobs, 2
        for jobs in rounds([(side, MIDDLE_RATIO) for side in low_rank], with_ratio(where), where):
            yield jobs, 2
        runs = {run: reported(where, (task, width, run)) for run in SIDES if run in ("full", *sides)}
        yield [runs[run][number] for number in range(len(SEEDS)) for run in runs], 1


if __name__ == "__main__":
    from experiments.factorize.table import write

    main(__doc__, __file__, stages, write, parts={"cells": NAMES, "sides": SIDES})
