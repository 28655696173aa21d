"""Draw charts as SVG text for a page: matplotlib draws them, and the page's style sheet colours them, in light and in dark.

Lines differ by colour, dash and marker, bars by colour and hatch, so that they differ in greyscale as well.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from textwrap import fill
from typing import Any

from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.report.runs import Series

WIDTH = 4.0  # inches: text of 9 points is still read on a phone, where a chart is as wide as the screen
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2, 4, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "xxxx", "....")
SLOTS = 8  # colours of the style sheet
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be selected, and takes the page's font
    "svg.hashsalt": "lowrank_pretrain",  # the same numbers give the same bytes
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "hatch.linewidth": 0.6,
}
# Placeholders: the style sheet's colours take their place in the SVG.
INK, FAINT, PAPER = "#010101", "#020202", "#030303"


def slot(index: int) -> str:
    """Return the placeholder of the style sheet's colour number `index`."""
    return f"#0400{index % SLOTS:02x}"


def lines(
    name: str,
    x: str,
    y: str,
    series: dict[str, Series],
    marks: dict[str, float] | None = None,
    level: tuple[str, float] | None = None,
    slots: dict[str, int] | None = None,
    bands: dict[str, list[tuple[float, float, float]]] | None = None,
) -> str:
    """Draw a line for each entry of `series`.

    Args:
        name: unique on the page; the prefix of the SVG's ids, and its accessible name.
        x: the axis' name with its unit.
        y: the axis' name with its unit.
        series: {label: points}.
        marks: {word: x} of vertical lines.
        level: (word, y) of a horizontal line.
        slots: the style of each label; by default in order.
        bands: [(x, lower, upper), …] of the area around each label's line; may be empty.
    """
    rows = -(-len(series) // _columns(series)) if len(series) > 1 else 0
    figure, axes = _figure(2.5 + 0.17 * rows)
    for index, (label, points) in enumerate(series.items()):
        k = slots[label] if slots else index
        many = len(points) > 25
        if bands and bands[label]:
            axes.fill_between(*zip(*bands[label], strict=True), color=slot(k), alpha=0.18, lw=0)
        axes.plot(
            *zip(*points, strict=True), label=label, color=slot(k), ls=DASHES[k % len(DASHES)], lw=1.5,
            marker=MARKERS[k % len(MARKERS)], ms=3.5, markevery=max(1, len(points) // 8) if many else 1,
        )  # fmt: skip
    ends = axes.get_xlim()
    inside = {word: at for word, at in (marks or {}).items() if ends[0] <= at <= ends[1]}
    for (word, at), side in zip(inside.items(), ("right", "left") if len(inside) > 1 else ("center",), strict=False):
        axes.axvline(at, color=FAINT, lw=1, ls=(0, (2, 2)))
        offset = {"right": 2, "left": -2, "center": 0}[side]  # two words never meet
        where = {"xytext": (offset, 2), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axes.annotate(word, (at, 1), xycoords=("data", "axes fraction"), fontsize=8, color=INK, **where)
    if level:
        axes.axhline(level[1], color=FAINT, lw=1, ls=(0, (2, 2)))
        where = {"xytext": (-2, 2), "textcoords": "offset points", "va": "bottom", "ha": "right"}  # lines end below it
        axes.annotate(level[0], (1, level[1]), xycoords=("axes fraction", "data"), fontsize=8, color=INK, **where)
    if all(float(at).is_integer() for points in series.values() for at, _ in points):
        axes.locator_params(axis="x", integer=True)  # there is no step 12.5
    axes.set_xlabel(x)
    axes.set_ylabel(fill(y, 26))
    axes.grid(color=FAINT, alpha=0.35, lw=0.5)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=_columns(series), frameon=False, fontsize=8, handlelength=3.2)
    return _svg(figure, name)


def bars(name: str, x: str, rows: Sequence[tuple[str, float, int, str]]) -> str:
    """Draw a horizontal bar for each row, with its value at its end.

    Args:
        name: unique on the page.
        x: the axis' name with its unit.
        rows: (label, value, style, text of the value), from top to bottom.
    """
    figure, axes = _figure(0.75 + 0.21 * len(rows))
    for index, (_, value, style, text) in enumerate(rows):
        axes.barh(index, value, height=0.75, color=slot(style), hatch=HATCHES[style % len(HATCHES)], edgecolor=PAPER, lw=0)
        axes.annotate(text, (value, index), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.28 * max([value for _, value, *_ in rows] + [1e-12]))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(fill(x, 26))  # long labels leave little room next to them
    axes.spines["left"].set_visible(False)
    return _svg(figure, name)


def heat_map(name: str, x: str, y: str, rows: list[str], columns: list[str], cells: dict[tuple[str, str], int]) -> str:
    """Draw integers in a grid of cells; darker is larger. A cell without a number stays empty.

    Args:
        name: unique on the page.
        x: the name of the columns.
        y: the name of the rows.
        rows: their names, from top to bottom.
        columns: their names.
        cells: {(row, column): number}.
    """
    figure, axes = _figure(0.95 + 0.19 * len(rows))
    levels = sorted(set(cells.values()))
    for (row, column), value in cells.items():
        strength = (levels.index(value) + 1) / len(levels)
        i, j = rows.index(row), columns.index(column)
        axes.bar(j, 0.94, 0.94, i - 0.47, color=slot(0), alpha=0.12 + 0.73 * strength**2, lw=0)
        colour = PAPER if strength > 0.8 else INK
        axes.annotate(str(value), (j, i), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return _svg(figure, name)


def _columns(series: dict[str, Series]) -> int:
    longest = max(map(len, series))
    return 3 if longest <= 12 else 2 if longest <= 24 else 1


def _figure(height: float) -> tuple[Any, Any]:
    with optional_import():
        import matplotlib
        from matplotlib.figure import Figure  # without pyplot: no global state, no display

    with matplotlib.rc_context({**STYLE, **dict.fromkeys(INKED, INK)}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots()


INKED: tuple[Any, ...] = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def _svg(figure: Any, name: str) -> str:
    """Return the figure as an ``<svg>`` with unique ids and the style sheet's colours."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}--\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}--", svg)
    svg = re.sub(r"<style.*?</style>|<metadata.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)  # as older versions of matplotlib write it
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for stand_in, value in ((INK, "var(--ink)"), (FAINT, "var(--faint)"), (PAPER, "var(--paper)")):
        svg = svg.replace(stand_in, value)
    for index in range(SLOTS):
        svg = svg.replace(slot(index), f"var(--s{index})")
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(name)}">', svg, count=1)
