"""Write the table of what a worker sends per optimizer step: DDP, LTE, DiLoCo and PreLoRA -> LTE, each with its wires.

    python benchmarks/lte_bytes.py --out benchmarks/results/lte_bytes.md

MiB per step and worker, 8 workers, rings. Nothing is estimated or run: ``lte.traffic`` has the code of training merge a copy of
the model without data, and takes what that counts as sent. LTE has one head of rank 16 to a worker. Three minutes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_pretrain.lte.traffic import traffic, traffic_of_run

WORKERS, FREEZE_AT = 8, 0.4
MODELS = {"ViT-S/32": "vit_small_patch32_224", "ViT-L/16": "vit_large_patch16_224", "GPT-2 124M": "gpt2"}
LTE: dict[str, Any] = {"heads": 1, "sync_rest": "merge"}
WIRES = ("float32", "bfloat16", "int8", "int4")


def bare(name: str) -> nn.Module:
    """Return a model that has shapes only."""
    with torch.device("meta"):
        if name == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            return GPT2LMHeadModel(GPT2Config())
        import timm

        return timm.create_model(name)


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield a row's name, the function that computes it, and its arguments."""
    yield "DDP", "ddp", {}
    yield 'LTE, T = 10, float32, `sync_rest="step"`', "step", {"merge_every": 10, **LTE, "sync_rest": "step"}
    for every in (10, 30):
        for wire in WIRES:
            yield f"LTE, T = {every}, {wire}", "step", {"merge_every": every, "wire": wire, **LTE}
    for every in (30, 100):
        for wire in (*WIRES, "int2"):
            name = "DiLoCo (MuLoCo)" if wire == "int2" else "DiLoCo"
            yield f"{name}, H = {every}, {wire}", "step", {"merge_every": every, "wire": wire, "update": "full"}
    for before, every, wire in (
        ("ddp", 10, "float32"), ("merge", 30, "float32"), ("merge", 30, "int8"), ("merge", 30, "int4"), ("merge", 100, "int4"),
    ):  # fmt: skip
        name = f"PreLoRA → LTE, T = {every}, {wire}, `before={before}`"
        yield name, "run", {"merge_every": every, "wire": wire, "before": before, "freeze_at": FREEZE_AT, **LTE}


def mebibytes(model: nn.Module, how: str, arguments: dict[str, Any]) -> float:
    """Return MiB per step of one row."""
    if how == "run":
        return traffic_of_run(model, workers=WORKERS, **arguments)["all"] / 2**20
    found = traffic(model, workers=WORKERS, **arguments)
    return found["ddp" if how == "ddp" else "all"] / 2**20


def number(value: float) -> str:
    """Return three digits, as a reader compares them.

    Example:
        >>> number(830.6), number(33.49), number(3.7), number(0.584)
        ('831', '33.5', '3.70', '0.58')
    """
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table() -> list[str]:
    """Return the lines of the table."""
    models = {title: bare(name) for title, name in MODELS.items()}
    lines = [f"| MiB per step and worker | {' | '.join(models)} |", f"|---|{'---|' * len(models)}"]
    for name, how, arguments in settings():
        cells = [number(mebibytes(model, how, arguments)) for model in models.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the table, or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file; default: print")
    args = parser.parse_args()
    head = [
        "# What a worker sends", "",
        f"Per optimizer step, {WORKERS} workers, computed by the sending code: `python benchmarks/lte_bytes.py`. LTE: one head",
        "of rank 16 to a worker, everything else averaged at merges unless said. PreLoRA → LTE: mean over a run with the",
        f"freeze at {100 * FREEZE_AT:.0f} % of the steps.", "",
    ]  # fmt: skip
    text = "\n".join([*head, *table()]) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
