"""Read run directories: finished, stopped, failed or still running."""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from omegaconf import OmegaConf

from lowrank_pretrain.core.checks import is_integer, is_number
from lowrank_pretrain.core.files import read_table, whole_step
from lowrank_pretrain.core.ownership import is_owned
from lowrank_pretrain.core.protocols import PHASES
from lowrank_pretrain.core.text import one_line

HIDDEN = ("hydra.", "hydra/", "ckpt_path", "experiment=", "sweep=")  # overrides that say nothing about a run
STATES = ("finished", "running", "failed", "damaged", "unfinished")
Series = list[tuple[float, float]]
# key of a phase in summary.json -> the metric that tells it while the run goes on, and which of its values
LOGGED: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("samples_per_sec", "throughput/samples_per_sec", statistics.median),
    ("peak_gib", "memory/peak_gib", max),
    ("optimizer_gib", "memory/optimizer_gib", max),
    ("trainable", "params/trainable", lambda values: values[-1]),
    ("adapters", "params/adapters", lambda values: values[-1]),
    ("total", "params/total", lambda values: values[-1]),
)


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
        owned: whether a process is writing into the directory.
        written: when ``metrics.csv`` was written to last; None if there is none.
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
    owned: bool = False
    written: datetime | None = None
    series: dict[str, Series] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """Return one of ``STATES``; ``unfinished`` is a run that no process on this machine writes, and that left no reason."""
        if self.failure:
            return "failed"
        if self.damage:
            return "damaged"
        if self.summary and not self._goes_on():
            return "finished"
        return "running" if self.owned else "unfinished"

    def _goes_on(self) -> bool:
        """Return whether a finished run was continued: it has rows after its summary's last step."""
        phases = self.summary.get("phases", [])
        return bool(phases) and self.last_step > sum(phase["steps"] for phase in phases) + 1

    @property
    def last_step(self) -> float:
        """Return the optimizer steps taken when the last row was logged; 0 before the first row."""
        return max((points[-1][0] for points in self.series.values() if points), default=0)

    @property
    def reason(self) -> str:
        """Return why the run did not finish; empty if it did."""
        if self.failure or self.damage:
            return self.failure or self.damage or ""
        if self.state == "finished":
            return ""
        if self.state == "running":
            return self._progress()
        where = f"after step {self.last_step:.0f}" if self.last_step else "before its first logged step"
        if self.summary:
            return f"goes on after its end: still running, or killed {where}"
        return f"no summary.json and no reason: still running, or killed {where}"

    def _progress(self) -> str:
        """Return how far a running run is: step, epoch, seconds of training, and when it logged its last row."""
        if not self.last_step:
            return "still running, before its first logged step"
        trainer: dict[str, Any] = self.config.get("trainer") or {}
        words = f"still running: step {self.last_step:,.0f}"
        most: Any = trainer.get("max_steps")
        if is_integer(most) and most > 0:
            words += f" of {most:,}"
        epoch, epochs = self.last("epoch"), cast(Any, trainer.get("max_epochs"))
        if epoch is not None and is_integer(epochs) and epochs > 0:
            words += f", epoch {epoch + 1:.0f} of {epochs}"
        if (seconds := self.last("time/train_seconds")) is not None:
            words += f", {seconds:,.1f} s of training"
        return words + (f", last row written at {self.written:%Y-%m-%d %H:%M:%S}" if self.written else "")

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
        """Return the phases of summary.json; of a run without one, or that was continued, what its rows tell so far."""
        if self.summary and not self._goes_on():
            return self.summary.get("phases", [])
        return phases_so_far(self.series) or self.summary.get("phases", [])

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
        return self.along(self.series.get("time/train_seconds") or self._times_of_phases(), metric)

    def along(self, known: Series, metric: str) -> Series:
        """Return a metric over another quantity than steps; [] if nothing is known of one of them.

        Args:
            known: [(optimizer steps taken, the quantity), …]. It is 0 before the first step, and grows evenly between two
                points and after the last.
            metric: the name of the metric.
        """
        points = self.series.get(metric, [])
        if not known or not points:
            return []
        steps, amounts = zip((0.0, 0.0), *known, strict=True)
        pace = amounts[-1] / steps[-1]
        return [
            (float(np.interp(step, steps, amounts)) if step <= steps[-1] else amounts[-1] + pace * (step - steps[-1]), value)
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


def read_run(directory: Path) -> Run:
    """Read a run directory; name a file that cannot be read in ``Run.damage``."""
    run = Run(directory, owned=is_owned(directory))
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
        run.written = datetime.fromtimestamp(file.stat().st_mtime)
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
        number = whole_step(row.get("step", ""))
        if number is None:
            continue
        step = number + 1.0  # rows count from 0, steps taken from 1
        for key, text in row.items():
            value = _number(text) if text and key != "step" else None
            if value is not None:
                series.setdefault(key, {})[step] = value
    return {key: sorted(points.items()) for key, points in series.items()}


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def phases_so_far(series: dict[str, Series]) -> list[dict[str, Any]]:
    """Return the phases of a run that has no summary yet, from its rows; [] if it has logged no phase or no time."""
    times = dict(series.get("time/train_seconds", []))
    logged = [(step, phase) for step, phase in series.get("lowrank/phase", []) if step in times]
    found, steps_before, seconds_before = [], 0.0, 0.0
    for number, name in enumerate(PHASES):
        rows = [step for step, phase in logged if phase == number]
        if not rows:
            continue
        last = rows[-1]
        phase = {"phase": name, "steps": int(last - steps_before), "seconds": times[last] - seconds_before}
        for key, metric, choose in LOGGED:
            if values := [value for step, value in series.get(metric, []) if rows[0] <= step <= last]:
                phase[key] = choose(values)
        found.append(phase)
        steps_before, seconds_before = last, times[last]
    return found
