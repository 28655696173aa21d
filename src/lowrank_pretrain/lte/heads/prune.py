"""Adapters' optimizer state at a merge: pruned by magnitude or dropped, as ReLoRA does it (arXiv 2307.05695, section 3).

After a merge with reset, A and B are new, and moments that point where the old ones went would push them straight back. The
authors keep a little of the moments (``optimizer_magnitude_pruning`` 0.9 of them zeroed) and never touch Adam's ``step``, so
bias correction stays off.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError


def prune_moments(optimizer: Optimizer, parameters: Iterable[Tensor], fraction: float) -> float:
    """Zero the smallest `fraction` of every moment of `parameters`, in place.

    Each moment (``exp_avg``, ``exp_avg_sq``, SGD's momentum: any state of its parameter's shape) has a threshold of its own;
    of a parameter (H, …, …) that stacks heads, every head has, so that the outcome does not depend on which heads share a
    process.

    Args:
        optimizer: holds the state; parameters that have none yet are passed over.
        parameters: the adapters.
        fraction: share of the entries to zero, from 0 to 1; rounded to the nearest whole number of entries.

    Returns:
        The share of entries that are zero afterwards, 0.0 where there is no state yet. To be logged: a pruning that silently
        does nothing is a known failure.

    Raises:
        ConfigError: a fraction outside [0, 1], or quantised moments, whose codes say nothing of magnitude.
        ValueError: a parameter that the optimizer does not hold.
    """
    if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 <= fraction <= 1:
        raise ConfigError("prune", fraction, "must be a share from 0 to 1")
    zeros = torch.zeros((), dtype=torch.int64)
    total = 0
    for parameter, state in _states(optimizer, parameters):
        for key, moment in state.items():
            if not isinstance(moment, Tensor) or moment.ndim == 0 or moment.shape != parameter.shape:
                continue
            if not moment.is_floating_point():
                raise ConfigError("prune", fraction, f"cannot prune {key}, which is stored as {moment.dtype}: use null")
            for head in moment if moment.ndim == 3 else (moment,):
                _zero_smallest(head, fraction)
            zeros = zeros.to(moment.device) + (moment == 0).sum()  # read once, at the end
            total += moment.numel()
    return int(zeros) / total if total else 0.0


def reset_moments(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Delete the state of `parameters`, Adam's ``step`` included; returns how many had one.

    Raises:
        ValueError: a parameter that the optimizer does not hold.
    """
    holder = _holder(optimizer)
    found = [parameter for parameter, _ in _states(optimizer, parameters)]
    for parameter in found:
        del holder.state[parameter]
    return len(found)


def _states(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[tuple[Tensor, dict]]:
    """(parameter, its state) of those that have one."""
    holder = _holder(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = []
    for parameter in parameters:
        if id(parameter) not in held:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in no group of the optimizer")
        state = holder.state.get(parameter)
        if state:
            found.append((parameter, state))
    return found


def _holder(optimizer: Optimizer) -> Optimizer:
    """Where the state really is: ``ZeroRedundancyOptimizer`` keeps it in an optimizer of its own."""
    return getattr(optimizer, "optim", optimizer)


@torch.no_grad()
def _drop_unscaled(state: dict) -> None:
    """No momentum where the mean square was zeroed: m / (√v + eps) would be a step hundreds of times too long."""
    m, v = state.get("exp_avg"), state.get("exp_avg_sq")
    if m is not None and v is not None and m.shape == v.shape:
        m.masked_fill_(v == 0, 0.0)


@torch.no_grad()
def _zero_smallest(moment: Tensor, fraction: float) -> None:
    count = round(fraction * moment.numel())
    if count:
        # by index and not by threshold: equal magnitudes (a half-precision moment has many) do not overshoot the share
        smallest = torch.topk(moment.abs().flatten(), count, largest=False, sorted=False).indices
        mask = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
        mask[smallest] = True
        moment.masked_fill_(mask.view(moment.shape), 0.0)
