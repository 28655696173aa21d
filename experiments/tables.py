"""What every study's table is made of: what runs found, spreads over seeds, CSV, and tables between a README's marks."""

import csv
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.runs import Job, done


class Missing(Exception):
    """Runs that a table needs are not there: it is not written."""


def need(jobs: Sequence[Job], where: Path) -> list[dict[str, Any]]:
    """What the runs found, in their order.

    Raises:
        Missing: one of them is not done, or diverged.
    """
    found = {job.name: done(job, where) for job in jobs}
    lacking = [name for name, one in found.items() if one is None]
    if lacking:
        raise Missing(f"{len(lacking)} of {len(found)} runs are not done: {', '.join(lacking[:5])}{' …' * (len(lacking) > 5)}")
    wild = [name for name, one in found.items() if "diverged" in one]
    if wild:
        raise Missing(f"diverged at the rate that seed 0 chose: {', '.join(wild)}")
    return [found[job.name] for job in jobs]


def series(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """(optimizer steps taken, value) of a column of the run's metrics.csv; [] where it has none."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]) + 1, float(row[key])) for row in csv.DictReader(file) if row.get(key)]


def keys(run_dir: Path, prefix: str) -> list[str]:
    """The columns of the run's metrics.csv that begin so."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return sorted(key for key in next(csv.reader(file)) if key.startswith(prefix))


def mean(values: Iterable[float]) -> float:
    """The mean."""
    return statistics.fmean(values)


def spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    """``mean ± standard deviation`` of several seeds, or the one value."""
    middle = form.format(statistics.fmean(values))
    return f"{middle} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else middle


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def fill(readme: Path, name: str, text: str) -> None:
    """Put `text` between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Raises:
        ValueError: the README has no such marks.
    """
    old = readme.read_text()
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{readme} has no place <!-- {name} -->")
    readme.write_text(pattern.sub(lambda found: f"{found[1]}{text.strip()}\n{found[2]}", old))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV, numbers to six digits; the columns are all that occur."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def write_curves(path: Path, where: Path, jobs: Iterable[Job], wanted: Sequence[str]) -> None:
    """The metrics that begin with one of `wanted`, of every run, in long form: run, metric, step, value."""
    rows = [
        {"run": job.name, "metric": key, "step": step, "value": value}
        for job in jobs
        for prefix in wanted
        for key in keys(where / job.name, prefix)
        for step, value in series(where / job.name, key)
    ]
    write_csv(path, rows)


def plain_row(job: Job, found: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training run goes into results.csv."""
    summary = found["summary"]
    last = summary["phases"][-1]
    row = {"name": job.name, **job.facts, **{k.replace("/", "_"): v for k, v in summary["final"].items() if "/acc5" not in k}}
    row |= {"cpu_seconds": found["cpu"], "wall_seconds": found["wall"], "load": found["load"]}
    row |= {"train_seconds": sum(phase["seconds"] for phase in summary["phases"])}
    row |= {"trainable_last_phase": last["trainable"], "total": last["total"], "optimizer_mib": found["optimizer_mib"]}
    return row | {"switch_step": summary["switch_step"], "freeze_step": summary["freeze_step"]}


def together(found: Iterable[Mapping[str, Any]]) -> int:
    """The most of these runs that shared their machine, as each has noted it; 1 for runs that have no note."""
    return max(one.get("together", 1) for one in found)


def machines(found: Iterable[Mapping[str, Any]], at_a_time: int) -> str:
    """The machine line: where, how many at a time, and how busy it was."""
    found = list(found)
    loads = sorted(one["load"] for one in found)
    where = "; ".join(sorted({one["machine"] for one in found}))
    minutes = sum(one["wall"] for one in found) / 60 / at_a_time
    return (
        f"{where}. {len(found)} reported runs, {at_a_time} at a time, about {minutes:.0f} minutes in all; the machine's load "
        f"at the end of a run was {loads[0]:.1f} to {loads[-1]:.1f}, median {statistics.median(loads):.1f}."
    )
