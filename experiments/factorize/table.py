"""results.csv and the README's tables of ``factorize``."""

import statistics
from pathlib import Path
from typing import Any

from experiments.factorize.study import TASKS, WIDTHS, final
from experiments.runs import Job
from experiments.tables import fill, machines, need, write_csv

COLUMNS = ("test_loss", "test_acc1", "speed_up_of_last_phase", "parameters", "cpu_seconds")


def write(where: Path, here: Path) -> None:
    """Write all that stands next to this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    found = need(jobs, where)
    rows = [row(job, one) for job, one in zip(jobs, found, strict=True)]
    write_csv(here / "results.csv", rows)
    fill(here / "README.md", "machine", machines(found, 1))
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
    lines = ["| width | run | rate of factors | test loss | accuracy | speed-up of the last phase | parameters | CPU s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for width in WIDTHS:
        mine = [one for one in rows if one["task"] == task and one["width"] == width]
        for run in dict.fromkeys(one["run"] for one in mine):
            group = [one for one in mine if one["run"] == run]
            cells = [_mean(group, key) for key in COLUMNS]
            lines.append(f"| {width} | {run} | {group[0]['ratio']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(group: list[dict[str, Any]], key: str) -> str:
    values = [float(one[key]) for one in group if one[key] != ""]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"
