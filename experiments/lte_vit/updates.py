"""Observation 4 on one matrix: how far a merge of parallel heads goes the way that full training's step would have gone.

Shapes: B batch, D width, R rank, N heads.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers

BATCH, RATE = 512, 1e-3


def moved(width: int, heads: int, rank: int, steps: int, seed: int) -> torch.Tensor:
    """W's change (D, D) by so many steps of SGD on a linear map; heads 0: in full, else by heads that are merged after them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width, bias=False)).double()
    x = torch.randn(steps, BATCH, width, dtype=torch.float64)
    goal = torch.randn(width, width, dtype=torch.float64) / width**0.5
    before = model[0].weight.detach().clone()
    if heads:
        owner = HeadSet(Settings(heads=heads, merge_every=steps, seed=seed), Workers())
        targets = find_targets(model)
        owner.convert(targets, dict.fromkeys(targets, rank))
        owner.shared.batch = BATCH
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for batch in x:
        (model(batch) - batch @ goal.t()).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if heads:
            owner.after_step()
    return model[0].weight.detach() - before


def cosines(facts: dict[str, Any], _: Path | None = None) -> dict[str, Any]:
    """Mean cosine over three draws, by "N R T".

    Args:
        facts: ``width``; ``heads``, list of (N, R); ``steps``, list of T.
    """
    found = {}
    for steps in facts["steps"]:
        for heads, rank in facts["heads"]:
            pairs = [(moved(facts["width"], heads, rank, steps, s), moved(facts["width"], 0, 0, steps, s)) for s in range(3)]
            cosine = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairs]
            found[f"{heads} {rank} {steps}"] = statistics.fmean(cosine)
    return {"cosines": found}
