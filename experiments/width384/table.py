"""results.csv and the README's tables of ``width384``, of the sides whose runs are done."""

from pathlib import Path
from typing import Any

from experiments.optimizers.table import interval, verdict
from experiments.runs import Job, done
from experiments.tables import Missing, fill, machines, mean, plain_row, series, spread, table, together, write_csv
from experiments.width384.sides import PARTS
from experiments.width384.study import SEEDS, Study, plain

Found = dict[tuple[str, int], dict[str, Any]]
WATCHED = {
    "lte/effective_rank/gradient": "effective rank of gradients",
    "lte/effective_rank/update": "effective rank of W − W₀",
    "lte/orthogonality": "mean cosine between two heads' updates",
}


def write(study: Study, here: Path) -> None:
    """Write all that stands next to this file.

    Raises:
        Missing: no side of any part is done.
    """
    rows, every = [], []
    for name in PARTS:
        try:
            jobs = study.reported(name)
        except Missing:
            jobs = {}
        found = {key: one for key, job in jobs.items() if (one := done(job, study.where)) is not None and "diverged" not in one}
        for key, one in found.items():
            rows.append(row(jobs[key], one))
            every.append(one)
        left = study.lacking(name)
        lines = [losses(name, jobs, found)] if found else []
        lines += [watched(study, jobs, found)] if found else []
        lines += [f"Not run: {', '.join(left)} (`python -m experiments.width384.study --parts {name}`)."] if left else []
        fill(here / "README.md", name, "\n\n".join(line for line in lines if line))
    if not every:
        raise Missing("no side is done")
    write_csv(here / "results.csv", rows)
    fill(here / "README.md", "machine", machines(every, together(every)))


def row(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    """Return a row of results.csv."""
    one = plain_row(job, found) | {"together": together([found]), "peak_gib": found["peak_gib"], "sent_bytes": found["sent"]}
    for record in found["summary"]["phases"]:
        one[f"{record['phase']}_samples_per_second"] = record["samples_per_sec"]
    return one


def losses(name: str, jobs: dict[tuple[str, int], Job], found: Found) -> str:
    """Return a part's table: test loss, paired with full training's, accuracy, state, bytes sent, CPU time."""
    anchor, lines = next(iter(PARTS[name].sides)), []
    for side in PARTS[name].sides:
        own = {seed: found[side, seed] for seed in SEEDS if (side, seed) in found}
        if not own:
            continue
        ended = [one["summary"]["final"] for one in own.values()]
        pairs = [
            100 * (one["summary"]["final"]["test/loss"] / found[anchor, seed]["summary"]["final"]["test/loss"] - 1)
            for seed, one in own.items() if (anchor, seed) in found
        ]  # fmt: skip
        against = "–"
        if side != anchor and pairs:
            middle, half = interval(pairs)
            against = f"{middle:+.2f} ± {half:.2f} ({verdict(pairs)})" if len(pairs) > 1 else f"{middle:+.2f} (one seed)"
        scores = [100 * one["test/acc1"] for one in ended if "test/acc1" in one]
        facts = next(iter(jobs[side, seed].facts for seed in own))
        rates = " / ".join(f"{facts[knob]:g}" for knob in ("lr", "rest", "adapters") if knob in facts)
        phases = next(iter(own.values()))["summary"]["phases"]
        speed = mean(one["summary"]["phases"][-1]["samples_per_sec"] / one["summary"]["phases"][0]["samples_per_sec"]
                     for one in own.values())  # fmt: skip
        lines.append([
            side, rates, spread([one["test/loss"] for one in ended], "{:.4f}"), against,
            spread(scores, "{:.2f}") if scores else "–", f"{phases[-1]['trainable'] / 1e6:.2f}",
            f"{next(iter(own.values()))['optimizer_mib']:.1f}", f"{mean(one['sent'] for one in own.values()) / 2**20:.0f}",
            f"{mean(one['cpu'] for one in own.values()):.0f}", f"{speed:.2f}" if len(phases) > 1 else "–", len(own),
        ])  # fmt: skip
    return table(
        ["side", "lr / rest / adapters", "test loss", f"against {anchor}, %", "accuracy, %", "trained at the end, M",
         "optimizer, MiB", "sent in all, MiB", "CPU s", "speed of the last phase, first = 1", "seeds"], lines
    )  # fmt: skip


def watched(study: Study, jobs: dict[tuple[str, int], Job], found: Found) -> str:
    """Return what was looked at over a run of one seed, at five steps; empty where nothing was."""
    lines = []
    for side, seed in found:
        if seed != SEEDS[0]:
            continue
        for key, words in WATCHED.items():
            curve = series(study.where / jobs[side, seed].name, key)
            if len(curve) > 1:
                at = [round(i * (len(curve) - 1) / 4) for i in range(5)]
                lines.append([plain(side), words, ", ".join(f"{curve[i][0]}: {curve[i][1]:.3g}" for i in at)])
    return table(["side", "watched, one seed", "step: value"], lines) if lines else ""
