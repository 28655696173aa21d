"""What AdamW and GaLore hold: of a network that has shapes but no values, and of one that trains.

The networks' configurations are the source's (LLaMA 1B of GaLore's paper; timm's ViT-B/16 and ViT-L/16), one is cut to fit.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LLAMA = {
    "llama1b": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5461, "num_hidden_layers": 24,
                "num_attention_heads": 32, "num_key_value_heads": 32},
    # 4 of the 24 layers of LLaMA 350M; a vocabulary that keeps the tables' share of the weights as it is in LLaMA 1B
    "llama_cut": {"vocab_size": 3072, "hidden_size": 1024, "intermediate_size": 2736, "num_hidden_layers": 4,
                  "num_attention_heads": 16, "num_key_value_heads": 16},
}  # fmt: skip
VIT = {"vit_base": "vit_base_patch16_224", "vit_large": "vit_large_patch16_224"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def network(name: str) -> nn.Module:
    """A LLaMA of transformers or a ViT of timm with 9 classes, on the default device."""
    if name in VIT:
        import timm

        return timm.create_model(VIT[name], num_classes=9)
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA[name]))


def optimizer(model: nn.Module, rank: int, refresh: str = "subspace") -> torch.optim.Optimizer:
    """AdamW (rank 0), or GaLore with moments in the gradient's dtype, as AdamW's are."""
    from lowrank_pretrain import GaLoreAdamW, galore_param_groups

    if not rank:
        return torch.optim.AdamW(model.parameters(), lr=1e-4)
    return GaLoreAdamW(galore_param_groups(model, rank), lr=1e-4, moments="grad", refresh=refresh)


def tensors(built: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors in the optimizer's state."""
    return [value for state in built.state.values() for value in state.values() if isinstance(value, Tensor)]


def size(some: Any) -> int:
    """Bytes of tensors together."""
    return sum(t.numel() * t.element_size() for t in some)


def shapes(facts: dict[str, Any], _: Path | None = None) -> dict[str, Any]:
    """Bytes of weights, gradients and states of a network on the meta device: built by a real step there, no values.

    Args:
        facts: ``network``, ``dtype`` and ``rank`` (0: AdamW).
    """
    with torch.device("meta"):
        model = network(facts["network"]).to(DTYPES[facts["dtype"]])
    built = optimizer(model, facts["rank"], "svd")  # which draws nothing: there are no random numbers without values
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if facts["rank"]:
        built._guard.check = lambda *_, **__: None  # there is no value that could be infinite, and none to be read
    built.step()
    weights = size(model.parameters())
    largest = max(size([p]) for p in model.parameters())
    formula = built.formula_bytes() if facts["rank"] else 2 * weights
    return {"weights": weights, "gradients": weights, "states": size(tensors(built)), "formula": formula,
            "largest_gradient": largest, "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def live(facts: dict[str, Any], _: Path | None = None) -> dict[str, Any]:
    """The same of a network that trains on random input, and the process's resident peak above what it held before.

    Args:
        facts: ``network``, ``rank``, ``batch``, ``steps``; ``tokens`` of a LLaMA.
    """
    from lowrank_pretrain.core.memory import PeakMemory, optimizer_bytes

    torch.manual_seed(0)
    meter = PeakMemory(torch.device("cpu"))
    meter.restart()
    before = meter.peak()
    model = network(facts["network"]).train()
    built = optimizer(model, facts["rank"])
    batch = facts["batch"]
    for _step in range(facts["steps"]):
        if facts["network"] in VIT:
            logits = model(torch.randn(batch, 3, 224, 224))
            loss = nn.functional.cross_entropy(logits, torch.arange(batch) % 9)
        else:
            tokens = torch.randint(0, 1000, (batch, facts["tokens"]))
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        built.step()
        built.zero_grad()  # gradients are freed, as Lightning frees them
        meter.sample()
    weights = size(model.parameters())
    formula = built.formula_bytes() if facts["rank"] else 2 * weights
    return {"weights": weights, "states": optimizer_bytes([built]), "formula": formula, "peak": meter.peak() - before}
