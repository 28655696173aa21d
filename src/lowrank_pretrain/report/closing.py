"""Print the end of a sweep: a row for each run with the best marked, means over seeds, and the command for its page."""

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowrank_pretrain.core.text import format_number, wide_enough
from lowrank_pretrain.report.collection import JUDGED_BY, best, by_seed
from lowrank_pretrain.report.runs import STATES, Run

WIDTH = 120  # characters, where stdout is no terminal
MOST = 30  # rows; the page has them all


def show(runs: list[Run], directory: Path, console: Console | None = None) -> None:
    """Print the table of a sweep.

    Args:
        runs: those in its directory, in the order of the jobs.
        directory: the sweep's.
        console: where to print; stdout by default.
    """
    console = console or wide_enough(Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))
    shown = [run for run in runs if run.state != "failed" or run.series]
    measured = [metric for metric in JUDGED_BY if any(run.last(metric) is not None for run in runs)][:5]
    if shown:
        table = Table("run", "state", *measured)
        for column in table.columns[2:]:
            column.justify = "right"
        finest = {metric: best([run.last(metric) for run in runs], metric) for metric in measured}
        for run in shown[:MOST]:
            table.add_row(escape(run.label), run.state, *(_measure(run.last(metric), finest[metric]) for metric in measured))
        for group in by_seed(runs):
            cells = [
                "-"
                if (mean := group.mean(metric)) is None
                else f"{format_number(mean)} ± {format_number(group.deviation(metric))}"
                for metric in measured
            ]
            table.add_row(escape(f"{group.label}, mean"), f"{len(group.runs)} seeds", *cells)
        console.print(table)
    if len(shown) > MOST:
        console.print(f"{len(shown) - MOST} more runs are on the page")
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{len(runs)} runs: {words}; * is the best of a column", soft_wrap=True, markup=False)
    for run in runs:
        if run.state in ("failed", "damaged"):
            console.print(f"{run.label}: {run.reason}", soft_wrap=True, markup=False)
    command = f"python -m lowrank_pretrain.report {os.path.relpath(directory)}"
    console.print(f"all of them on one page: {command}", soft_wrap=True, markup=False)


def _measure(value: float | None, finest: float | None) -> str:
    if value is None:
        return "-"
    return f"{format_number(value)} *" if value == finest else format_number(value)
