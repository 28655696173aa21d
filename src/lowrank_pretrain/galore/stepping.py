"""The arithmetic of one step over many parameters: check every gradient first, then update matrices and the rest.

Matrices of one group go through together: project each, one fused Adam call over all R, project each back.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.galore import moments, sharded
from lowrank_pretrain.galore.chunks import chunks, slices, split
from lowrank_pretrain.galore.projection import Projected

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW


def apply(optimizer: "GaLoreAdamW", params: list[Tensor]) -> None:
    """Step with the gradients of these parameters.

    Raises:
        ConfigError: a sparse or complex gradient.
        FloatingPointError: a gradient that is not finite.
    """
    lookup = optimizer.lookup()
    by_device: dict[torch.device, list[Tensor]] = {}
    for p in params:
        _check_gradient(p, lookup[p].name)
        by_device.setdefault(p.device, []).append(p)
    for some in by_device.values():
        _on_device(optimizer, some)


def _on_device(optimizer: "GaLoreAdamW", params: list[Tensor]) -> None:
    lookup = optimizer.lookup()
    slots, plain = [], []
    for p in params:
        slot = optimizer._present(p, lookup[p].slot)
        if slot is None:
            plain.append(p)
        else:
            slot.grad, slot.low = p.grad, optimizer._layerwise.low.pop(p, None)
            slots.append(slot)
    # what writes the gradient itself into the weight, or starts from nothing, cannot be masked on the device
    wait = any(slot.cold or slot.group["residual"] or slot.group["variant"] == "apollo" for slot in slots)
    parts = [(t, s.name) for s in slots for t in (s.grad, s.low) if t is not None]
    parts += [(p.grad, lookup[p].name) for p in plain]
    grads, names = [sharded.local(t) for t, _ in parts], [name for _, name in parts]
    skip = optimizer._guard.check(grads, names, params, wait, alone=optimizer._layerwise.stepping)
    for some in chunks(slots, params[0].device):
        _projected(optimizer, some, skip)
    for group in optimizer.param_groups:
        mine = [p for p in plain if lookup[p].group is group]
        for same_step in split(mine, lambda p: (int(optimizer.state[p].get("step", 0)), p.dtype)):
            _plain(optimizer, same_step, group, skip)


def _projected(optimizer: "GaLoreAdamW", slots: list[Projected], skip: Tensor | None) -> None:
    group, step = slots[0].group, slots[0].step + 1
    lows, ms, vs = [], [], []
    for slot in slots:
        sample = slot.grad if slot.grad is not None else slot.p
        m, v = slot.read_moments(sample)
        if slot.due:
            began = optimizer._clock.start(slot.p)
            m, v, overlap = slot.refresh(m, v, skip)
            optimizer._clock.stop(slot.p, began, step, overlap)
        low = slot.low
        if slot.grad is not None:
            low = slot.project(slot.grad) if low is None else low.add_(slot.project(slot.grad))
        lows.append(low)
        ms.append(m)
        vs.append(v)
    minus_n = moments.directions(lows, ms, vs, step, group, skip)
    for slot, low, n, m, v in zip(slots, lows, minus_n, ms, vs, strict=True):
        if slot.local is None:
            slot.apply(low, n)
        else:
            slot.local.take(slot, n, float(group["lr"]) * group["weight_decay"])
        slot.write_moments(m, v)
        slot.grad = slot.low = None
    _decay([slot.p for slot in slots if slot.local is None], group, skip)


def _plain(optimizer: "GaLoreAdamW", params: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
    states, grads = [optimizer.state[p] for p in params], [sharded.local(p.grad) for p in params]
    step, dtype = int(states[0].get("step", 0)) + 1, moments.moment_dtype(group, grads[0].dtype)
    weights, lr = [sharded.local(p) for p in params], float(group["lr"])
    pairs = [moments.read(state, w.shape, dtype, w.device) for state, w in zip(states, weights, strict=True)]
    ms, vs = [m for m, _ in pairs], [v for _, v in pairs]
    if dtype == params[0].dtype:
        moments.directions(grads, ms, vs, step, group, skip, into=weights, lr=lr)
    else:
        for piece in zip(weights, grads, ms, vs, strict=True):
            for weight, grad, m, v in zip(*(slices(t) for t in piece), strict=True):  # no full float32 copy
                weight.add_(*moments.directions([grad.to(dtype)], [m], [v], step, group, skip, lr=lr))
    for p, state, m, v in zip(params, states, ms, vs, strict=True):
        m, v = sharded.wrap(m, p, p.shape, 0), sharded.wrap(v, p, p.shape, 0)
        moments.write(state, m, v, moments.kind(group) == "8bit")
        moments.count(state)
    _decay(weights, group, skip)


def _check_gradient(p: Tensor, name: str) -> None:
    grad = p.grad
    if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
        what = "complex" if grad.is_complex() else "sparse"
        raise ConfigError("params", name, f"has a {what} gradient: GaLoreAdamW takes dense real ones (Embedding(sparse=False))")


def _decay(weights: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
    rate = float(group["lr"]) * group["weight_decay"]
    if not rate or not weights:
        return
    weights = [sharded.local(w) for w in weights]
    if skip is None:
        torch._foreach_add_(weights, weights, alpha=-rate)  # 1 - rate, rounded, would drift from the published sum
    else:
        torch._foreach_mul_(weights, 1 - rate * (1 - skip))
