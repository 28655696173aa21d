"""Prune or drop the heads' optimizer state at a merge that resets them, as ReLoRA does (arXiv 2307.05695, section 3).

After a merge with reset, A and B are new, and moments that point where the old ones went would push them straight back. The
authors keep a little of the moments (``optimizer_magnitude_pruning`` 0.9 of them zeroed) and never touch Adam's ``step``, so
bias correction stays off.

**Where this differs from the authors' code**: there each state tensor is pruned by its own magnitudes. An entry may then keep
its momentum m and lose its mean square v. Of the entries that keep momentum at 0.9, most do, and the next step
m / (√v + eps) is up to a thousand times too long there. Here m is pruned as theirs, and v at the same entries: what keeps its
momentum keeps its scale.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.core import checks
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.wrapped import state_holder

MOMENTUM = "exp_avg"  # where Adam and its kin keep it


@torch.no_grad()
def prune_moments(optimizer: Optimizer, parameters: Iterable[Tensor], fraction: float) -> float:
    """Zero the smallest ``fraction`` of every moment of ``parameters``, in place.

    Where there is momentum (``exp_avg``), its magnitudes choose the entries of all moments; else each moment of the parameter's
    shape (SGD's momentum) is pruned by its own. Of a parameter (H, …, …) that stacks heads, every head is pruned separately, so
    that the outcome does not depend on which heads share a process.

    Args:
        optimizer: holds the state; parameters without state are skipped.
        parameters: the adapters.
        fraction: share of the entries to zero, from 0 to 1; rounded to the nearest whole number of entries.

    Returns:
        The share of entries that are zero afterwards, 0.0 where there is no state yet. To be logged: a pruning that silently
        does nothing is a known failure.

    Raises:
        ConfigError: a fraction outside [0, 1], or quantised moments, whose codes say nothing of magnitude.
        ValueError: a parameter that the optimizer does not hold.
    """
    checks.number("prune", fraction, least=0, most=1, allowed="must be a share from 0 to 1")
    zeros = torch.zeros((), dtype=torch.int64)
    total = 0
    for parameter, state in _states(optimizer, parameters):
        moments = {k: m for k, m in state.items() if isinstance(m, Tensor) and m.ndim and m.shape == parameter.shape}
        for key, moment in moments.items():
            if not moment.is_floating_point():
                raise ConfigError("prune", fraction, f"cannot prune {key}, which is stored as {moment.dtype}: use null")
        mask = _smallest(moments[MOMENTUM], fraction) if MOMENTUM in moments else None
        for moment in moments.values():
            moment.masked_fill_(_smallest(moment, fraction) if mask is None else mask, 0.0)
            zeros = zeros.to(moment.device) + (moment == 0).sum()  # read once, at the end
            total += moment.numel()
    return int(zeros) / total if total else 0.0


def reset_moments(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Delete the state of ``parameters``, Adam's ``step`` included; returns how many had one.

    Raises:
        ValueError: a parameter that the optimizer does not hold.
    """
    holder = state_holder(optimizer)
    found = [parameter for parameter, _ in _states(optimizer, parameters)]
    for parameter in found:
        del holder.state[parameter]
    return len(found)


def _states(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[tuple[Tensor, dict]]:
    """Return (parameter, its state) of those that have one."""
    holder = state_holder(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = []
    for parameter in parameters:
        if id(parameter) not in held:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in no group of the optimizer")
        state = holder.state.get(parameter)
        if state:
            found.append((parameter, state))
    return found


def _smallest(moment: Tensor, fraction: float) -> Tensor:
    """Return a mask of the smallest entries, of each head where a moment stacks heads (H, …, …)."""
    heads = moment.flatten(1) if moment.ndim == 3 else moment.reshape(1, -1)
    count = round(fraction * heads.shape[1])
    # by index and not by threshold: equal magnitudes (a half-precision moment has many) do not overshoot the share
    chosen = torch.topk(heads.abs(), count, largest=False, sorted=False).indices
    return torch.zeros_like(heads, dtype=torch.bool).scatter_(1, chosen, True).reshape(moment.shape)
