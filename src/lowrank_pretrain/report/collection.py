"""Collect the runs of one page: find them, name them by what differs, and put runs that differ by seed only together."""

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.metrics import METRICS
from lowrank_pretrain.report.runs import Run, read_run

# metrics that runs are compared by, the most informative first
JUDGED_BY = ("val/loss", "val/acc1", "val/ppl", "train/loss", "test/loss", "test/acc1", "test/ppl")
MODEST_LABEL, LONGEST_LABEL = 24, 40  # characters: one line on a phone, two on a desk
MARKS = ("metrics.csv", "summary.json", "failure.txt", ".hydra/config.yaml")  # any of these: a run directory


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


Quantity = Callable[[Run], float | None]


@dataclass(eq=False)
class Entry:
    """Hold what one row of a table and one line of a chart stand for: a run, or finished runs that differ by seed only.

    Attributes:
        label: short, different from those of other entries.
        runs: one; or two and more, with different seeds.
    """

    label: str
    runs: list[Run]

    def values(self, of: str | Quantity) -> list[float]:
        """Return a quantity of each run that has it; for a metric's name, its last values."""
        found = (run.last(of) if isinstance(of, str) else of(run) for run in self.runs)
        return [value for value in found if value is not None]

    def mean(self, of: str | Quantity) -> float | None:
        """Return the mean of a quantity over the runs; None if a run lacks it."""
        values = self.values(of)
        return statistics.fmean(values) if len(values) == len(self.runs) else None

    def deviation(self, of: str | Quantity) -> float:
        """Return the sample standard deviation of a quantity, to two digits."""
        return float(f"{statistics.stdev(self.values(of)):.2g}")


def entries(runs: list[Run]) -> list[Entry]:
    """Return the entries of a page, in the order of its runs: seeds that belong together become one."""
    groups = {id(run): group for group in by_seed(runs) for run in group.runs}
    found: dict[int, Entry] = {}
    for run in runs:
        entry = groups.get(id(run)) or Entry(run.label, [run])
        found[id(entry)] = entry
    alone = {entry.label for entry in found.values() if len(entry.runs) == 1}
    for entry in found.values():
        if len(entry.runs) > 1 and entry.label in alone:
            entry.label += ", mean"
    return list(found.values())


def by_seed(runs: list[Run]) -> list[Entry]:
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
    return [Entry(name or "all", group) for name, group in zip(names, found, strict=True)]


def _method(run: Run) -> list[str]:
    return [override for override in run.told if override.startswith("method=")]
