"""results.csv, the README's tables and figure.png of ``prelora_glyphs``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.prelora_glyphs.study import EPOCHS, STEPS, Study
from experiments.runs import Job, done
from experiments.tables import Missing, fill, machines, mean, need, plain_row, series, spread, table, together, write_csv

Found = dict[tuple[str, int], dict[str, Any]]


def write(study: Study, here: Path) -> None:
    """Write all that stands next to this file: of every side whose runs are all done.

    Raises:
        Missing: full training's are not.
    """
    jobs, lacking = {}, []
    for key, job in study.final().items():
        if done(job, study.where) is None:
            lacking.append(f"{key[0]} (seed {key[1]})")
        else:
            jobs[key] = job
    seeds = [seed for seed in study.seeds if ("full", seed) in jobs]
    if not seeds:
        raise Missing("full training is not done")
    found = dict(zip(jobs, need([*jobs.values()], study.where), strict=True))
    write_csv(here / "results.csv", [row(job, found[key]) for key, job in jobs.items()])
    left = f"\n\nNot run: {', '.join(lacking)}." if lacking else ""
    fill(here / "README.md", "machine", machines(found.values(), together(found.values())) + left)
    fill(here / "README.md", "accuracy", accuracy(study, found))
    draw(study, jobs, here / "figure.png")


def row(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of results.csv."""
    one = plain_row(job, found) | {"together": together([found])}
    one |= {f"{phase}_cpu_seconds_per_step": seconds for phase, seconds in found.get("step_cpu", {}).items()}
    for record in found["summary"]["phases"]:
        one[f"{record['phase']}_images_per_second"] = record["samples_per_sec"]
        one[f"{record['phase']}_peak_gib"] = record["peak_gib"]
    return one


def accuracy(study: Study, found: Found) -> str:
    """Return the table: accuracy, what of it full training has, when it switched, speed of the last phase."""
    lines = []
    for side in study.sides:
        own = {seed: found[side, seed] for seed in study.seeds if (side, seed) in found}
        if not own:
            continue
        scores = [100 * one["summary"]["final"]["test/acc1"] for one in own.values()]
        gaps = [100 * (one["summary"]["final"]["test/acc1"] - found["full", seed]["summary"]["final"]["test/acc1"])
                for seed, one in own.items() if ("full", seed) in found]  # fmt: skip
        switches = [f"{one['summary']['switch_step'] / STEPS:g} → {one['summary']['freeze_step'] / STEPS:g}"
                    for one in own.values() if one["summary"]["switch_step"]] or ["–"]  # fmt: skip
        phases = [one["summary"]["phases"] for one in own.values()]
        last = phases[0][-1]
        speed = [one["step_cpu"]["full"] / one["step_cpu"][last["phase"]] for one in own.values() if one.get("step_cpu")]
        minutes = [one["cpu"] / 60 for one in own.values()]
        lines.append([
            side, spread(scores, "{:.2f}"), "–" if side == "full" else f"{mean(gaps):+.2f}",
            spread([one["summary"]["final"]["test/loss"] for one in own.values()], "{:.4f}"), ", ".join(switches),
            f"{100 * last['trainable'] / phases[0][0]['total']:.0f}",
            "–" if side == "full" or not speed else f"{mean(speed):.2f}", f"{mean(minutes):.1f}",
            f"{mean(one['optimizer_mib'] for one in own.values()):.0f}", len(own),
        ])  # fmt: skip
    head = ["run", "test accuracy, %", "against full, points", "test loss", f"switch → freeze, epoch of {EPOCHS}, by seed",
            "trained at the end, % of full", "speed of the last phase, full phase = 1", "CPU minutes of the run",
            "states at the end, MiB", "seeds"]  # fmt: skip
    return table(head, lines)


def draw(study: Study, jobs: dict[tuple[str, int], Job], path: Path) -> None:
    """Draw accuracy and training loss over epochs, of the first seed."""
    figure, axes = figures.panels(1, 2)
    for number, side in enumerate(side for side in study.sides if (side, study.seeds[0]) in jobs):
        run_dir = study.where / jobs[side, study.seeds[0]].name
        figures.line(axes[0][0], [(step / STEPS, 100 * y) for step, y in series(run_dir, "val/acc1")], number, side)
        losses: dict[int, list[float]] = {}
        for step, loss in series(run_dir, "train/loss"):
            losses.setdefault((step - 1) // STEPS + 1, []).append(loss)
        figures.line(axes[0][1], [(epoch, mean(some)) for epoch, some in losses.items()], number, side)
    axes[0][1].set_yscale("log")
    figures.named(axes[0][0], "accuracy on fonts never seen", "epoch", "validation accuracy, %")
    figures.named(axes[0][1], "training loss", "epoch", "cross entropy")
    figures.save(figure, path)
