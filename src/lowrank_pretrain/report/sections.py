"""Choose the charts of a page: the metrics of several runs together, and those of a single run."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from lowrank_pretrain.core.metrics import METRICS
from lowrank_pretrain.core.protocols import PHASES
from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.report import charts
from lowrank_pretrain.report.collection import Entry
from lowrank_pretrain.report.curves import ALONG, SENT, STEPS, Axis, Curve, curve
from lowrank_pretrain.report.runs import Run

DRAWN = 16  # lines in one chart; more cannot be distinguished

CURVES = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val/ppl")
# metric -> factor and unit, where the page shows another unit than the one that is logged
OVER_STEPS: dict[str, tuple[float, str | None]] = {
    "throughput/samples_per_sec": (1, None),
    "throughput/tokens_per_sec": (1, None),
    "throughput/mfu": (1, None),
    "memory/peak_gib": (1, None),
    "memory/optimizer_gib": (1024, "MiB"),
    "params/trainable": (1e-6, "million parameters"),
}
FAMILIES = [name for name, metric in METRICS.items() if metric.by_family]  # a line per family
SINGLES = ("lte/merge_mib", "lte/rest_mib", "lte/merge_ms", "galore/refresh_ms", "galore/overlap")
# of a phase in summary.json: key -> (title, axis, factor, form)
PHASE_BARS: dict[str, tuple[str, str, float, Callable[[float], str]]] = {
    "samples_per_sec": ("Throughput by phase", "samples / s, from the median step", 1, format_number),
    "peak_gib": ("Peak memory by phase", "GiB, process 0", 1, "{:.3g}".format),
    "optimizer_gib": ("Optimizer states by phase", "MiB, process 0", 1024, format_number),
    "trainable": ("Trainable parameters by phase", "million parameters", 1e-6, format_number),
    "flops_per_sample": ("Operations by phase", "MFLOP per sample, forward and backward", 1e-6, format_number),
    "mfu": ("Model FLOPs utilisation by phase", "share of the chip's peak", 1, "{:.1%}".format),
}

PARTS_SENT = ("full", "joint", "lowrank", "rest", "all")  # what a worker sends in a run: in each phase, for the rest, in all


class Chart(NamedTuple):
    """Hold a figure of the page: caption, SVG, a remark under the caption, and the x axis that a reader chooses it by."""

    title: str
    svg: str
    remark: str = ""
    axis: str = ""


BAND = "Band: mean ± standard deviation over seeds."


def side_by_side(entries: list[Entry]) -> Iterator[Chart]:
    """Draw the curves of all entries over each x axis, then bars by phase and, for several, costs over steps."""
    shown, remark = drawn_of(entries)
    for metric in CURVES:
        for axis in ALONG:
            yield from _curves(shown, axis, metric, remark)
    yield from by_phase(shown, remark)
    if len(entries) > 1:
        yield from over_steps(entries)


def drawn_of(entries: list[Entry]) -> tuple[list[Entry], str]:
    """Return the entries that charts show, finished ones preferred, in the page's order; and a remark if some are left out."""
    known = [entry for entry in entries if all(run.series for run in entry.runs)]
    chosen = sorted(known, key=lambda entry: entry.runs[0].state != "finished")[:DRAWN]
    left_out = len(known) - len(chosen)
    remark = f"{DRAWN} rows of the table; {left_out} more are not drawn." if left_out else ""
    return [entry for entry in known if entry in chosen], remark


def _curves(shown: list[Entry], axis: Axis, metric: str, remark: str) -> Iterator[Chart]:
    """Draw a metric of all entries over one x axis, if any has it."""
    found = {entry.label: drawn for entry in shown if (drawn := curve(entry, axis, metric))}
    if not found:
        return
    without = [entry.label for entry in shown if entry.label not in found]
    words = [remark, BAND if any(drawn.band for drawn in found.values()) else ""]
    words.append(f"Without {', '.join(without)}: nothing sent, or not known." if axis is SENT and without else "")
    svg = _lines(f"{metric} {axis.words}", axis, METRICS[metric].axis, shown, found)
    yield Chart(f"{METRICS[metric].title} {axis.words}", svg, " ".join(filter(None, words)), axis.key)


def over_steps(entries: list[Entry]) -> Iterator[Chart]:
    """Draw what runs cost over their steps."""
    shown, remark = drawn_of(entries)
    for metric, (factor, unit) in OVER_STEPS.items():
        found = {entry.label: drawn for entry in shown if (drawn := curve(entry, STEPS, metric, factor))}
        if found:
            yield Chart(METRICS[metric].title, _lines(metric, STEPS, unit or METRICS[metric].axis, shown, found), remark)


def _lines(name: str, axis: Axis, y: str, shown: list[Entry], found: dict[str, Curve]) -> str:
    """Draw curves by label; an entry looks alike in all charts, and a single run's phases are marked."""
    only = shown[0].runs[0] if len(shown) == 1 and len(shown[0].runs) == 1 else None
    return charts.lines(
        name,
        axis.unit,
        y,
        {label: drawn.points for label, drawn in found.items()},
        marks_of(only, axis) if only else {},
        slots={entry.label: index for index, entry in enumerate(shown)},
        bands={label: drawn.band for label, drawn in found.items()},
    )


def by_phase(entries: list[Entry], remark: str = "") -> Iterator[Chart]:
    """Draw a bar for each entry and phase; of seeds, their mean."""
    for key, (title, axis, factor, form) in PHASE_BARS.items():
        rows = []
        for entry in entries:
            for number, name in enumerate(PHASES):
                value = entry.mean(partial(_of_phase, name=name, key=key))
                if value is not None:
                    label = name if len(entries) == 1 else f"{short(entry.label)} · {name}"
                    rows.append((label, value * factor, number, form(value * factor)))
        if rows:
            yield Chart(title, charts.bars(key, axis, rows), remark)
    rows = []
    for entry in entries:
        for number, name in enumerate(PARTS_SENT):
            mib = entry.mean(partial(_sent, name=name))
            if mib is not None:
                label = name if len(entries) == 1 else f"{short(entry.label)} · {name}"
                rows.append((label, mib, number, format_number(mib)))
    if rows:
        yield Chart("Sent by a worker", charts.bars("sent", "MiB in the whole run", rows), remark)


def _sent(run: Run, name: str) -> float | None:
    """Return the MiB that a worker of the run has sent in a phase, for the rest, or in all; None if that is not known."""
    return run.summary.get("sent_mib", {}).get(name)


def _of_phase(run: Run, name: str, key: str) -> float | None:
    """Return a figure of a run's phase; None if it has no such phase, or no such figure."""
    return next((phase.get(key) for phase in run.phases if phase["phase"] == name), None)


def of_one(run: Run, several: bool) -> Iterator[Chart]:
    """Draw the charts of a single run: ranks, norms, heads, subspaces."""
    own = f"{run.label}: " if several else ""  # ids and accessible names are unique on the page
    if run.summary.get("plan"):
        yield Chart("Ranks", rank_map(run.summary["plan"], f"{own}ranks"), "Rank of each adapter, chosen at the switch.")
    for prefix in FAMILIES:
        title, axis = METRICS[prefix].title, METRICS[prefix].axis
        series = run.group(prefix)
        if prefix in run.series:
            series = {"mean of all": run.series[prefix]} | series
        if series:
            names = dict(zip(series, shortened(list(series)), strict=True))
            drawn = {names[key]: points for key, points in list(series.items())[:DRAWN]}
            tolerance = _tolerance(run) if prefix == "lowrank/weight_change" else None
            svg = charts.lines(f"{own}{prefix}", STEPS.unit, axis, drawn, marks_of(run), tolerance)
            yield Chart(title, svg, f"The first {DRAWN} of {len(series)} families." if len(series) > DRAWN else "")
    for metric in SINGLES:
        title, axis = METRICS[metric].title, METRICS[metric].axis
        if any(value for _, value in run.series.get(metric, [])):  # one worker sends nothing
            yield Chart(title, charts.lines(f"{own}{metric}", STEPS.unit, axis, {title: run.series[metric]}, marks_of(run)))


def rank_map(plan: dict[str, int], name: str) -> str:
    """Draw the ranks of a plan, layer by family. Layers are the indices in a target's name."""
    cells, rows, columns = {}, [], []
    for target, rank in plan.items():
        layer, family = split(target)
        cells[layer, family] = rank
        rows.append(layer)
        columns.append(family)
    rows = sorted(set(rows), key=lambda layer: [int(n) if n.isdigit() else -1 for n in layer.split(".")])
    columns = list(dict.fromkeys(columns))
    names = dict(zip(columns, shortened(columns), strict=True))
    named = {(row, names[column]): rank for (row, column), rank in cells.items()}
    return charts.heat_map(name, "family of matrices", "layer", rows, list(names.values()), named)


def split(target: str) -> tuple[str, str]:
    """Split a target's name into layer and family; a target outside of all lists is of layer ``–``.

    Example:
        >>> split("blocks.3.mlp.fc1")
        ('3', 'blocks.*.mlp.fc1')
    """
    words = target.split(".")
    layer = ".".join(word for word in words if word.isdigit()) or "–"
    return layer, ".".join("*" if word.isdigit() else word for word in words)


def marks_of(run: Run, axis: Axis = STEPS) -> dict[str, float]:
    """Return where the run's phases change on an axis, by ``switch`` and ``freeze``."""
    marks = {}
    for word in ("switch", "freeze"):
        step = run.summary.get(f"{word}_step")
        if step is not None:
            helper = Run(run.path, config=run.config, summary=run.summary, series={**run.series, word: [(float(step), 0.0)]})
            if found := axis.of(helper, word):
                marks[word] = found[0][0]
    return marks


def shortened(names: list[str]) -> list[str]:
    """Shorten names: drop the leading words that all dotted names share, and stars.

    Example:
        >>> shortened(["blocks.*.attn.qkv.q", "blocks.*.mlp.fc1"])
        ['attn.qkv.q', 'mlp.fc1']
    """
    words = [re.sub(r"\.?\*\.?", ".", name).strip(".").split(".") for name in names]
    while len({w[0] for w in words if len(w) > 1}) == 1 and sum(len(w) > 1 for w in words) > 1:
        words = [w[1:] if len(w) > 1 else w for w in words]
    found = [".".join(w) for w in words]
    return found if len(set(found)) == len(names) else names


def short(label: str, most: int = 22) -> str:
    """Cut a label so that it leaves room for a bar."""
    return label if len(label) <= most else label[: most - 1] + "…"


def _tolerance(run: Run) -> tuple[str, float] | None:
    tolerance = (run.config.get("method") or {}).get("weight_tol")
    return ("weight_tol", tolerance) if isinstance(tolerance, float) else None
