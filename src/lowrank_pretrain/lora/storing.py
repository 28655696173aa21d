"""Store every frozen W of a model in a cheaper type, and handle in checkpoints what then belongs to it (pure torch)."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import Target, all_targets, families, parts, tied_layers
from lowrank_pretrain.lora import frozen
from lowrank_pretrain.lora.layer import LoRALinear, by_layer, give_adapters, has_own_forward, lora_layers


def frozen_layers(
    module: nn.Module, plan: Mapping[str, int], freeze_rest: bool, kind: str
) -> tuple[dict[str, Target], dict[str, str]]:
    """Return the layers whose whole W a freeze makes a constant, with one of their targets; and why others are left out.

    Args:
        module: with or without adapters.
        plan: target -> rank, 0 included.
        freeze_rest: whether everything but adapters freezes.
        kind: the type to store W in.

    Raises:
        ConfigError: a W whose shape the type's kernel refuses.
    """
    found, left_out, tied = {}, {}, tied_layers(module)
    for layer_name, group in by_layer(all_targets(module), plan).items():
        layer = group[0].layer
        if has_own_forward(layer):
            left_out[layer_name] = "has a class with a forward of its own"
        elif layer_name in tied:  # an embedding would look numbers up that only our forward can read
            left_out[layer_name] = f"shares its weight with {', '.join(tied[layer_name])} (an output head of rank 0)"
        elif len(group) < len(parts(layer_name, layer)) and not freeze_rest:
            left_out[layer_name] = "has row blocks that are no targets and train on"
        else:
            found[layer_name] = group[0]
            reason = frozen.obstacle(kind, tuple(layer.weight.shape))
            if reason is not None:
                raise ConfigError("frozen_dtype", kind, f"{layer_name} {reason}")
    return found, left_out


def check_frozen(module: nn.Module, plan: Mapping[str, int], freeze_rest: bool, kind: str) -> str | None:
    """Refuse before training what a freeze could not store; return one line that names what it will leave out.

    Raises:
        ConfigError: a shape, or a device, that cannot multiply in this type.
    """
    chosen, left_out = frozen_layers(module, plan, freeze_rest, kind)
    device = next((target.layer.weight.device for target in chosen.values()), None)
    reason = None if device is None else frozen.refuses(kind, device)
    if reason is not None:
        raise ConfigError("frozen_dtype", kind, f"{reason}: use bfloat16, or leave frozen_dtype out")
    if not left_out:
        return None
    reasons: dict[str, str] = {}
    for family in families(module, left_out).items():
        reasons[family[1]] = left_out[family[0]]
    listed = "; ".join(f"{family} {why}" for family, why in reasons.items())
    return f"frozen_dtype={kind} leaves out {listed}: their W stays as it is"


def store_frozen(module: nn.Module, plan: Mapping[str, int], freeze_rest: bool, kind: str, keep_original: bool) -> None:
    """Store every frozen W in a cheaper type. A layer of rank 0 gets our forward for it, without an adapter."""
    refuse_overflow(module, plan, freeze_rest, kind)
    for target in frozen_layers(module, plan, freeze_rest, kind)[0].values():
        if not isinstance(target.layer, LoRALinear):
            give_adapters(target.layer, [], None, False, None)
        cast(LoRALinear, target.layer).store_weight(kind, keep_original)


def refuse_overflow(module: nn.Module, plan: Mapping[str, int], freeze_rest: bool, kind: str) -> None:
    """Refuse a finite W that the type cannot hold, before any is stored.

    Raises:
        ConfigError: naming the target.
    """
    for name, target in frozen_layers(module, plan, freeze_rest, kind)[0].items():
        if frozen.overflows(target.layer.weight, kind):
            largest = float(target.layer.weight.abs().max())
            raise ConfigError(
                "frozen_dtype", kind, f"{name} holds numbers up to {largest:.3g}, which it cannot: leave it out of the targets "
                "or use bfloat16 (a run may go on with that from its last checkpoint before the freeze)"
            )  # fmt: skip


def stored_tensors(name: str, stored: frozen.Stored | None) -> dict[str, Tensor]:
    """Return what belongs to a W that is stored in a cheaper type, by its name in a checkpoint."""
    return {} if stored is None else {f"{name}.frozen_{field}": value for field, value in stored.tensors().items()}


def stored_again(module: nn.Module, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store each W that comes in its own dtype (others wrote into it after a fit); return what replaces it."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(module):
        given, stored = exact.get(f"{name}.weight"), layer._stored
        if stored is None or given is None:
            continue
        lacks_original = stored.original is not None and f"{name}.frozen_original" not in exact
        if given.dtype != layer.weight.dtype or lacks_original:
            layer.write_weight(given.to(layer.weight.device, stored.dtype))
            layer.store_weight(stored.kind, stored.original is not None)
            found |= {f"{name}.weight": layer.weight.detach()} | stored_tensors(name, layer._stored)
    return found


def unmerged_weights(exact: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the W of every layer with adapters in its own dtype, from the result of ``exact_state``.

    Args:
        exact: of a checkpoint; a W may be stored in a cheaper type.
        like: the merged weights by the same names, which have W's own dtype.
    """
    found = {}
    for key in (key for key in exact if key.endswith(".weight")):
        name = key.removesuffix(".weight")
        kind = "float8" if f"{name}.frozen_turned" in exact else "int8"
        original = exact.get(f"{name}.frozen_original")
        dtype = like[key].dtype if key in like else torch.float32
        found[key] = (
            frozen.widened(exact[key], kind, exact.get(f"{name}.frozen_scale"), dtype) if original is None else original
        )
    return found
