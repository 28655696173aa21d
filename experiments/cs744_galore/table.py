"""results.csv, memory.csv, the README's tables and figure.png of ``cs744_galore``."""

from pathlib import Path
from typing import Any

from experiments import figures
from experiments.cs744_galore.study import LIVE, POINTS, SEEDS, SHAPES, final
from experiments.runs import Job
from experiments.tables import fill, machines, mean, need, plain_row, spread, table, write_csv

GIB = 2**30
NAMES = {"llama1b": "LLaMA 1B", "vit_base": "ViT-B/16", "vit_large": "ViT-L/16", "llama_cut": "LLaMA, cut"}
Memory = dict[tuple[str, str, int], dict[str, Any]]


def write(where: Path, here: Path) -> None:
    """Everything beside this file, from the runs in `where`.

    Raises:
        Missing: one of them is not there.
    """
    jobs = final(where)
    found = dict(zip(jobs, need([*jobs.values()], where), strict=True))
    shaped = {key(job): one for job, one in zip(SHAPES, need(SHAPES, where), strict=True)}
    lived = {key(job): one for job, one in zip(LIVE, need(LIVE, where), strict=True)}
    write_csv(here / "results.csv", [plain_row(job, found[key]) for key, job in jobs.items()])
    write_csv(here / "memory.csv", [
        {"kind": kind, "network": network, "dtype": dtype, "rank": rank or "AdamW",
         **{k: v for k, v in one.items() if k in ("weights", "gradients", "states", "formula", "peak", "parameters")}}
        for kind, some in (("shapes", shaped), ("live", lived)) for (network, dtype, rank), one in some.items()
    ])  # fmt: skip
    readme = here / "README.md"
    fill(readme, "machine", machines([*shaped.values(), *lived.values(), *found.values()], 2))
    fill(readme, "shapes", shapes(shaped))
    fill(readme, "live", live(lived))
    fill(readme, "ranks", ranks(found, jobs))
    draw(shaped, found, here / "figure.png")


def key(job: Job) -> tuple[str, str, int]:
    """(network, dtype, rank)."""
    return job.facts["network"], job.facts.get("dtype", "float32"), job.facts["rank"]


def total(one: dict[str, Any]) -> int:
    """Weights, gradients and states."""
    return one["weights"] + one["gradients"] + one["states"]


def shapes(found: Memory) -> str:
    """Everything but activations, by network and rank."""
    lines = []
    for (network, dtype, rank), one in found.items():
        adam = found[network, dtype, 0]
        layerwise = one["weights"] + one["states"] + one["largest_gradient"]
        source = "−30 %" if (network, dtype, rank) == ("llama1b", "bfloat16", 1024) else "–"
        if network != "llama1b" and rank == 512:
            source = "minimal"
        lines.append([
            NAMES[network], dtype, rank or "AdamW", *(f"{one[k] / GIB:.2f}" for k in ("weights", "states", "formula")),
            f"{total(one) / GIB:.2f}", source, f"{total(one) / total(adam) - 1:+.0%}" if rank else "–",
            f"{layerwise / total(adam) - 1:+.0%}" if rank else "–",
        ])  # fmt: skip
    head = ["network", "dtype", "rank", "weights, GiB", "states, GiB", "by formula", "with gradients, GiB",
            "source: against Adam", "ours: against AdamW", "ours, layer by layer"]  # fmt: skip
    return table(head, lines)


def live(found: Memory) -> str:
    """What a training process really held."""
    lines = []
    for (network, _, rank), one in found.items():
        adam = found[network, "float32", 0]
        lines.append([
            NAMES[network], rank or "AdamW", *(f"{one[k] / GIB:.3f}" for k in ("weights", "states", "formula", "peak")),
            f"{one['states'] / adam['states']:.2f}", f"{one['peak'] / adam['peak']:.2f}",
        ])  # fmt: skip
    head = ["network", "rank", "weights, GiB", "states, GiB", "by formula", "resident peak, GiB", "states, ratio",
            "peak, ratio"]  # fmt: skip
    return table(head, lines)


def tests(found: dict[tuple[str, int], Any], point: str) -> list[float]:
    """Test loss of each seed."""
    return [found[point, seed]["summary"]["final"]["test/loss"] for seed in SEEDS]


def ranks(found: dict[tuple[str, int], Any], jobs: dict[tuple[str, int], Job]) -> str:
    """Loss and states by rank. Points with one rate for all weights are in results.csv, and in no comparison."""
    lines, whole = [], mean(tests(found, "galore-r128"))
    for point in (point for point in POINTS if point.startswith("galore-r") and "scale" not in point):
        one = found[point, SEEDS[0]]
        lines.append([
            point, f"{jobs[point, SEEDS[0]].facts['lr']:g}", spread(tests(found, point)),
            f"{mean(tests(found, point)) - whole:+.3f}", f"{one['optimizer_mib']:.2f}",
            f"{mean(found[point, s]['cpu'] for s in SEEDS):.1f}",
        ])  # fmt: skip
    return table(["optimizer", "lr", "test loss", "against full rank", "states, MiB", "CPU seconds"], lines)


def draw(shaped: Memory, found: dict[tuple[str, int], Any], path: Path) -> None:
    """Memory by rank; loss by rank."""
    figure, axes = figures.panels(1, 2)
    memory, loss = axes.flat
    some = [(network, rank) for network, dtype, rank in shaped if (network, dtype) == ("llama1b", "bfloat16")]
    names = [f"rank {rank}" if rank else "AdamW" for _, rank in some]  # of GaLore
    base = [0.0] * len(some)
    for number, part in enumerate(("weights", "gradients", "states")):
        values = [shaped[network, "bfloat16", rank][part] / GIB for network, rank in some]
        memory.bar(names, values, bottom=base, color=str(0.9 - 0.3 * number), edgecolor="black", hatch=figures.HATCHES[number],
                   label=part)  # fmt: skip
        base = [a + b for a, b in zip(base, values, strict=True)]
    figures.headroom(memory)
    figures.named(memory, "LLaMA 1B in bfloat16, without activations", "optimizer", "GiB")
    points = [p for p in POINTS if p.startswith("galore-r") and "scale" not in p]
    xs = [int(p.removeprefix("galore-r")) for p in points]
    losses = [tests(found, p) for p in points]
    low = [mean(some) - min(some) for some in losses]
    high = [max(some) - mean(some) for some in losses]
    loss.errorbar(xs, [mean(some) for some in losses], [low, high], capsize=3, label="GaLore, mean and range of three seeds",
                  **{k: v for k, v in figures.style(0).items() if k != "markevery"})  # fmt: skip
    loss.axhline(mean(tests(found, "adamw")), color="0.4", linestyle="--", label="AdamW")
    loss.set_xscale("log", base=2)
    figures.named(loss, "LLaMA of width 128", "rank", "test loss (cross entropy)")
    figures.save(figure, path)
