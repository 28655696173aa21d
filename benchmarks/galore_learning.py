"""Does GaLore learn as well as AdamW? Validation losses side by side, every side with learning rates of its own.

    PYTHONPATH=src python benchmarks/galore_learning.py                               # one CUDA GPU: all three parts, minutes
    PYTHONPATH=src python benchmarks/galore_learning.py --device cpu --parts text --steps 60 --seeds 1 --sides adamw track

Parts. ``text``: a LLaMA of hidden size 128 and 3 layers on the King James tokens, 450 steps of 8×128 tokens. ``vit``: a ViT of
width 128 and 3 layers on the Fashion-MNIST sample, 450 steps of 64 images. ``large``: ``text`` at twice the width and steps.
Rank is a quarter of the width. Warm-up 10 %, cosine to 10 %, no decay, no clipping, float32.

Tuning, the same for each side, on seed 0 and the dev split: the matrices' learning rate by factors of 2 until the best lies
inside, then everything else's likewise, then the matrices' by √2. ``large`` starts at ``text``'s best and searches the
matrices' by √2. Reported: the test split, on seeds that tuning never saw. Runs are paired: same seed, same start, same batches.
Sides: ``published`` is galore_torch's own class where it is installed, else our published mode (equal to 1e-5).
"""

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

PUBLISHED = {"refresh": "svd", "rotate_moments": False, "stagger": False}
# side -> (group settings, or None for AdamW; its matrices' first learning rate as a multiple of AdamW's)
SIDES = {
    "adamw": (None, 1.0),
    "published": (PUBLISHED, 2.0),
    "galore": ({}, 2.0),
    "track": ({"refresh": "track"}, 2.0),
    "track_fira": ({"refresh": "track", "residual": "fira"}, 1.0),
    "fira": ({"residual": "fira"}, 2.0),
    "apollo": ({"variant": "apollo"}, 4.0),
    "factored": ({"refresh": "track", "second_moment": "factored", "nesterov": True}, 2.0),
    "factored_fira": ({"refresh": "track", "second_moment": "factored", "nesterov": True, "residual": "fira"}, 1.5),
    "galore_muon": ({"refresh": "track", "rule": "muon", "nesterov": True}, 2.0),
}
DEFAULT_SIDES = ["adamw", "published", "galore", "track", "track_fira"]
# part -> (width, steps, AdamW's first learning rates: matrices, the rest)
PARTS = {"text": (128, 450, 2e-3, 1e-2), "vit": (128, 450, 2e-3, 2e-3), "large": (256, 900, 2e-3, 1e-2)}
GAP, BATCH, CONTEXT = 50, {"text": 8, "large": 8, "vit": 64}, 128


# ---- one run ------------------------------------------------------------------------------------------------------------


@cache
def data(part, device):
    """(train, dev, test); text: token tensors, vit: (images, labels)."""
    from lowrank_pretrain.data import SAMPLES

    if part == "vit":
        with np.load(SAMPLES / "fashion_mnist.npz") as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}

        def prepare(x, y):
            return ((x.float() / 255 - 0.286) / 0.353)[:, None].to(device), y.long().to(device)

        train, held = slice(0, -2000), slice(-2000, None)  # the dev split comes out of the training images
        x, y = arrays["train_images"], arrays["train_labels"]
        return prepare(x[train], y[train]), prepare(x[held], y[held]), prepare(arrays["test_images"], arrays["test_labels"])
    from lowrank_pretrain.data.text.bins import open_bin

    train, val = (
        torch.from_numpy(open_bin(SAMPLES / f"kjv_{name}.bin")[0].astype(np.int64)).to(device) for name in ("train", "val")
    )
    windows = val[: val.numel() // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return train, windows[::2], windows[1::2]


def make_model(part, width, device):
    """The model, on the CPU's random numbers whatever the device."""
    if part == "vit":
        from timm.models.vision_transformer import VisionTransformer

        model = VisionTransformer(
            img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=width, depth=3, num_heads=4, mlp_ratio=3,
            class_token=False, global_pool="avg",
        )  # fmt: skip
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=2048, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=3,
            num_attention_heads=width // 32, max_position_embeddings=CONTEXT, use_cache=False,
        ))  # fmt: skip
    return model.to(device)


def loss_of(model, part, batch):
    """Mean cross-entropy of a batch."""
    if part == "vit":
        return F.cross_entropy(model(batch[0]), batch[1])
    logits = model(input_ids=batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def make_optimizer(model, side, lr, rest_lr, rank):
    """A side's optimizer: matrices with ``lr``, everything else with ``rest_lr``."""
    from lowrank_pretrain.galore import GaLoreAdamW
    from lowrank_pretrain.galore.groups import target_layers

    chosen = {id(model.get_submodule(name).weight) for name in target_layers(model, "all")}
    matrices = [p for p in model.parameters() if id(p) in chosen]
    rest = {"params": [p for p in model.parameters() if id(p) not in chosen], "lr": rest_lr}
    settings = SIDES[side][0]
    if settings is None:
        return torch.optim.AdamW([{"params": matrices}, rest], lr=lr, weight_decay=0.0, fused=True)
    group = {"params": matrices, "rank": rank, "update_proj_gap": GAP, "scale": 1.0, "proj_type": "std"}
    if side == "published":
        try:
            from galore_torch import GaLoreAdamW as Published

            return Published([group, rest], lr=lr, no_deprecation_warning=True)
        except ImportError:
            pass
    return GaLoreAdamW([{**group, **settings}, rest], lr=lr, seed=0)


@torch.no_grad()
def evaluate(model, part, split):
    """Mean loss over a split."""
    model.eval()
    pieces = zip(*(t.split(500) for t in split), strict=True) if part == "vit" else split.split(64)
    total = count = 0
    for piece in pieces:
        n = len(piece[0]) if part == "vit" else len(piece)
        total, count = total + loss_of(model, part, piece).double() * n, count + n
    model.train()
    return (total / count).item()


def run(part, side, seed, lr, rest_lr, steps, device, deadline=math.inf):
    """Train once; returns dev and test loss (infinite if it diverged) and seconds, or None if it is too late to begin."""
    if time.monotonic() > deadline:
        return None
    torch.set_num_threads(1)
    width = PARTS[part][0]
    train, dev, test = data(part, device)
    torch.manual_seed(seed)
    model = make_model(part, width, device)
    optimizer = make_optimizer(model, side, lr, rest_lr, width // 4)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: (t + 1) / warm if t < warm else 0.55 + 0.45 * math.cos(math.pi * (t - warm) / (steps - warm))
    )
    draw = torch.Generator().manual_seed(1000 + seed)
    began = time.perf_counter()
    try:
        for _ in range(steps):
            if part == "vit":
                chosen = torch.randint(len(train[0]), (BATCH[part],), generator=draw).to(device)
                batch = train[0][chosen], train[1][chosen]
            else:
                starts = torch.randint(train.numel() - CONTEXT, (BATCH[part], 1), generator=draw)
                batch = train[(starts + torch.arange(CONTEXT)).to(device)]
            loss_of(model, part, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        dev_loss, test_loss = evaluate(model, part, dev), evaluate(model, part, test)
    except (FloatingPointError, torch.linalg.LinAlgError):
        dev_loss = test_loss = math.inf
    seconds = time.perf_counter() - began
    losses = [x if math.isfinite(x) else math.inf for x in (dev_loss, test_loss)]
    return losses[0], losses[1], seconds


# ---- tuning and the report ----------------------------------------------------------------------------------------------


class Study:
    """Runs each setting once, in worker processes, and writes a row for each."""

    def __init__(self, args):
        self.args, self.known, self.lock = args, {}, threading.Lock()
        self.deadline = time.monotonic() + args.minutes * 60
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(args.workers, mp_context=context)
        self.file = open(args.out, "w", newline="")
        self.rows = csv.writer(self.file)
        self.rows.writerow(["part", "side", "phase", "seed", "lr", "rest_lr", "steps", "dev_loss", "test_loss", "seconds"])

    def many(self, phase, jobs):
        """Results of jobs (part, side, seed, lr, rest_lr), which run side by side."""
        futures = {}
        for job in jobs:
            if job not in self.known and time.monotonic() < self.deadline:
                steps = max(10, int(PARTS[job[0]][1] * self.args.steps / 450)) if self.args.steps else PARTS[job[0]][1]
                futures[job] = steps, self.pool.submit(run, *job, steps, self.args.device, self.deadline)
        for job, (steps, future) in futures.items():
            result = future.result()
            if result is None:
                continue
            with self.lock:
                self.known[job] = result
                part, side, seed, lr, rest_lr = job
                numbers = [f"{lr:.3g}", f"{rest_lr:.3g}", steps, f"{result[0]:.4f}", f"{result[1]:.4f}", f"{result[2]:.1f}"]
                self.rows.writerow([part, side, phase, seed, *numbers])
                self.file.flush()
        return [self.known.get(job, (math.inf, math.inf, 0.0)) for job in jobs]

    def search(self, part, side, lr, rest_lr, axis, factor, limit=4):
        """Best of a geometric grid along one axis, extended until the best lies inside (at most ``limit`` times)."""
        exponents = [-1, 0, 1]
        for _ in range(limit + 1):
            points = [(lr * factor**e, rest_lr) if axis == 0 else (lr, rest_lr * factor**e) for e in exponents]
            losses = [r[0] for r in self.many("tune", [(part, side, 0, *point) for point in points])]
            best = losses.index(min(losses))
            if 0 < best < len(points) - 1 or not math.isfinite(min(losses)):
                break
            exponents = [exponents[0] - 1, *exponents] if best == 0 else [*exponents, exponents[-1] + 1]
        else:
            print(f"{part} {side}: the best of axis {axis} lies at the edge of {exponents}", flush=True)
        return points[best]

    def side(self, part, side, start=None):
        """Tune one side and report it; returns its learning rates."""
        if start is None:
            lr, rest_lr = PARTS[part][2] * SIDES[side][1], PARTS[part][3]
            lr, rest_lr = self.search(part, side, lr, rest_lr, 0, 2.0)
            lr, rest_lr = self.search(part, side, lr, rest_lr, 1, 2.0)
            lr, rest_lr = self.search(part, side, lr, rest_lr, 0, 2**0.5, limit=1)
        else:
            lr, rest_lr = self.search(part, side, *start, 0, 2**0.5)
        self.many("final", [(part, side, seed, lr, rest_lr) for seed in range(1, self.args.seeds + 1)])
        return lr, rest_lr

    def report(self, part, chosen):
        """Print the final losses of a part, beside AdamW's on the same seeds."""
        seeds = range(1, self.args.seeds + 1)
        finals = {side: [self.known.get((part, side, s, *rates)) for s in seeds] for side, rates in chosen.items()}
        base = finals.get("adamw")
        print(f"\n{part}: test loss by seed, and against AdamW (mean ± s.e. of the paired differences)")
        for side, results in finals.items():
            if None in results:
                print(f"  {side:12s} not finished: out of time")
                continue
            losses = [r[1] for r in results]
            text = f"  {side:12s} lr {chosen[side][0]:.2e} rest {chosen[side][1]:.2e}  " + " ".join(f"{x:.4f}" for x in losses)
            if base and None not in base and side != "adamw":
                gaps = [100 * (r[1] / b[1] - 1) for r, b in zip(results, base, strict=True)]
                error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else math.nan
                text += f"   {statistics.mean(gaps):+.2f} % ± {error:.2f}"
            print(f"{text}   {statistics.median(r[2] for r in results):.0f} s a run", flush=True)


def main():
    """Tune and report every side of every part."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sides", nargs="+", default=DEFAULT_SIDES, choices=list(SIDES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="instead of text's 450; the other parts in proportion")
    parser.add_argument("--workers", type=int, default=12 if cuda else 1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=8.0, help="start no run after this long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/galore_learning.csv"))
    parser.add_argument("--start", nargs="*", default=[], metavar="SIDE=LR,REST", help="where large's search starts")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    try:
        import galore_torch  # noqa: F401

        published = "galore_torch"
    except ImportError:
        published = "our published mode (galore_torch is not installed)"
    print(f"{date.today()} {name}, torch {torch.__version__}, published = {published}", flush=True)
    study, chosen = Study(args), {}
    given = {side: tuple(map(float, rates.split(","))) for side, rates in (item.split("=") for item in args.start)}

    def everything(parts, side):
        for part in parts:
            start = (chosen.get(("text", side)) or given.get(side)) if part == "large" else None
            chosen[part, side] = study.side(part, side, start)

    # text and then large depend on each other; vit runs beside them
    chains = [[p for p in ("text", "large") if p in args.parts], [p for p in ("vit",) if p in args.parts]]
    threads = [threading.Thread(target=everything, args=pair) for pair in itertools.product(chains, args.sides)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    study.pool.shutdown()
    for part in args.parts:
        study.report(part, {side: chosen[part, side] for side in args.sides if (part, side) in chosen})
    study.file.close()


if __name__ == "__main__":
    main()
