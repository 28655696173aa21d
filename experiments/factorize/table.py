"""results.csv and the README's tables of ``factorize``."""

import statistics
from pathlib import Path
from typing import Any

from experiments.factorize.study import CELLS, SIDES, TASKS, WIDTHS, reported
from experiments.runs import Job
from experiments.tables import Missing, fill, machines, need, table, write_csv

COLUMNS = {"test_loss": 1, "test_acc1": 100, "parameters": 1e-3, "cpu_seconds": 1}  # and what each is multiplied by


def write(where: Path, here: Path) -> None:
    """Write all that stands next to this file, from the runs in `where`; what is not finished is named.

    Raises:
        Missing: no side is finished.
    """
    rows, results, waiting = [], [], []
    for task, width in CELLS:
        lacking = []
        for run in SIDES:
            try:
                jobs = reported(where, (task, width, run))
                found = need(jobs, where)
            except Missing:
                lacking.append(run)
                continue
            rows += [row(job, one) for job, one in zip(jobs, found, strict=True)]
            results += found
        if lacking:
            waiting.append(f"{task} at width {width}{'' if lacking == [*SIDES] else ' (' + '; '.join(lacking) + ')'}")
    if not rows:
        raise Missing(f"no side is finished: {', '.join(waiting)}")
    write_csv(here / "results.csv", rows)
    left = f"\n\nNot run yet: {', '.join(waiting)}." if waiting else ""
    fill(here / "README.md", "machine", machines(results, 1) + left)
    for task in TASKS:
        fill(here / "README.md", task, markdown(rows, task))


def row(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of results.csv."""
    summary = found["summary"]
    first, last = summary["phases"][0], summary["phases"][-1]
    ended = summary["final"]
    return {
        **job.facts, "test_loss": ended["test/loss"], "test_acc1": ended.get("test/acc1", ""), "cpu_seconds": found["cpu"],
        "speed_up_of_last_phase": last["samples_per_sec"] / first["samples_per_sec"], "parameters": last["total"],
        "optimizer_mib": found["optimizer_mib"], "switch_step": summary["switch_step"],
        "freeze_step": summary["freeze_step"],
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]], task: str) -> str:
    """Return the table of a task: mean of the seeds, and their standard deviation."""
    head = ["width", "run", "rates: matrices, rest over them, factors over theirs", "test loss", "accuracy, %",
            "parameters, thousands", "CPU s of the whole run"]  # fmt: skip
    lines = []
    for width in WIDTHS:
        mine = [one for one in rows if one["task"] == task and one["width"] == width]
        for run in dict.fromkeys(one["run"] for one in mine):
            group = [one for one in mine if one["run"] == run]
            cells = [_mean(group, key, factor) for key, factor in COLUMNS.items()]
            rates = ", ".join(f"{group[0][key]:g}" for key in ("lr", "rest", "ratio"))
            lines.append([width, run, rates, *cells])
    return table(head, lines)


def _mean(group: list[dict[str, Any]], key: str, factor: float) -> str:
    values = [float(one[key]) * factor for one in group if one[key] != ""]
    if not values:
        return ""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.4g}" + (f" ± {spread:.2g}" if spread else "")
