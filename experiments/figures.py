"""Figures that survive greyscale: every line has its own dashes and marker beside its colour."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLORS = ("black", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "0.5", "#882255", "#6a3d9a", "#b8860b",
          "#2f4f4f")  # fmt: skip
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 2)), (0, (3, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", ">", "h")
HATCHES = ("", "//", "..", "xx")


def panels(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its (rows, columns) axes."""
    from matplotlib.figure import Figure  # without pyplot: no display, nothing global

    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def style(number: int, count: int = 10) -> dict[str, Any]:
    """Of the number-th line, which has `count` points."""
    k = number % len(COLORS)
    return {"color": COLORS[k], "linestyle": DASHES[k % len(DASHES)], "marker": MARKERS[k], "markersize": 4, "linewidth": 1.4,
            "markevery": max(1, count // 10)}  # fmt: skip


def line(axis: Any, points: Sequence[tuple[float, float]], number: int, label: str) -> None:
    """One line through (x, y) points."""
    axis.plot(*zip(*points, strict=True), label=label, **style(number, len(points)))


def bars(axis: Any, names: Sequence[str], values: Sequence[float], number: int = 0, of: int = 1, label: str = "") -> None:
    """The number-th of `of` bars beside each name."""
    width = 0.8 / of
    places = [i - 0.4 + width * (number + 0.5) for i in range(len(names))]
    shade = str(0.85 - 0.5 * number / max(1, of - 1)) if of > 1 else "0.7"
    axis.bar(places, values, width, color=shade, edgecolor="black", hatch=HATCHES[number % 4], label=label or None)
    axis.set_xticks(range(len(names)), names, fontsize=8)


def log_x(axis: Any) -> None:
    """Make x logarithmic with a number at 1, 2 and 5 of each decade: within one decade matplotlib's own numbers overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def headroom(axis: Any) -> None:
    """Space for a legend above bars."""
    axis.set_ylim(0, 1.35 * axis.get_ylim()[1])


def named(axis: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title and axis names with units; a legend where something is labelled."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def save(figure: Any, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, dpi=130)
