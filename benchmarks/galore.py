"""GaLore's step beside its peers': time, refresh, optimizer bytes, temporaries. One run, interleaved, medians.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/galore.py --threads 1 --shapes vit_s
    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python benchmarks/galore.py --threads 2 --shapes vit_s vit_l gpt2
    python benchmarks/galore.py --refresh-only                      # a 1024x4096 refresh at rank 128 against its SVD
    PYTHONPATH=src python benchmarks/galore.py --device cuda        # LLaMA-1B shapes in bfloat16, and memory of whole steps

On the CPU times are CPU times of the process, next to the wall time of a step; a busy machine changes them less.
``step`` is a step without a refresh, ``refresh`` what renewing every basis once adds, ``amortised`` step + refresh/200 (for
``track``, which renews at each step, the step itself). On the CPU only the matrices are stepped, in float32; on CUDA all of the
model's parameters, in bfloat16. A full SVD is timed once per distinct shape and counted as often as the shape occurs. ``state``
is every storage the optimizer keeps alive; ``temporary`` the most that one step allocates on top. A missing peer: an empty row.
"""

import argparse
import csv
import gc
import itertools
import os
import platform
import statistics
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import torch
from torch import nn

from lowrank_pretrain.galore import GaLoreAdamW, subspace

NEVER, GAP = 10**9, 200
PUBLISHED = {"refresh": "svd", "rotate_moments": False, "stagger": False}


def vit(width, depth):
    """Matrices of a ViT."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * depth


LLAMA_1B = [*[(2048, 2048)] * 4, (5461, 2048), (5461, 2048), (2048, 5461)] * 24
# name -> (projected matrices, other parameters, rank)
SHAPES = {
    "vit_s": (vit(384, 12), [], 96),
    "vit_l": (vit(1024, 24), [], 256),
    "gpt2": ([(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12, [], 192),
    "tiny": (vit(64, 1), [], 8),
    "llama_1b": (LLAMA_1B, [(32000, 2048), (32000, 2048), *[(2048,)] * 49], 512),
}


def ours(**settings):
    """A side of ours."""

    def make(matrices, rest, rank, gap):
        group = {"params": matrices, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{**group, "stagger": False, **settings}, *_rest(rest, settings)], lr=1e-6)

    return make


def adamw(matrices, rest, rank, gap):
    """AdamW of torch, fused."""
    return torch.optim.AdamW([*matrices, *rest], lr=1e-6, weight_decay=0.0, fused=True)


def galore_torch(matrices, rest, rank, gap):
    """The published optimizer."""
    from galore_torch import GaLoreAdamW as Published

    group = {"params": matrices, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
    return Published([group, *_rest(rest, {})], lr=1e-6, no_deprecation_warning=True)


def pytorch_optimizer(matrices, rest, rank, gap):
    """pytorch_optimizer's GaLore."""
    from pytorch_optimizer import GaLore

    group = {"params": matrices, "rank": rank, "update_proj_gap": gap, "scale": 0.25, "projection_type": "std"}
    return GaLore([group, *_rest(rest, {})], lr=1e-6)


def torchao(matrices, rest, rank, gap):
    """AdamW of torchao with 8-bit states."""
    from torchao.optim import AdamW8bit

    return AdamW8bit([*matrices, *rest], lr=1e-6)


class MuonAndAdamW:
    """torch's Muon for the matrices, its AdamW for the rest."""

    def __init__(self, matrices, rest):
        self.parts = [torch.optim.Muon(matrices, lr=1e-6, weight_decay=0.0)]
        self.parts += [torch.optim.AdamW(rest, lr=1e-6, weight_decay=0.0, fused=True)] if rest else []

    @property
    def state(self):
        """Of both."""
        return {p: kept for part in self.parts for p, kept in part.state.items()}

    def step(self):
        """Of both."""
        for part in self.parts:
            part.step()


def muon(matrices, rest, rank, gap):
    """Muon of torch (2.9 and later)."""
    return MuonAndAdamW(matrices, rest)


def _rest(params, settings):
    keep = {key: settings[key] for key in ("moments", "layerwise") if key in settings}
    return [{"params": params, **keep}] if params else []


# side -> (how to make it, whether it renews its basis at every step anyhow, whether a refresh is a full SVD)
SIDES = {
    "adamw fused": (adamw, None, False),
    "torchao AdamW8bit": (torchao, None, False),
    "muon": (muon, None, False),
    "galore_torch": (galore_torch, False, True),
    "pytorch_optimizer": (pytorch_optimizer, False, True),
    "ours": (ours(), False, False),
    "ours, grad moments": (ours(moments="grad"), False, False),
    "ours, 8bit": (ours(moments="8bit"), False, False),
    "ours, published": (ours(**PUBLISHED), False, True),
    "ours, track": (ours(refresh="track"), True, False),
    "ours, track every 2nd": (ours(refresh="track", track_every=2, stagger=True), True, False),
    "ours, factored": (ours(refresh="track", second_moment="factored", nesterov=True), True, False),
    "ours, factored, residual by muon": (
        ours(refresh="track", second_moment="factored", nesterov=True, residual="muon"),
        True,
        False,
    ),
    "ours, muon": (ours(refresh="track", rule="muon", nesterov=True), True, False),
    "ours, fira": (ours(residual="fira"), False, False),
    "ours, apollo": (ours(variant="apollo"), None, False),
}


@contextmanager
def quick_start():
    """First bases of random numbers: what they hold does not change a step's time or memory, and finding them takes long."""
    svd, finder = torch.linalg.svd, subspace.range_finder

    def random_svd(g, full_matrices=False):
        k = min(g.shape)
        u, v = (torch.randn(n, k, device=g.device, dtype=g.dtype) / n**0.5 for n in g.shape)
        return u, torch.ones(k, device=g.device, dtype=g.dtype), v.t()

    torch.linalg.svd = random_svd
    subspace.range_finder = lambda matrix, rank, generator: (
        torch.randn(matrix.shape[0], rank, device=matrix.device) / matrix.shape[0] ** 0.5
    )
    try:
        yield
    finally:
        torch.linalg.svd, subspace.range_finder = svd, finder


def parameters(shapes, device, dtype):
    """Parameters with gradients whose spectrum decays."""
    params = []
    for shape in shapes:
        p = nn.Parameter((0.02 * torch.randn(shape, device=device)).to(dtype))
        decay = torch.arange(1, shape[-1] + 1, device=device).rsqrt()
        p.grad = (torch.randn(shape, device=device) * decay).to(dtype) * 1e-3
        params.append(p)
    return params


def sync(device):
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    """Time of one call: on the CPU the process's CPU time, all threads, which a busy machine changes little; else wall time."""
    return both_times(function, device)[device != "cpu"]


def both_times(function, device):
    """CPU time and wall time of one call."""
    sync(device)
    began = time.process_time(), time.perf_counter()
    function()
    sync(device)
    return time.process_time() - began[0], time.perf_counter() - began[1]


def kept_bytes(value, seen=None):
    """Bytes of every storage reachable from an optimizer's state, each once."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        inner = [t for t in vars(value).values() if isinstance(t, torch.Tensor)] if type(value) is not torch.Tensor else []
        for t in inner or [value]:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            kept_bytes(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            kept_bytes(item, seen)
    elif hasattr(value, "__dict__"):
        kept_bytes(vars(value), seen)
    return sum(seen.values())


def temporary_bytes(step, device):
    """The most that one step allocates on top of what is there."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in events), initial=0))


def renewal(make, matrices, rank, device, dtype, each_shape):
    """Seconds that renewing all bases once adds to a step."""
    counts = Counter(tuple(p.shape) for p in matrices)
    total = 0.0
    for shape, count in counts.items() if each_shape else [(None, 1)]:
        params = parameters([shape], device, dtype) if each_shape else matrices
        often, never = (make(params, [], rank, gap) for gap in (1, NEVER))
        times = {}
        for name, optimizer, rounds in (("never", never, 3), ("often", often, 1 if each_shape else 3)):
            with quick_start():
                optimizer.step()
            times[name] = min(seconds(optimizer.step, device) for _ in range(rounds))
        total += count * max(0.0, times["often"] - times["never"])
        del often, never, params
    return total


def compare(name, args):
    """Rows of one set of shapes."""
    shapes, other, rank = SHAPES[name]
    device, dtype = args.device, torch.bfloat16 if args.device == "cuda" else torch.float32
    other = other if device == "cuda" else []
    rows, live = {}, {}
    for side, (make, always, _) in SIDES.items():
        if args.sides and side not in args.sides:
            continue
        if device == "cpu" and side in ("ours, grad moments",):
            continue  # in float32 the same as ours
        try:
            matrices, rest = parameters(shapes, device, dtype), parameters(other, device, dtype)
            optimizer = make(matrices, rest, rank, NEVER)
            with nullcontext() if side == "ours" else quick_start():
                cold = seconds(optimizer.step, device)
            if side == "ours":
                print(f"  ours: the first step, which finds every basis: {cold:.1f} s", flush=True)
            optimizer.step()
        except Exception as error:  # noqa: BLE001 - a peer that is missing, or cannot do this, has an empty row
            print(f"  {side}: {type(error).__name__}: {str(error)[:100]}", flush=True)
            rows[side] = dict.fromkeys(("step", "refresh", "amortised", "state", "temporary"))
            matrices = rest = optimizer = None
            _collect(device)
            continue
        rows[side] = {"state": kept_bytes(optimizer.state), "temporary": temporary_bytes(optimizer.step, device)}
        live[side] = optimizer
        if device == "cuda":  # one at a time: they do not fit side by side
            rows[side]["step"] = statistics.median(seconds(optimizer.step, device) for _ in range(args.rounds))
            del live[side]
            optimizer = None
            if always is False:
                rows[side]["refresh"] = renewal(make, matrices, rank, device, dtype, SIDES[side][2])
            matrices = rest = None
            _collect(device)
    times = {side: [] for side in live}
    for round_ in range(args.rounds if live else 0):
        order = list(live)
        for side in order[round_ % len(order) :] + order[: round_ % len(order)]:
            times[side].append(both_times(live[side].step, device))
    for side, taken in times.items():
        cpu, wall = zip(*taken, strict=True)
        rows[side] |= {"step": statistics.median(cpu), "fastest": min(cpu), "wall": statistics.median(wall)}
    live.clear()
    gc.collect()
    for side, row in rows.items():
        make, always, svd = SIDES[side]
        if row.get("step") is None:
            continue
        if always is False and "refresh" not in row:
            if svd and name in ("vit_l", "llama_1b") and device == "cpu" and not args.slow:
                row["refresh"] = row["amortised"] = None  # minutes of SVD: --slow
                continue
            row["refresh"] = renewal(make, parameters(shapes, device, dtype), rank, device, dtype, svd)
        row["amortised"] = row["step"] + (row.get("refresh") or 0.0) / GAP
    return rows


def _collect(device):
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def show(name, rows, args, write):
    """Print a table and write its rows."""
    m_n = SHAPES[name]
    print(f"\n{name}: {len(m_n[0])} matrices, rank {m_n[2]}, {args.threads} threads, {args.device}")
    print(f"  {'':22s}{'step ms':>10s}{'fastest':>9s}{'refresh':>10s}{'amortised':>11s}{'/published':>11s}{'/adamw':>8s}"
          f"{'/default':>10s}{'wall':>9s}{'state MiB':>11s}{'temp. MiB':>11s}")  # fmt: skip
    base, peer, default = (rows.get(side, {}).get("amortised") for side in ("adamw fused", "galore_torch", "ours"))
    for side, row in rows.items():
        cells = [row.get("step"), row.get("fastest"), row.get("refresh"), row.get("amortised")]
        ms = ["" if c is None else f"{1e3 * c:.1f}" for c in cells]
        ratio = ["" if not (x and cells[3]) else f"{cells[3] / x:.2f}" for x in (peer, base, default)]
        ratio.append("" if row.get("wall") is None else f"{1e3 * row['wall']:.1f}")
        mib = ["" if row.get(k) is None else f"{row[k] / 2**20:.1f}" for k in ("state", "temporary")]
        widths = (10, 9, 10, 11, 11, 8, 10, 9, 11, 11)
        print(f"  {side:22s}" + "".join(f"{c:>{w}s}" for c, w in zip((*ms, *ratio, *mib), widths, strict=True)), flush=True)
        write([name, args.device, args.threads, side, *ms, *ratio, *mib])


def refresh_against_svd(device, write):
    """The 1024×4096, rank 128 refresh beside the SVD that it replaces, and the kinds of QR."""
    for m, n, rank in ((1024, 4096, 128), *(((2048, 5461, 512),) if device == "cuda" else ())):
        grad = torch.randn(m, n, device=device) * torch.arange(1, n + 1, device=device).rsqrt()
        p = torch.linalg.qr(torch.randn(m, rank, device=device))[0]
        y = subspace.unit(grad @ (grad.t() @ p)).add_(p, alpha=subspace.RIDGE)
        kinds = {
            "warm refresh": lambda g=grad, q=p: subspace.power_step(g, q),
            "QR of it alone": lambda t=y: torch.linalg.qr(t),
            "orthonormal()": lambda t=y, q=p: subspace.orthonormal(t, q),
            "full SVD": lambda g=grad: torch.linalg.svd(g, full_matrices=False),
        }
        times = {}
        for kind, function in kinds.items():
            function() if kind != "full SVD" or device == "cuda" else None
            times[kind] = statistics.median(seconds(function, device) for _ in range(1 if kind == "full SVD" else 5))
        q = subspace.power_step(grad, p)
        error = (q.t() @ q - torch.eye(rank, device=device)).abs().max().item()
        print(f"\n{m}x{n}, rank {rank}: " + ", ".join(f"{k} {1e3 * t:.2f} ms" for k, t in times.items())
              + f"; SVD/refresh {times['full SVD'] / times['warm refresh']:.0f}; |QᵀQ−I| {error:.1e}", flush=True)  # fmt: skip
        write([f"{m}x{n} r{rank}", device, "", *(f"{k}: {1e3 * t:.2f}" for k, t in times.items())])


def step_memory(args, write):
    """Peak memory of a whole training step of a LLaMA-1B in bfloat16 with one sequence of 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5461, num_hidden_layers=24, num_attention_heads=32,
        max_position_embeddings=1024, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    sides = {"adamw fused, bf16 state": (adamw, 0)}
    for rank in (512, 1024):
        for moments in ("grad", "float32", "8bit"):
            sides[f"ours r{rank}, {moments}"] = (ours(moments=moments, stagger=True), rank)
            sides[f"ours r{rank}, {moments}, layerwise"] = (ours(moments=moments, stagger=True, layerwise=True), rank)
    base = None
    print("\nLLaMA-1B, bfloat16, one sequence of 256: peak GiB of steps 3 to 8 (and of the first)")
    for side, (make, rank) in sides.items():
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
        torch.set_default_dtype(default)
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ("attn" in name or "mlp" in name)]
        chosen = set(map(id, matrices))
        rest = [p for p in model.parameters() if id(p) not in chosen]
        tokens = torch.randint(32000, (1, 256), device="cuda")
        try:
            optimizer = make(matrices, rest, rank, GAP)

            def closure(model=model, optimizer=optimizer, tokens=tokens):
                optimizer.zero_grad()
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                return loss

            peaks, times = [], []
            for i in range(8):
                torch.cuda.reset_peak_memory_stats()
                with quick_start() if i == 0 else nullcontext():
                    times.append(seconds(lambda o=optimizer, c=closure: o.step(c), "cuda"))
                peaks.append(torch.cuda.max_memory_allocated() / 2**30)
        except Exception as error:  # noqa: BLE001 - e.g. bitsandbytes is missing: an empty row
            print(f"  {side:32s}{type(error).__name__}: {str(error)[:90]}", flush=True)
            model = matrices = rest = optimizer = closure = None
            _collect("cuda")
            continue
        peak, step = max(peaks[2:]), statistics.median(times[2:])
        base = base or peak
        state = kept_bytes(optimizer.state) / 2**30
        print(f"  {side:32s}{peak:7.2f}  {100 * (peak / base - 1):+6.1f} %   first {peaks[0]:6.2f}   state {state:5.2f}   "
              f"step {1e3 * step:6.1f} ms", flush=True)  # fmt: skip
        write(["memory", "cuda", "", side, f"{peak:.3f}", f"{peaks[0]:.3f}", f"{state:.3f}", f"{1e3 * step:.1f}"])
        model = matrices = rest = optimizer = closure = None
        _collect("cuda")


def main():
    """Run what was asked for; print tables and write one CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--sides", nargs="+", choices=list(SIDES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow", action="store_true", help="also time the full SVDs of large shapes on the CPU")
    parser.add_argument("--refresh-only", action="store_true")
    parser.add_argument("--no-refresh", action="store_true", help="leave out the refresh against the SVD")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of whole steps (CUDA)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = args.shapes or (["llama_1b"] if args.device == "cuda" else ["vit_s"])
    out = args.out or Path(f"benchmarks/results/galore_{args.device}_{args.threads}.csv")
    out.parent.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{date.today()} {machine}, torch {torch.__version__}", flush=True)
    with open(out, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([str(date.today()), machine, f"torch {torch.__version__}", f"{args.threads} threads"])
        rows.writerow(["shapes", "device", "threads", "side", "step_ms", "fastest_ms", "refresh_ms", "amortised_ms",
                       "of_published", "of_adamw", "of_default", "wall_ms", "state_mib", "temporary_mib"])  # fmt: skip
        if not args.no_refresh:
            refresh_against_svd(args.device, rows.writerow)
        if args.refresh_only:
            return
        for name in shapes:
            show(name, compare(name, args), args, rows.writerow)
            file.flush()
        if args.device == "cuda" and not args.no_memory:
            step_memory(args, rows.writerow)


if __name__ == "__main__":
    main()
