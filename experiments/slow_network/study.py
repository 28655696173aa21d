"""Merging now and then, on a slow network: what loss for how many bytes, and in what time?

    make study NAME=slow_network                       or  python -m experiments.slow_network.study
    python -m experiments.slow_network.study --only text ddp diloco_h30       some tasks and sides
    python -m experiments.slow_network.study --table                          run nothing

Four workers (real processes over gloo), 300 steps. DDP, DiLoCo (H = 10, 30, 100), LTE (T = 10, 30; with outer momentum), LTE x
GaLore, MuLoCo, PreLoRA -> LTE that merges from the first step. Every side searches one space (``sides.py``) by coordinate
descent with eight runs, on seed 0 by the dev split; reported are seeds 1-3 on the test split. Then the wires int8, int4 and
int2 for the best side of each family (in any case DiLoCo's H = 10 and 30, LTE's T = 10), with float32's settings and seeds.

What is done stays, so it goes on where it stopped. Tables and figure are made from the sides that are complete; the others are
named with the command that runs them.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.command import exit_code
from experiments.rates import loss_of
from experiments.runs import Job, done, run
from experiments.slow_network.sides import FIRST_LR, SIDES, TASKS, WORLD, Space, settings
from experiments.tables import Missing
from lowrank_pretrain.run.search import Descent, Point

SEEDS = (1, 2, 3)
CORE = ("ddp", "diloco_h10", "diloco_h30", "lte_t10")  # these come first
PUBLISHED = ("diloco_h10", "diloco_h30", "lte_t10")  # whose wires are tried in any case, at once


@dataclass
class Study:
    """What to run and where.

    Attributes:
        where: folder of the runs.
        tasks: by name.
        sides: by name; those that this installation cannot run are left out.
        space: the search space.
        seeds: that are reported.
    """

    where: Path
    tasks: Sequence[str] = tuple(TASKS)
    sides: Sequence[str] = tuple(SIDES)
    space: Space = field(default_factory=Space)
    seeds: Sequence[int] = SEEDS

    def __post_init__(self) -> None:
        self.sides = [side for side in self.sides if SIDES[side].there]

    def job(self, task: str, side: str, point: Point, seed: int = 0, wire: str = "float32") -> Job:
        """Return one run."""
        found = self.values(task, side, point)
        words = "-".join(f"{value:g}" for value in found.values())
        coded = "" if wire == "float32" else f"-{wire}"
        return Job(
            f"{task}-{side}-{words}{coded}-seed{seed}", [*settings(task, side, found, wire), f"seed={seed}"],
            {"task": task, "side": side, "wire": wire, "seed": seed, **found},
        )  # fmt: skip

    def values(self, task: str, side: str, point: Point) -> dict[str, float]:
        """Return the settings that a point means."""
        values = self.space.values(point, FIRST_LR[task] * SIDES[side].first)
        return values if "rest" in values else {**values, "rest": SIDES[side].rest}

    def loss(self, task: str, side: str, point: Point) -> float:
        """Return the dev loss of a point that has been run.

        Raises:
            Missing: it has not.
        """
        job = self.job(task, side, point)
        found = done(job, self.where)
        if found is None:
            raise Missing(f"{job.name} is not done")
        return loss_of(found)

    def descent(self, task: str, side: str) -> Descent:
        """Return a side's search, at its beginning."""
        spec = SIDES[side]
        start = self.space.start(spec)
        return Descent(self.space, start, spec.coordinates, lambda point: self.loss(task, side, point))

    def search(self, task: str, side: str) -> Iterator[list[Job]]:
        """Yield lists of runs until the side has its best point."""
        for points in self.descent(task, side).requests():
            yield [self.job(task, side, point) for point in points]

    def best(self, task: str, side: str) -> Descent:
        """Return a side's finished search.

        Raises:
            Missing: a run of it is not done.
        """
        descent = self.descent(task, side)
        for points in descent.requests():
            for point in points:
                self.loss(task, side, point)
        return descent

    def reported(self, task: str, side: str, wire: str = "float32") -> list[Job]:
        """Return the runs to report, one for each seed.

        Raises:
            Missing: the search is not finished.
        """
        point = self.best(task, side).point
        return [self.job(task, side, point, seed, wire) for seed in self.seeds]

    def wired(self, task: str) -> list[str]:
        """Return the sides whose wires are tried: the best of each family by dev loss, and those published.

        Raises:
            Missing: a search is not finished.
        """
        losses = {side: self.loss(task, side, self.best(task, side).point) for side in self.sides}
        families = {SIDES[side].family: [s for s in losses if SIDES[s].family == SIDES[side].family] for side in losses}
        best = {min(of, key=lambda side: losses[side]) for of in families.values()}
        return [side for side in self.sides if SIDES[side].wires and (side in best or side in PUBLISHED)]

    def stages(self) -> Iterator[list[Job]]:
        """Yield what to run, one list after another: for each task the core and its wires, then all else."""
        for task in self.tasks:
            for side in self.sides:
                if side in CORE:
                    yield from self._plain(task, side)
                if side in PUBLISHED:
                    yield from self._wires(task, [side])
            for side in self.sides:
                yield from self._plain(task, side)
            yield from self._wires(task, self.wired(task))

    def _plain(self, task: str, side: str) -> Iterator[list[Job]]:
        yield from self.search(task, side)
        yield self.reported(task, side)

    def _wires(self, task: str, sides: Sequence[str]) -> Iterator[list[Job]]:
        for side in sides:
            for wire in SIDES[side].wires:
                yield self.reported(task, side, wire)

    def left(self) -> int:
        """Return how many runs are still to do, at most."""
        count = 0
        for task in self.tasks:
            for side in self.sides:
                try:
                    count += self._undone(self.reported(task, side))
                except Missing:
                    searched = len(list(self.where.glob(f"{task}-{side}-*-seed0/found.json")))
                    count += max(1, self.space.budget - searched) + len(self.seeds)
            try:
                for side in self.wired(task):
                    count += sum(self._undone(self.reported(task, side, wire)) for wire in SIDES[side].wires)
            except Missing:
                most = {SIDES[side].family: len(SIDES[side].wires) for side in self.sides}
                count += len(self.seeds) * sum(most.values())
        return count

    def _undone(self, jobs: Sequence[Job]) -> int:
        return sum(done(job, self.where) is None for job in jobs)


def go(study: Study) -> None:
    """Do what is not done, one run at a time, each tried twice; say what is left.

    Raises:
        Missing: a run has failed twice.
    """
    seconds: list[float] = []
    for jobs in study.stages():
        for job in jobs:
            for _ in range(2):  # a busy machine may let a rendezvous time out
                if done(job, study.where) is None:
                    began = time.monotonic()
                    run([job], study.where, WORLD)
                    seconds.append(time.monotonic() - began)
                    left, typical = study.left(), sorted(seconds)[len(seconds) // 2]
                    print(f"at most {left} runs are left, about {left * typical / 60:.0f} minutes", flush=True)
            if done(job, study.where) is None:
                raise Missing(f"{job.name} has failed twice: see its rank0.log")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, then write its record; returns the exit code."""
    from experiments.slow_network.table import write

    parser = argparse.ArgumentParser(
        prog="python -m experiments.slow_network.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", default=[], choices=[*TASKS, *SIDES], help="tasks and sides to run")
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/slow_network"), help="where the runs are")
    args = parser.parse_args(argv)
    chosen_tasks = [task for task in TASKS if task in args.only] or list(TASKS)
    chosen_sides = [side for side in SIDES if side in args.only] or list(SIDES)

    def work() -> None:
        if not args.table:
            go(Study(args.runs.resolve(), chosen_tasks, chosen_sides))
        write(Study(args.runs.resolve()), Path(__file__).parent)

    return exit_code("slow_network", work)


if __name__ == "__main__":
    sys.exit(main())
