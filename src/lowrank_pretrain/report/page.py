"""The page itself: HTML and its style sheet, with everything inside and no script."""

import json
import os
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from .runs import Run, find_runs
from .sections import Chart, of_one, over_steps, side_by_side
from .tables import phases_table, runs_table


def write_report(paths: list[Path], out: Path | None = None) -> Path:
    """Write one page about the runs in `paths`.

    Args:
        paths: run directories, or directories that hold some (a multirun's).
        out: the file; None: ``report.html`` in the directory, or in the present one if there are several.

    Returns:
        The file.

    Raises:
        ConfigError: no such directory, no run in it, or a damaged summary.json.
    """
    runs = find_runs(paths)
    out = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.part")
    beside.write_text(render(runs, title(paths, runs)), encoding="utf-8")
    os.replace(beside, out)
    return out


def title(paths: list[Path], runs: list[Run]) -> str:
    """The directory's name, or how many runs there are."""
    return paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"


def render(runs: list[Run], title: str) -> str:
    """The page as HTML text."""
    several = len(runs) > 1
    unwell = [run for run in runs if run.state != "finished"]
    parts = [f"<h1>{escape(title)}</h1>", intro(runs)]
    if unwell:
        items = "".join(f"<li><b>{escape(run.label)}</b> · {escape(run.reason)}</li>" for run in unwell)
        parts.append(f'<section class="unwell"><h2>Failed or unfinished</h2><ul>{items}</ul></section>')
    parts.append(f"<section><h2>{'Runs, with ratios to the first' if several else 'The run'}</h2>{runs_table(runs)}</section>")
    charts = list(side_by_side(runs))
    if charts:
        parts.append(f"<section><h2>{'Side by side' if several else 'Curves and phases'}</h2>{grid(charts)}</section>")
    parts += [one(run, several) for run in runs if run.config or run.series or run.phases]
    return page(title, "\n".join(parts) + f"\n{NOTES}")


def page(title: str, body: str) -> str:
    """A whole HTML page around `body`, with the style sheet inside."""
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n{body}</main></body></html>\n"
    )


NOTES = (
    "<footer><p>Steps are optimizer steps. Times are those of training: validation, checkpoints and the switch itself are not "
    "counted. Rates come from the median step of a phase, so that its first steps do not matter. On a CPU, peak memory is the "
    "whole process's. Training losses of long runs are means over stretches of equal length.</p></footer>"
)


def intro(runs: list[Run]) -> str:
    """How many runs, and how they ended."""
    counts = {state: sum(run.state == state for run in runs) for state in ("finished", "failed", "unfinished")}
    if len(runs) == 1:
        return f"<p>{command(runs[0])}</p>"
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"<p>{len(runs)} runs: {words}.</p>"


def command(run: Run) -> str:
    """The command line that the run was started with, as far as ``.hydra`` tells."""
    words = " ".join(["python -m lowrank_pretrain", *run.overrides])
    return f"<code>{escape(words)}</code>"


def one(run: Run, several: bool) -> str:
    """What concerns one run; folded where there are several."""
    charts = [*of_one(run, several), *([] if several else over_steps([run]))]
    parts = []
    if several:
        parts.append(f"<p>{command(run)}</p>")
    if run.phases:
        parts.append(phases_table(run))
    events = [f"{word} after step {step:,}" for word in ("switch", "freeze") if (step := run.summary.get(f"{word}_step"))]
    if events:
        parts.append(f"<p>{escape('; '.join(events)).capitalize()}.</p>")
    parts.append(grid(charts))
    if run.config:
        parts.append(
            f"<details><summary>Configuration</summary><pre>{escape(json.dumps(run.config, indent=1))}</pre></details>"
        )
    inside = "".join(parts)
    if not several:
        return f"<section><h2>Phases, ranks, norms</h2>{inside}</section>"
    return f'<section><details class="run"><summary><h2>{escape(run.label)}</h2></summary>{inside}</details></section>'


def grid(charts: Iterable[Chart]) -> str:
    """Charts beside each other where the screen is wide enough, else below."""
    figures = (
        f"<figure><figcaption>{escape(chart.title)}{f'<small>{escape(chart.remark)}</small>' if chart.remark else ''}"
        f"</figcaption>{chart.svg}</figure>"
        for chart in charts
    )
    return f'<div class="grid">{"".join(figures)}</div>'
