"""results.csv, search.csv, figure.png and the README's tables of ``slow_network``, from the sides that are complete."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments import figures
from experiments.runs import done
from experiments.slow_network.sides import SIDES, TASKS
from experiments.slow_network.study import PUBLISHED, Study
from experiments.tables import Missing, fill, machines, spread, table, write_csv
from lowrank_pretrain.run.search import Descent

NETWORKS = {"100 Mb/s": 1e8, "1 Gb/s": 1e9, "10 Gb/s": 1e10}
LIMITS = {"int8": 0.2, "int4": 0.5}  # per cent above float32's loss, on text
COMMAND = "python -m experiments.slow_network.study --only {} {}"
Row = dict[str, Any]


def write(study: Study, here: Path) -> None:
    """Write all that stands next to this file.

    Raises:
        Missing: no side is complete.
    """
    rows, found, lacking = collect(study)
    if not rows:
        raise Missing("no side is complete yet")
    write_csv(here / "results.csv", rows)
    write_csv(here / "search.csv", searches(study))
    readme = here / "README.md"
    fill(readme, "machine", machines(found, 1))
    for task in TASKS:
        fill(readme, task, losses(rows, task) or "Not run yet.")
    fill(readme, "wires", wires(rows) or "Not run yet.")
    fill(readme, "time", times(rows))
    fill(readme, "real", real_sizes(rows))
    fill(readme, "chosen", chosen(study))
    fill(readme, "lacking", "\n".join(f"- {line}" for line in lacking) or "All have been run.")
    draw(rows, here / "figure.png")


def collect(study: Study) -> tuple[list[Row], list[Row], list[str]]:
    """Return the rows of results.csv, what their runs found, and what has not been run."""
    rows: list[Row] = []
    found: list[Row] = []
    lacking = []
    for task in study.tasks:
        for side, spec in SIDES.items():
            missing = []
            for wire in ("float32", *spec.wires):
                some = finished(study, task, side, wire)
                if some is not None:
                    rows += [row for row, _ in some]
                    found += [one for _, one in some]
                elif wire == "float32" or side in wired(study, task):
                    missing.append(wire)
            if missing:
                why = "" if spec.there else f" (it needs {spec.needs}, which this installation does not have)"
                lacking.append(f"{task}, {side}, {', '.join(missing)}{why}: `{COMMAND.format(task, side)}`")
    return rows, found, lacking


def wired(study: Study, task: str) -> list[str]:
    """Return the sides whose wires are tried, as far as is known."""
    try:
        return study.wired(task)
    except Missing:
        return [*PUBLISHED]


def finished(study: Study, task: str, side: str, wire: str) -> list[tuple[Row, Row]] | None:
    """Return (row, what the run found) of each seed, ``None`` where one is missing or has diverged."""
    if side not in study.sides:
        return None
    try:
        jobs = study.reported(task, side, wire)
    except Missing:
        return None
    result = []
    for job in jobs:
        one = done(job, study.where)
        if one is None or "diverged" in one:
            return None
        final = one["summary"]["final"]
        result.append(({
            **job.facts, "dev_loss": final["val/loss"], "test_loss": final["test/loss"],
            "test_acc1": final.get("test/acc1", ""), "sent_mib": one["sent"] / 2**20, "train_cpu": one["train_cpu"],
            "steps": one["steps"], "optimizer_mib": one["optimizer_mib"], "load": one["load"],
        }, one))  # fmt: skip
    return result


def of(rows: Sequence[Row], task: str, side: str, wire: str = "float32") -> list[Row]:
    """Return one side's rows, by seed."""
    mine = [row for row in rows if (row["task"], row["side"], row["wire"]) == (task, side, wire)]
    return sorted(mine, key=lambda row: row["seed"])


def points(rows: Sequence[Row], task: str) -> list[tuple[str, str]]:
    """Return a task's (side, wire), in order."""
    return list(dict.fromkeys((row["side"], row["wire"]) for row in rows if row["task"] == task))


def above(mine: Sequence[Row], other: Sequence[Row]) -> str:
    """Return by how many per cent the test loss is above another's with the same seeds: mean, and each seed."""
    if not mine or not other:
        return ""
    by_seed = {row["seed"]: row["test_loss"] for row in other}
    differences = [100 * (row["test_loss"] / by_seed[row["seed"]] - 1) for row in mine if row["seed"] in by_seed]
    return f"{fmean(differences):+.2f} % ({', '.join(f'{d:+.2f}' for d in differences)})"


def seconds(mine: Sequence[Row], bits: float) -> float:
    """Return the simulated seconds of a run: measured compute, plus the counted bytes at so many bits a second."""
    return fmean(row["train_cpu"] for row in mine) + fmean(row["sent_mib"] for row in mine) * 2**20 * 8 / bits


def frontier(rows: Sequence[Row], task: str) -> list[tuple[float, float, str, str]]:
    """Return (MiB, loss, side, wire) of the points that no other beats in both, by MiB."""
    every = sorted(
        (fmean(r["sent_mib"] for r in mine), fmean(r["test_loss"] for r in mine), side, wire)
        for side, wire in points(rows, task) if (mine := of(rows, task, side, wire))
    )  # fmt: skip
    best, result = math.inf, []
    for point in every:
        if point[1] < best:
            result.append(point)
            best = point[1]
    return result


def losses(rows: Sequence[Row], task: str) -> str:
    """Return a task's table."""
    edge = {(side, wire) for _, _, side, wire in frontier(rows, task)}
    lines = []
    for side, wire in points(rows, task):
        mine = of(rows, task, side, wire)
        accuracy = [spread([100 * row["test_acc1"] for row in mine], "{:.1f}") + " %"] if task == "images" else []
        lines.append([
            side, wire, spread([row["test_loss"] for row in mine], "{:.4f}"), *accuracy, above(mine, of(rows, task, "ddp")),
            f"{fmean(row['sent_mib'] for row in mine):.2f}",
            f"{fmean(row['sent_mib'] / row['steps'] for row in mine) * 1024:.1f}", "yes" if (side, wire) in edge else "",
        ])  # fmt: skip
    if not lines:
        return ""
    head = ["side", "wire", "test loss", *["accuracy"] * (task == "images"), "above DDP (each seed)", "MiB, whole run",
            "KiB a step", "on the frontier"]  # fmt: skip
    return table(head, lines)


def wires(rows: Sequence[Row]) -> str:
    """Return the table of wires against float32 with the same seeds and settings."""
    lines = []
    for task in TASKS:
        for side, wire in points(rows, task):
            if wire == "float32":
                continue
            mine, plain = of(rows, task, side, wire), of(rows, task, side)
            more = 100 * (fmean(r["test_loss"] for r in mine) / fmean(r["test_loss"] for r in plain) - 1)
            limit = LIMITS.get(wire) if task == "text" else None
            fewer = fmean(r["sent_mib"] for r in plain) / fmean(r["sent_mib"] for r in mine)
            held = "" if limit is None else f"{limit:g} %: {'kept' if more <= limit else 'missed'}"
            lines.append([task, side, wire, f"{more:+.2f} %", above(mine, plain), held, f"1/{fewer:.1f}"])
    head = ["task", "side", "wire", "loss above float32's (of means)", "mean of pairs (each seed)", "limit", "bytes"]
    return table(head, lines) if lines else ""


def times(rows: Sequence[Row]) -> str:
    """Return the table of simulated seconds."""
    lines = []
    for task in TASKS:
        for side, wire in points(rows, task):
            mine = of(rows, task, side, wire)
            lines.append([
                task, side, wire, f"{fmean(r['train_cpu'] for r in mine):.1f}",
                *(f"{seconds(mine, bits):.1f}" for bits in NETWORKS.values()), spread([r["test_loss"] for r in mine], "{:.4f}"),
            ])  # fmt: skip
    return table(["task", "side", "wire", "compute alone, s", *NETWORKS, "test loss"], lines)


REAL = ("vit_small_patch32_224", "vit_large_patch16_224", "gpt2")
AT_8 = {  # side -> how the same side is set up at real sizes
    "diloco_h10": {"update": "full", "merge_every": 10},
    "diloco_h30": {"update": "full", "merge_every": 30},
    "diloco_h100": {"update": "full", "merge_every": 100},
    "muloco_h30": {"update": "full", "merge_every": 30},
    "lte_t10": {"rank": 16, "heads": 1, "merge_every": 10},
    "lte_t10_outer": {"rank": 16, "heads": 1, "merge_every": 10},
    "lte_t30": {"rank": 16, "heads": 1, "merge_every": 30},
    "lte_galore": {"update": "galore", "rank": 128, "merge_every": 10},
}


def real_sizes(rows: Sequence[Row]) -> str:
    """Return MiB a step and worker at N = 8 for the real models, by the code that sends, next to the text's loss."""
    import timm
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from lowrank_pretrain.lte.traffic import traffic

    with torch.device("meta"):
        models = {name: GPT2LMHeadModel(GPT2Config()) if name == "gpt2" else timm.create_model(name) for name in REAL}
    lines, ddp = [], {}
    for side, settings in AT_8.items():
        for wire in ("float32", *SIDES[side].wires):
            cells = []
            for name, model in models.items():
                found = traffic(model, workers=8, sync_rest="merge", wire=wire, **settings)  # type: ignore[arg-type]  # a dict of both
                ddp[name] = found["ddp"] / 2**20
                cells.append(f"{found['all'] / 2**20:.2f}")
            losses = [above(of(rows, task, side, wire), of(rows, task, "ddp")).partition(" (")[0] for task in TASKS]
            lines.append([side, wire, *cells, *losses])
    first = ["ddp", "float32", *(f"{ddp[name]:.2f}" for name in REAL), *["0"] * len(TASKS)]
    return table(["side", "wire", *REAL, *(f"loss above DDP's here, {task}" for task in TASKS)], [first, *lines])


NAMES = ("lr", "rest", "outer_lr", "outer_momentum")


def searched(study: Study) -> Iterator[tuple[str, str, Descent]]:
    """Yield every finished search with its task and side."""
    for task in study.tasks:
        for side in study.sides:
            try:
                yield task, side, study.best(task, side)
            except Missing:
                continue


def chosen(study: Study) -> str:
    """Return what each side has chosen, in how many runs, and whether its search has settled."""
    lines = []
    for task, side, descent in searched(study):
        values = study.values(task, side, descent.point)
        state = "no neighbour is better" if descent.settled else "the budget ended it"
        edges = ", ".join(descent.at_an_edge())
        cells = [f"{values[name]:g}" if name in values else "" for name in NAMES]
        end = state + (f"; at an edge: {edges}" if edges else "")
        lines.append([task, side, *cells, f"{study.loss(task, side, descent.point):.4f}", len(descent.tried), end])
    return table(["task", "side", *NAMES, "dev loss", "runs", "end"], lines)


def searches(study: Study) -> list[Row]:
    """Return every run of every finished search with its dev loss."""
    rows = []
    for task, side, descent in searched(study):
        for point in sorted(descent.tried):
            facts = study.job(task, side, point).facts
            rows.append({**facts, "dev_loss": study.loss(task, side, point), "chosen": point == descent.point})
    return rows


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw, for each task, loss over MiB with its frontier, and loss over simulated seconds at 100 Mb/s."""
    tasks = [task for task in TASKS if points(rows, task)]
    figure, axes = figures.panels(len(tasks), 2)
    sides = list(SIDES)
    for task, (by_bytes, by_time) in zip(tasks, axes, strict=True):
        edge = [(mib, loss) for mib, loss, *_ in frontier(rows, task)]
        by_bytes.plot(*zip(*edge, strict=True), color="0.6", linewidth=3, alpha=0.5, zorder=0, label="frontier")
        for side, wire in points(rows, task):
            mine = of(rows, task, side, wire)
            losses = [row["test_loss"] for row in mine]
            style = figures.style(sides.index(side))
            marker = figures.MARKERS[sides.index(side) % len(figures.MARKERS)]
            for axis, x in ((by_bytes, fmean(r["sent_mib"] for r in mine)), (by_time, seconds(mine, NETWORKS["100 Mb/s"]))):
                axis.errorbar(
                    x, fmean(losses), [[fmean(losses) - min(losses)], [max(losses) - fmean(losses)]], color=style["color"],
                    marker=marker, markersize=6, linewidth=1, markerfacecolor=style["color"] if wire == "float32" else "white",
                    label=side if wire == "float32" else None,
                )  # fmt: skip
                if wire != "float32":
                    axis.annotate(wire, (x, fmean(losses)), xytext=(4, 4), textcoords="offset points", fontsize=6)
        for axis in (by_bytes, by_time):
            axis.set_xscale("log")
        figures.named(by_bytes, f"{task}: loss over bytes", "sent by a worker in the whole run, MiB", "test loss, 3 seeds")
        figures.named(by_time, f"{task}: loss over time", "simulated seconds at 100 Mb/s", "test loss, 3 seeds")
    figure.suptitle("4 workers; filled: float32, hollow: fewer bits; bars: lowest and highest seed", fontsize=9)
    figures.save(figure, path)
