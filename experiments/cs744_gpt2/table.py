"""results.csv, the README's tables and figure.png of ``cs744_gpt2``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.cs744_gpt2.study import EVERY, FULL, HEADS, INTERVALS, RANKS, REPLACED, SEEDS, SPEED, Point, final
from experiments.runs import Job
from experiments.tables import fill, machines, mean, need, plain_row, spread, table, write_csv

# the report's test losses: heads by rank at T = 10, and by T at 4 heads of rank 8
LOSS = {
    (2, 1): 6.35, (2, 4): 6.32, (2, 16): 6.33, (2, 64): 6.52, (4, 1): 6.23, (4, 4): 6.23, (4, 16): 6.27, (4, 64): 6.28,
    (8, 1): 6.25, (8, 4): 6.23, (8, 16): 6.24, (8, 64): 6.39,
}  # fmt: skip
BY_INTERVAL = {10: (6.23, 795), 20: (6.25, 794), 30: (6.29, 794), 40: (6.33, 793)}
Found = dict[tuple[Point, int], dict[str, Any]]


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    speed = need([SPEED], where)[0]
    found = dict(zip(jobs, need([*jobs.values()], where), strict=True))
    write_csv(here / "results.csv", [plain_row(job, found[key]) for key, job in jobs.items()])
    write_csv(here / "speed.csv", [
        {"side": name, "milliseconds": value, "of_full": value / speed["milliseconds"]["full"], "load": speed["load"],
         "trainable_124m": speed["parameters"][name.partition(", ")[2] or name]["trainable"]}
        for name, value in speed["milliseconds"].items()
    ])  # fmt: skip
    readme = here / "README.md"
    fill(readme, "machine", machines([speed, *found.values()], 2))
    fill(readme, "speed", speeds(speed))
    fill(readme, "heads and rank", heads_by_rank(found, jobs))
    fill(readme, "merge interval", intervals(found, jobs))
    fill(readme, "layers", layers(found, jobs))
    draw(found, speed, here / "figure.png")


def tests(found: Found, point: Point) -> list[float]:
    """Test loss of each seed that was run."""
    return [found[point, seed]["summary"]["final"]["test/loss"] for seed in SEEDS if (point, seed) in found]


def speeds(speed: dict[str, Any]) -> str:
    """Times and parameters of sequential and parallel heads."""
    times, counts = speed["milliseconds"], speed["parameters"]
    lines = []
    for rank in SPEED.facts["ranks"]:
        one, many, joint = (times[f"{kind}, rank {rank}"] for kind in ("sequential", "parallel", "joint"))
        saved = 1 - counts[f"rank {rank}"]["trainable"] / counts["full"]["trainable"]
        lines.append([
            rank, "1.25", f"{one / many:.2f}", f"{one / joint:.2f}", "about 1", f"{many / times['full']:.2f}",
            f"{joint / times['full']:.2f}", "24 %", f"{saved:.1%}",
        ])  # fmt: skip
    head = ["rank of 4 heads", "source: sequential / parallel, time", "ours: sequential / parallel (LTE)",
            "ours: sequential / joint (MHLoRA)", "source: parallel / full", "ours: LTE / full", "ours: MHLoRA / full",
            "source: fewer trainable parameters", "ours, GPT-2 124M"]  # fmt: skip
    return table(head, lines)


def heads_by_rank(found: Found, jobs: dict[tuple[Point, int], Job]) -> str:
    """The report's table of heads and ranks, each cell theirs / ours (rate)."""
    head = ["heads \\ rank: source / ours (lr)", *RANKS]
    lines = []
    for heads in HEADS:
        cells = []
        for rank in RANKS:
            point = Point(heads=heads, rank=rank)
            lr = jobs[point, SEEDS[0]].facts["lr"]
            cells.append(f"{LOSS[heads, rank]:.2f} / {tests(found, point)[0]:.3f} ({lr:g})")
        lines.append([heads, *cells])
    return table(head, lines)


def intervals(found: Found, jobs: dict[tuple[Point, int], Job]) -> str:
    """The report's table of merge intervals."""
    lines = []
    for point in INTERVALS:
        loss, seconds = BY_INTERVAL[point.every]
        one = found[point, SEEDS[0]]
        took = sum(phase["seconds"] for phase in one["summary"]["phases"])
        lr = jobs[point, SEEDS[0]].facts["lr"]
        lines.append([point.every, f"{loss:.2f}", f"{tests(found, point)[0]:.3f}", f"{lr:g}", seconds, f"{took:.1f}"])
    head = ["T", "source: test loss", "ours: test loss", "lr", "source: seconds", "ours: training seconds"]
    return table(head, lines)


def layers(found: Found, jobs: dict[tuple[Point, int], Job]) -> str:
    """Which layers have heads: loss and trainable parameters."""
    full = found[FULL, SEEDS[0]]["summary"]["phases"][-1]["trainable"]
    lines = []
    for point in (FULL, *REPLACED):
        trainable = found[point, SEEDS[0]]["summary"]["phases"][-1]["trainable"]
        losses = tests(found, point)
        against = mean(losses) - mean(tests(found, FULL)[: len(losses)])  # of the same seeds
        lines.append([
            " + ".join(point.layers) or "none (full)", len(losses), f"{jobs[point, SEEDS[0]].facts['lr']:g}",
            spread(losses), f"{against:+.3f}", f"{trainable:,}", f"{trainable / full:.2f}",
        ])  # fmt: skip
    return table(["layers with heads", "seeds", "lr", "test loss", "against full", "trainable", "of full's"], lines)


def draw(found: Found, speed: dict[str, Any], path: Path) -> None:
    """Times; heads by rank, intervals and layers, of seed 1."""
    figure, axes = figures.panels(2, 2)
    time, grid, interval, which = axes.flat
    ranks = SPEED.facts["ranks"]
    for number, kind in enumerate(("sequential", "parallel", "joint")):
        values = [speed["milliseconds"][f"{kind}, rank {rank}"] for rank in ranks]
        figures.bars(time, [str(rank) for rank in ranks], values, number, 3, kind)
    time.axhline(speed["milliseconds"]["full"], color="black", linestyle="--", label="full")
    figures.headroom(time)
    figures.named(time, "step of GPT-2 blocks, attention with 4 heads", "rank of a head", "milliseconds, median")
    for number, heads in enumerate(HEADS):
        points = [(rank, tests(found, Point(heads=heads, rank=rank))[0]) for rank in RANKS]
        figures.line(grid, points, number, f"{heads} heads")
    grid.set_xscale("log", base=4)
    figures.named(grid, "heads and rank, T = 10", "rank of a head", "test loss (cross entropy)")
    figures.line(interval, [(t, tests(found, Point(every=t))[0]) for t in EVERY], 0, "4 heads of rank 8")
    figures.named(interval, "merge interval", "T, optimizer steps", "test loss (cross entropy)")
    for number, point in enumerate((FULL, *REPLACED)):
        x = found[point, SEEDS[0]]["summary"]["phases"][-1]["trainable"] / 1e3
        label = " + ".join(point.layers) or "none (full)"
        which.plot(x, tests(found, point)[0], linestyle="", label=label, color=figures.COLORS[number],
                   marker=figures.MARKERS[number], markersize=8)  # fmt: skip
    figures.named(which, "layers with heads", "trainable parameters, thousands", "test loss (cross entropy)")
    which.legend(fontsize=8, loc="upper left")  # where no point is
    figures.save(figure, path)
