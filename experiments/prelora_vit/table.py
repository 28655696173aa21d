"""results.csv, curves.csv, the README's tables and figure.png of ``prelora_vit``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.prelora_vit.study import EPOCHS, LATEST, RUNS, SEEDS, STEPS, final
from experiments.runs import Job
from experiments.tables import fill, keys, machines, mean, need, plain_row, series, spread, table, write_csv, write_curves
from lowrank_pretrain.core.protocols import PHASES

CURVES = ("val/acc1", "val/loss", "train/loss", "time/train_seconds", "lowrank/weight_norm/", "lowrank/base_norm/",
          "lowrank/adapter_norm/", "lowrank/phase")  # fmt: skip
# the source: validation top-1 at epoch 299 and the last joint epoch, from its published logs; top-1 before and after the freeze
ACCURACY = {"full": ("71.86", "–"), "exp1": ("71.43", "124"), "exp2": ("71.23", "150"), "exp3": ("71.28", "182")}
WARMUPS = {
    "exp2-w1": ("5", "71.45", "70.37 → 69.66"), "exp2": ("10", "71.23", "70.69 → 69.96"),
    "exp2-w3": ("15", "71.36", "70.42 → 70.12"),
}  # fmt: skip
Found = dict[tuple[str, int], dict[str, Any]]


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    found = dict(zip(jobs, need([*jobs.values()], where), strict=True))
    write_csv(here / "results.csv", [row(where, job, found[key]) for key, job in jobs.items()])
    write_curves(here / "curves.csv", where, jobs.values(), CURVES)
    readme = here / "README.md"
    fill(readme, "machine", machines(found.values(), 1))
    fill(readme, "accuracy", accuracy(found, jobs))
    fill(readme, "costs", costs(found))
    fill(readme, "warmup", warmups(where, found, jobs))
    draw(where, jobs, found, here / "figure.png")


def phase(found: dict[str, Any], name: str) -> dict[str, Any]:
    """A phase's record."""
    return next(record for record in found["summary"]["phases"] if record["phase"] == name)


def dip(run_dir: Path, freeze_step: int) -> tuple[float, float]:
    """Validation accuracy at the freeze and an epoch later."""
    seen = series(run_dir, "val/acc1")
    return [v for step, v in seen if step <= freeze_step][-1], next(v for step, v in seen if step > freeze_step)


def row(where: Path, job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Of results.csv."""
    one = plain_row(job, found)
    for record in found["summary"]["phases"]:
        name = record["phase"]
        one |= {f"{name}_seconds_per_epoch": record["seconds"] / record["steps"] * STEPS}
        one |= {f"{name}_images_per_second": record["samples_per_sec"], f"{name}_trainable": record["trainable"]}
        one |= {f"{name}_optimizer_gib": record["optimizer_gib"], f"{name}_peak_gib": record["peak_gib"]}
    if one["freeze_step"]:
        one["acc1_at_freeze"], one["acc1_an_epoch_later"] = dip(where / job.name, one["freeze_step"])
    return one


def tests(found: Found, run: str, key: str = "test/acc1", scale: float = 100) -> list[float]:
    """A final figure of each seed."""
    return [found[run, seed]["summary"]["final"][key] * scale for seed in SEEDS]


def seconds(found: Found, run: str) -> float:
    """Mean training seconds of an epoch over a whole run."""
    return mean(sum(record["seconds"] for record in found[run, seed]["summary"]["phases"]) for seed in SEEDS) / EPOCHS


def seconds_until(found: dict[str, Any], step: int) -> float:
    """Training seconds to optimizer step `step`, from the phases' mean step times."""
    total = 0.0
    for record in found["summary"]["phases"]:
        part = min(step, record["steps"])
        total, step = total + part * record["seconds"] / record["steps"], step - part
    return total


def accuracy(found: Found, jobs: dict[tuple[str, int], Job]) -> str:
    """Fig. 4: accuracy and time of Exp1, 2, 3 against full training."""
    lines = []
    for run, (top1, froze) in ACCURACY.items():
        facts, own = jobs[run, SEEDS[0]].facts, [found[run, seed]["summary"] for seed in SEEDS]
        tols = f"{facts['weight_tol']:.2%} / {facts['loss_tol']:.2%}" if run != "full" else "–"
        epochs = [
            f"{s['switch_step'] / STEPS:g}{'*' * (s['switch_step'] == LATEST * STEPS)} → {s['freeze_step'] / STEPS:g}"
            for s in own if run != "full"
        ] or ["–"]  # fmt: skip
        gap = mean(tests(found, run)) - mean(tests(found, "full"))
        lines.append([
            run, top1, froze, tols, ", ".join(epochs), spread(tests(found, run), "{:.1f}"),
            "–" if run == "full" else f"{gap:+.1f}", spread(tests(found, run, "test/loss", 1)), f"{seconds(found, run):.2f}",
            f"{seconds(found, 'full') / seconds(found, run):.2f}",
        ])  # fmt: skip
    head = ["run", "source: top-1, %", "source: freeze, epoch of 300", "ours: tolerances, weight / loss",
            f"ours: switch → freeze, epoch of {EPOCHS}, by seed", "ours: test accuracy, %", "against full, points",
            "test loss", "seconds an epoch, whole run", "speed-up"]  # fmt: skip
    return table(head, lines)


def costs(found: Found) -> str:
    """The abstract's ratios, of Exp2's phases."""

    def both(value: Any, form: str) -> list[str]:
        full, low = (mean(value(phase(found["exp2", seed], name)) for seed in SEEDS) for name in ("full", "lowrank"))
        return [form.format(full), form.format(low), f"{low / full:.2f}"]

    share = lambda record: 100 * record["trainable"] / record["total"]  # noqa: E731
    return table(
        ["", "source: full", "source: low-rank", "source: ratio", "ours: full", "ours: low-rank", "ours: ratio"],
        [
            ["trainable share, %", "100", "10", "0.1", *both(share, "{:.1f}")],
            ["throughput, images/s", "4000", "13000", "3.25", *both(lambda r: r["samples_per_sec"], "{:.0f}")],
            ["seconds an epoch", "300", "195", "0.65", *both(lambda r: r["seconds"] / r["steps"] * STEPS, "{:.2f}")],
            ["memory (GB) / resident, libraries too (GiB)", "20", "16", "0.80", *both(lambda r: r["peak_gib"], "{:.2f}")],
            ["optimizer state, MiB", "–", "–", "–", *both(lambda r: 1024 * r["optimizer_gib"], "{:.2f}")],
        ],
    )


def warmups(where: Path, found: Found, jobs: dict[tuple[str, int], Job]) -> str:
    """Fig. 5: loss and speed-up by warm-up window."""
    lines = []
    for run, (epochs, top1, change) in WARMUPS.items():
        dips = [dip(where / jobs[run, s].name, found[run, s]["summary"]["freeze_step"]) for s in SEEDS]
        before, after = (100 * mean(d[i] for d in dips) for i in (0, 1))
        lines.append([
            epochs, top1, change, RUNS[run][1], spread(tests(found, run), "{:.1f}"), spread(tests(found, run, "test/loss", 1)),
            f"{before:.1f} → {after:.1f}", f"{seconds(found, 'full') / seconds(found, run):.2f}",
        ])  # fmt: skip
    head = ["source: w, epochs of 300", "source: top-1, %", "source: before → after freeze", f"ours: w, epochs of {EPOCHS}",
            "test accuracy, %", "test loss", "validation accuracy at the freeze → an epoch later, %", "speed-up"]  # fmt: skip
    return table(head, lines)


def draw(where: Path, jobs: dict[tuple[str, int], Job], found: Found, path: Path) -> None:
    """Its Fig. 2 to 6, of seed 1."""
    seed, names = SEEDS[0], list(RUNS)
    figure, axes = figures.panels(2, 4)
    norms, accuracies, timed, flow, losses, faster, bases, adapters = axes.flat

    def curve(run: str, key: str) -> list[tuple[float, float]]:
        return [(step / STEPS, value) for step, value in series(where / jobs[run, seed].name, key)]

    def family(key: str) -> str:
        return key.split("/")[-1].removeprefix("model.").removeprefix("blocks.*.")

    for number, key in enumerate(keys(where / jobs["full", seed].name, "lowrank/weight_norm/")):
        points = curve("full", key)
        figures.line(norms, [(x, y / points[0][1]) for x, y in points], number, family(key))
    figures.named(norms, "full training: weight norms by module (Fig. 3)", "epoch", "mean ‖W‖, first epoch = 1")
    for number, run in enumerate(("full", "exp1", "exp2", "exp3")):
        points = [(x, 100 * y) for x, y in curve(run, "val/acc1") if x > EPOCHS / 3]  # as there: not the beginning
        figures.line(accuracies, points, number, run)
        by_time = [(seconds_until(found[run, seed], round(x * STEPS)), y) for x, y in points]
        figures.line(timed, by_time, number, run)
    figures.named(accuracies, "accuracy by epoch (Fig. 4 a)", "epoch", "validation accuracy, %")
    figures.named(timed, "accuracy by time (Fig. 4 b)", "training seconds, without validation", "validation accuracy, %")
    for number, run in enumerate(WARMUPS):
        figures.line(losses, [p for p in curve(run, "val/loss") if p[0] > EPOCHS / 3], number, f"w = {RUNS[run][1]}")
        for axis, key in ((bases, "lowrank/base_norm/"), (adapters, "lowrank/adapter_norm/")):
            name = next(k for k in keys(where / jobs[run, seed].name, key) if k.endswith("qkv.q"))
            points = curve(run, name)
            figures.line(axis, points, number, f"w = {RUNS[run][1]}")
    figures.named(losses, "warm-up windows (Fig. 5 a)", "epoch", "validation loss (cross entropy)")
    figures.bars(
        faster, [str(RUNS[run][1]) for run in WARMUPS], [seconds(found, "full") / seconds(found, run) for run in WARMUPS]
    )
    faster.axhline(1, color="black", linestyle="--", label="full training")
    figures.named(faster, "speed-up of whole runs (Fig. 5 b)", "w, epochs", "full training's time over the run's")
    figures.named(bases, "query, base: from the switch on (Fig. 6 a)", "epoch", "mean ‖W‖")
    figures.named(adapters, "query, adapters (Fig. 6 b)", "epoch", "mean ‖s·BA‖")
    for place, run in enumerate(reversed(names)):
        left = 0.0
        for number, name in enumerate(PHASES):
            width = sum(r["steps"] for r in found[run, seed]["summary"]["phases"] if r["phase"] == name) / STEPS
            flow.barh(place, width, left=left, color=str(0.9 - 0.3 * number), edgecolor="black", hatch=figures.HATCHES[number],
                      label=name if not place else None)  # fmt: skip
            left += width
    flow.set_yticks(range(len(names)), reversed(names))
    figures.named(flow, "workflow, from the runs' phase records (Fig. 2)", "epoch", "run")
    figures.save(figure, path)
