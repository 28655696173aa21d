"""Write adapters for peft: one dense adapter per layer, for any ranks of its row blocks.

                 A (ΣR, D)        B (O, ΣR)
           q    [ A_q    ]       [ s B_q    0        0     ]      scale 1 = alpha / rank of the whole, since each
           k    [ A_k    ]       [   0    s B_k      0     ]      block's own scale s is folded into its B
           v    [ A_v    ]       [   0      0      s B_v   ]

Shapes: D in, O out, R rank of a row block, ΣR of all blocks of a layer.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.files import write_whole

_PARTS = ("W", "q", "k", "v")  # in the order of their rows


def adapted_layers(exact: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the layers with at least one adapter among a checkpoint's exact factors."""
    return [key.removesuffix(".lora_A") for key, value in exact.items() if key.endswith(".lora_A") and len(value)]


def dense_adapter(exact: Mapping[str, Tensor], layer: str, alpha: float | None) -> tuple[Tensor, Tensor]:
    """Return one adapter (A, B) of rank ΣR and scale 1 for a layer, float32.

    Row blocks without an adapter are rows of zeros in B.

    Args:
        exact: a checkpoint's exact factors: ``{layer}.lora_A`` and ``{layer}.lora_B.<part>``.
        layer: full name of the layer.
        alpha: scale = alpha / R of a part; ``None``: scale 1.
    """
    A = exact[layer + ".lora_A"].float()
    factors = {part: exact[key].float() for part in _PARTS if (key := f"{layer}.lora_B.{part}") in exact}
    rows = next(iter(factors.values())).shape[0]  # a fused layer's row blocks are equal thirds
    B = A.new_zeros(rows if "W" in factors else 3 * rows, len(A))
    column = 0
    for part, factor in factors.items():
        rank = factor.shape[1]
        row = max(0, _PARTS.index(part) - 1) * rows
        B[row : row + rows, column : column + rank] = factor * (1.0 if alpha is None else alpha / rank)
        column += rank
    return A.contiguous(), B


def write_adapters(exact: Mapping[str, Tensor], alpha: float | None, out: Path, prefix: str, task_type: str | None) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into the folder `out`.

    Args:
        exact: a checkpoint's exact factors, by full names.
        alpha: as for :func:`dense_adapter`.
        out: the folder; its sub-folder ``base`` holds the weights that the adapters belong to.
        prefix: to drop from the names: peft's names count from the network.
        task_type: peft's, ``"CAUSAL_LM"`` or nothing.
    """
    with optional_import():
        from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    transposed = False
    for layer in adapted_layers(exact):
        A, B = dense_adapter(exact, layer, alpha)
        name = layer.removeprefix(prefix)
        ranks[name] = len(A)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
        # transformers' Conv1D keeps W as D×O; where D = O peft looks at the layer and corrects the flag itself
        transposed |= tuple(exact[layer + ".weight"].shape) != (len(B), A.shape[1])
    # peft takes the first pattern that a layer's name ends with: longer names first
    ranks = dict(sorted(ranks.items(), key=lambda item: -len(item[0])))
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": "base",  # relative to this folder, which may move
        "inference_mode": True,
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    save_file(tensors, out / "adapter_model.safetensors")
    write_whole(out / "adapter_config.json", json.dumps(config, indent=2) + "\n")
