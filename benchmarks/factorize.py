"""Step time, memory and FLOPs of factored weights next to full training and to adapters, side by side in one run.

    python benchmarks/factorize.py                                          # ViT-S/16 224, batch 16, 2 CPU threads, float32
    python benchmarks/factorize.py --precision bf16
    python benchmarks/factorize.py --widths 256 384 768 1024 --depth 2      # ViT blocks (384: S, 768: B, 1024: L)
    python benchmarks/factorize.py --model gpt2 --depth 2 --batch 2
    python benchmarks/factorize.py --layers                                 # one layer: where do factors pay?

Every variant makes the same step (forward, backward, AdamW) on the same batch; rounds are interleaved, and each variant's
figure is the median of its time over full's within a round. CPU time of the process is the steadier one where a machine has
neighbours. The factors come from moments of two batches; the rank is a share of the width for every layer but the head.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_pretrain.core.memory import optimizer_bytes
from lowrank_pretrain.core.targets import all_targets, find_targets
from lowrank_pretrain.factorize.cost import numbers_of
from lowrank_pretrain.factorize.model import Factors
from lowrank_pretrain.factorize.ranks import rank_of_fraction
from lowrank_pretrain.lora import model as lora

MIB = 2**20


def vision(args: argparse.Namespace, width: int | None) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a ViT and its loss on one fixed batch."""
    import timm

    cut = {} if width is None else {"embed_dim": width, "num_heads": width // 64}
    cut |= {} if args.depth is None else {"depth": args.depth}
    name = args.model if width is None else "vit_small_patch16_224"
    with torch.device(args.device):  # a ViT-L's random weights take a CPU seconds
        model = timm.create_model(name, num_classes=1000, **cut)
    x, y = torch.randn(args.batch, 3, 224, 224, device=args.device), torch.randint(0, 1000, (args.batch,), device=args.device)
    return model, lambda model: nn.functional.cross_entropy(model(x), y)


def text(args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Return a GPT-2 and its loss on one fixed batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config() if args.depth is None else GPT2Config(n_layer=args.depth)
    tokens = torch.randint(0, config.vocab_size, (args.batch, 512), device=args.device)
    return GPT2LMHeadModel(config), lambda model: model(tokens, labels=tokens).loss


def full(model: nn.Module, loss: Callable) -> None:
    """Everything trains."""


def adapters(model: nn.Module, loss: Callable) -> None:
    """Rank 16 next to frozen weights."""
    plan = {name: 8 if name.endswith((".k", ".v")) else 16 for name in find_targets(model, "all")}
    lora.inject(model, plan)
    lora.freeze(model, plan)


def factored(fraction: float) -> Callable[[nn.Module, Callable], None]:
    """Return what factors a model's layers at a share of their width."""

    def change(model: nn.Module, loss: Callable) -> None:
        targets = {name: all_targets(model)[name] for name in find_targets(model, "all")}
        factors = Factors()
        plan = {name: rank_of_fraction(fraction, target.rows, target.cols) for name, target in targets.items()}
        factors.adopt(plan, model)
        for _ in range(2):
            loss(model).backward()
        model.zero_grad()
        factors.release()

    return change


VARIANTS = {
    "full": full,
    "adapters r16": adapters,
    "factored 1/2": factored(1 / 2),
    "factored 1/4": factored(1 / 4),
    "factored 1/8": factored(1 / 8),
}


class Runner:
    """One model with its optimizer."""

    def __init__(self, change: Callable, args: argparse.Namespace, width: int | None) -> None:
        torch.manual_seed(0)
        self.args = args
        model, self.loss = text(args) if args.model == "gpt2" and width is None else vision(args, width)
        self.model = model.to(args.device).train()
        change(self.model, self.loss)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)

    def step(self) -> tuple[float, float]:
        """Make one training step: (wall seconds, CPU seconds)."""
        self._settle()
        wall, cpu = time.perf_counter(), time.process_time()
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._settle()
        return time.perf_counter() - wall, time.process_time() - cpu

    def sizes(self, others: int) -> dict[str, float]:
        """Measure once what does not vary: MiB kept for backward and by the optimizer, GFLOP of a step, parameters.

        Args:
            others: bytes on the GPU that belong to other variants.
        """
        known, kept = {p.untyped_storage().data_ptr() for p in self.model.parameters()}, {}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return t

        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                loss = self._loss()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        found = {
            "parameters": float(sum(p.numel() for p in self.model.parameters())),
            "activations_mib": sum(kept.values()) / MIB,
            "optimizer_mib": optimizer_bytes([self.optimizer]) / MIB,
            "gflop": counter.get_total_flops() / 1e9,
        }
        if self.args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            found["peak_gib"] = (torch.cuda.max_memory_allocated() - others) / 2**30
        return found

    def _loss(self) -> Tensor:
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16"):
            return self.loss(self.model)

    def _settle(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()


def compare(args: argparse.Namespace, width: int | None) -> list[dict[str, Any]]:
    """Time the variants in interleaved rounds and print their table."""
    chosen = {name: change for name, change in VARIANTS.items() if name == "full" or not args.only or name in args.only}
    runners: dict[str, Runner] = {}
    sizes: dict[str, dict[str, float]] = {}
    for name, change in chosen.items():
        others = torch.cuda.memory_allocated() if args.device == "cuda" else 0
        runners[name] = Runner(change, args, width)
        gc.collect()
        sizes[name] = runners[name].sizes(others)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    names = list(runners)
    for runner in runners.values():
        runner.step()
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(runners[name].step())
    what = f"ViT, width {width}" if width else args.model
    print(f"\n{what}, depth {args.depth or 'all'}, batch {args.batch}, {args.precision}, {args.rounds} rounds")
    columns = ("CPU s", "of full", "wall s", "of full", "M par", "act MiB", "opt MiB", "GFLOP")
    print(f"{'variant':14}" + "".join(f"{column:>9}" for column in columns))
    rows = []
    for name in names:
        of_full = [statistics.median(v[i] / f[i] for f, v in zip(times["full"], times[name], strict=True)) for i in (0, 1)]
        wall, cpu = (statistics.median(t[i] for t in times[name]) for i in (0, 1))
        s = sizes[name]
        print(
            f"{name:14}{cpu:9.3f}{of_full[1]:9.2f}{wall:9.3f}{of_full[0]:9.2f}{s['parameters'] / 1e6:9.2f}"
            f"{s['activations_mib']:9.0f}{s['optimizer_mib']:9.0f}{s['gflop']:9.1f}"
        )
        rows.append({"model": what, "variant": name, "cpu_s": cpu, "cpu_of_full": of_full[1], "wall_s": wall})
        rows[-1] |= {"wall_of_full": of_full[0]} | s
    return rows


def layers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time one layer, dense and factored, forward and backward: over dense time next to the share of its FLOPs."""
    rows = []
    print(f"{'D':>6}{'O':>6}{'rank':>6}{'share':>7}{'time':>7}   ({args.precision}, N = {args.batch * 197})")
    for width in args.widths or (384, 768):
        for cols, out in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            x, g = torch.randn(args.batch * 197, cols, requires_grad=True), torch.randn(args.batch * 197, out)
            dense = nn.Linear(cols, out)
            ranks = [width // 8, width // 4, 3 * width // 8, width // 2, 5 * width // 8]
            variants = [dense, *(nn.Sequential(nn.Linear(cols, k, bias=False), nn.Linear(k, out)) for k in ranks)]
            spent: list[list[float]] = [[] for _ in variants]
            for _ in range(args.rounds):
                for seconds, layer in zip(spent, variants, strict=True):
                    start = time.process_time()
                    with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
                        y = layer(x)
                    y.backward(g.to(y.dtype))
                    seconds.append(time.process_time() - start)
            for rank, seconds in zip(ranks, spent[1:], strict=True):
                share = numbers_of(rank, out, cols) / (out * cols)
                ratio = statistics.median(s / f for s, f in zip(seconds, spent[0], strict=True))
                print(f"{cols:6}{out:6}{rank:6}{share:7.2f}{ratio:7.2f}")
                rows.append({"D": cols, "O": out, "rank": rank, "share": share, "time_of_dense": ratio})
    return rows


def main() -> None:
    """Run what was asked for and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a ViT of timm's, or gpt2")
    parser.add_argument("--widths", type=int, nargs="*", help="ViTs of these widths, in place of --model")
    parser.add_argument("--depth", type=int, help="blocks; default: the model's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--layers", action="store_true", help="time single layers")
    parser.add_argument("--only", nargs="*", help="names of variants; full is always run")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines next to the machine and the date")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    print(f"{device}, torch {torch.__version__}, {date.today()}")
    rows = layers(args) if args.layers else [row for width in args.widths or [None] for row in compare(args, width)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {key: value for key, value in vars(args).items() if key != "out"}
        about |= {"device": device, "torch": torch.__version__, "date": str(date.today())}
        args.out.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")


if __name__ == "__main__":
    main()
