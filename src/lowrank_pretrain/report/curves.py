"""Compute the curves of a page's entries over steps, time and bytes sent; seeds become a mean with a band."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lowrank_pretrain.core.metrics import AXES, STEP, TIME
from lowrank_pretrain.report.collection import Entry
from lowrank_pretrain.report.runs import Run, Series
from lowrank_pretrain.report.traffic import sent

MOST = 120  # points of a curve that was averaged


class Axis(NamedTuple):
    """Describe one x axis of the curves.

    Attributes:
        key: for identifiers on the page.
        words: how a reader chooses it.
        unit: its name below a chart.
        of: returns a run's points of a metric over it.
        form: a sentence's part that names a value on it.
    """

    key: str
    words: str
    unit: str
    of: Callable[[Run, str], Series]
    form: str


STEPS = Axis("steps", "by step", AXES[STEP], lambda run, metric: run.series.get(metric, []), "after {:,.0f} steps")
SECONDS = Axis("time", "by time", AXES[TIME], Run.by_time, "after {:,.1f} s of training")
SENT = Axis(
    "bytes",
    "by bytes sent",
    "MiB sent by each worker",
    lambda run, metric: run.along(sent(run), metric),
    "after {:,.1f} MiB sent",
)
ALONG = (STEPS, SECONDS, SENT)


class Curve(NamedTuple):
    """Hold one line of a chart: its points and, for seeds, (x, lower, upper) of the band around it."""

    points: Series
    band: list[tuple[float, float, float]] = []


def curve(entry: Entry, axis: Axis, metric: str, factor: float = 1) -> Curve | None:
    """Return an entry's curve of a metric; None if one of its runs has no points.

    Args:
        entry: a run, or several that differ by seed only: their mean, with a band of one standard deviation.
        axis: what it is drawn over.
        metric: its name.
        factor: what values are multiplied by.
    """
    each = [smooth([(x, factor * y) for x, y in axis.of(run, metric)], metric) for run in entry.runs]
    if not all(each):
        return None
    if len(each) == 1:
        return Curve(each[0])
    grid = _common(each)
    if not grid:
        return None
    values_of = (np.interp(grid, [x for x, _ in points], [y for _, y in points]).tolist() for points in each)
    columns = zip(*values_of, strict=True)
    middle = [(statistics.fmean(values), statistics.stdev(values)) for values in columns]
    band = [(x, mean - deviation, mean + deviation) for x, (mean, deviation) in zip(grid, middle, strict=True)]
    return Curve([(x, mean) for x, (mean, _) in zip(grid, middle, strict=True)], band)


def _common(each: list[Series]) -> list[float]:
    """Return where curves are averaged: at the points that they share, else evenly over the stretch that all of them cover."""
    shared = sorted(set.intersection(*({x for x, _ in points} for points in each)))
    if len(shared) * 2 >= max(map(len, each)):
        return shared
    begin, end = max(points[0][0] for points in each), min(points[-1][0] for points in each)
    count = min(MOST, max(map(len, each)))
    return [float(x) for x in np.linspace(begin, end, count)] if begin < end else []


def reached(entry: Entry, axis: Axis, metric: str, at: float) -> list[float]:
    """Return the last value of a metric that each run of an entry had logged by `at` on an axis."""
    each = ([y for x, y in axis.of(run, metric) if x <= at * (1 + 1e-9)] for run in entry.runs)
    return [values[-1] for values in each if values]


def smooth(points: Series, metric: str) -> Series:
    """Average a long training loss over stretches of equal length; leave other metrics unchanged."""
    if metric != "train/loss" or len(points) <= MOST:
        return points
    size = -(-len(points) // MOST)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(stretch) for column in zip(*stretch, strict=True)) for stretch in stretches]
