"""Choose the charts of a page: the metrics of several runs together, and those of a single run."""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lowrank_pretrain.core.metrics import AXES, METRICS, STEP, TIME
from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.report import charts
from lowrank_pretrain.report.runs import Run, Series

STEPS, SECONDS = AXES[STEP], AXES[TIME]
DRAWN = 16  # runs in one chart; more cannot be distinguished

CURVES = ("train/loss", "val/loss", "val/acc1", "val/acc5", "val/ppl")
BY_TIME = ("train/loss", "val/loss", "val/acc1", "val/ppl")
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

SENT = ("full", "joint", "lowrank", "rest", "all")  # what a worker sends in a run: in each phase, for the rest, in all


class Chart(NamedTuple):
    """Hold a figure of the page: caption, SVG and, under the caption, a remark."""

    title: str
    svg: str
    remark: str = ""


def side_by_side(runs: list[Run]) -> Iterator[Chart]:
    """Draw curves of all runs over steps and over time, then bars by phase."""
    drawn = sorted((run for run in runs if run.series), key=lambda run: run.state != "finished")[:DRAWN]
    shown = [run for run in runs if any(run is other for other in drawn)]  # finished ones are preferred; in the page's order
    left_out = sum(bool(run.series) for run in runs) - len(shown)
    remark = f"{DRAWN} runs; {left_out} more are in the table." if left_out else ""
    marks = marks_of(shown[0]) if len(shown) == 1 else {}
    for metric in CURVES:
        title, axis = METRICS[metric].title, METRICS[metric].axis
        series = {run.label: smooth(run.series[metric], metric) for run in shown if run.series.get(metric)}
        if not series:
            continue
        slots = {run.label: index for index, run in enumerate(shown)}
        yield Chart(f"{title} by step", charts.lines(f"{metric} by step", STEPS, axis, series, marks, slots=slots), remark)
        if metric in BY_TIME:
            timed = {run.label: run.by_time(metric) for run in shown if run.by_time(metric)}
            timed = {label: smooth(points, metric) for label, points in timed.items()}
            if timed:
                at = marks_of(shown[0], by_time=True) if len(shown) == 1 else {}
                svg = charts.lines(f"{metric} by time", SECONDS, axis, timed, at, slots=slots)
                yield Chart(f"{title} by time", svg, remark)
    yield from by_phase(shown, remark)
    if len(runs) > 1:
        yield from over_steps(shown, remark)


def over_steps(shown: list[Run], remark: str = "") -> Iterator[Chart]:
    """Draw the cost of a run over its steps."""
    slots = {run.label: index for index, run in enumerate(shown)}
    marks = marks_of(shown[0]) if len(shown) == 1 else {}
    for metric, (factor, unit) in OVER_STEPS.items():
        title, axis = METRICS[metric].title, unit or METRICS[metric].axis
        series = {r.label: [(x, y * factor) for x, y in r.series[metric]] for r in shown if r.series.get(metric)}
        if series:
            yield Chart(title, charts.lines(metric, STEPS, axis, series, marks, slots=slots), remark)


def by_phase(runs: list[Run], remark: str = "") -> Iterator[Chart]:
    """Draw a bar for each run and phase."""
    order = ["full", "joint", "lowrank"]
    for key, (title, axis, factor, form) in PHASE_BARS.items():
        rows = []
        for run in runs:
            for phase in run.phases:
                if phase.get(key) is not None:
                    name = phase["phase"]
                    style = order.index(name) if name in order else len(order)
                    label = name if len(runs) == 1 else f"{short(run.label)} · {name}"
                    value = phase[key] * factor
                    rows.append((label, value, style, form(value)))
        if rows:
            yield Chart(title, charts.bars(key, axis, rows), remark)
    rows = []
    for run in runs:
        for name, mib in run.summary.get("sent_mib", {}).items():
            label = name if len(runs) == 1 else f"{short(run.label)} · {name}"
            rows.append((label, mib, SENT.index(name) if name in SENT else len(SENT), format_number(mib)))
    if rows:
        yield Chart("Sent by a worker", charts.bars("sent", "MiB in the whole run", rows), remark)


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
            svg = charts.lines(f"{own}{prefix}", STEPS, axis, drawn, marks_of(run), tolerance)
            yield Chart(title, svg, f"The first {DRAWN} of {len(series)} families." if len(series) > DRAWN else "")
    for metric in SINGLES:
        title, axis = METRICS[metric].title, METRICS[metric].axis
        if any(value for _, value in run.series.get(metric, [])):  # one worker sends nothing
            yield Chart(title, charts.lines(f"{own}{metric}", STEPS, axis, {title: run.series[metric]}, marks_of(run)))


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


def marks_of(run: Run, by_time: bool = False) -> dict[str, float]:
    """Return where the run's phases change, by ``switch`` and ``freeze``."""
    marks = {}
    for word in ("switch", "freeze"):
        step = run.summary.get(f"{word}_step")
        if step is None:
            continue
        if by_time:
            helper = Run(run.path, summary=run.summary, series={**run.series, "at": [(float(step), 0.0)]})
            marks[word] = helper.by_time("at")[0][0]
        else:
            marks[word] = float(step)
    return marks


def smooth(points: Series, metric: str) -> Series:
    """Average a long training loss over stretches of equal length; leave other metrics unchanged."""
    most = 120
    if metric != "train/loss" or len(points) <= most:
        return points
    size = -(-len(points) // most)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(stretch) for column in zip(*stretch, strict=True)) for stretch in stretches]


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
