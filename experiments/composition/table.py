"""results.csv, figure.png and the README's tables, from the runs that are there."""

import statistics
from pathlib import Path
from typing import Any

from experiments import figures
from experiments.composition.study import CELLS, TASKS, final
from experiments.runs import Job
from experiments.tables import fill, machines, need, write_csv

NEIGHBOURS = {  # a composed cell, and the single methods that it is made of
    "prelora_galore": ("prelora", "galore"), "prelora_lte": ("prelora", "lte"), "lte_galore": ("lte", "galore"),
    "prelora_lte_galore": ("prelora", "lte", "galore"),
}  # fmt: skip


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    found = need([*jobs.values()], where)
    table = [row(job, one) for job, one in zip(jobs.values(), found, strict=True)]
    write_csv(here / "results.csv", table)
    fill(here / "README.md", "machine", machines(found, 1))
    for task in TASKS:
        fill(here / "README.md", task, markdown(table, task))
    draw(table, here / "figure.png")


def row(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Of results.csv."""
    summary, wire = found["summary"], found["wire"]
    last, ended = summary["phases"][-1], summary["final"]
    end = wire[last["phase"]] if last["phase"] in wire else list(wire.values())[-1]
    return {
        **job.facts, "test_loss": ended["test/loss"], "test_acc1": ended.get("test/acc1", ""), "cpu_seconds": found["cpu"],
        "wall_seconds": found["wall"], "peak_gib": found["peak_gib"], "optimizer_mib": found["optimizer_mib"],
        "sent_kib_per_step_last_phase": end / 1024,
        "sent_mib_whole_run": sum(wire.get(p["phase"], end) * p["steps"] for p in summary["phases"]) / 2**20,
        "trainable_last_phase": last["trainable"], "switch_step": summary["switch_step"], "freeze_step": summary["freeze_step"],
    }  # fmt: skip


def mean(table: list[dict[str, Any]], task: str, cell: str, key: str) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [float(row[key]) for row in table if row["task"] == task and row["cell"] == cell and row[key] != ""]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table: list[dict[str, Any]], task: str) -> str:
    """The table of a task, and which composed cells beat both neighbours on an axis at no worse a loss."""
    lines = [
        "| cell | lr | test loss | accuracy | sent, KiB a step (last phase) | sent, MiB (whole run) | optimizer, MiB "
        "| trainable | peak, GiB | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    cells = [cell for cell in CELLS if any(row["task"] == task and row["cell"] == cell for row in table)]
    for cell in cells:
        keys = [key for key in table[0] if isinstance(table[0][key], (int, float)) and key != "seed"]
        of = next(row for row in table if row["task"] == task and row["cell"] == cell)
        get = {key: mean(table, task, cell, key) for key in keys if of[key] != ""}
        accuracy = "{:.1%} ± {:.1%}".format(*mean(table, task, cell, "test_acc1")) if of["test_acc1"] != "" else ""
        lines.append(
            f"| {cell} | {of['lr']:g} | {get['test_loss'][0]:.4f} ± {get['test_loss'][1]:.4f} | {accuracy} "
            f"| {get['sent_kib_per_step_last_phase'][0]:.0f} | {get['sent_mib_whole_run'][0]:.0f} "
            f"| {get['optimizer_mib'][0]:.2f} "
            f"| {get['trainable_last_phase'][0]:,.0f} | {get['peak_gib'][0]:.2f} | {get['cpu_seconds'][0]:.1f} |"
        )
    lines.append("")
    for cell, around in NEIGHBOURS.items():
        if all(c in cells for c in (cell, *around)):
            lines.append(f"- {cell}: {verdict(table, task, cell, around)}")
    return "\n".join(lines) + "\n"


def verdict(table: list[dict[str, Any]], task: str, cell: str, around: tuple[str, ...]) -> str:
    """Against each neighbour: on which axes a cell is below it, or that its loss is higher by more than one deviation."""
    loss, spread = mean(table, task, cell, "test_loss")
    axes = {"sent_kib_per_step_last_phase": "bytes", "optimizer_mib": "optimizer memory", "cpu_seconds": "seconds"}
    said = []
    for other in around:
        theirs, its_spread = mean(table, task, other, "test_loss")
        below = [
            word for key, word in axes.items() if mean(table, task, cell, key)[0] < 0.98 * mean(table, task, other, key)[0]
        ]
        if loss > theirs + max(spread, its_spread):
            said.append(f"loses to {other} (loss {loss:.3f} against {theirs:.3f})")
        else:
            said.append(f"no worse a loss than {other}, and less in {', '.join(below) or 'nothing'}")
    return "; ".join(said)


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Loss over bytes per step, a panel for each task; the marker's size is the optimizer's memory."""
    tasks = [task for task in TASKS if any(row["task"] == task for row in table)]
    figure, axes = figures.panels(1, len(tasks))
    for axis, task in zip(axes.flat, tasks, strict=True):
        cells = [cell for cell in CELLS if any(row["task"] == task and row["cell"] == cell for row in table)]
        for cell in cells:
            x, (y, deviation) = mean(table, task, cell, "sent_kib_per_step_last_phase")[0], mean(table, task, cell, "test_loss")
            size = 24 + 60 * mean(table, task, cell, "optimizer_mib")[0]
            marker = "*" if cell == "full" else "s" if cell.endswith("galore") else "o"
            color = "black" if cell.startswith("prelora") else "white"
            axis.errorbar(x, y, deviation, color="0.5", linewidth=1, zorder=1)
            axis.scatter(x, y, size, marker=marker, facecolor=color, edgecolor="black", zorder=2)
            left = cell in ("prelora", "galore", "prelora_galore")  # so that no two names overlap
            offset = (-9 if left else 9, -12 if cell in ("prelora_lte", "prelora_galore") else 4)
            axis.annotate(cell, (x, y), xytext=offset, textcoords="offset points", fontsize=8, ha="right" if left else "left")
        axis.set_xscale("log")
        axis.margins(0.15)
        figures.named(axis, task, "sent per step and worker in the last phase, KiB", "test loss (cross entropy), 3 seeds")
    figure.suptitle("circles: adapters, squares: projections; black: after a switch; size: optimizer memory", fontsize=9)
    figures.save(figure, path)
