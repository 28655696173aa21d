"""Bytes that autograd keeps for backward, with inputs that are kept and inputs that are made again, and what that costs.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/kept.py                  # ViT-S/16 224, float32 and bf16-mixed
    OMP_WAIT_POLICY=PASSIVE python benchmarks/kept.py --model gpt2 --depth 2 --batch 1

Counted are the storages that go into autograd's graph in one forward pass, each once, parameters apart. Under autocast that
includes the casts of the weights, which are the same for any batch: they are in a column of their own. The count is the same on
every machine. CPU time is that of a step (forward, backward, clipping, AdamW). Each round has one step of each variant, in an
order that rotates; reported is the median, within a round, of a variant's time over that of the one that keeps its inputs.
Gradients of the adapters, of three blocks: the largest relative difference of one tensor, between inputs made again and kept,
and of both, and of plain autograd operations in place of the package's function, from float64.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from lora import Runner, full, plan_for
from torch import nn

from lowrank_pretrain.lora import function
from lowrank_pretrain.lora import model as lora


def adapters(recompute_inputs: bool, freeze_rest: bool, zero: int = 0) -> Callable[[nn.Module], nn.Module]:
    """Adapters on every linear layer but the head; none in the lowest ``zero`` blocks."""

    def change(model: nn.Module) -> nn.Module:
        plan = plan_for(model)
        for name in plan:
            block = int(next(piece for piece in name.split(".") if piece.isdigit()))
            plan[name] = plan[name] if block >= zero else 0
        lora.inject(model, plan, recompute_inputs=recompute_inputs)
        lora.freeze(model, plan, freeze_rest=freeze_rest)
        return model

    return change


# name -> how the model is changed, and the variant whose time it is compared with
VARIANTS = {
    "full": (full, None),
    "default": (adapters(False, False), None),
    "default, inputs made again": (adapters(True, False), "default"),
    "freeze_rest": (adapters(False, True), None),
    "freeze_rest, inputs made again": (adapters(True, True), "freeze_rest"),
    "freeze_rest, lowest block rank 0, made again": (adapters(True, True, zero=1), None),
    "freeze_rest, two lowest rank 0, made again": (adapters(True, True, zero=2), None),
}


def kept_mib(runner: Runner) -> tuple[float, float]:
    """Return MiB kept for backward: (what grows with the batch, casts of weights)."""
    own = {p.untyped_storage().data_ptr() for p in runner.model.parameters()}
    sizes = {p.numel() for p in runner.model.parameters()}
    kept: dict[int, tuple[int, bool]] = {}
    alive = []  # or an address might be used again

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            weight = runner.args.precision == "bf16-mixed" and t.dtype == torch.bfloat16 and t.ndim <= 2 and t.numel() in sizes
            kept[storage.data_ptr()] = storage.nbytes(), weight
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        runner.loss()
    total = {flag: sum(size for size, is_weight in kept.values() if is_weight == flag) / 2**20 for flag in (False, True)}
    return total[False], total[True]


class Steps(Runner):
    """A runner that can stop after the forward pass."""

    def loss(self) -> torch.Tensor:
        """Return the loss of the batch."""
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16-mixed"):
            if self.args.model == "gpt2":
                return self.model(input_ids=self.x, labels=self.y).loss
            return nn.functional.cross_entropy(self.model(self.x), self.y)


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row per variant, in one precision."""
    rows = {}
    for name, (change, _) in VARIANTS.items():
        runner = Steps(change, args)
        runner.loss()  # once each layer compares its input with the one made again
        activations, casts = kept_mib(runner)
        rows[name] = {"precision": args.precision, "variant": name, "kept_mib": activations, "casts_mib": casts}
        first = rows["full"]
        rows[name] |= {
            "of_full": activations / first["kept_mib"],
            "of_full_with_casts": (activations + casts) / (first["kept_mib"] + first["casts_mib"]),
        }
        del runner
    pairs = {name: base for name, (_, base) in VARIANTS.items() if base and args.rounds}
    runners = {name: Steps(VARIANTS[name][0], args) for pair in pairs.items() for name in pair}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for i in range(-1, args.rounds if runners else -1):
        names = list(runners)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(runners[name].step()[1])
    for name, base in pairs.items():
        rows[name]["cpu_time"] = statistics.median(a / b for a, b in zip(times[name][1:], times[base][1:], strict=True))
    return list(rows.values())


def gradients(args: argparse.Namespace, precision: str, recompute_inputs: bool, plain: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of all adapters, which are not zero; ``plain``: by autograd's own operations."""
    args = argparse.Namespace(**{**vars(args), "precision": precision, "depth": 3, "batch": 4})
    change = adapters(recompute_inputs, freeze_rest=False)
    runner = Steps(change, args)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, p in lora.adapter_parameters(runner.model):
            p.normal_(0, 0.02)
    if precision == "fp64":
        runner.model.double()
        runner.x = runner.x.double() if runner.x.is_floating_point() else runner.x
    ordinary = function.is_ordinary
    function.is_ordinary = (lambda x: False) if plain else ordinary
    runner.loss().backward()
    function.is_ordinary = ordinary
    return {name: p.grad.double() for name, p in lora.adapter_parameters(runner.model)}


def compare_gradients(args: argparse.Namespace) -> list[dict]:
    """Return a row per precision."""
    exact, rows = gradients(args, "fp64", False), []

    def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in a)

    for precision in ("fp32", "bf16-mixed", "bf16-true"):
        kept, again = gradients(args, precision, False), gradients(args, precision, True)
        plain = gradients(args, precision, False, plain=True)
        rows.append({"precision": precision, "again_to_kept": difference(again, kept), "kept_to_fp64": difference(kept, exact)})
        rows[-1] |= {"again_to_fp64": difference(again, exact), "autograd_to_fp64": difference(plain, exact)}
        rows[-1] |= {"kept_to_autograd": difference(kept, plain)}
        print(
            "gradients:",
            ", ".join(f"{k} {v if k == 'precision' else format(v, '.1e')}" for k, v in rows[-1].items()),
            flush=True,
        )
    return rows


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT, gpt2 (512 tokens) or pocket")
    parser.add_argument("--depth", type=int, help="blocks; default: all that the model has")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="0: no times")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="*", default=["fp32", "bf16-mixed"])
    parser.add_argument("--gradients", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="write the table as JSON lines beside the machine and the date")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    print(f"{'precision':12}{'variant':48}{'kept MiB':>9}{'casts':>7}{'of full':>9}{'with casts':>11}{'CPU time':>9}")
    for precision in args.precisions:
        args.precision = precision
        rows += measure(args)
        for row in rows[-len(VARIANTS) :]:
            numbers = f"{row['kept_mib']:9.1f}{row['casts_mib']:7.1f}{row['of_full']:9.3f}{row['of_full_with_casts']:11.3f}"
            print(f"{row['precision']:12}{row['variant']:48}{numbers}{row.get('cpu_time', float('nan')):9.3f}", flush=True)
    rows += compare_gradients(args) if args.gradients else []
    if args.out:
        about = {**vars(args), "device": f"{platform.machine()}, {args.threads} threads", "torch": torch.__version__}
        about = {k: v for k, v in about.items() if k not in ("out", "precision")} | {"date": str(date.today())}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")


if __name__ == "__main__":
    main()
