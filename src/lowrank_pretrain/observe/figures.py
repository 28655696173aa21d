"""The figure of an analysis: what ``EffectiveRank`` and ``HeadOrthogonality`` logged, over optimizer steps."""

import csv
from os import PathLike
from pathlib import Path

from lowrank_pretrain.core.errors import ConfigError

PANELS = {
    "lte/effective_rank/gradient": "effective rank of gradients",
    "lte/effective_rank/update": "effective rank of W − W₀",
    "lte/rank/gradient": "rank of gradients, at the tolerance",
    "lte/rank/update": "rank of W − W₀, at the tolerance",
    "lte/orthogonality": "|cosine| between heads' updates",
    "lte/row_space_overlap": "overlap of heads' row spaces",
}


def read_series(metrics_csv: str | PathLike) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{panel: {family, or "" for the mean: [(step, value), …]}} of the panels that the file has values for.

    Raises:
        ConfigError: no such file, or no value of ours in it.
    """
    path = Path(metrics_csv)
    if not path.is_file():
        raise ConfigError("metrics_csv", str(path), "no such file; a run writes metrics.csv into its directory")
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, text in row.items():
                panel = next((p for p in PANELS if column == p or column.startswith(f"{p}/")), None)
                if panel is not None and text:
                    line = series.setdefault(panel, {}).setdefault(column[len(panel) + 1 :], [])
                    line.append((int(row["step"]) + 1, float(text)))  # rows count from 0, steps taken from 1
    if not series:
        raise ConfigError("metrics_csv", str(path), "holds no lte/effective_rank or lte/orthogonality: switch the callbacks on")
    return series


def plot_analysis(metrics_csv: str | PathLike, out_png: str | PathLike) -> Path:
    """Draw everything the callbacks logged, one panel per quantity: the mean thick, each family thin.

    Args:
        metrics_csv: a run's ``metrics.csv``.
        out_png: where to write the figure.

    Returns:
        The figure's path.

    Raises:
        ConfigError: no such file, or nothing in it to draw.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    series = read_series(metrics_csv)
    panels = [panel for panel in PANELS if panel in series]
    names = list(dict.fromkeys(name for lines in series.values() for name in lines if name))
    shown = dict(zip(names, _short(names), strict=True))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.1 * rows + 0.35 * -(-(len(names) + 1) // 3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    colors = {name: f"C{i % 10}" for i, name in enumerate(names)}
    styles = {name: ("-", "--", ":", "-.")[i // 10 % 4] for i, name in enumerate(names)}
    handles = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        for name, points in sorted(series[panel].items(), key=lambda item: item[0] == ""):  # the mean on top
            style = {"color": "black", "lw": 2.2} if not name else {"color": colors[name], "lw": 1.1, "ls": styles[name]}
            (line,) = axes.plot(*zip(*sorted(points), strict=True), marker="." if len(points) < 40 else None, ms=4, **style)
            handles.setdefault(shown.get(name, "mean of all targets"), line)
        axes.set_title(PANELS[panel], fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for index in range(max(0, len(panels) - columns), len(panels)):  # the last panel of each column
        grid.flat[index].set_xlabel("optimizer steps")
        grid.flat[index].tick_params(labelbottom=True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    out = Path(out_png)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    return out


def _short(names: list[str]) -> list[str]:
    """The names without the leading words that all of them share."""
    words = [name.split(".") for name in names]
    while len(words) > 1 and all(len(w) > 1 and w[0] == words[0][0] for w in words):
        words = [w[1:] for w in words]
    return [".".join(w) for w in words]
