"""The heads of a model as plain tensors by name, each with the heads along dim 0: what is parked, gathered, saved, put back.

Keys are (kind, name, key): ``("layer", layer, "A" | "B.<part>" | "prev_A" | "prev_B.<part>" | "stage")`` and
``("moment", factor, state key)``. ``stage`` (H,) says what a head has seen.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.bare_groups import check_moment

Record = dict[tuple[str, str, str], Tensor]

UNBORN, LIVES, MERGED = 0.0, 1.0, 2.0  # never trained yet · trains · trains and W holds some of it


def factors(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The heads' parameters by name, as the module would name them."""
    found = {}
    for name, layer in layers.items():
        found[f"{name}.lora_A"] = layer.lora_A
        found |= {f"{name}.lora_B.{part.name}": layer.lora_B[part.name] for part in layer._parts}
    return found


def of_layers(layers: Mapping[str, nn.Module]) -> Record:
    """Factors and what W holds of them; views of the live ones."""
    found: Record = {}
    for name, layer in layers.items():
        A, stage = layer.lora_A.detach(), MERGED if layer.has_prev else LIVES
        found["layer", name, "A"] = A
        found["layer", name, "prev_A"] = layer.prev_A if layer.has_prev else torch.zeros_like(A)
        found["layer", name, "stage"] = torch.full((len(A),), stage, device=A.device)
        for part, prev in zip(layer._parts, layer.prev_B, strict=True):
            B = layer.lora_B[part.name].detach()
            found["layer", name, f"B.{part.name}"] = B
            found["layer", name, f"prev_B.{part.name}"] = prev if layer.has_prev else torch.zeros_like(B)
    return found


def of_moments(layers: Mapping[str, nn.Module], optimizers: Iterable[Optimizer]) -> Record:
    """The heads' optimizer state; entries that all heads of a parameter share (``step``) are repeated for each."""
    found: Record = {}
    for name, p in factors(layers).items():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    found["moment", name, key] = value
                else:
                    check_moment(type(optimizer).__name__, key, value, p)
                    found["moment", name, key] = torch.as_tensor(value).repeat(len(p))
    return found


@torch.no_grad()
def put_layers(record: Mapping[tuple[str, str, str], Tensor], layers: Mapping[str, nn.Module]) -> None:
    """Put factors back, and what W holds of them.

    Raises:
        ConfigError: a layer or a shape differs.
    """
    for name, layer in layers.items():
        live = {"A": layer.lora_A} | {f"B.{part.name}": layer.lora_B[part.name] for part in layer._parts}
        for key, p in live.items():
            there = record.get(("layer", name, key))
            if there is None or there.shape != p.shape:
                shape = "is missing" if there is None else f"has shape {tuple(there.shape)}, not {tuple(p.shape)}"
                raise ConfigError("ckpt_path", f"{name}.lora_{key}", f"{shape}: the checkpoint's heads are of another model")
            p.copy_(there)
        if (record["layer", name, "stage"] == MERGED).any():
            moved = {k: record["layer", name, k].to(layer.lora_A) for k in ("prev_A", *(f"prev_{b}" for b in live if b != "A"))}
            layer.set_prev(moved["prev_A"], {part.name: moved[f"prev_B.{part.name}"] for part in layer._parts})
        else:
            layer.set_prev(None, None)


def put_moments(record: Mapping[tuple[str, str, str], Tensor], layers: Mapping[str, nn.Module], optimizers: Any) -> None:
    """Put optimizer state back into optimizers that hold the factors."""
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, p in factors(layers).items():
        state = state_of(record, name)
        if state:
            owner[id(p)].state[p] = state


def state_of(record: Mapping[tuple[str, str, str], Tensor], name: str) -> dict[str, Tensor]:
    """One factor's optimizer state."""
    found = {key: value for (kind, of, key), value in record.items() if kind == "moment" and of == name}
    return {key: value.max() if value.ndim == 1 else value for key, value in found.items()}


def choose(record: Mapping[tuple[str, str, str], Tensor], first: int, count: int) -> Record:
    """Heads ``first`` … ``first + count − 1`` of a record, as copies; fewer if it has not so many."""
    return {key: value[first : first + count].clone() for key, value in record.items()}


def padded(record: Record, count: int) -> Record:
    """A record with heads added until there are ``count``, as if they had not been born; their moments are made to be safe.

    Adam's ``step`` is one for all heads of a parameter, so a new head among old ones has no bias correction: with a second
    moment of zero its first steps would be several times too long. It starts with the others' mean square, and no momentum.
    """
    result: Record = {}
    for key, value in record.items():
        missing = count - len(value)
        if missing > 0:
            mean = key[0] == "moment" and (value.ndim == 1 or "sq" in key[2]) and len(value) > 0
            fill = value.mean(0, keepdim=True) if mean else value.new_zeros(1, *value.shape[1:])
            value = torch.cat([value, fill.expand(missing, *value.shape[1:])])
        result[key] = value
    return result
