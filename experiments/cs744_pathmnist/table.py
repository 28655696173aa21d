"""results.csv, memory.csv, curves.csv, the README's tables and figure.png of ``cs744_pathmnist``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.cs744_pathmnist.study import EPOCHS, MEMORY, MEMORY_RANKS, POINTS, PRETRAIN, SEEDS, STEPS, final
from experiments.runs import Job
from experiments.tables import fill, machines, mean, need, plain_row, series, spread, table, write_csv, write_curves

MB = 1e6
NAMES = {"vit_base": "ViT-B/16", "vit_large": "ViT-L/16"}
SHARE = 0.95  # of the validation accuracy that fine-tuning in full ends with: how soon is it there?
Found = dict[tuple[str, int], dict[str, Any]]


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    memory = {(job.facts["network"], job.facts["rank"]): one for job, one in zip(MEMORY, need(MEMORY, where), strict=True)}
    started = need([PRETRAIN], where)[0]
    found = dict(zip(jobs, need([*jobs.values()], where), strict=True))
    write_csv(here / "results.csv", [plain_row(job, found[key]) for key, job in jobs.items()])
    columns = ("peak", "weights", "states", "trainable", "total", "load")
    write_csv(here / "memory.csv", [
        {"network": network, "rank": rank or "full", **{column: one[column] for column in columns}}
        for (network, rank), one in memory.items()
    ])  # fmt: skip
    write_curves(here / "curves.csv", where, jobs.values(), ("val/acc1", "val/loss"))
    readme = here / "README.md"
    fill(readme, "machine", machines([*memory.values(), started, *found.values()], 2))
    fill(readme, "memory", memories(memory))
    fill(readme, "convergence", convergence(where, found, jobs))
    draw(where, memory, jobs, here / "figure.png")


def memories(memory: dict[tuple[str, int], dict[str, Any]]) -> str:
    """By rank, for both networks."""
    lines = []
    for rank in MEMORY_RANKS:
        base, large = (memory[network, rank] for network in NAMES)
        full = [memory[network, 0] for network in NAMES]
        lines.append([
            rank or "full", f"{base['peak'] / MB:.0f}", f"{large['peak'] / MB:.0f}", "1.95" if rank else "–",
            f"{large['peak'] / base['peak']:.2f}", "lighter" if rank else "–",
            *(f"{one['peak'] / of['peak']:.2f}" for one, of in zip((base, large), full, strict=True)),
            *(f"{one['trainable'] / one['total']:.1%}" for one in (base, large)),
        ])  # fmt: skip
    head = ["rank", "ours: ViT-B, MB", "ours: ViT-L, MB", "source: L / B (11900 / 6100)", "ours: L / B", "source: against full",
            "ours: ViT-B against full", "ViT-L against full", "trainable, ViT-B", "trainable, ViT-L"]  # fmt: skip
    return table(head, lines)


def accuracy(where: Path, job: Job) -> list[tuple[int, float]]:
    """(step, validation accuracy)."""
    return series(where / job.name, "val/acc1")


def convergence(where: Path, found: Found, jobs: dict[tuple[str, int], Job]) -> str:
    """Steps to a share of what fine-tuning in full ends with, and the end."""
    goal = SHARE * mean(accuracy(where, jobs["full", seed])[-1][1] for seed in SEEDS)
    lines = []
    for point in POINTS:
        first = [next((step for step, acc in accuracy(where, jobs[point, s]) if acc >= goal), None) for s in SEEDS]
        per_step = mean(p["seconds"] / p["steps"] for s in SEEDS for p in found[point, s]["summary"]["phases"])
        reached = [step for step in first if step is not None]
        lines.append([
            point, f"{jobs[point, SEEDS[0]].facts['lr']:g}",
            ", ".join("not reached" if step is None else str(step) for step in first),
            f"{mean(reached) * per_step:.1f}" if len(reached) == len(first) else "–",
            spread([100 * found[point, s]["summary"]["final"]["test/acc1"] for s in SEEDS], "{:.1f}"),
            spread([found[point, s]["summary"]["final"]["test/loss"] for s in SEEDS]),
            f"{found[point, SEEDS[0]]['summary']['phases'][-1]['trainable']:,}",
        ])  # fmt: skip
    head = ["fine-tuning", "lr", f"steps to {goal:.1%} validation accuracy, by seed", "seconds to it", "test accuracy, %",
            "test loss", "trainable"]  # fmt: skip
    return table(head, lines)


def draw(where: Path, memory: dict[tuple[str, int], dict[str, Any]], jobs: dict[tuple[str, int], Job], path: Path) -> None:
    """Memory by rank; accuracy by step."""
    figure, axes = figures.panels(1, 2)
    bars, curves = axes.flat
    names = [f"rank {rank}" if rank else "full" for rank in MEMORY_RANKS]
    for number, (network, words) in enumerate(NAMES.items()):
        figures.bars(bars, names, [memory[network, rank]["peak"] / MB for rank in MEMORY_RANKS], number, 2, words)
    figures.headroom(bars)
    figures.named(bars, "fine-tuning at 224 pixels, batch 1", "adapters", "resident peak, MB")
    for number, point in enumerate(POINTS):
        by_seed = [accuracy(where, jobs[point, seed]) for seed in SEEDS]
        points = [(row[0][0], 100 * mean(value for _, value in row)) for row in zip(*by_seed, strict=True)]
        figures.line(curves, points, number, point)
    title = f"made images, mean of {len(SEEDS)} seeds, {EPOCHS * STEPS} steps"
    figures.named(curves, title, "optimizer step", "validation accuracy, %")
    figures.save(figure, path)
