"""Run directories as they lie there: finished, stopped, failed or still running. Nothing of torch is needed to read them."""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ..errors import ConfigError

MARKS = ("metrics.csv", "summary.json", "failure.txt", ".hydra/config.yaml")  # any of these: a run directory
Series = list[tuple[float, float]]


@dataclass
class Run:
    """One run directory.

    Attributes:
        path: the directory.
        label: what tells it from the others on the page.
        overrides: the command line's, e.g. ``["seed=1"]``.
        config: as composed; {} where ``.hydra`` is gone.
        summary: contents of summary.json; {} where the run has not finished.
        failure: why it ended, in one line; None where nothing went wrong that it could tell.
        series: {metric: [(optimizer steps taken, value), …]}; values that are no finite number are left out.
    """

    path: Path
    label: str = ""
    overrides: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    series: dict[str, Series] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """``finished``, ``failed`` or ``unfinished``."""
        return "failed" if self.failure else "finished" if self.summary else "unfinished"

    @property
    def reason(self) -> str:
        """Why there is no end to show; empty where there is one."""
        if self.failure:
            return self.failure
        if self.summary:
            return ""
        last = max((points[-1][0] for points in self.series.values() if points), default=0)
        where = f"after step {last:.0f}" if last else "before its first logged step"
        return f"no summary.json and no reason: still running, or killed {where}"

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The phases of summary.json."""
        return self.summary.get("phases", [])

    def last(self, metric: str) -> float | None:
        """The last value of `metric`."""
        points = self.series.get(metric)
        return points[-1][1] if points else None

    def group(self, prefix: str) -> dict[str, Series]:
        """{what follows `prefix`/: points} of the metrics that begin so."""
        return {key[len(prefix) + 1 :]: points for key, points in self.series.items() if key.startswith(f"{prefix}/")}

    def by_time(self, metric: str) -> Series:
        """`metric` over seconds of training instead of steps; [] where no time is known.

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
    """The runs in `paths`, each a run directory or one that holds some (a multirun's), in the order of arguments and jobs.

    Raises:
        ConfigError: no such directory, or no run in it.
    """
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigError("RUN_DIR", str(path), "no such directory; give one that a run or a multirun wrote")
        if _is_run(path):
            directories = [path]
        else:
            candidates = {mark.parent.parent if mark.parent.name == ".hydra" else mark.parent for mark in _marks(path)}
            directories = sorted(candidates, key=lambda d: (_job_number(d), str(d)))
        if not directories:
            raise ConfigError("RUN_DIR", str(path), "holds no run: no metrics.csv, summary.json or .hydra in it or below")
        for directory in directories:
            found.setdefault(directory.resolve(), read_run(directory))
    runs = list(found.values())
    for run, label in zip(runs, _labels(runs), strict=True):
        run.label = label
    return runs


def read_run(directory: Path) -> Run:
    """One run directory, whatever of it is there.

    Raises:
        ConfigError: a file in it that cannot be read.
    """
    run = Run(directory)
    hydra, failure = directory / ".hydra", directory / "failure.txt"
    if (hydra / "config.yaml").is_file():
        run.config = OmegaConf.to_container(OmegaConf.load(hydra / "config.yaml"), resolve=False)
    if (hydra / "overrides.yaml").is_file():
        run.overrides = list(OmegaConf.load(hydra / "overrides.yaml"))
    if failure.is_file():
        run.failure = failure.read_text(errors="replace").strip() or "failed without a word"
    if (directory / "summary.json").is_file():
        try:
            run.summary = json.loads((directory / "summary.json").read_text())
        except ValueError as error:
            raise ConfigError("RUN_DIR", str(directory / "summary.json"), f"is damaged: {error}") from error
    if (directory / "metrics.csv").is_file():
        run.series = read_series(directory / "metrics.csv")
    return run


def read_series(path: Path) -> dict[str, Series]:
    """{column: [(optimizer steps taken, value), …]} of a metrics.csv, sorted by step; a row cut off at the end is left out."""
    series: dict[str, dict[float, float]] = {}
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]  # the process was killed while it wrote: half a number is another number
    for row in csv.DictReader(lines):
        if not (row.get("step") or "").isdigit():
            continue
        step = int(row["step"]) + 1.0  # rows count from 0, steps taken from 1
        for key, text in row.items():
            value = _number(text) if text and key not in ("step", "epoch", None) else None
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


def _job_number(directory: Path) -> int:
    """Hydra's number of the job; jobs without one come last."""
    file = directory / ".hydra" / "hydra.yaml"
    if not file.is_file():
        return 10**9
    number = OmegaConf.select(OmegaConf.load(file), "hydra.job.num", default=None)
    return number if isinstance(number, int) else 10**9


def _labels(runs: list[Run]) -> list[str]:
    """Per run the overrides that not all runs share, shortened; directory names where these do not tell runs apart."""
    hidden = ("hydra.", "hydra/", "ckpt_path", "experiment=", "sweep=")
    shared = set.intersection(*(set(run.overrides) for run in runs))
    own = [[o.lstrip("+") for o in run.overrides if o not in shared and not o.startswith(hidden)] for run in runs]
    short = [", ".join(_short(override) for override in overrides) for overrides in own]
    for some in (short, [", ".join(overrides) for overrides in own], [run.path.resolve().name for run in runs]):
        if all(some) and len(set(some)) == len(runs):
            return some
    return [str(run.path) for run in runs]


def _short(override: str) -> str:
    """``method.rank=4`` -> ``rank=4``, ``method=full`` -> ``full``."""
    key, _, value = override.partition("=")
    return value if key == "method" else f"{key.rsplit('.', 1)[-1]}={value}"
