"""Projection from the middle of a fit on: a plan's targets become projected, in the groups where they are.

No group is added or removed, so schedulers stay as they are; which parameters have a rank of their own is the optimizer's
knowledge (``ranks``), and travels in its ``state_dict``.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import all_targets, plain_name
from lowrank_pretrain.galore.groups import check_rank_value, largest_rank

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW


def check(optimizer: "GaLoreAdamW", names: Iterable[str], module: nn.Module) -> None:
    """See :meth:`GaLoreAdamW.check_adopt`."""
    targets = all_targets(module)
    named = {plain_name(name): p for name, p in module.named_parameters()}
    lookup = optimizer.lookup()
    for layer in dict.fromkeys(targets[name].layer_name for name in names):
        p = named[f"{layer}.weight"]
        if p not in lookup or lookup[p].slot is not None:
            raise ConfigError("targets", layer, "must be in a group of this optimizer, and not projected already")
        group = lookup[p].group
        if group["variant"] == "apollo":
            raise ConfigError("variant", "apollo", "has no subspace that moments could move into: use galore")
        if group["layerwise"]:
            raise ConfigError("layerwise", True, "has no step between two of which the model could switch: use layerwise=false")


def adopt(optimizer: "GaLoreAdamW", plan: Mapping[str, int], module: nn.Module) -> None:
    """See :meth:`GaLoreAdamW.adopt`."""
    targets, ranks = all_targets(module), {}
    for name, rank in plan.items():
        if name not in targets:
            raise ConfigError("plan", name, "is no target of this model")
        if rank:
            check_rank_value(rank)
            layer = targets[name].layer_name
            ranks[layer] = max(rank, ranks.get(layer, 0))
    named = {plain_name(name): p for name, p in module.named_parameters()}
    check(optimizer, [name for name, rank in plan.items() if rank], module)
    lookup, chosen = optimizer.lookup(), []
    for layer, rank in ranks.items():
        p = named[f"{layer}.weight"]
        if rank > largest_rank(p):
            raise ConfigError("plan", {layer: rank}, f"the matrix is {tuple(p.shape)}: at most {largest_rank(p)}")
        chosen.append((p, rank))
    for p, rank in chosen:
        lookup[p].group["scale"] = 1.0
        optimizer._ranks[p] = rank
    optimizer._index = None


def release(optimizer: "GaLoreAdamW") -> None:
    """See :meth:`GaLoreAdamW.release`."""
    for p in optimizer._ranks:
        state = optimizer.state.get(p, {})
        if state and "proj" not in state:
            for key in [key for key in state if key.startswith("exp_avg")]:
                del state[key]
