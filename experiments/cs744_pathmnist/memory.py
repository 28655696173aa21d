"""What a process holds that fine-tunes ViT-B/16 or ViT-L/16 at 224 pixels, in full or by LoRA of a rank."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.cs744_galore.memory import VIT, size


def live(facts: dict[str, Any], _: Path | None = None) -> dict[str, Any]:
    """Two steps of AdamW on random images; memory needs no real ones, and no pre-trained weights.

    Args:
        facts: ``network``, ``rank`` (0: in full), ``batch``, ``steps``.

    Returns:
        bytes: ``peak`` resident above what the process held before, ``weights``, ``states``; numbers: ``trainable``, ``total``.
    """
    import timm

    from lowrank_pretrain.core.memory import PeakMemory, optimizer_bytes
    from lowrank_pretrain.core.targets import find_targets
    from lowrank_pretrain.lora.model import freeze, inject

    torch.manual_seed(0)
    meter = PeakMemory(torch.device("cpu"))
    meter.restart()
    before = meter.peak()
    model = timm.create_model(VIT[facts["network"]], num_classes=9).train()
    if facts["rank"]:
        plan = dict.fromkeys(find_targets(model), facts["rank"])
        inject(model, plan)
        freeze(model, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _step in range(facts["steps"]):
        logits = model(torch.randn(facts["batch"], 3, 224, 224))
        nn.functional.cross_entropy(logits, torch.arange(facts["batch"]) % 9).backward()
        optimizer.step()
        optimizer.zero_grad()
        meter.sample()
    return {"peak": meter.peak() - before, "weights": size(model.parameters()), "states": optimizer_bytes([optimizer]),
            "trainable": sum(p.numel() for p in trained), "total": sum(p.numel() for p in model.parameters())}  # fmt: skip
