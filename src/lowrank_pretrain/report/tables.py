"""Build the page's tables: runs with ratios to the first one, and one run's phases with ratios to the full one."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.report.runs import JUDGED_BY, Run, Seeds, best

STEPS = "optimizer steps"
STAR = "★"
Value = Callable[[Any], float | None]
Form = Callable[[float], str]


def runs_table(runs: list[Run]) -> str:
    """Build a row for each run: losses and accuracies with the best marked, then costs with ratios to the first run."""
    measured = [metric for metric in JUDGED_BY if any(run.last(metric) is not None for run in runs)]
    columns: list[tuple[str, Value, Form]] = [
        (STEPS, lambda r: _sum(r, "steps"), "{:,.0f}".format),
        ("training, s", lambda r: _sum(r, "seconds"), "{:,.1f}".format),
        ("samples/s", overall_rate, format_number),
        ("samples/s, last phase", lambda r: _of_last(r, "samples_per_sec"), format_number),
        (
            "peak memory, GiB",
            lambda r: max((p["peak_gib"] for p in r.phases if "peak_gib" in p), default=None),
            "{:.3g}".format,
        ),
        ("peak, last phase, GiB", lambda r: _of_last(r, "peak_gib"), "{:.3g}".format),
        ("trainable, last phase", lambda r: _of_last(r, "trainable"), "{:,.0f}".format),
        ("parameters", lambda r: _of_last(r, "total"), "{:,.0f}".format),
    ]
    columns = [column for column in columns if any(column[1](run) is not None for run in runs)]
    finest = {metric: best([run.last(metric) for run in runs], metric) for metric in measured}
    bases = [next((v for other in runs if (v := value(other)) is not None), None) for _, value, _ in columns]
    rows = []
    for run in runs:
        cells = [_head(run, len(runs) > 1)]
        cells += [measure(run.last(metric), finest[metric]) for metric in measured]
        for (name, value, form), base in zip(columns, bases, strict=True):
            cells.append(cell(value(run), form, None if run is runs[0] or name == STEPS else base))
        rows.append(cells)
    note = f'<p class="note">Losses and accuracies are the last logged ones; {STAR} is the best of a column.</p>'
    return table(["run", *measured, *(name for name, *_ in columns)], rows) + (note if measured and len(runs) > 1 else "")


def _head(run: Run, several: bool) -> str:
    """Return the run's label; under it the directory's name where the label lacks it, and the state of an unfinished run."""
    lines = [escape(run.label)]
    if several and run.job is None and run.name not in run.label:
        lines.append(f'<small class="name">{escape(run.name)}</small>')
    if run.state != "finished":
        lines.append(f'<small class="{run.state}">{run.state}</small>')
    return "".join(lines)


def seeds_table(groups: list[Seeds]) -> str:
    """Build a row for each group of seeds: mean and sample standard deviation, with the best mean marked."""
    measured = [metric for metric in JUDGED_BY if any(group.mean(metric) is not None for group in groups)]
    finest = {metric: best([group.mean(metric) for group in groups], metric) for metric in measured}
    rows = []
    for group in groups:
        cells = [escape(group.label)]
        for metric in measured:
            mean = group.mean(metric)
            cells.append(
                measure(
                    mean, finest[metric], "" if mean is None else f" <small>± {format_number(group.deviation(metric))}</small>"
                )
            )
        rows.append([*cells, f"{len(group.runs)}"])
    return table(["runs", *measured, "seeds"], rows)


def measure(value: float | None, finest: float | None, more: str = "") -> str:
    """Format a loss or an accuracy, and mark it if it is the best."""
    if value is None:
        return "–"
    return f'<b class="best">{format_number(value)} {STAR}</b>{more}' if value == finest else format_number(value) + more


def phases_table(run: Run) -> str:
    """Build a row for each phase, with ratios to the full one."""
    full = next((phase for phase in run.phases if phase["phase"] == "full"), None)
    columns = [
        ("optimizer steps", "steps", 1, "{:,.0f}".format, False),
        ("seconds", "seconds", 1, "{:,.1f}".format, False),
        ("samples/s", "samples_per_sec", 1, format_number, True),
        ("peak memory, GiB", "peak_gib", 1, "{:.3g}".format, True),
        ("optimizer, MiB", "optimizer_gib", 1024, format_number, True),
        ("trainable", "trainable", 1, "{:,.0f}".format, True),
        ("parameters", "total", 1, "{:,.0f}".format, True),
        ("MFLOP per sample", "flops_per_sample", 1e-6, format_number, True),
        ("MFU", "mfu", 1, "{:.1%}".format, True),
    ]
    columns = [column for column in columns if any(phase.get(column[1]) is not None for phase in run.phases)]
    rows = []
    for phase in run.phases:
        cells = [escape(phase["phase"])]
        for _, key, factor, form, compared in columns:
            base = full.get(key) if compared and full is not None and full is not phase else None
            value = phase.get(key)
            cells.append(cell(None if value is None else value * factor, form, None if base is None else base * factor))
        rows.append(cells)
    return table(["phase", *(name for name, *_ in columns)], rows)


def cell(value: float | None, form: Form, base: float | None = None) -> str:
    """Format a number, followed by its ratio to `base`."""
    if value is None:
        return "–"
    return form(value) + (f" <small>{value / base:.2f}×</small>" if base else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Build a table that scrolls on a narrow screen while its first column stays visible; cells are HTML."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{text}</td>" for text in rest) + "</tr>" for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def overall_rate(run: Run) -> float | None:
    """Return samples per second over all phases, with each phase's median step."""
    known = [(p["steps"], p["samples_per_sec"]) for p in run.phases if p["steps"] and p.get("samples_per_sec")]
    seconds = sum(steps / rate for steps, rate in known)
    return sum(steps for steps, _ in known) / seconds if seconds else None


def _sum(run: Run, key: str) -> float | None:
    return sum(phase[key] for phase in run.phases) if run.phases else None


def _of_last(run: Run, key: str) -> float | None:
    return run.phases[-1].get(key) if run.phases else None
