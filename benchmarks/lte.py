"""LTE's costs: several heads on one device, merges over processes, bytes beside DDP's. One run, interleaved, medians.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/lte.py --threads 1 --out benchmarks/results/lte_cpu_1.jsonl
    python benchmarks/lte.py --parts step --models vit_s16 --rounds 9
    python benchmarks/lte.py --parts merge --sets vit_s gpt2 --workers 2 4
    python benchmarks/lte.py --device cuda --precision bf16          # merges need as many GPUs as workers

``step``: forward, backward and AdamW on one batch, every side once per round in an order that rotates. Heads hold what the last
merge put into W, as they do in all windows but the first. Ratios are medians, over rounds, of side/1 head, by wall clock and
by CPU time (with neighbours on the machine the steadier one). Beside ours:
    a loop over heads: one forward and backward per head, of its share of the batch, through models that share all but the head;
    Seq: every head on the whole batch, one after another in each layer, as the CS744 project's emulation does (with one adapter
    for a fused layer where ours have three); ``joint`` is the same function, batched.
``merge``: from the first byte to W, W₀ and the heads' copies in place, the slowest process's time, both routes in one flat
buffer, beside DDP's averaging of the same matrices in buckets of 25 MiB, which it does at every step. One thread a process.
``traffic``: what 8 workers of one head each send per step, computed from the real models' shapes; with T = 10.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_pretrain.core.targets import find_targets, weight_rows
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.settings import ROUTES, Settings
from lowrank_pretrain.lte.traffic import traffic
from lowrank_pretrain.lte.workers import Workers

RANK, EVERY, BUCKET = 16, 10, 25 * 2**20
# limits that the rows are held against
MOST_4_HEADS, MOST_FACTORS = 1.10, 0.7


# -- a step with several heads on one device --------------------------------------------------------------------------


def vit(name: str, batch: int) -> tuple[nn.Module, Tensor, Callable]:
    """A timm model, its input, its loss."""
    import timm

    y = torch.arange(batch)
    return timm.create_model(name, num_classes=1000), torch.randn(batch, 3, 224, 224), lambda z, rows: (
        nn.functional.cross_entropy(z, y.to(z.device)[rows])
    )  # fmt: skip


class Blocks(nn.Module):
    """GPT-2's blocks alone: no embedding, no head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2Model

        names = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None}
        config = GPT2Config(n_layer=depth, n_positions=512, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, **names)
        self.inner = GPT2Model(config)
        for p in (*self.inner.wte.parameters(), *self.inner.wpe.parameters()):
            p.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 768) -> (B, T, 768)."""
        return self.inner(inputs_embeds=x, use_cache=False).last_hidden_state


def gpt2(depth: int, batch: int, length: int) -> tuple[nn.Module, Tensor, Callable]:
    """GPT-2 small's blocks, their input, a loss."""
    return Blocks(depth), torch.randn(batch, length, 768), lambda z, rows: z.float().square().mean()


MODELS = {
    "vit_s16": lambda: vit("vit_small_patch16_224", 16),
    "vit_ti16": lambda: vit("vit_tiny_patch16_224", 16),
    "gpt2": lambda: gpt2(12, 8, 512),
    "gpt2_2_blocks": lambda: gpt2(2, 8, 256),
}
USUAL = {"cpu": ["vit_s16", "vit_ti16", "gpt2_2_blocks"], "cuda": ["vit_s16", "gpt2"]}


def put_heads(model: nn.Module, heads: int, mode: str = "parallel") -> HeadSet:
    """Every matrix but the output head's gets heads; one merge with nothing learnt, so that W holds something of them."""
    owner = HeadSet(Settings(heads=heads, merge_every=1, mode=mode, seed=0), Workers())
    targets = find_targets(model)
    owner.convert(targets, dict.fromkeys(targets, RANK))
    for B in (factor for name, factor in owner.parameters().items() if "lora_B" in name):
        nn.init.normal_(B, std=1e-3)
    owner.after_step()
    return owner


class Side:
    """One way to train; ``step`` returns (wall s, CPU s)."""

    def __init__(self, name: str, heads: int, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args, self.heads = args, heads
        model, x, self.loss = MODELS[name]()
        self.x = x.to(args.device)
        self.models = self.make(model.to(args.device).train())
        params = {id(p): p for m in self.models for p in m.parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(params.values(), lr=1e-5, fused=True)

    def make(self, model: nn.Module) -> list[nn.Module]:
        """The models to go through, one after another."""
        self.owner = put_heads(model, self.heads)
        self.owner.shared.batch = len(self.x)
        return [model]

    def chunks(self) -> list[slice]:
        """The rows of the batch that each model sees."""
        return [slice(None)]

    def step(self) -> tuple[float, float]:
        """One training step."""
        synchronize(self.args.device)
        wall, cpu = time.perf_counter(), time.process_time()
        for model, rows in zip(self.models, self.chunks(), strict=True):
            with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16"):
                loss = self.loss(model(self.x[rows]), rows)
            (loss / len(self.models)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.args.device)
        return time.perf_counter() - wall, time.process_time() - cpu


class Loop(Side):
    """A model per head; W, the biases, the norms are the same objects in all of them."""

    def make(self, model: nn.Module) -> list[nn.Module]:
        """Copies with one head each."""
        shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
        models = [model] + [copy.deepcopy(model, dict(shared)) for _ in range(self.heads - 1)]
        for m in models:
            put_heads(m, 1).shared.batch = 1
        return models

    def chunks(self) -> list[slice]:
        """Equal shares."""
        share = len(self.x) // self.heads
        return [slice(k * share, (k + 1) * share) for k in range(self.heads)]


class Joint(Side):
    """All heads on the whole batch, as one wide adapter."""

    def make(self, model: nn.Module) -> list[nn.Module]:
        """The same with ``mode=joint``."""
        self.owner = put_heads(model, self.heads, "joint")
        self.owner.shared.batch = 1
        return [model]


class SeqLayer(nn.Module):
    """y = W x + b + (1/N) Σ BₙAₙx, one head after another."""

    def __init__(self, layer: nn.Module, heads: int) -> None:
        super().__init__()
        self.layer = layer
        layer.weight.requires_grad_(False)
        rows, cols = weight_rows(layer).shape
        device = layer.weight.device
        self.A = nn.ModuleList(nn.Linear(cols, RANK, bias=False, device=device) for _ in range(heads))
        self.B = nn.ModuleList(nn.Linear(RANK, rows, bias=False, device=device) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, …, D) -> (B, …, O)."""
        y = self.layer(x)
        for A, B in zip(self.A, self.B, strict=True):
            y = y + B(A(x)) / len(self.A)
        return y


class Seq(Side):
    """The loop within each layer."""

    def make(self, model: nn.Module) -> list[nn.Module]:
        """Every target's layer wrapped."""
        for name in {t.layer_name for t in find_targets(model).values()}:
            model.set_submodule(name, SeqLayer(model.get_submodule(name), self.heads))
        return [model]


SIDES = {
    "1 head": (Side, 1),
    "4 heads": (Side, 4),
    "8 heads": (Side, 8),
    "a loop over 4 heads": (Loop, 4),
    "4 heads, joint": (Joint, 4),
    "Seq of 4 heads": (Seq, 4),
}


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every side on every model."""
    rows = []
    for model in args.models or USUAL[args.device]:
        sides = {name: make(model, heads, args) for name, (make, heads) in SIDES.items()}
        for side in sides.values():
            for _ in range(3 if args.device == "cuda" else 1):
                side.step()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        names = list(sides)
        for i in range(args.rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(sides[name].step())
        shape = "x".join(map(str, sides["1 head"].x.shape))
        print(f"\nstep of {model}, input {shape}, {args.precision}, {args.rounds} rounds")
        print(f"{'':22}{'wall ms':>10}{'of 1 head':>11}{'CPU ms':>10}{'of 1 head':>11}")
        for name in names:
            wall, cpu = (1e3 * statistics.median(t[j] for t in times[name]) for j in (0, 1))
            of, cpu_of = (
                statistics.median(t[j] / one[j] for t, one in zip(times[name], times["1 head"], strict=True)) for j in (0, 1)
            )
            note = f"   at most {MOST_4_HEADS:.2f}" if name == "4 heads" else ""
            print(f"{name:22}{wall:10.1f}{of:11.3f}{cpu:10.1f}{cpu_of:11.3f}{note}", flush=True)
            rows.append({"part": "step", "model": model, "side": name, "wall_ms": wall, "of_1_head": of, "cpu_ms": cpu,
                         "cpu_of_1_head": cpu_of})  # fmt: skip
        del sides
    return rows


# -- a merge over processes -------------------------------------------------------------------------------------------

SETS = {"vit_s": (384, 12), "vit_l": (1024, 24), "gpt2": (768, 12)}  # width, blocks


def stack(width: int, depth: int, device: str) -> nn.Module:
    """The matrices of so many blocks, those of q, k and v fused."""
    sizes = {"qkv": (width, 3 * width), "proj": (width, width), "fc1": (width, 4 * width), "fc2": (4 * width, width)}
    make = {name: lambda size=size: nn.Linear(*size, bias=False, device=device) for name, size in sizes.items()}
    return nn.ModuleList(nn.ModuleDict({name: one() for name, one in make.items()}) for _ in range(depth))


def blocks_that_fit(name: str, workers: int, device: str) -> int:
    """All of them, or as many as the machine's free memory holds: W, W₀, the sums and their flat buffer in every process."""
    width, depth = SETS[name]
    if device == "cuda" or not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return depth
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(depth, int(0.8 * free / (workers * 5 * 4 * 12 * width**2))))


def merge_rank(rank: int, world: int, name: str, depth: int, args: argparse.Namespace, meeting: str, answers: Any) -> None:
    """One process: time both routes and DDP's averaging by turns; rank 0 answers."""
    torch.set_num_threads(1)
    device = f"cuda:{rank}" if args.device == "cuda" else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=world)
    torch.manual_seed(0)
    module = stack(SETS[name][0], depth, device)
    heads = HeadSet(Settings(heads=1, merge_every=1, seed=0), Workers(dist.group.WORLD))
    targets = find_targets(module)
    heads.convert(targets, dict.fromkeys(targets, RANK))
    chosen = {piece.route for piece in heads.pieces}
    for B in (factor for key, factor in heads.parameters().items() if "lora_B" in key):
        nn.init.normal_(B, std=1e-3)
    total = sum(p.numel() * p.itemsize for p in module.parameters() if not p.requires_grad)
    bucket = torch.zeros(BUCKET // 4, device=device)

    def merge(route: str) -> tuple[float, float]:
        for piece in heads.pieces:
            piece.route = route
        heads.after_step()
        return heads.last_cost

    def ddp() -> tuple[float, float]:
        left, began = total // 4, time.perf_counter()
        while left:
            now = min(left, len(bucket))
            dist.all_reduce(bucket[:now])
            left -= now
        synchronize(args.device)
        return 2 * (world - 1) / world * total, time.perf_counter() - began

    sides = {route: lambda route=route: merge(route) for route in ROUTES} | {"DDP": ddp}
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for i in range(-1, args.rounds):
        order = list(sides)
        for side in order[i % len(order) :] + order[: i % len(order)]:
            dist.barrier()
            synchronize(args.device)
            began = time.perf_counter()
            sent, waited = sides[side]()
            synchronize(args.device)
            slowest = torch.tensor(time.perf_counter() - began, device=device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if i >= 0:
                found[side].append((sent, waited, slowest.item()))
    if rank == 0:
        answers.put((found, sorted(chosen)))
    dist.barrier()
    dist.destroy_process_group()


def merges(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the routes for every set of targets and every number of workers."""
    rows = []
    print(f"\nmerge at rank {RANK}, one head a worker, {args.rounds} rounds")
    print(f"{'':36}{'route':>9}{'ms':>9}{'of dense':>9}{'waiting':>9}{'MiB sent':>10}{'of DDP':>8}")
    for name in args.sets:
        for world in args.workers:
            if args.device == "cuda" and torch.cuda.device_count() < world:
                print(f"{name}, {world} workers: needs {world} GPUs, here are {torch.cuda.device_count()}")
                continue
            depth = blocks_that_fit(name, world, args.device)
            answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                context = torch.multiprocessing.spawn(
                    merge_rank, (world, name, depth, args, f"{folder}/meeting", answers), nprocs=world, join=False
                )
                while not context.join():
                    pass
            found, chosen = answers.get()
            label = f"{name}, {world} workers"
            label += "" if depth == SETS[name][1] else f" ({depth} of {SETS[name][1]} blocks)"
            for side, times in found.items():
                ms, waiting = 1e3 * statistics.median(t[2] for t in times), 1e3 * statistics.median(t[1] for t in times)
                of = statistics.median(t[2] / d[2] for t, d in zip(times, found["dense"], strict=True))
                sent, every_step = times[0][0], found["DDP"][0][0]
                note = " chosen by bytes" if [side] == chosen else ""
                note += f", at most {MOST_FACTORS}" if (name, world, side) == ("vit_s", 2, "factors") else ""
                print(f"{label:36}{side:>9}{ms:9.1f}{of:9.2f}{waiting:9.1f}{sent / 2**20:10.2f}{sent / every_step:8.3f}{note}",
                      flush=True)  # fmt: skip
                rows.append({"part": "merge", "set": name, "workers": world, "blocks": depth, "route": side, "ms": ms,
                             "of_dense": of, "waiting_ms": waiting, "sent": sent, "of_ddp": sent / every_step})  # fmt: skip
    return rows


# -- what is sent -----------------------------------------------------------------------------------------------------


def bare(name: str) -> nn.Module:
    """A real model without data."""
    with torch.device("meta"):
        if name == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            return GPT2LMHeadModel(GPT2Config())
        import timm

        return timm.create_model(name)


TRAFFIC = {"vit_small_patch32_224": (40, 30, 12), "vit_large_patch16_224": (90, 90, 60), "gpt2": (90, 20, 3)}


def traffics(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of bytes."""
    rows, workers = [], 8
    print(f"\nMiB a worker sends per step, {workers} workers of one head, rank {RANK}, T = {EVERY} (computed)")
    print(f"{'':24}{'DDP':>9}{'targets':>9}{'1 /':>7}{'rest merged':>13}{'1 /':>7}{'rest by step':>14}{'1 /':>7}   wanted")
    for name, wanted in TRAFFIC.items():
        merge, step = (traffic(bare(name), "all", RANK, 1, workers, EVERY, sync) for sync in ("merge", "step"))
        ddp, *ours = (v / 2**20 for v in (merge["ddp"], merge["targets"], merge["all"], step["all"]))
        shown = "".join(f"{v:{w}.2f}{ddp / v:7.1f}" for v, w in zip(ours, (9, 13, 14), strict=True))
        print(f"{name:24}{ddp:9.2f}{shown}   at most 1/{wanted[0]}, 1/{wanted[1]}; about 1/{wanted[2]}")
        rows.append({"part": "traffic", "model": name, "workers": workers, "ddp": merge["ddp"], "targets": merge["targets"],
                     "all_merge": merge["all"], "all_step": step["all"], "routes": merge["routes"]})  # fmt: skip
    return rows


PARTS = {"traffic": traffics, "merge": merges, "step": steps}


def main() -> None:
    """Run the parts, print their tables and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of a step; merges have one a process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="of the steps")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="of the merges")
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4], help="of the merges")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines behind the machine and the date")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    about = {**{k: v for k, v in vars(args).items() if k != "out"}, "machine": device, "torch": torch.__version__,
             "date": str(date.today())}  # fmt: skip
    print(f"{about['date']} {device}, {args.threads} threads, torch {torch.__version__}", flush=True)
    rows = [row for part in args.parts for row in PARTS[part](args)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")


if __name__ == "__main__":
    main()
