"""Learning rates, tried equally for every side of a comparison: on seed 0, by the validation half.

Half, once and twice the side's middle rate; while the best is at an edge, one more beyond it, up to five in all. Where a side
has two rates, first that of the matrices is tried, then that of the rest (embedding, head, norms) over it, each in this way.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import Job, done
from experiments.tables import Missing

FACTORS, MOST = (0.5, 1.0, 2.0), 5
Make = Callable[[Any, float], Job]  # side, rate -> the run of seed 0
MakeTwo = Callable[[Any, float, float], Job]  # side, the matrices' rate, the rest's over it -> the run of seed 0
Two = tuple[float, float]


def loss_of(found: dict[str, Any]) -> float:
    """The last validation loss; infinite for a run that diverged."""
    loss = math.inf if "diverged" in found else found["summary"]["final"]["val/loss"]
    return loss if loss == loss else math.inf


def tried(side: Any, middle: float, make: Make, where: Path) -> tuple[list[float], float | None]:
    """The rates that are to be tried as far as is known, and the best of them; None while a run is missing."""
    rates = [middle * factor for factor in FACTORS]
    while True:
        found = {rate: done(make(side, rate), where) for rate in rates}
        if any(one is None for one in found.values()):
            return rates, None
        best = min(rates, key=lambda rate: (loss_of(found[rate]), rate))
        if best not in (min(rates), max(rates)) or len(rates) >= MOST:
            return rates, best
        rates.append(best * 2 if best == max(rates) else best / 2)


def rounds(sides: Sequence[tuple[Any, float]], make: Make, where: Path) -> Iterator[list[Job]]:
    """Lists of runs to do until every side of (side, middle rate) has its rate.

    Raises:
        Missing: a run that was asked for is still not there, so it failed.
    """
    for _ in range(MOST - len(FACTORS) + 1):
        jobs = [make(side, rate) for side, middle in sides for rate in tried(side, middle, make, where)[0]]
        if all(done(job, where) for job in jobs):
            return
        yield jobs
        failed = [job.name for job in jobs if done(job, where) is None]
        if failed:
            raise Missing(f"no learning rate can be chosen without {', '.join(failed)}")


def chosen(side: Any, middle: float, make: Make, where: Path) -> float:
    """The side's rate.

    Raises:
        Missing: not all its rates have been tried.
    """
    rates, best = tried(side, middle, make, where)
    if best is None:
        raise Missing(f"not all learning rates have been tried: {', '.join(make(side, rate).name for rate in rates)}")
    return best


def rounds_of_two(sides: Sequence[tuple[Any, Two]], make: MakeTwo, where: Path) -> Iterator[list[Job]]:
    """Lists of runs to do until every side of (side, middle rates) has both its rates.

    Raises:
        Missing: a run that was asked for is still not there, so it failed.
    """
    middle = dict(sides)
    yield from rounds([(side, lr) for side, (lr, _) in sides], lambda side, lr: make(side, lr, middle[side][1]), where)
    best = {side: chosen(side, lr, lambda one, rate: make(one, rate, middle[one][1]), where) for side, (lr, _) in sides}
    yield from rounds([(side, rest) for side, (_, rest) in sides], lambda side, rest: make(side, best[side], rest), where)


def chosen_two(side: Any, middle: Two, make: MakeTwo, where: Path) -> Two:
    """The side's rates: the matrices', and the rest's over it.

    Raises:
        Missing: not all its rates have been tried.
    """
    lr = chosen(side, middle[0], lambda one, rate: make(one, rate, middle[1]), where)
    return lr, chosen(side, middle[1], lambda one, rest: make(one, lr, rest), where)


def reported(
    sides: Sequence[tuple[Any, float]],
    make: Callable[..., Job],
    seeds: Sequence[int],
    where: Path,
    headline: Sequence[Any] = (),
) -> dict[tuple[Any, int], Job]:
    """The runs to report by (side, seed), each at its side's rate: all sides with the first seed, `headline` with all seeds.

    Without `headline` all sides have all seeds.

    Raises:
        Missing: a rate is not chosen yet.
    """
    best = {side: chosen(side, middle, make, where) for side, middle in sides}
    return {
        (side, seed): make(side, best[side], seed)
        for seed in seeds for side in best if seed == seeds[0] or not headline or side in headline
    }  # fmt: skip
