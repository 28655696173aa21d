"""LTE's observations, heads on GPT-2 and every composition, at width 384: who keeps full training's loss, at which price?

    python -m experiments.width384.study                        all parts; what is done stays, so it goes on where it stopped
    python -m experiments.width384.study --parts lte            one part: lte, gpt2, composition-images, composition-text
    python -m experiments.width384.study --parts lte --sides lte-h4-r96-t10 sequential-h4-r96     and full training
    python -m experiments.width384.study --quick                the same questions at pocket size: minutes
    python -m experiments.width384.study --table                only the record, from the runs there are

The data are made beforehand:

    python -m lowrank_pretrain.data.images.draw_glyphs --out runs/studies/width384/glyphs
    python -m lowrank_pretrain.data.corpus --out runs/studies/width384/corpus

A ViT of three blocks on glyphs of fonts (94 classes, 64 tokens, test fonts never seen) and a GPT-2 of three on documentation
and Python sources; 600 steps, bf16-mixed. Every side searches alike on seed 0, by the validation split: three learning rates,
then three rates of the rest (embedding, head, norms) over the matrices', then, where it has adapters next to weights, three of
theirs; more where the best is at an edge. Reported: the test split, seeds 1-3 for headlines, seed 1 for sweeps ("one seed").
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.command import exit_code, need_data
from experiments.rates import chosen, rounds
from experiments.runs import Job, done, run
from experiments.tables import Missing
from experiments.width384.sides import EPOCHS, PARTS, POCKET, STEPS, WIDTH, Part, task

SEEDS = (1, 2, 3)
MIDDLE = {"rest": 4.0, "adapters": 2.0}  # ratios to the matrices' rate
KNOBS = ("lr", "rest", "adapters")
Values = dict[str, float]


DATA = {  # task -> file in its folder, module that makes it
    "glyphs": ("glyphs.npz", "lowrank_pretrain.data.images.draw_glyphs"),
    "corpus": ("train.bin", "lowrank_pretrain.data.corpus"),
}


@dataclass(frozen=True)
class Study:
    """What to run and where.

    Attributes:
        where: folder of the runs, and of the two tasks' data.
        parts: by name.
        sides: by name; those of a part, and what it compares them with, are run.
        width: of the models.
        steps: of an epoch.
        epochs: of a run.
    """

    where: Path
    parts: Sequence[str] = tuple(PARTS)
    sides: Sequence[str] = ()
    width: int = WIDTH
    steps: int = STEPS
    epochs: int = EPOCHS

    def of(self, name: str) -> list[str]:
        """Return the sides of a part that are run."""
        every = list(PARTS[name].sides)
        return [side for side in every if not self.sides or side in self.sides or side == every[0]]

    def job(self, name: str, side: str, values: Values, seed: int = 0) -> Job:
        """Return one run."""
        part, chosen_side = PARTS[name], PARTS[name].sides[side]
        rates = [f"optim.lr={values['lr']:g}", f"optim.rest_lr={values['lr'] * values['rest']:g}"]
        rates += [f"method.adapter_lr={values['adapters']:g}"] if chosen_side.adapters else []
        ddp = ["++trainer.strategy=ddp"] if part.world > 1 and chosen_side.ddp else []
        looks = list(chosen_side.looks) if seed else []
        words = "-".join(f"{values[knob]:g}" for knob in self.knobs(name, side))
        return Job(
            f"{name}-{plain(side)}-{words}-seed{seed}",
            [*task(part, self.where, self.width, self.steps, self.epochs), *chosen_side.overrides, *looks, *ddp, *rates,
             f"seed={seed}"],
            {"part": name, "side": side, "seed": seed, **values},
        )  # fmt: skip

    def knobs(self, name: str, side: str) -> tuple[str, ...]:
        """Return what a side searches, in this order."""
        return KNOBS if PARTS[name].sides[side].adapters else KNOBS[:-1]

    def middle(self, name: str, side: str, knob: str) -> float:
        """Return the first value of a setting."""
        part = PARTS[name]
        return part.lr * part.sides[side].first if knob == "lr" else MIDDLE[knob]

    def values(self, name: str, side: str, known: Sequence[str]) -> Values:
        """Return a side's settings: those in ``known`` as its search has chosen them, the others their first values.

        Raises:
            Missing: a run of the search is not done.
        """
        found = {knob: self.middle(name, side, knob) for knob in self.knobs(name, side)}
        for knob in known:
            found[knob] = chosen(side, found[knob], self.varied(name, knob, dict(found)), self.where)
        return found

    def varied(self, name: str, knob: str, fixed: Values) -> Callable[[str, float], Job]:
        """Return what makes the run of a side for another value of one setting."""
        return lambda side, value: self.job(name, side, {**fixed, knob: value})

    def search(self, name: str, knob: str) -> Iterator[list[Job]]:
        """Yield lists of runs until every side has its best value of one setting, the ones before it chosen."""
        fixed = {}
        for side in self.of(name):
            knobs = self.knobs(name, side)
            if knob in knobs:
                fixed[side] = self.values(name, side, knobs[: knobs.index(knob)])
        sides = [(side, values[knob]) for side, values in fixed.items()]
        yield from rounds(sides, lambda side, value: self.job(name, side, {**fixed[side], knob: value}), self.where)

    def reported(self, name: str) -> dict[tuple[str, int], Job]:
        """Return the runs to report by (side, seed), of the sides whose search is done.

        Raises:
            Missing: no search is done.
        """
        jobs: dict[tuple[str, int], Job] = {}
        for side in self.of(name):
            try:
                values = self.values(name, side, self.knobs(name, side))
            except Missing:
                continue
            seeds = SEEDS if PARTS[name].sides[side].headline else SEEDS[:1]
            jobs |= {(side, seed): self.job(name, side, values, seed) for seed in seeds}
        if not jobs:
            raise Missing(f"no side of {name} has been searched yet")
        return jobs

    def go(self) -> None:
        """Run what is not done: part by part; in a part first every search, then the reported runs.

        Raises:
            Missing: a run failed that a choice needs.
        """
        for name in self.parts:
            part: Part = PARTS[name]
            together = 2 if part.world == 1 else 1  # two cores
            for knob in KNOBS:
                for jobs in self.search(name, knob):
                    run(jobs, self.where, part.world, together)
            run([*self.reported(name).values()], self.where, part.world, together)

    def lacking(self, name: str) -> list[str]:
        """Return a part's sides that are not reported, in its order."""
        try:
            jobs = self.reported(name)
        except Missing:
            return list(PARTS[name].sides)
        return [
            side for side in PARTS[name].sides
            if (side, SEEDS[0]) not in jobs or any(done(job, self.where) is None for (s, _), job in jobs.items() if s == side)
        ]  # fmt: skip


def plain(side: str) -> str:
    """Return a side's name for a folder."""
    return "".join(letter if letter.isalnum() or letter == "-" else "_" for letter in side)


def main() -> int:
    """Run the study, then write its record; returns the exit code."""
    from experiments.width384.table import write

    parser = argparse.ArgumentParser(
        prog="python -m experiments.width384.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sides = tuple(dict.fromkeys(side for part in PARTS.values() for side in part.sides))
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--quick", action="store_true", help="the pocket studies of the same questions")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--sides", nargs="+", choices=sides, default=[], metavar="SIDE", help=", ".join(sides))
    parser.add_argument("--runs", type=Path, default=Path("runs/studies/width384"), help="where the runs are")
    args = parser.parse_args()
    if args.quick:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        names = dict.fromkeys(POCKET[name] for name in args.parts)
        return max(subprocess.run([sys.executable, "-m", f"experiments.{name}.study"]).returncode for name in names)
    study = Study(args.runs.resolve(), tuple(args.parts), tuple(args.sides))

    def work() -> None:
        if not args.table:
            for name in dict.fromkeys(PARTS[part].task for part in args.parts):
                need_data(study.where / name, *DATA[name])
            study.go()
        write(Study(study.where), Path(__file__).parent)

    return exit_code("width384", work)


if __name__ == "__main__":
    sys.exit(main())
