"""Times of a training step with heads one after another and heads in one product; parameters of GPT-2 124M with heads.

Shapes: B batch, T tokens, D in, O out, R rank, H heads.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.targets import find_targets, weight_rows
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers


class OneByOne(nn.Module):
    """y = W x + b + (1/H) Σ BₙAₙx, one head after another: the report's sequential heads."""

    def __init__(self, layer: nn.Module, heads: int, rank: int) -> None:
        super().__init__()
        self.layer = layer
        layer.weight.requires_grad_(False)
        rows, cols = weight_rows(layer).shape
        self.A = nn.ModuleList(nn.Linear(cols, rank, bias=False) for _ in range(heads))
        self.B = nn.ModuleList(nn.Linear(rank, rows, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, O)."""
        y = self.layer(x)
        for A, B in zip(self.A, self.B, strict=True):
            y = y + B(A(x)) / len(self.A)
        return y


def blocks(depth: int = 2, tokens: int = 512, vocab: int = 1) -> nn.Module:
    """GPT-2 small, of fewer blocks, and without its tables unless a vocabulary is given."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    names = {"vocab_size": vocab, "bos_token_id": None, "eos_token_id": None, "embd_pdrop": 0, "attn_pdrop": 0}
    config = GPT2Config(n_layer=depth, n_positions=tokens, resid_pdrop=0, **names)
    if vocab > 1:
        return GPT2LMHeadModel(config)
    model = GPT2Model(config)
    for table in (model.wte, model.wpe):
        table.weight.requires_grad_(False)
    return model


def put_heads(model: nn.Module, heads: int, rank: int, mode: str, batch: int) -> nn.Module:
    """Ours, on the attention layers; one merge behind it, as in all windows but the first."""
    owner = HeadSet(Settings(heads=heads, merge_every=1, mode=mode, seed=0), Workers())
    targets = find_targets(model, "attention")
    owner.convert(targets, dict.fromkeys(targets, rank))
    owner.after_step()
    owner.shared.batch = batch
    model.owner = owner
    return model


def put_one_by_one(model: nn.Module, heads: int, rank: int) -> nn.Module:
    """The loop, on the attention layers."""
    for name in {target.layer_name for target in find_targets(model, "attention").values()}:
        model.set_submodule(name, OneByOne(model.get_submodule(name), heads, rank))
    return model


class Side:
    """A model and its optimizer; ``step`` returns seconds."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model.train(), x
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def step(self) -> float:
        """Forward, backward, AdamW."""
        began = time.perf_counter()
        self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state.square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began


def measure(facts: dict[str, Any], _: Path) -> dict[str, Any]:
    """Median milliseconds by side, rounds interleaved; trainable and all parameters of GPT-2 124M by rank."""
    heads, ranks, batch = facts["heads"], facts["ranks"], facts["batch"]
    torch.manual_seed(0)
    x = torch.randn(batch, facts["tokens"], 768)
    sides = {"full": Side(blocks(), x)}
    for rank in ranks:
        sides[f"sequential, rank {rank}"] = Side(put_one_by_one(blocks(), heads, rank), x)
        sides[f"parallel, rank {rank}"] = Side(put_heads(blocks(), heads, rank, "parallel", batch), x)
        sides[f"joint, rank {rank}"] = Side(put_heads(blocks(), heads, rank, "joint", 1), x)
    names = list(sides)
    for side in sides.values():
        side.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(facts["rounds"]):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(1e3 * sides[name].step())
    return {
        "milliseconds": {name: statistics.median(t) for name, t in times.items()},
        "all": times,
        "parameters": counts(heads, ranks),
    }


def counts(heads: int, ranks: list[int]) -> dict[str, dict[str, int]]:
    """Of GPT-2 124M, the output head tied: in full, and with its attention layers' W frozen behind heads of each rank."""
    found = {}
    for rank in (0, *ranks):
        with torch.device("meta"):
            model = blocks(12, 1024, 50257)
        total = sum(p.numel() for p in model.parameters())
        trainable = total
        for target in find_targets(model, "attention").values() if rank else ():
            trainable += heads * rank * (target.rows + target.cols) - target.rows * target.cols
        found[f"rank {rank}" if rank else "full"] = {"trainable": trainable, "base": total}
    return found
