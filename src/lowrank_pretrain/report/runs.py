"""Read run directories: finished, stopped, failed or still running. Reading them needs no torch."""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from lowrank_pretrain.core.checks import is_number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import read_table
from lowrank_pretrain.core.metrics import METRICS
from lowrank_pretrain.core.text import one_line

# metrics that runs are compared by, the most informative first
JUDGED_BY = ("val/loss", "val/acc1", "val/ppl", "train/loss", "test/loss", "test/acc1", "test/ppl")
HIDDEN = ("hydra.", "hydra/", "ckpt_path", "experiment=", "sweep=")  # overrides that say nothing about a run
MODEST_LABEL, LONGEST_LABEL = 24, 40  # characters: one line on a phone, two on a desk
MARKS = ("metrics.csv", "summary.json", "failure.txt", ".hydra/config.yaml")  # any of these: a run directory
Series = list[tuple[float, float]]


@dataclass
class Run:
    """Hold what one run directory contains.

    Attributes:
        path: the directory.
        label: its name on the page, different from all others.
        overrides: the command line's, e.g. ``["seed=1"]``.
        config: as composed; {} where ``.hydra`` is gone.
        summary: contents of summary.json; {} where the run has not finished.
        failure: why it ended, in one line; None if it left no such line.
        damage: which of its files cannot be read, in one line; None if all can be read.
        job: its number in a sweep, from Hydra; None for a single run, whose directory has a name that somebody chose.
        series: {metric: [(optimizer steps taken, value), …]}; values that are NaN or infinite are left out.
    """

    path: Path
    label: str = ""
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    damage: str | None = None
    job: int | None = None
    series: dict[str, Series] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Return ``finished``, ``failed``, ``damaged`` or ``unfinished``."""
        if self.failure:
            return "failed"
        if self.damage:
            return "damaged"
        return "finished" if self.summary and not self._goes_on() else "unfinished"

    def _goes_on(self) -> bool:
        """Return whether a finished run was continued: it has rows after its summary's last step."""
        steps = sum(phase["steps"] for phase in self.phases)
        return bool(self.phases) and max((points[-1][0] for points in self.series.values()), default=0) > steps + 1

    @property
    def reason(self) -> str:
        """Return why the run did not finish; empty if it did."""
        if self.failure or self.damage:
            return self.failure or self.damage or ""
        if self.state == "finished":
            return ""
        last = max((points[-1][0] for points in self.series.values() if points), default=0)
        where = f"after step {last:.0f}" if last else "before its first logged step"
        if self.summary:
            return f"goes on after its end: still running, or killed {where}"
        return f"no summary.json and no reason: still running, or killed {where}"

    @property
    def name(self) -> str:
        """Return the directory's name."""
        return self.path.resolve().name

    @property
    def told(self) -> list[str]:
        """Return the overrides that describe the run, without ``+``."""
        return [override.removeprefix("++").removeprefix("+") for override in self.overrides if not override.startswith(HIDDEN)]

    @property
    def phases(self) -> list[dict[str, Any]]:
        """Return the phases of summary.json."""
        return self.summary.get("phases", [])

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric."""
        points = self.series.get(metric)
        return points[-1][1] if points else None

    def group(self, prefix: str) -> dict[str, Series]:
        """Return the points of all metrics ``prefix/NAME``, by NAME."""
        return {key[len(prefix) + 1 :]: points for key, points in self.series.items() if key.startswith(f"{prefix}/")}

    def by_time(self, metric: str) -> Series:
        """Return a metric over seconds of training instead of steps; [] if no time is known.

        Validation and checkpoints are not counted. Between two known times, steps count as equally long.
        """
        known = self.series.get("time/train_seconds") or self._times_of_phases()
        points = self.series.get(metric, [])
        if not known or not points:
            return []
        steps, seconds = zip((0.0, 0.0), *known, strict=True)
        pace = seconds[-1] / steps[-1]
        return [
            (float(np.interp(step, steps, seconds)) if step <= steps[-1] else seconds[-1] + pace * (step - steps[-1]), value)
            for step, value in points
        ]

    def _times_of_phases(self) -> Series:
        steps = seconds = 0.0
        known = []
        for phase in self.phases:
            steps, seconds = steps + phase["steps"], seconds + phase["seconds"]
            if phase["steps"]:
                known.append((steps, seconds))
        return known


def find_runs(paths: list[Path]) -> list[Run]:
    """Find the runs in `paths`, in the order of arguments and jobs.

    Args:
        paths: run directories, or directories that hold some (a multirun's).

    Raises:
        ConfigError: no such directory, or no run in it.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigError("RUN_DIR", str(path), "no such directory; give one that a run or a multirun wrote")
        if _is_run(path):
            here = [read_run(path)]
        else:
            candidates = {mark.parent.parent if mark.parent.name == ".hydra" else mark.parent for mark in _marks(path)}
            here = sorted(map(read_run, candidates), key=_job_number)
        if not here:
            raise ConfigError("RUN_DIR", str(path), "holds no run: no metrics.csv, summary.json or .hydra in it or below")
        for run in here:
            found.setdefault(run.path.resolve(), run)
    runs = list(found.values())
    if all(run.damage and not (run.series or run.summary or run.config) for run in runs):
        raise ConfigError("RUN_DIR", str(runs[0].path), runs[0].damage or "")
    for run, label in zip(runs, labels(runs), strict=True):
        run.label = label
    return runs


def read_run(directory: Path) -> Run:
    """Read a run directory; name a file that cannot be read in ``Run.damage``."""
    run = Run(directory)
    hydra, failure = directory / ".hydra", directory / "failure.txt"
    with _readable(run, hydra / "config.yaml") as file:
        run.config = _mapping(OmegaConf.to_container(OmegaConf.load(file), resolve=False))
    with _readable(run, hydra / "overrides.yaml") as file:
        run.overrides = [str(override) for override in OmegaConf.load(file)]
    with _readable(run, hydra / "hydra.yaml") as file:
        number = OmegaConf.select(OmegaConf.load(file), "hydra.job.num", default=None)
        run.job = number if isinstance(number, int) else None
    with _readable(run, failure) as file:
        run.failure = file.read_text(errors="replace").strip() or "failed without a word"
    with _readable(run, directory / "metrics.csv") as file:
        run.series = read_series(file)
    with _readable(run, directory / "summary.json") as file:
        run.summary = _summary(_mapping(json.loads(file.read_text())))
    return run


class _readable:  # noqa: N801
    """Read a file in a ``with`` block: skip it if missing, and note in ``Run.damage`` if it cannot be read."""

    def __init__(self, run: Run, file: Path) -> None:
        self.run, self.file = run, file

    def __enter__(self) -> Path:
        return self.file

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, FileNotFoundError):
            return True
        if isinstance(error, Exception):
            self.run.damage = self.run.damage or f"{self.file.name} is damaged: {one_line(error, 120)}"
            return True
        return False


def _mapping(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError("holds no keys")
    return found


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return a summary whose phases have a name, steps and seconds, and otherwise numbers only."""
    phases = []
    for phase in found.get("phases") or []:
        numbers = {key: value for key, value in _mapping(phase).items() if is_number(value)}
        phases.append(
            {**numbers, "phase": str(phase["phase"]), "steps": int(phase["steps"]), "seconds": float(phase["seconds"])}
        )
    steps = {f"{word}_step": found.get(f"{word}_step") for word in ("switch", "freeze")}
    for key, value in steps.items():
        if value is not None and not is_number(value):
            raise ValueError(f"{key} is no number")
    plan = found.get("plan")
    ranks = None if plan is None else {str(target): int(rank) for target, rank in _mapping(plan).items()}
    return {**found, **steps, "phases": phases, "plan": ranks}


def read_series(path: Path) -> dict[str, Series]:
    """Read a ``metrics.csv``: {column: [(optimizer steps taken, value), …]}, sorted by step."""
    series: dict[str, dict[float, float]] = {}
    for row in read_table(path, errors="replace")[1]:
        if not row.get("step", "").isdigit():
            continue
        step = int(row["step"]) + 1.0  # rows count from 0, steps taken from 1
        for key, text in row.items():
            value = _number(text) if text and key not in ("step", "epoch") else None
            if value is not None:
                series.setdefault(key, {})[step] = value
    return {key: sorted(points.items()) for key, points in series.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _is_run(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in MARKS)


def _marks(directory: Path) -> list[Path]:
    return [path for mark in MARKS for path in directory.rglob(mark)]


def _job_number(run: Run) -> tuple[int, str]:
    """Return a sorting key: Hydra's number of the job; runs without one come last, by name."""
    return 10**9 if run.job is None else run.job, str(run.path)


def labels(runs: list[Run], without: str = "hydra.") -> list[str]:
    """Return a short, unique name for each run.

    A job is named by the overrides that differ between runs, a single run by its directory.

    Args:
        runs: those on one page.
        without: overrides that begin with it are left out: ``seed=`` if a name stands for several seeds.
    """
    told = [[override for override in run.told if not override.startswith(without)] for run in runs]
    shared = set.intersection(*map(set, told)) if told else set()
    own = [[override for override in some if override not in shared] for some in told]
    values: dict[str, set[str]] = {}
    for override in {override for some in own for override in some}:
        values.setdefault(override.partition("=")[0], set()).add(override)
    # keys with several values distinguish runs; a key that some runs merely lack is used only where the others do not suffice
    differ = [", ".join(short_override(o) for o in some if len(values[o.partition("=")[0]]) > 1) for some in own]
    brief = [", ".join(map(short_override, some)) for some in own]
    if max(map(len, brief), default=0) > MODEST_LABEL and all(differ) and len(set(differ)) == len(runs):
        brief = differ
    names = [run.name for run in runs]
    # of a sweep: what differs; else the directory's name, which somebody chose
    first = [text if run.job is not None else name for run, text, name in zip(runs, brief, names, strict=True)]
    top = os.path.commonpath([run.path.resolve().parent for run in runs])
    below = [os.path.relpath(run.path.resolve(), top) for run in runs]
    for some in (first, below, brief, [", ".join(overrides) for overrides in own], names):
        if all(some) and len(set(some)) == len(runs) and max(map(len, some)) <= LONGEST_LABEL:
            return some
    cut = [_cut(text or name) for text, name in zip(first, names, strict=True)]
    if len(set(cut)) == len(runs):
        return cut
    return [f"{_cut(text or name, LONGEST_LABEL - 5)} #{i}" for i, (text, name) in enumerate(zip(first, names, strict=True), 1)]


def short_override(override: str) -> str:
    """Shorten an override for a label.

    Example:
        >>> short_override("method.rank=4"), short_override("method=full"), short_override("~model.config.x")
        ('rank=4', 'full', 'without x')
    """
    key, equals, value = override.partition("=")
    if key.startswith("~"):
        return f"without {key[1:].rsplit('.', 1)[-1]}"
    if not equals:
        return override
    return value if key == "method" else f"{key.rsplit('.', 1)[-1]}={_cut(value, 24)}"


def _cut(text: str, most: int = LONGEST_LABEL) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def best(values: Sequence[float | None], metric: str) -> float | None:
    """Return the best of several runs' values; None if all are equal, there is only one, or neither end of the scale is better.

    Example:
        >>> best([0.5, None, 0.7], "val/acc1"), best([0.5, 0.7], "val/loss"), best([0.5], "val/loss")
        (0.7, 0.5, None)
    """
    known = [value for value in values if value is not None]
    best_of = METRICS[metric].best if metric in METRICS else None
    return best_of(known) if best_of and len(set(known)) > 1 else None


@dataclass
class Seeds:
    """Hold finished runs that differ in their seed only.

    Attributes:
        label: short, different from those of other groups.
        runs: two or more, with different seeds.
    """

    label: str
    runs: list[Run]

    def values(self, metric: str) -> list[float]:
        """Return the last values of a metric."""
        return [value for run in self.runs if (value := run.last(metric)) is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric's last values; None if a run lacks one."""
        values = self.values(metric)
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    def deviation(self, metric: str) -> float:
        """Return the sample standard deviation of a metric's last values, to two digits."""
        return float(f"{statistics.stdev(self.values(metric)):.2g}")


def by_seed(runs: list[Run]) -> list[Seeds]:
    """Group finished runs that differ in their seed only, in order; a run without such a partner is in no group."""
    groups: dict[str, dict[Any, Run]] = {}
    for run in runs:
        if run.state != "finished":
            continue
        config = {key: value for key, value in run.config.items() if key not in ("seed", "ckpt_path", "logger")}
        told = sorted(override for override in run.told if not override.startswith(("seed=", "logger")))
        seed = run.config.get("seed", next((override for override in run.told if override.startswith("seed=")), None))
        groups.setdefault(json.dumps([config, told], sort_keys=True, default=str), {}).setdefault(seed, run)
    found = [list(group.values()) for group in groups.values() if len(group) > 1]
    # directories of several seeds have no name in common; what differs between groups has
    numbered = [dataclasses.replace(group[0], job=0) for group in found]
    names = (
        labels(numbered, without="seed=") if len(found) > 1 else [", ".join(map(short_override, _method(g[0]))) for g in found]
    )
    return [Seeds(name or "all", group) for name, group in zip(names, found, strict=True)]


def _method(run: Run) -> list[str]:
    return [override for override in run.told if override.startswith("method=")]
