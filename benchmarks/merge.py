"""Time a merge of whole weights: quantise, exchange, apply, next to a plain all-reduce of float32. Medians, interleaved.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/merge.py --out benchmarks/results/merge_cpu.jsonl
    python benchmarks/merge.py --model vit_tiny_patch16_224 --wires int8 --rounds 15
    python benchmarks/merge.py --overlap 5 --wires int8        # and what ten training steps take with a merge among them

Two processes (gloo), one thread each, ``LTEStrategy(update="full")``'s own merge of all parameters: from W to W, so forming
the increment, refusing NaN, error feedback, the outer step and writing W are in it. ``all-reduce`` sums one flat float32
buffer of the same size and does nothing else. Wall is the slower process's, CPU is the mean of both, all threads, the
kernel's copying included: on a busy machine CPU time is the steadier one. Ratios are medians over rounds; in a round every
side goes once, in an order that rotates.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.wire import WIRES
from lowrank_pretrain.lte.workers import Workers

WORLD, STEPS = 2, 10
MOST, MOST_OVERLAPPED = 1.5, 0.05  # int8's merge over the all-reduce; what a merge adds to ten steps
PLAIN = "all-reduce"


def model_of(name: str) -> nn.Module:
    """A timm model, the same in every process."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=1000)


def merging(model: nn.Module, wire: str, every: int = 1, **more: Any) -> FullSet:
    """All parameters as targets of DiLoCo."""
    settings = Settings(merge_every=every, wire=wire, outer_lr=0.7, outer_momentum=0.9, **more)
    full = FullSet(settings, Workers(dist.group.WORLD))
    full.start(dict(model.named_parameters()))
    return full


def merges(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time every wire's merge and the all-reduce by turns: per side a list of (wall of the slower, mean CPU, MiB sent)."""
    sides: dict[str, tuple[Callable[[], Any], FullSet | None]] = {}
    for wire in args.wires:
        full = merging(model_of(args.model), wire)
        sides[wire] = full.after_step, full
    flat = torch.randn(sum(p.numel() for p in model_of(args.model).parameters()))
    sides[PLAIN] = lambda: dist.all_reduce(flat.mul_(0.5)), None
    found: dict[str, list[list[float]]] = {side: [] for side in sides}
    noise = torch.Generator().manual_seed(rank)
    for i in range(-2, args.rounds):
        order = list(sides)
        for side in order[i % len(order) :] + order[: i % len(order)]:
            call, full = sides[side]
            for piece in full.pieces if full is not None else ():
                piece.p.data.add_(torch.randn(piece.p.shape, generator=noise), alpha=1e-3)
            cost = timed(call)
            if i >= 0:
                sent = 2 * (WORLD - 1) / WORLD * 4 * flat.numel() if full is None else full.last_cost[0]
                found[side].append([*cost, sent / 2**20])
    return {"merges": found, "numbers": flat.numel()}


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """(wall of the slower process, mean CPU of both), seconds."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    both = torch.zeros(WORLD, 2)
    both[dist.get_rank()] = torch.tensor([wall, cpu])
    dist.all_reduce(both)
    return both[:, 0].max().item(), both[:, 1].mean().item()


def steps(rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time ten training steps without a merge, with one at the end of them, and with one that overlaps them."""
    if "overlap" not in {one.name for one in fields(Settings)}:
        raise SystemExit("overlap: this installation has none")
    found: dict[str, list[list[float]]] = {}
    model = model_of(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    x, y = torch.randn(args.batch, 3, 224, 224), torch.arange(args.batch)
    for wire in args.wires:
        sides = {"no merge": None, f"{wire}": merging(model, wire, STEPS)}
        sides[f"{wire}, overlap {args.overlap}"] = merging(model, wire, STEPS, overlap=args.overlap)
        for i in range(-1, max(3, args.rounds // 3)):
            order = list(sides)
            for side in order[i % len(order) :] + order[: i % len(order)]:
                merger = sides[side]

                def ten(merger: FullSet | None = merger) -> None:
                    for _ in range(STEPS):
                        nn.functional.cross_entropy(model(x), y).backward()
                        optimizer.step()
                        optimizer.zero_grad()
                        if merger is not None:
                            merger.after_step()

                cost = timed(ten)
                if i >= 0:
                    found.setdefault(side, []).append([*cost, 0.0])
    return {"steps": found}


def process(rank: int, args: argparse.Namespace, meeting: str, answers: Any) -> None:
    """One of the two processes; rank 0 answers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    found = merges(rank, args) | (steps(rank, args) if args.overlap else {})
    if rank == 0:
        answers.put(found)
    dist.barrier()
    dist.destroy_process_group()


def shown(times: dict[str, list[list[float]]], against: str, part: str, limits: dict[str, str]) -> list[dict[str, Any]]:
    """Print a table of medians, and return its rows."""
    print(f"{'':24}{'wall ms':>10}{'ratio':>8}{'CPU ms':>10}{'ratio':>8}{'MiB sent':>10}")
    rows = []
    for side, some in times.items():
        wall, cpu, sent = (statistics.median(column) for column in zip(*some, strict=True))
        ratios = [
            statistics.median(mine[j] / plain[j] for mine, plain in zip(some, times[against], strict=True)) for j in (0, 1)
        ]
        print(
            f"{side:24}{1e3 * wall:10.1f}{ratios[0]:8.2f}{1e3 * cpu:10.1f}{ratios[1]:8.2f}{sent:10.1f}  {limits.get(side, '')}"
        )
        rows.append({"part": part, "side": side, "wall_ms": 1e3 * wall, "wall_ratio": ratios[0], "cpu_ms": 1e3 * cpu,
                     "cpu_ratio": ratios[1], "mib": sent})  # fmt: skip
    return rows


def main() -> None:
    """Run both processes, print the tables and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name")
    parser.add_argument("--wires", nargs="+", choices=list(WIRES), default=["float32", "int8", "int4", "int2"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--overlap", type=int, default=0, help="also time ten steps with a merge that overlaps so many")
    parser.add_argument("--batch", type=int, default=8, help="images of a training step")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines after the machine and the date")
    args = parser.parse_args()
    about = {**{k: v for k, v in vars(args).items() if k != "out"}, "machine": f"{platform.machine()}, {os.cpu_count()} cores",
             "torch": torch.__version__, "date": str(date.today()), "load": os.getloadavg()[0]}  # fmt: skip
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(process, (args, f"{folder}/meeting", answers), nprocs=WORLD, join=False)
        while not context.join():
            pass
    found = answers.get()
    about["numbers"] = found["numbers"]
    print(f"{about['date']} {about['machine']}, load {about['load']:.1f}; {args.model}, {found['numbers'] / 1e6:.1f} M numbers")
    rows = shown(found["merges"], PLAIN, "merge", {"int8": f"at most {MOST:g}"})
    if "steps" in found:
        limits = {side: f"at most {1 + MOST_OVERLAPPED:g}" for side in found["steps"] if "overlap" in side}
        rows += shown(found["steps"], "no merge", "ten steps", limits)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")


if __name__ == "__main__":
    main()
