"""Which optimizer learns best when each is tuned alike: AdamW, Muon, the stateless, the 8-bit, GaLore and its modes?

    python -m experiments.optimizers                     everything; what is done stays, so it goes on where it stopped
    python -m experiments.optimizers --cells text1m-1tpp --sides adamw muon track
    python -m experiments.optimizers --quick             minutes: tiny models, three sides, six runs of search for each
    python -m experiments.optimizers --table             run nothing; tables and figure from the runs there are

The protocol, the same for every side. One space (``run/search.py``): rates of matrices and of the rest by factors, averages,
decay and warm-up from lists. Coordinate descent from one start, on seed 0 by the dev split, until no neighbour is better by
more than .001 or 60 runs are spent. Then test loss on five seeds that the search never saw, judged at the end of the schedule.

The rule of significance, stated beforehand: a side is better (worse) than another if the 95 % t-interval of the paired
differences of its test losses lies below (above) zero; a pair is one seed: same start, same batches. Else they are even.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from experiments.optimizers.sides import CELLS, QUICK, QUICK_SIDES, SIDES, Cell, settings, task
from experiments.rates import loss_of
from experiments.runs import Job, done, hold, run
from experiments.tables import Missing, together
from lowrank_pretrain.core.checks import choice, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.run.search import NAMES, Descent, Point, Space, from_file

SEEDS = (1, 2, 3, 4, 5)
LONG = 5_000  # steps from which on a run keeps checkpoints and goes on from them
MOST_STEPS = 4.0  # a side that is quicker than AdamW gets at most so many times its steps at equal seconds
ANCHOR = "adamw"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")


@dataclass
class Study:
    """What to run and where.

    Attributes:
        where: folder of the runs.
        cells: parts at their sizes and lengths, in order: a cell begins at the best of the last one of its part.
        sides: by name.
        space: the search space.
        seeds: that are reported.
        corpus: folder of the corpus; None: the embedded text.
        device: ``cpu`` or ``cuda``.
        precision: Lightning's.
        images: training images of a pass.
        together: runs at a time of a search.
        timed: equal seconds are compared; reported runs on a GPU then go one at a time.
        coordinates: that searches may go along, of those of each cell; the others keep their first values.
        budgets: by cell, most runs of a side's search there; the space's where none is given.
    """

    where: Path
    cells: Sequence[Cell] = CELLS
    sides: Sequence[str] = tuple(SIDES)
    space: Space = field(default_factory=Space)
    seeds: Sequence[int] = SEEDS
    corpus: Path | None = None
    device: str = "cpu"
    precision: str = "bf16-mixed"
    images: int = 60_000
    together: int = 2
    timed: bool = True
    coordinates: Sequence[str] = NAMES
    budgets: Mapping[str, int] = field(default_factory=dict)

    def budget(self, cell: Cell) -> int:
        """Return the most runs that each side's search may take on a cell."""
        return self.budgets.get(cell.name, self.space.budget)

    def origin(self, side: str, cell: Cell) -> tuple[Point, dict[str, float]]:
        """Return the first point of a part's first cell, and the rates that the scale is counted from."""
        rate, rest = cell.rates
        return self.space.start(rate * SIDES[side][1], rest)

    def job(self, side: str, cell: Cell, point: Point, seed: int = 0, steps: int | None = None) -> Job:
        """Return one run; ``steps`` other than the cell's for a comparison at equal seconds."""
        values = self.space.values(point, self.origin(side, cell)[1])
        length = cell.steps(self.images) if steps is None else steps
        words = "-".join(f"{values[name]:g}" for name in values)
        extra = "" if steps is None else f"-steps{steps}"
        long = ["++save_every=1000", "ckpt_path=last"] if length >= LONG else []
        common = [
            word for word in task(cell, length, self.corpus, self.device, self.precision) if not long or "save_" not in word
        ]
        return Job(
            f"{cell.name}-{side}-{words}-seed{seed}{extra}",
            [*common, *long, *settings(side, cell, values), f"seed={seed}"],
            {"cell": cell.name, "side": side, "seed": seed, "steps": length, **values},
        )

    def loss(self, side: str, cell: Cell, point: Point) -> float:
        """Return the dev loss of a point that has been run.

        Raises:
            Missing: it has not.
        """
        job = self.job(side, cell, point)
        found = done(job, self.where)
        if found is None:
            raise Missing(f"the search of {side} on {cell.name} cannot go on without {job.name}")
        return loss_of(found)

    def descent(self, side: str, cell: Cell, point: Point) -> Descent:
        """Return a side's search on a cell, from a point on."""
        space = replace(self.space, budget=self.budget(cell))
        along = tuple(name for name in cell.coordinates if name in self.coordinates)
        return Descent(space, point, along, lambda where: self.loss(side, cell, where))

    def search(self, cell: Cell, starts: dict[str, Point]) -> Iterator[list[Job]]:
        """Yield lists of runs until every side has its best point on this cell; sides go forward together."""
        going = {side: self.descent(side, cell, starts[side]).requests() for side in self.sides}
        while going:
            wanted: dict[str, list[Point]] = {}
            for side, requests in list(going.items()):
                points = next(requests, None)
                while points is not None and all(done(self.job(side, cell, p), self.where) for p in points):
                    points = next(requests, None)
                if points is None:
                    del going[side]
                else:
                    wanted[side] = points
            jobs = [self.job(side, cell, point) for side, points in wanted.items() for point in points]
            if jobs:
                yield jobs

    def best(self, side: str, cell: Cell) -> Descent:
        """Return the finished search of a side on a cell.

        Raises:
            Missing: a run of it is not done.
        """
        descent = self.descent(side, cell, self.start_of(side, cell))
        for points in descent.requests():
            for point in points:
                self.loss(side, cell, point)
        return descent

    def start_of(self, side: str, cell: Cell) -> Point:
        """Return where a side's search on a cell begins: at the best of the last cell before it that is not larger."""
        before = [
            other for other in self.cells[: list(self.cells).index(cell)] if other.part == cell.part and other.size <= cell.size
        ]
        return self.best(side, before[-1]).point if before else self.origin(side, cell)[0]

    def reported(self, cell: Cell) -> dict[tuple[str, int], Job]:
        """Return the runs to report by (side, seed)."""
        points = {side: self.best(side, cell).point for side in self.sides}
        return {(side, seed): self.job(side, cell, points[side], seed) for seed in self.seeds for side in self.sides}

    def equal_seconds(self, cell: Cell) -> dict[tuple[str, int], Job]:
        """Return runs of as many steps as fit into AdamW's training time, each with a whole schedule.

        A side's speed is the median of its reported runs' seconds per step, on the same machine: CPU time of the process,
        or the clock's on a GPU.

        Raises:
            Missing: a reported run is not done.
        """
        if ANCHOR not in self.sides:
            return {}
        jobs = self.reported(cell)
        seconds: dict[str, list[float]] = {}
        for (side, _), job in jobs.items():
            found = done(job, self.where)
            if found is None or "diverged" in found:
                raise Missing(f"{job.name} is not done, or diverged")
            if self.device != "cpu" and together([found]) > 1:
                raise Missing(f"{job.name} shared its machine: its seconds say nothing")
            seconds.setdefault(side, []).append(seconds_of(found, self.device))
        middle = {side: sorted(some)[len(some) // 2] for side, some in seconds.items()}
        full, result = cell.steps(self.images), {}
        for side in self.sides:
            share = min(middle[ANCHOR] / middle[side], MOST_STEPS)
            steps = max(1, round(full * share, -1 if full > 100 else 0).__int__())  # tens: the same after a repeated timing
            point = self.best(side, cell).point
            for seed in self.seeds if side != ANCHOR else ():
                result[side, seed] = self.job(side, cell, point, seed, steps)
        return result

    def stages(self) -> Iterator[tuple[list[Job], int]]:
        """Yield what to run, one stage after another; runs that a clock times go one at a time."""
        for cell in self.cells:
            for jobs in self.search(cell, {side: self.start_of(side, cell) for side in self.sides}):
                yield jobs, self.together
            yield [*self.reported(cell).values()], 1 if self.timed and self.device != "cpu" else self.together
            if self.timed:
                yield [*self.equal_seconds(cell).values()], self.together


def seconds_of(found: dict, device: str) -> float:
    """Return the seconds that a run has trained, without validation; on a CPU of its process, whoever shares the machine."""
    if device == "cpu":
        return found["train_cpu"]
    return sum(phase["seconds"] for phase in found["summary"]["phases"])


def choose(names: Sequence[str] | None, known: dict[str, object], key: str) -> list[str]:
    """Return the names asked for, all where none are.

    Raises:
        SystemExit: an unknown one, in one line.
    """
    for name in names or ():
        if name not in known:
            raise SystemExit(f"{key}={name!r}: must be some of {', '.join(known)}")
    return [name for name in known if not names or name in names]


def read_space(path: Path) -> Space:
    """Return the search space in a file.

    Raises:
        ConfigError: it cannot be read, or a value of it is wrong.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("space", str(path), f"must be a JSON file: {str(error).splitlines()[0]}") from None
    return from_file(values)


def from_arguments(argv: Sequence[str] | None = None) -> tuple[Study, argparse.Namespace]:
    """Return the study that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.optimizers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, three sides, two seeds")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--cells", nargs="+", help="parts at their sizes and lengths, e.g. text1m-1tpp")
    parser.add_argument("--sides", nargs="+")
    parser.add_argument("--space", type=Path, help="a search space of one's own, JSON (lowrank_pretrain/run/search.py)")
    parser.add_argument("--coordinates", nargs="+", help=f"what searches may go along: {', '.join(NAMES)}; default all")
    parser.add_argument("--budget", nargs="+", default=[], help="most runs of a side's search on a cell: CELL=RUNS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--together", type=int, default=2, help="runs at a time of a search")
    parser.add_argument("--untimed", action="store_true", help="reported runs together too; no comparison at equal seconds")
    parser.add_argument("--runs", type=Path, help="where the runs are; default runs/studies/optimizers")
    args = parser.parse_args(argv)
    where = (args.runs or Path("runs/studies") / ("optimizers_quick" if args.quick else "optimizers")).resolve()
    cells = {cell.name: cell for cell in (QUICK if args.quick else CELLS)}
    chosen = [cells[name] for name in choose(args.cells, dict(cells), "cells")]
    sides = choose(args.sides or (QUICK_SIDES if args.quick else None), dict(SIDES), "sides")
    if not args.sides and "galore_torch" in sides and find_spec("galore_torch") is None:
        print("without the side galore_torch: pip install galore-torch", flush=True)
        sides.remove("galore_torch")
    space = read_space(args.space) if args.space else Space(budget=6) if args.quick else Space()
    budgets = {}
    for word in args.budget:
        cell, _, runs = word.partition("=")
        budgets[choose([cell], dict(cells), "budget")[0]] = whole("budget", int(runs) if runs.isdigit() else runs, 1, "runs")
    whole("together", args.together, 1, "runs")
    choice("precision", args.precision, PRECISIONS)
    from experiments.optimizers.sides import pictures

    study = Study(
        where, chosen, sides, space, SEEDS[:2] if args.quick else SEEDS, None if args.quick else where / "corpus", args.device,
        args.precision, 12_000 if pictures() == "sample" else 60_000, args.together, not args.untimed,
        choose(args.coordinates, dict.fromkeys(NAMES), "coordinates"), budgets,
    )  # fmt: skip
    return study, args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, then write its record; returns the exit code, 2 for a wrong value."""
    from experiments.optimizers.table import write

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = Path(__file__).parent
    try:
        study, args = from_arguments(argv)
        if not args.table:
            make_folder(study.where)
            hold(study.where)
            make_corpus_once(study)
            for jobs, at_a_time in study.stages():
                run(jobs, study.where, 1, at_a_time)
        write(study, study.where if args.quick else here)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except Missing as error:
        print(f"optimizers: {error}", file=sys.stderr)
        return 1
    return 0


def make_folder(where: Path) -> None:
    """Make the runs' folder.

    Raises:
        ConfigError: there is a file of that name, or the disk cannot be written to.
    """
    try:
        where.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("runs", str(where), f"must be a folder that can be written to ({error.strerror})") from None


def make_corpus_once(study: Study) -> None:
    """Make the corpus where a text cell needs it and it is not there.

    Raises:
        ConfigError: this installation has too few sources.
    """
    if study.corpus is None or (study.corpus / "SHA256SUMS").is_file() or all(cell.part != "text" for cell in study.cells):
        return
    from lowrank_pretrain.data.corpus import make_corpus

    print(f"making a corpus of what is installed under {study.corpus}", flush=True)
    make_corpus(study.corpus)
