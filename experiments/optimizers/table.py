"""results.csv, search.csv, the README's tables and figure.png of ``optimizers``, of the cells whose runs are all done."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.optimizers.sides import Cell
from experiments.optimizers.study import ANCHOR, Study, seconds_of
from experiments.runs import done
from experiments.tables import Missing, fill, machines, mean, need, plain_row, spread, table, together, write_csv
from lowrank_pretrain.run.search import NAMES

# 97.5 % points of Student's t by degrees of freedom: the half-width of a 95 % interval in standard errors
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
BLANK = "# Optimizers\n\n" + "".join(f"<!-- {name} -->\n<!-- /{name} -->\n\n" for name in ("machine", "losses", "settings"))
Found = dict[tuple[str, int], dict[str, Any]]


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Return mean and half-width of the 95 % t-interval of paired differences; the width of one pair is infinite."""
    if len(differences) < 2:
        return mean(differences), math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean(differences), T.get(len(differences) - 1, 1.96) * error


def verdict(differences: Sequence[float]) -> str:
    """Return ``better``, ``worse`` or ``even``, by the rule that ``study.py`` states."""
    middle, half = interval(differences)
    return "better" if middle + half < 0 else "worse" if middle - half > 0 else "even"


def write(study: Study, here: Path) -> None:
    """Write into ``here`` the record of every cell, of the sides that are finished on it.

    Raises:
        Missing: none is.
    """
    cells: dict[Cell, tuple[Study, Found]] = {}
    rows: list[dict[str, Any]] = []
    lacking = ""
    for cell in study.cells:
        own = replace(study, sides=[side for side in study.sides if unfinished(study, cell, side) is None])
        if own.sides:
            jobs = own.reported(cell)  # asks every run of every search: once for a cell
            cells[cell] = own, dict(zip(jobs, need([*jobs.values()], study.where), strict=True))
            rows += [plain_row(jobs[key], one) for key, one in cells[cell][1].items()]
        else:
            lacking = lacking or unfinished(study, cell, study.sides[0]) or ""
    if not cells:
        raise Missing(lacking)
    readme = here / "README.md"
    if not readme.is_file():
        readme.write_text(BLANK)
    write_csv(here / "results.csv", rows)
    write_csv(here / "search.csv", [row for cell, (own, _) in cells.items() for row in searches(own, cell)])
    most = " or ".join(f"{runs}" for runs in sorted({study.budget(cell) for cell in cells}))
    searched = f"Search: at most {most} runs for a side and cell, rates by factors of {study.space.factor:g}"
    searched += "." if len(study.coordinates) == len(NAMES) else f", along {', '.join(study.coordinates)} alone."
    reported = [one for _, found in cells.values() for one in found.values()]
    fill(readme, "machine", f"{machines(reported, together(reported))}\n\n{searched}")
    parts = []
    for cell, (own, found) in cells.items():
        left = [side for side in study.sides if side not in own.sides]
        title = f"### {cell.name}: {cell.steps(study.images):,} steps, at most {study.budget(cell)} runs of search for a side"
        parts.append(f"{title}\n\n{losses(own, cell, found)}")
        parts += [f"Not run: {', '.join(left)}."] if left else []
    fill(readme, "losses", "\n\n".join(parts))
    fill(readme, "settings", "\n\n".join(f"### {cell.name}\n\n{chosen(own, cell)}" for cell, (own, _) in cells.items()))
    draw(cells, here / "figure.png")


def unfinished(study: Study, cell: Cell, side: str) -> str | None:
    """Say what of a side is not done on a cell; ``None`` if all is."""
    try:
        need([*replace(study, sides=[side]).reported(cell).values()], study.where)
    except Missing as error:
        return str(error)
    return None


def tests(found: Found, side: str, seeds: Sequence[int]) -> list[float]:
    """Return a side's test losses."""
    return [found[side, seed]["summary"]["final"]["test/loss"] for seed in seeds]


def losses(study: Study, cell: Cell, found: Found) -> str:
    """Return the table of a cell: loss, paired difference, verdict, state, seconds."""
    sides = [side for side in study.sides if (side, study.seeds[0]) in found]
    rivals = [name for name in (ANCHOR, "muon") if name in sides]
    timed = at_equal_seconds(replace(study, sides=tuple(sides)), cell) if study.timed else {}
    state = {side: found[side, study.seeds[0]]["optimizer_mib"] for side in sides}
    middle = {side: mean(tests(found, side, study.seeds)) for side in sides}
    lines = []
    for side in sides:
        line = [side, spread(tests(found, side, study.seeds), "{:.4f}")]
        for rival in rivals:
            pairs = zip(tests(found, side, study.seeds), tests(found, rival, study.seeds), strict=True)
            line.append("–" if side == rival else paired([100 * (a / b - 1) for a, b in pairs]))
        line.append(timed.get(side, "–"))
        fewer = [other for other in sides if state[other] <= state[side] * 1.001]
        line.append("yes" if min(fewer, key=lambda other: middle[other]) == side else "no")
        steps = cell.steps(study.images)
        alone = study.timed and (study.device == "cpu" or together(found[side, seed] for seed in study.seeds) == 1)
        milliseconds = statistics.median(1e3 * seconds_of(found[side, seed], study.device) / steps for seed in study.seeds)
        lines.append([*line, f"{state[side]:.2f}", f"{milliseconds:.1f}" if alone else "–"])
    head = ["side", "test loss", *(f"against {rival}, %" for rival in rivals), f"at {ANCHOR}'s seconds, %",
            "best at its bytes or fewer", "states, MiB", "CPU ms a step" if study.device == "cpu" else "ms a step"]  # fmt: skip
    kept = [i for i in range(len(head)) if any(line[i] != "–" for line in lines)]  # what nobody has is left out
    return table([head[i] for i in kept], [[line[i] for i in kept] for line in lines])


def paired(differences: Sequence[float]) -> str:
    """Return ``mean ± half-width (verdict)``."""
    middle, half = interval(differences)
    return f"{middle:+.2f} ± {half:.2f} ({verdict(differences)})"


def at_equal_seconds(study: Study, cell: Cell) -> dict[str, str]:
    """Return by side the paired difference to AdamW, where each trains as long as AdamW does; what is not run is left out."""
    try:
        jobs, anchors = study.equal_seconds(cell), study.reported(cell)
    except Missing:
        return {}
    result = {}
    for side in study.sides:
        pairs = [
            (done(jobs[side, s], study.where), done(anchors[ANCHOR, s], study.where)) for s in study.seeds if (side, s) in jobs
        ]
        finals = [[one["summary"]["final"]["test/loss"] for one in pair if one and "summary" in one] for pair in pairs]
        if finals and all(len(pair) == 2 for pair in finals):
            result[side] = paired([100 * (a / b - 1) for a, b in finals])
    return result


def chosen(study: Study, cell: Cell) -> str:
    """Return what each side has chosen, in how many runs, and whether the search has settled."""
    lines = []
    for side in study.sides:
        descent = study.best(side, cell)
        values = study.space.values(descent.point, study.origin(side, cell)[1])
        edges = ", ".join(descent.at_an_edge())
        state = "no neighbour is better" if descent.settled else "the budget ended it"
        lines.append(
            [
                side,
                *(f"{value:g}" for value in values.values()),
                len(descent.tried),
                state + (f"; at an edge: {edges}" if edges else ""),
            ]
        )
    return table(["side", "lr", "rest_lr", "beta1", "beta2", "weight_decay", "warmup", "runs", "end"], lines)


def searches(study: Study, cell: Cell) -> list[dict[str, Any]]:
    """Return every run of a cell's searches with its dev loss."""
    rows = []
    for side in study.sides:
        descent = study.best(side, cell)
        for point in sorted(descent.tried):
            values = study.space.values(point, study.origin(side, cell)[1])
            found = {"dev_loss": study.loss(side, cell, point), "chosen": point == descent.point}
            rows.append({"cell": cell.name, "side": side, **values, **found})
    return rows


def along_the_rate(study: Study, side: str, cell: Cell) -> list[tuple[float, float]]:
    """Return, for every matrices' rate that was tried, the lowest dev loss there."""
    lowest: dict[float, float] = {}
    for point in study.best(side, cell).tried:
        rate = study.space.values(point, study.origin(side, cell)[1])["lr"]
        lowest[rate] = min(lowest.get(rate, math.inf), study.loss(side, cell, point))
    return sorted(pair for pair in lowest.items() if math.isfinite(pair[1]))


def draw(cells: dict[Cell, tuple[Study, Found]], path: Path) -> None:
    """Draw, for each cell, loss over the matrices' rate and test loss over state."""
    figure, axes = figures.panels(len(cells), 2)
    for (cell, (study, found)), (rate, state) in zip(cells.items(), axes, strict=True):
        for number, side in enumerate(study.sides):
            figures.line(rate, along_the_rate(study, side, cell), number, side)
            middle = mean(tests(found, side, study.seeds))
            figures.line(state, [(found[side, study.seeds[0]]["optimizer_mib"], middle)], number, side)
        figures.log_x(rate)
        figures.named(rate, f"{cell.name}: sensitivity", "learning rate of matrices", "lowest dev loss, seed 0")
        figures.named(state, f"{cell.name}: loss over memory", "optimizer state, MiB", "test loss")
    figures.save(figure, path)
