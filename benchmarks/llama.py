"""Whole training steps of a LLaMA: tokens per second and peak GiB, by method and phase.

    python benchmarks/llama.py --device cuda                      # 1B in bfloat16, 4 sequences of 1024
    python benchmarks/llama.py --size tiny                        # to try it anywhere

A step is forward, backward and the optimizer. One method at a time is on the device, so that its peak is its own. Adapters:
rank 16 on every linear layer but the head, trained by fused AdamW. A method that fails has a row that says why.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch

from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.lora import model as lora

RANK = 16
SIZES = {  # vocabulary, width, hidden width, layers, heads; rank of projections
    "1b": (32000, 2048, 5461, 24, 32, 512),
    "tiny": (64, 32, 48, 2, 2, 8),
}


def adamw(model, rank):
    """AdamW of torch, fused, of what trains."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def adapters(freeze=True, **kwargs):
    """A low-rank phase; without ``freeze`` the joint one."""

    def make(model, rank):
        plan = dict.fromkeys(find_targets(model), min(RANK, rank))
        lora.inject(model, plan)
        if freeze:
            lora.freeze(model, plan, **kwargs)
        return adamw(model, rank)

    return make


def galore(**settings):
    """GaLore in this mode, of all parameters."""
    return lambda model, rank: GaLoreAdamW(galore_param_groups(model, rank, **settings), lr=1e-5)


METHODS = {
    "full, AdamW fused": adamw,
    "joint": adapters(freeze=False),
    "lowrank": adapters(),
    "lowrank, freeze_rest": adapters(freeze_rest=True),
    "galore": galore(),
    "galore, track": galore(refresh="track"),
    "galore, fira": galore(residual="fira"),
    "galore, layerwise": galore(layerwise=True),
    "galore, apollo rank 1": lambda model, rank: galore(variant="apollo")(model, 1),
}


def build(size, device, dtype):
    """The model on the device, without weights from anywhere."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, hidden, layers, heads, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def measure(make, args, dtype):
    """One method's row."""
    torch.manual_seed(0)
    model = build(args.size, args.device, dtype)
    optimizer = make(model, SIZES[args.size][-1])
    tokens = torch.randint(SIZES[args.size][0], (args.batch, args.length), device=args.device)
    cuda = args.device == "cuda"

    def closure():
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss

    times = []
    for i in range(3 + args.rounds):
        if cuda:
            torch.cuda.synchronize()
            if i == 3:
                torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        optimizer.step(closure)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    step = statistics.median(times[3:])
    row = {"step_ms": 1e3 * step, "tokens_per_s": tokens.numel() / step, "first_step_s": times[0]}
    row["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return row | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if cuda else {})


def main():
    """Measure every method, print the table, write a row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", choices=list(SIZES))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="substrings of methods")
    parser.add_argument("--out", type=Path, help="write the rows as JSON lines after the machine and the date")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    args.size = args.size or ("1b" if cuda else "tiny")
    args.batch, args.length = args.batch or (4 if cuda else 2), args.length or (1024 if cuda else 16)
    machine = torch.cuda.get_device_name() if cuda else platform.machine()
    about = {k: v for k, v in vars(args).items() if k != "out"}
    about |= {"machine": machine, "torch": torch.__version__, "date": str(date.today())}
    lines = [json.dumps(about)]
    print(f"LLaMA {args.size}, {args.batch} sequences of {args.length}; {machine}, torch {torch.__version__}, {date.today()}")
    print(f"{'method':26}{'tokens/s':>12}{'step ms':>10}{'peak GiB':>10}")
    for name, make in METHODS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        try:
            row = measure(make, args, torch.bfloat16 if cuda else torch.float32)
            print(
                f"{name:26}{row['tokens_per_s']:12.0f}{row['step_ms']:10.1f}{row.get('peak_gib', float('nan')):10.2f}",
                flush=True,
            )
        except Exception as error:  # noqa: BLE001 - out of memory, say: the others still count
            row = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            print(f"{name:26}{row['error'][:100]}", flush=True)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        lines.append(json.dumps({"method": name} | row))
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
