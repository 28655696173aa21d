"""Build the page's tables: entries with ratios to the first one, one run's results and phases, and values at equal cost."""

import statistics
from collections.abc import Callable, Sequence
from html import escape

from lowrank_pretrain.core.metrics import METRICS
from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.report.collection import JUDGED_BY, Entry, best
from lowrank_pretrain.report.curves import ALONG, Axis, reached
from lowrank_pretrain.report.runs import Run

TOOK = "optimizer steps"  # the column without ratios
STAR, NONE = "★", "–"
Form = Callable[[float], str]


def _in_millions(value: float) -> str:
    return format_number(value / 1e6)


def _peak(run: Run) -> float | None:
    return max((phase["peak_gib"] for phase in run.phases if "peak_gib" in phase), default=None)


# of the table of runs: name, value, form
COSTS: tuple[tuple[str, Callable[[Run], float | None], Form], ...] = (
    (TOOK, lambda run: _sum(run, "steps"), "{:,.0f}".format),
    ("training, s", lambda run: _sum(run, "seconds"), "{:,.1f}".format),
    ("samples/s", lambda run: overall_rate(run), format_number),
    ("samples/s, last phase", lambda run: _of_last(run, "samples_per_sec"), format_number),
    ("peak memory, GiB", _peak, "{:.3g}".format),
    ("peak, last phase, GiB", lambda run: _of_last(run, "peak_gib"), "{:.3g}".format),
    ("trainable, last phase, M", lambda run: _of_last(run, "trainable"), _in_millions),
    ("parameters, M", lambda run: _of_last(run, "total"), _in_millions),
)


def entries_table(entries: list[Entry]) -> str:
    """Build a row for each entry: losses and accuracies with the best marked, then costs with ratios to the first entry."""
    measured = [metric for metric in JUDGED_BY if any(entry.mean(metric) is not None for entry in entries)]
    columns = [column for column in COSTS if any(entry.mean(column[1]) is not None for entry in entries)]
    finest = {metric: best([entry.mean(metric) for entry in entries], metric) for metric in measured}
    bases = [next((v for other in entries if (v := other.mean(value)) is not None), None) for _, value, _ in columns]
    rows = []
    for entry in entries:
        cells = [_head(entry)]
        cells += [measure(entry.mean(metric), finest[metric], _spread(entry, metric)) for metric in measured]
        for (name, value, form), base in zip(columns, bases, strict=True):
            cells.append(cell(entry.mean(value), form, None if entry is entries[0] or name == TOOK else base))
        rows.append(cells)
    notes = [f"Losses and accuracies are the last logged ones; {STAR} is the best of a column."] if measured else []
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append("Runs that differ by seed only are one row: mean ± standard deviation; each of them is below.")
    note = f'<p class="note">{" ".join(notes)}</p>' if notes else ""
    return table(["run", *measured, *(name for name, *_ in columns)], rows) + note


def _head(entry: Entry) -> str:
    """Return an entry's label; under it the directory's name where the label lacks it, and the state of an unfinished run."""
    lines, run = [escape(entry.label)], entry.runs[0]
    if len(entry.runs) > 1:
        lines.append(f"<small>{len(entry.runs)} seeds</small>")
    elif run.job is None and run.name not in entry.label:
        lines.append(f'<small class="name">{escape(run.name)}</small>')
    if run.state != "finished":
        lines.append(f'<small class="{run.state}">{run.state}</small>')
    return "".join(lines)


def _spread(entry: Entry, metric: str) -> str:
    if len(entry.runs) == 1 or entry.mean(metric) is None:
        return ""
    return f" <small>± {format_number(entry.deviation(metric))}</small>"


def equal_cost_table(entries: list[Entry]) -> str:
    """Build a row for each entry with its value of the first metric at the end of the shortest: by steps, time, bytes sent.

    Empty if there are fewer than two entries with values of it.
    """
    for metric in JUDGED_BY[:4]:
        shown = [entry for entry in entries if entry.mean(metric) is not None]
        if len(shown) > 1:
            break
    else:
        return ""
    columns: list[tuple[Axis, float]] = []
    for axis in ALONG:
        ends = [min((points[-1][0] if (points := axis.of(run, metric)) else 0.0) for run in entry.runs) for entry in shown]
        if sum(end > 0 for end in ends) > 1:
            columns.append((axis, min(end for end in ends if end > 0)))
    columns = [(axis, end) for axis, end in columns if any(reached(entry, axis, metric, end) for entry in shown)]
    means = [[_mean(entry, axis, metric, end) for entry in shown] for axis, end in columns]
    rows = []
    for index, entry in enumerate(shown):
        cells = [_head(entry)]
        for (axis, end), column in zip(columns, means, strict=True):
            values = reached(entry, axis, metric, end)
            more = f" <small>± {format_number(float(f'{statistics.stdev(values):.2g}'))}</small>" if len(values) > 1 else ""
            cells.append(measure(column[index], best(column, metric), more))
        rows.append(cells)
    return table(["run", *(f"{metric} {axis.form.format(end)}" for axis, end in columns)], rows, upright=True)


def _mean(entry: Entry, axis: Axis, metric: str, at: float) -> float | None:
    values = reached(entry, axis, metric, at)
    return statistics.fmean(values) if len(values) == len(entry.runs) else None


def results_table(run: Run) -> str:
    """Build a row for each loss and accuracy of one run: its last value, its best one and the step of that."""
    rows = []
    for metric in JUDGED_BY:
        points = run.series.get(metric)
        if not points:
            continue
        choose = METRICS[metric].best or min
        finest = choose(value for _, value in points)
        step = next(step for step, value in points if value == finest)
        rows.append([metric, format_number(points[-1][1]), format_number(finest), f"{step:,.0f}"])
    return table(["", "last", "best", "at step"], rows, upright=True) if rows else ""


def measure(value: float | None, finest: float | None, more: str = "") -> str:
    """Format a loss or an accuracy, and mark it if it is the best."""
    if value is None:
        return NONE
    return f'<b class="best">{format_number(value)} {STAR}</b>{more}' if value == finest else format_number(value) + more


def phases_table(run: Run) -> str:
    """Build a column for each phase, with ratios to the full one, and one for the whole run."""
    phases = run.phases
    full = next((phase for phase in phases if phase["phase"] == "full"), None)
    rows = []
    for name, key, factor, form, compared in OF_PHASE:
        values = [None if phase.get(key) is None else phase[key] * factor for phase in phases]
        if all(value is None for value in values):
            continue
        base = full[key] * factor if compared and full is not None and full.get(key) is not None else None
        cells = [cell(v, form, None if phase is full else base) for phase, v in zip(phases, values, strict=True)]
        if len(phases) > 1:
            whole = WHOLE.get(key, lambda run: None)(run)
            cells.append("" if whole is None else form(whole * factor))
        rows.append([name, *cells])
    names = [escape(phase["phase"]) for phase in phases] + (["whole run"] if len(phases) > 1 else [])
    return table(["", *names], rows, upright=True)


# of the table of phases: name, key in summary.json, factor, form, whether it is compared with the full phase
OF_PHASE: tuple[tuple[str, str, float, Form, bool], ...] = (
    ("optimizer steps", "steps", 1, "{:,.0f}".format, False),
    ("seconds", "seconds", 1, "{:,.1f}".format, False),
    ("samples/s", "samples_per_sec", 1, format_number, True),
    ("peak memory, GiB", "peak_gib", 1, "{:.3g}".format, True),
    ("optimizer, MiB", "optimizer_gib", 1024, format_number, True),
    ("trainable", "trainable", 1, "{:,.0f}".format, True),
    ("parameters", "total", 1, "{:,.0f}".format, True),
    ("MFLOP per sample", "flops_per_sample", 1e-6, format_number, True),
    ("MFU", "mfu", 1, "{:.1%}".format, True),
)
# what is known of all phases together
WHOLE: dict[str, Callable[[Run], float | None]] = {
    "steps": lambda run: _sum(run, "steps"),
    "seconds": lambda run: _sum(run, "seconds"),
    "samples_per_sec": lambda run: overall_rate(run),
    "peak_gib": _peak,
}


def cell(value: float | None, form: Form, base: float | None = None) -> str:
    """Format a number, followed by its ratio to `base`."""
    if value is None:
        return NONE
    return form(value) + (f" <small>{value / base:.2f}×</small>" if base else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], upright: bool = False) -> str:
    """Build a table that fits the screen; cells are HTML.

    Args:
        head: names of the columns.
        rows: the first cell of each names it.
        upright: few columns, which fit a phone. Else each row becomes a card on a narrow screen.
    """
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = []
    for first, *rest in rows:
        cells = zip(head[1:], rest, strict=True)
        named = (f'<td{" class=none" if text == NONE else ""} data-name="{escape(name)}">{text}</td>' for name, text in cells)
        body.append(f'<tr><th scope="row">{first}</th>{"".join(named)}</tr>')
    kind = "upright" if upright else "cards"
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def overall_rate(run: Run) -> float | None:
    """Return samples per second over all phases, with each phase's median step."""
    known = [(p["steps"], p["samples_per_sec"]) for p in run.phases if p["steps"] and p.get("samples_per_sec")]
    seconds = sum(steps / rate for steps, rate in known)
    return sum(steps for steps, _ in known) / seconds if seconds else None


def _sum(run: Run, key: str) -> float | None:
    return sum(phase[key] for phase in run.phases) if run.phases else None


def _of_last(run: Run, key: str) -> float | None:
    return run.phases[-1].get(key) if run.phases else None
