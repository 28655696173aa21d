"""Step time of low-rank training against full training and against peft, side by side in one run.

    python benchmarks/lora.py                                     # ViT-S/16 224, batch 16, 2 CPU threads
    python benchmarks/lora.py --device cuda --model vit_large_patch16_224 --batch 64 --precision bf16-mixed
    OMP_WAIT_POLICY=PASSIVE python benchmarks/lora.py --model gpt2 --depth 2 --batch 2 --precision bf16-true
    python benchmarks/lora.py --model pocket --batch 128          # the demo's ViT: width 224, 3 blocks, 16 tokens

Every variant makes the same step (forward, backward, clipping, fused AdamW) on the same batch. "no adapters" is the bound: all
but the position embedding is frozen, so it is what adapters that cost nothing would reach. Rounds are interleaved: each round
times every variant once, in an order that rotates, so that a machine that drifts drifts for all. Reported are medians, and as
the speed-up the median of full/variant within a round. CPU time is printed next to wall time: on a machine with neighbours it
is the steadier one, provided that threads which wait do not count: set OMP_WAIT_POLICY=PASSIVE.
Adapters: rank 16 on every linear layer but the head, q 16, k 8, v 8 (peft: 32 on the fused qkv, as it has no row blocks).
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

import timm
import torch
from torch import nn

from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lora import frozen
from lowrank_pretrain.lora import model as lora

RANK = 16


PEFT_LAYERS = ["qkv", "attn.proj", "fc1", "fc2", "c_attn", "c_proj", "c_fc"]  # timm's names and GPT-2's
POCKET = {"img_size": 28, "patch_size": 7, "in_chans": 1, "num_classes": 10, "embed_dim": 224, "depth": 3, "num_heads": 4,
          "mlp_ratio": 2.0, "global_pool": "avg", "class_token": False}  # fmt: skip
TOKENS = 512  # of a text


def make(args: argparse.Namespace) -> nn.Module:
    """Build the model, on the device, in its precision, with blocks as many as asked for."""
    with torch.device(args.device):  # a ViT-L's random weights take a CPU seconds
        model = build(args)
    return model.to(args.device, torch.bfloat16 if args.precision == "bf16-true" else torch.float32)


def build(args: argparse.Namespace) -> nn.Module:
    """Build the model in float32."""
    if args.model == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=args.depth or 12, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
        return GPT2LMHeadModel(config)
    depth = {"depth": args.depth} if args.depth else {}
    if args.model == "pocket":
        return timm.create_model("vit_tiny_patch16_224", **POCKET | depth)
    return timm.create_model(args.model, num_classes=1000, **depth)


def batch_for(model: nn.Module, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw inputs and what they should give."""
    if args.model == "gpt2":
        x = torch.randint(0, model.config.vocab_size, (args.batch, TOKENS), device=args.device)
        return x, x
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (224, 224)
    channels, classes = (1, 10) if args.model == "pocket" else (3, 1000)
    x = torch.randn(args.batch, channels, *size, device=args.device)
    x = x.bfloat16() if args.precision == "bf16-true" else x
    return x, torch.randint(0, classes, (args.batch,), device=args.device)


def plan_for(model: nn.Module, lower_half_zero: bool = False) -> dict[str, int]:
    """Return ranks 16, 8 for k and v; 0 in the lower half of the blocks on request."""
    targets = find_targets(model, "all")
    block_of = {name: int(next(piece for piece in name.split(".") if piece.isdigit())) for name in targets}
    half = (max(block_of.values()) + 1) // 2
    plan = {}
    for name in targets:
        rank = RANK // 2 if name.endswith((".k", ".v")) else RANK
        plan[name] = 0 if lower_half_zero and block_of[name] < half else rank
    return plan


def full(model: nn.Module) -> nn.Module:
    """Everything trains, no adapters."""
    return model


def ours(
    freeze_rest: bool = False, lower_half_zero: bool = False, joint: bool = False, stored: str | None = None
) -> Callable[[nn.Module], nn.Module]:
    """This package's adapters; ``stored``: the type in which the frozen W is kept and multiplied."""

    def change(model: nn.Module) -> nn.Module:
        plan = plan_for(model, lower_half_zero)
        lora.inject(model, plan)
        if not joint:
            lora.freeze(model, plan, freeze_rest=freeze_rest, frozen_dtype=stored)
        return model

    return change


def bound(model: nn.Module) -> nn.Module:
    """Freeze all but the position embedding: backward goes through every layer, and no layer has a gradient to make."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(("pos_embed", "wpe.weight")))
    return model


def peft(freeze_rest: bool) -> Callable[[nn.Module], nn.Module]:
    """The same ranks by peft."""

    def change(model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        twice = {"qkv": 2 * RANK, "c_attn": 2 * RANK}
        gpt2 = any(name.endswith("c_attn") for name, _ in model.named_modules())
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=PEFT_LAYERS, rank_pattern=twice, alpha_pattern=twice, fan_in_fan_out=gpt2
        )
        wrapped = get_peft_model(model, config)
        if not freeze_rest:
            for name, p in wrapped.named_parameters():
                p.requires_grad_("base_layer" not in name)
        return wrapped

    return change


VARIANTS = {
    "full": full,
    "joint": ours(joint=True),
    "peft, rest trains": peft(freeze_rest=False),
    "ours, rest trains (default)": ours(),
    "peft, rest frozen": peft(freeze_rest=True),
    "ours, freeze_rest": ours(freeze_rest=True),
    "ours, lower half rank 0, freeze_rest": ours(freeze_rest=True, lower_half_zero=True),
    "ours, freeze_rest, W in bfloat16": ours(freeze_rest=True, stored="bfloat16"),
    "ours, half rank 0, W in bfloat16": ours(freeze_rest=True, lower_half_zero=True, stored="bfloat16"),
    "ours, freeze_rest, W in int8": ours(freeze_rest=True, stored="int8"),
    "ours, freeze_rest, W in float8": ours(freeze_rest=True, stored="float8"),
    "no adapters (bound)": bound,
}


class Runner:
    """One model with its optimizer; ``step`` makes one training step and returns (wall s, CPU s)."""

    def __init__(self, change: Callable[[nn.Module], nn.Module], args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.args = args
        model = make(args)
        self.x, self.y = batch_for(model, args)
        self.model = change(model).train()
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.params)
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=True)

    def step(self) -> tuple[float, float]:
        """One training step: (wall seconds, CPU seconds)."""
        cuda = self.args.device == "cuda"
        if cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.autocast(self.args.device, torch.bfloat16, enabled=self.args.precision == "bf16-mixed"):
            if self.args.model == "gpt2":
                loss = self.model(input_ids=self.x, labels=self.y).loss
            else:
                loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu


def peak_gib(runner: Runner) -> float:
    """Allocator peak of one step, with nothing but this variant on the device."""
    torch.cuda.reset_peak_memory_stats()
    runner.step()
    return torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="a timm ViT, gpt2 (512 tokens) or pocket")
    parser.add_argument("--depth", type=int, help="blocks; default: all that the model has")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16-mixed", "bf16-true"])
    parser.add_argument("--only", nargs="*", help="substrings of variant names; full is always run")
    parser.add_argument("--out", type=Path, help="write the table as JSON lines beside the machine and the date")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = {n: c for n, c in VARIANTS.items() if n == "full" or not args.only or any(o in n for o in args.only)}
    for name in [name for name in chosen if " W in " in name]:
        reason = frozen.refuses(name.split()[-1], torch.device(args.device))
        if reason is not None:
            print(f"without {name!r}: {reason}")
            del chosen[name]
    wall: dict[str, list[float]] = {name: [] for name in chosen}
    cpu: dict[str, list[float]] = {name: [] for name in chosen}
    memory, trained = {}, {}
    if args.device == "cuda":  # one at a time first: what each needs alone
        for name, change in chosen.items():
            runner = Runner(change, args)
            runner.step()
            memory[name] = peak_gib(runner)
            del runner
            gc.collect()
            torch.cuda.empty_cache()
    runners = {name: Runner(change, args) for name, change in chosen.items()}
    for name, runner in runners.items():
        trained[name] = runner.trained
        for _ in range(3 if args.device == "cuda" else 1):
            runner.step()
    names = list(runners)
    for i in range(args.rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            for times, value in zip((wall, cpu), runners[name].step(), strict=True):
                times[name].append(value)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    setting = f"{args.model}, {args.depth or 'all'} blocks, batch {args.batch}, {args.precision}, {args.rounds} rounds"
    print(f"{setting}; {device}, torch {torch.__version__}, {date.today()}")
    print(f"{'variant':38}{'trained':>12}{'wall s':>9}{'speed-up':>9}{'CPU s':>9}{'speed-up':>9}{'peak GiB':>9}")
    rows = []
    for name in names:
        ratio = statistics.median(f / v for f, v in zip(wall["full"], wall[name], strict=True))
        cpu_ratio = statistics.median(f / v for f, v in zip(cpu["full"], cpu[name], strict=True))
        w, c, m = statistics.median(wall[name]), statistics.median(cpu[name]), memory.get(name, float("nan"))
        print(f"{name:38}{trained[name]:12,}{w:9.4f}{ratio:9.2f}{c:9.4f}{cpu_ratio:9.2f}{m:9.2f}")
        rows.append(
            {"variant": name, "trained": trained[name], "wall_s": w, "speedup": ratio, "cpu_s": c, "cpu_speedup": cpu_ratio}
        )
        rows[-1] |= {"peak_gib": memory[name]} if memory else {}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        about = {
            **{k: v for k, v in vars(args).items() if k != "out"},
            "device": device,
            "torch": torch.__version__,
            "date": str(date.today()),
        }
        args.out.write_text("\n".join(json.dumps(row) for row in [about, *rows]) + "\n")


if __name__ == "__main__":
    main()
