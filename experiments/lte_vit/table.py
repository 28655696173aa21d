"""results.csv, curves.csv, the README's tables and figure.png of ``lte_vit``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.lte_vit.study import INTERVALS, LOOK, POINTS, SEEDS, UPDATES, WIDTHS, final
from experiments.runs import Job
from experiments.tables import (
    fill,
    keys,
    machines,
    mean,
    need,
    plain_row,
    series,
    spread,
    table,
    write_csv,
    write_curves,
)

CURVES = ("val/loss", "lte/effective_rank/", "lte/rank/", "lte/orthogonality", "lte/row_space_overlap")
Jobs, Found = dict[tuple[str, int], Job], dict[tuple[str, int], dict[str, Any]]
VIT = {64: ("vit64-full", "vit64-lte"), 128: ("full", "lte-h4-r32-t10"), 192: ("vit192-full", "vit192-lte")}


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    found = dict(zip(jobs, need([*jobs.values()], where), strict=True))
    write_csv(here / "results.csv", [plain_row(job, found[key]) for key, job in jobs.items()])
    write_curves(here / "curves.csv", where, jobs.values(), CURVES)
    readme = here / "README.md"
    updates = need([UPDATES], where)[0]
    fill(readme, "machine", machines([updates, *found.values()], 2))
    lora = ["full", *(p for p in POINTS if p.startswith(("lora", "mhlora")))]
    fill(readme, "observation 1", points(found, jobs, lora))
    fill(readme, "observation 2", over_time(where, jobs, "full", "lte/effective_rank/gradient", "effective rank of gradients"))
    fill(readme, "observation 3", points(found, jobs, ["full", "sequential-h4-r32", "lte-h4-r32-t10"]))
    merges = ["full", *(f"lte-h4-r32-t{t}" for t in INTERVALS), "lte-h4-r8-t10"]
    fill(readme, "observation 4", points(found, jobs, merges))
    fill(readme, "one matrix", one_matrix(updates["cosines"]))
    angles = [over_time(where, jobs, "lte-h4-r32-t10", key, words) for key, words in (
        ("lte/orthogonality", "mean cosine between two heads' updates"),
        ("lte/row_space_overlap", "mean cos² between their row spaces (random ones: R/D = 0.25)"),
    )]  # fmt: skip
    fill(readme, "observation 5", "\n\n".join(angles))
    fill(readme, "widths", widths(found, jobs))
    draw(where, jobs, found, here / "figure.png")


def tests(found: Found, point: str, key: str = "test/loss", scale: float = 1.0) -> list[float]:
    """A final figure of each seed that was run."""
    return [found[point, seed]["summary"]["final"][key] * scale for seed in SEEDS if (point, seed) in found]


def points(found: Found, jobs: Jobs, names: list[str]) -> str:
    """Loss and accuracy of some points, against full training."""
    lines = []
    for name in names:
        losses, last = tests(found, name), found[name, SEEDS[0]]["summary"]["phases"][-1]
        full = mean(tests(found, "full")[: len(losses)])  # of the same seeds
        lines.append([
            name, len(losses), f"{jobs[name, SEEDS[0]].facts['lr']:g}", spread(losses), f"{mean(losses) - full:+.3f}",
            spread(tests(found, name, "test/acc1", 100), "{:.1f}"), f"{last['trainable']:,}",
        ])  # fmt: skip
    return table(["run", "seeds", "lr", "test loss", "against full", "test accuracy, %", "trainable parameters"], lines)


def one_matrix(cosines: dict[str, float]) -> str:
    """How far a merge goes full training's way, beside what heads of random directions would on the same data."""
    width, steps = UPDATES.facts["width"], UPDATES.facts["steps"]
    lines = []
    for heads, rank in UPDATES.facts["heads"]:
        random = (1 + (width / rank - 1) / heads) ** -0.5
        lines.append([heads, rank, heads * rank, f"{random:.3f}", *(f"{cosines[f'{heads} {rank} {t}']:.3f}" for t in steps)])
    return table(["heads N", "rank R", "N·R", "if all heads saw all data, T = 1", *(f"cosine, T = {t}" for t in steps)], lines)


def over_time(where: Path, jobs: Jobs, point: str, key: str, words: str) -> str:
    """A watched figure at the beginning, in the middle and at the end, over seeds."""
    curves = [series(where / jobs[point, seed].name, key) for seed in SEEDS]
    count = min(map(len, curves))
    at = [0, count // 4, count // 2, 3 * count // 4, count - 1]
    head = [f"{words}, at step", *(curves[0][i][0] for i in at)]
    return table(head, [[point, *(spread([curve[i][1] for curve in curves]) for i in at)]])


def widths(found: Found, jobs: Jobs) -> str:
    """Full against LTE at every width of both networks."""
    lines = []
    for net in ("vit", "mixer"):
        for width in WIDTHS:
            full, lte = VIT[width] if net == "vit" else (f"mixer{width}-full", f"mixer{width}-lte")
            one = [found[point, SEEDS[0]]["summary"]["final"] for point in (full, lte)]
            rates = " / ".join(f"{jobs[point, SEEDS[0]].facts['lr']:g}" for point in (full, lte))
            lines.append([
                {"vit": "ViT", "mixer": "MLP-Mixer"}[net], width, rates, *(f"{f['test/loss']:.3f}" for f in one),
                *(f"{100 * f['test/acc1']:.1f}" for f in one),
            ])  # fmt: skip
    head = ["network", "width", "lr, full / LTE", "test loss, full", "LTE", "test accuracy, full, %", "LTE, %"]
    return table(head, lines)


def draw(where: Path, jobs: Jobs, found: Found, path: Path) -> None:
    """A panel for each observation, and the widths, all of seed 1."""
    figure, axes = figures.panels(2, 3)
    ranks, grads, merging, interval, angles, wide = axes.flat
    lora = [(int(p.removeprefix("lora-r")), tests(found, p)[0]) for p in POINTS if p.startswith("lora")]
    figures.line(ranks, lora, 0, "LoRA")
    joint = [(4 * int(p.rpartition("r")[2]), tests(found, p)[0]) for p in POINTS if p.startswith("mhlora")]
    figures.line(ranks, joint, 1, "MHLoRA, 4 heads")
    ranks.axhline(tests(found, "full")[0], color="0.5", linestyle=(0, (3, 3)), label="full training")
    ranks.set_xscale("log", base=2)
    figures.named(ranks, "1: rank and heads", "rank of all adapters of a matrix together", "test loss (cross entropy)")
    run = where / jobs["full", SEEDS[0]].name
    for number, key in enumerate(keys(run, "lte/effective_rank/gradient/")):
        figures.line(grads, series(run, key), number, key.split("blocks.*.")[-1])
    figures.named(grads, f"2: full training's gradients, every {LOOK} steps", "optimizer step", "effective rank")
    for number, point in enumerate(("full", "sequential-h4-r32", "lte-h4-r32-t10")):
        figures.line(merging, series(where / jobs[point, SEEDS[0]].name, "val/loss"), number, point)
    figures.named(merging, "3: sequential and parallel merging", "optimizer step", "validation loss (cross entropy)")
    figures.line(interval, [(t, tests(found, f"lte-h4-r32-t{t}")[0]) for t in INTERVALS], 0, "LTE, 4 heads of rank 32")
    interval.axhline(tests(found, "full")[0], color="0.5", linestyle=(0, (3, 3)), label="full training")
    interval.set_xscale("log")
    figures.named(interval, "4: merge interval", "T, optimizer steps", "test loss (cross entropy)")
    run = where / jobs["lte-h4-r32-t10", SEEDS[0]].name
    for number, (key, words) in enumerate(
        (("lte/orthogonality", "|cosine| of updates"), ("lte/row_space_overlap", "cos², rows"))
    ):
        figures.line(angles, series(run, key), number, words)
    angles.set_ylim(0, 1)
    figures.named(angles, "5: heads' directions", "optimizer step", "mean over pairs and matrices")
    number = 0
    for net in ("vit", "mixer"):
        for kind in (0, 1):
            names = [(w, (VIT[w] if net == "vit" else (f"mixer{w}-full", f"mixer{w}-lte"))[kind]) for w in WIDTHS]
            label = f"{'ViT' if net == 'vit' else 'Mixer'}, {('full', 'LTE')[kind]}"
            figures.line(wide, [(w, tests(found, name)[0]) for w, name in names], number, label)
            number += 1
    figures.named(wide, "widths", "width", "test loss (cross entropy)")
    figures.save(figure, path)
