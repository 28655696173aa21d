"""Keep optimizers in line with a changed model: new parameters join the group of their base weight, frozen ones leave."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Inherit


def group_names(optimizers: Iterable[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """Return parameter names by optimizer and group, in order: state is restored by position, so a resume compares them."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [[[names.get(id(p), "?") for p in group["params"]] for group in opt.param_groups] for opt in optimizers]


def check_restored(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Refuse moments that landed on a parameter of another shape; loading by position does not notice.

    Raises:
        ConfigError: naming the parameter.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            continue  # projected moments have their own shapes: such an optimizer checks them itself
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0 and key.startswith("exp_avg") and value.shape != p.shape:
                    raise ConfigError(
                        "ckpt_path", names.get(id(p), "?"), f"its {key} has shape {tuple(value.shape)}, not {tuple(p.shape)}: "
                        "the checkpoint's optimizer belongs to another model or another grouping of parameters"
                    )  # fmt: skip


def inherit_state(optimizer: Optimizer, inherited: Iterable[Inherit]) -> None:
    """Give new parameters the state of the rows that they take over; a state of an unknown form starts afresh."""
    for heir in inherited:
        state = optimizer.state.get(heir.old) if heir.rows else None
        if state:
            with suppress(LookupError):
                optimizer.state[heir.new] = {key: _part_of(value, heir) for key, value in state.items()}


def _part_of(value: Any, heir: Inherit) -> Any:
    """Return what a new parameter takes over of one value of its origin's state; LookupError if that has an unknown form."""
    new, old, dim, start, rows = heir
    if isinstance(value, Tensor) and value.shape == old.shape:
        # one parameter more than one of the old one's shape: heads that all start from the same adapter
        return value.expand(new.shape).clone() if new.ndim > old.ndim else value.narrow(dim, start, rows).clone()
    whole = isinstance(value, Tensor) and value.ndim == old.ndim == new.ndim
    if whole and all(size in (1, full) for size, full in zip(value.shape, old.shape, strict=True)):  # Adafactor's means
        return (value if value.shape[dim] == 1 else value.narrow(dim, start, rows)).clone()
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() > 1):
        raise LookupError(type(value).__name__)
    return value.clone() if isinstance(value, Tensor) else value


def join(optimizers: list[Optimizer], module: nn.Module, before: dict[int, bool], inherited: Iterable[Inherit]) -> None:
    """Put new parameters into the group that owns their base weight.

    Args:
        optimizers: theirs.
        module: as the change has left it.
        before: ``requires_grad`` of each parameter before the change, by id.
        inherited: which new parameter takes over rows of which old one.

    Raises:
        ConfigError: no optimizer owns a target's weight.
    """
    groups = {id(p): group for opt in optimizers for group in opt.param_groups for p in group["params"]}
    origins = {id(new): id(old) for new, old, *_ in inherited}
    named = dict(module.named_parameters())
    for name, p in named.items():
        if id(p) in before or not p.requires_grad or id(p) in groups:
            continue
        owner = origins.get(id(p)) or _base_weight(name, named, groups, origins)
        if owner not in groups and ".rest_bias." in name:  # nothing trained the bias before
            p.requires_grad_(False)
            continue
        if owner not in groups:
            raise ConfigError(
                "targets", name.partition(".lora_")[0], "is in no optimizer: configure_optimizers must hand over its weight"
            )
        group = groups[id(p)] = groups[owner]  # a joined parameter can own later ones
        group["params"].append(p)
        if "param_names" in group:
            group["param_names"].append(name)
        _start_momentum(optimizers, group, p)


def _start_momentum(optimizers: list[Optimizer], group: dict[str, Any], p: nn.Parameter) -> None:
    """Let torch's fused SGD take a new parameter: it wants momentum for all parameters of a group, or for none."""
    optimizer = next(optimizer for optimizer in optimizers if any(group is one for one in optimizer.param_groups))
    if not isinstance(optimizer, SGD) or not group.get("fused") or p in optimizer.state:
        return
    if all(optimizer.state[old].get("momentum_buffer") is None for old in group["params"] if old in optimizer.state):
        return
    if group["dampening"]:  # a first step from zero would be damped, which SGD does not do
        group["fused"] = False
    else:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


def _base_weight(name: str, named: dict[str, nn.Parameter], groups: dict[int, Any], origins: dict[int, int]) -> int | None:
    """Find the nearest enclosing parameter of a new one that an optimizer owns: ``fc1.lora_B.W`` -> ``fc1.weight``."""
    words = name.split(".")
    for end in range(len(words) - 1, 0, -1):
        prefix = ".".join(words[:end])
        siblings = [f"{prefix}.weight", *(n for n in named if n.rpartition(".")[0] == prefix)]
        for sibling in siblings:
            if sibling in named:
                own = id(named[sibling])
                found = next((owner for owner in (own, origins.get(own)) if owner in groups), None)
                if found is not None:
                    return found
    return None


def leave(optimizers: list[Optimizer], module: nn.Module, before: dict[int, bool]) -> None:
    """Remove parameters that the change froze or removed from their group, with their state."""
    after = {id(p): p.requires_grad for p in module.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            stays = [not (id(p) in before and before[id(p)] and not after.get(id(p), False)) for p in group["params"]]
            for p, stay in zip(group["params"], stays, strict=True):
                if not stay:
                    optimizer.state.pop(p, None)
                    p.grad = None
            for key in ("params", "param_names"):
                if key in group:
                    group[key][:] = [item for item, stay in zip(group[key], stays, strict=True) if stay]
