"""Write the page: HTML with its style sheet and all charts inside, and no script."""

import json
import os
from collections.abc import Iterable
from datetime import datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import write_whole
from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.report.collection import JUDGED_BY, Entry, best, entries, find_runs
from lowrank_pretrain.report.curves import ALONG
from lowrank_pretrain.report.runs import STATES, Run
from lowrank_pretrain.report.sections import Chart, of_one, over_steps, side_by_side
from lowrank_pretrain.report.tables import entries_table, equal_cost_table, phases_table, results_table


def write_report(paths: list[Path], out: Path | None = None) -> Path:
    """Write one page about the runs in `paths`.

    Args:
        paths: run directories, or directories that hold some (a multirun's).
        out: the file, or a folder for ``report.html``. None: in the directory, or in the current one if there are several.

    Returns:
        The file.

    Raises:
        ConfigError: no such directory, no run in it that can be read, or nothing can be written to `out`.
    """
    runs = find_runs(paths)
    out = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if out.is_dir() or not out.suffix:
        out = out / "report.html"
    text = render(runs, title(paths, runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        raise ConfigError(
            "--out", str(out), f"cannot be written: {error.strerror}; give a file or a folder with --out"
        ) from error
    return out


def title(paths: list[Path], runs: list[Run]) -> str:
    """Return the directory's name, or the number of runs if there are several directories."""
    return paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"


def render(runs: list[Run], title: str) -> str:
    """Return the page as HTML text."""
    shown = [run for run in runs if run.series or run.phases] or runs
    parts = [f"<h1>{escape(title)}</h1>", intro(runs), going(runs)]
    parts += _of_several(shown, entries(shown)) if len(runs) > 1 else [_results(runs[0])]
    parts.append(unwell(runs))
    if drawn := list(side_by_side(entries(shown))):
        parts.append(curves(drawn, "Side by side" if len(runs) > 1 else "Curves and phases"))
    parts += [one(run, len(runs) > 1) for run in runs if run.config or run.series or run.phases]
    return page(title, "\n".join(part for part in parts if part) + f"\n{NOTES}")


def _results(run: Run) -> str:
    tables = results_table(run) + (phases_table(run) if run.phases else "")
    return f"<section><h2>The run</h2>{tables}</section>" if tables else ""


def _of_several(shown: list[Run], rows: list[Entry]) -> list[str]:
    """Return the sections that compare runs: all that is measured, the same at equal cost, and each seed, folded."""
    parts = [f"<section><h2>Runs, with ratios to the first</h2>{entries_table(rows)}</section>"]
    if len(rows) < len(shown):
        each = entries_table([Entry(run.label, [run]) for run in shown])
        parts.append(f"<section><details><summary><h2>Each seed</h2></summary>{each}</details></section>")
    if equal := equal_cost_table(rows):
        parts.append(f"<section><h2>At equal cost: at the end of the shortest run</h2>{equal}</section>")
    return parts


def going(runs: list[Run]) -> str:
    """List the runs that are still training, with how far they are and when the page was written."""
    found = [run for run in runs if run.state == "running"]
    if not found:
        return ""
    items = "".join(f"<li><b>{escape(run.label)}</b> · {escape(run.reason)}</li>" for run in found)
    now = f"This page is of {datetime.now():%Y-%m-%d %H:%M:%S}; the same command writes it anew."
    return f'<section class="going"><h2>Still running</h2><ul>{items}</ul><p class="note">{now}</p></section>'


def unwell(runs: list[Run]) -> str:
    """List the runs that have not finished or have unreadable files, with the reason; folded if there are several runs."""
    found = [run for run in runs if run.state not in ("finished", "running") or run.damage]
    if not found:
        return ""
    items = []
    for run in found:
        reasons = [run.reason, run.damage] if run.damage != run.reason else [run.reason]
        words = " · ".join(escape(reason) for reason in reasons if reason)
        items.append(f"<li><b>{escape(run.label)}</b> · {words}</li>")
    listed = f"<ul>{''.join(items)}</ul>"
    if len(runs) == 1:
        return f'<section class="unwell"><h2>{found[0].state.capitalize()}</h2>{listed}</section>'
    heading = f"<h2>Failed, damaged or unfinished: {len(found)}</h2>"
    return f'<section><details class="unwell"><summary>{heading}</summary>{listed}</details></section>'


def page(title: str, body: str) -> str:
    """Return a whole HTML page around `body`, with the style sheet inside."""
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
    """Return the number of runs by outcome; for a single one, its command and directory."""
    counts = {state: sum(run.state == state for run in runs) for state in STATES}
    if len(runs) == 1:
        return f"<p>{command(runs[0])}</p><p>{where(runs[0])}</p>"
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"<p>{len(runs)} runs: {words}.{winner(entries(runs))}</p>"


def winner(rows: list[Entry]) -> str:
    """Name the best row by the first metric that several rows have."""
    for metric in JUDGED_BY:
        values = [entry.mean(metric) for entry in rows]
        found = best(values, metric)
        if found is not None:
            label = next(entry.label for entry, value in zip(rows, values, strict=True) if value == found)
            return f" Best {escape(metric)}: <b>{escape(label)}</b>, {format_number(found)}."
    return ""


def where(run: Run) -> str:
    """Return the run's directory."""
    return f"<code>{escape(os.path.relpath(run.path))}</code>"


def command(run: Run) -> str:
    """Return the command line that started the run, if ``.hydra`` has it."""
    words = " ".join(["python -m lowrank_pretrain", *run.overrides])
    return f"<code>{escape(words)}</code>"


def one(run: Run, several: bool) -> str:
    """Return the section of one run; folded if there are several."""
    charts = [*of_one(run, several), *([] if several else over_steps([Entry(run.label, [run])]))]
    parts = []
    if several:
        parts.append(f"<p>{where(run)}</p><p>{command(run)}</p>")
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


def curves(charts: list[Chart], heading: str) -> str:
    """Build the section of all curves; a reader chooses the x axis by radio buttons, which need no script.

    Where style sheets are not understood, and on paper, the curves over all axes are there.
    """
    keys = {chart.axis for chart in charts}
    there = [axis for axis in ALONG if axis.key in keys]
    choices = "".join(
        f'<input type="radio" name="axis" id="over-{axis.key}"{" checked" if axis is there[0] else ""}>'
        f'<label for="over-{axis.key}">{axis.words}</label>'
        for axis in there
    )
    return f'<section class="curves"><h2>{heading}</h2>{choices if len(there) > 1 else ""}{grid(charts)}</section>'


def grid(charts: Iterable[Chart]) -> str:
    """Put charts next to each other where the screen is wide enough, else below each other."""
    figures = (
        f"<figure{f' class={chart.axis}' if chart.axis else ''}><figcaption>{escape(chart.title)}"
        f"{f'<small>{escape(chart.remark)}</small>' if chart.remark else ''}</figcaption>{chart.svg}</figure>"
        for chart in charts
    )
    return f'<div class="grid">{"".join(figures)}</div>'
