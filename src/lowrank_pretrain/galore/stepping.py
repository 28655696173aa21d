"""The arithmetic of one step over many parameters: check every gradient first, then update matrices and the rest.

Matrices of one group go through together: project each, one fused Adam call over all R, project each back.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import dtensor as sharded
from lowrank_pretrain.galore import moments
from lowrank_pretrain.galore.chunks import chunks, slices, split
from lowrank_pretrain.galore.groups import check_rates
from lowrank_pretrain.galore.layout import check_shape, dense, fit
from lowrank_pretrain.galore.projection import Projected

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW


def apply(optimizer: "GaLoreAdamW", params: list[Tensor]) -> None:
    """Step with the gradients of these parameters.

    Raises:
        ConfigError: a sparse or complex gradient; a rate that is NaN or infinite; a parameter that was resized.
        FloatingPointError: a gradient that is not finite.
    """
    lookup = optimizer.lookup()
    by_device: dict[torch.device, list[Tensor]] = {}
    rates: set[int] = set()
    for p in params:
        group, name, _ = lookup[p]
        if id(group) not in rates:
            rates.add(id(group))
            check_rates(group)
        _check_gradient(p, name)
        by_device.setdefault(p.device, []).append(p)
    for some in by_device.values():
        _on_device(optimizer, some)


def _on_device(optimizer: "GaLoreAdamW", params: list[Tensor]) -> None:
    lookup = optimizer.lookup()
    slots: list[Projected] = []
    plain: dict[int, list[_Plain]] = {}  # by group: looked for group by group, thousands of groups would cost their square
    for p in params:
        group, name, slot = lookup[p]
        if slot is None:
            plain.setdefault(id(group), []).append(_Plain(p, name, p.grad, optimizer.state[p]))
        else:
            slot = optimizer._present(p, slot)
            slot.grad, slot.low = optimizer._layerwise.gradient(p), optimizer._layerwise.taken(p)
            slots.append(slot)
    # what writes the gradient itself into the weight, or starts from nothing, cannot be masked on the device
    wait = any(slot.cold or slot.group["residual"] or slot.group["variant"] == "apollo" for slot in slots)
    # two lists, not one of pairs: thousands of small objects in each step would call for the garbage collector
    pairs = [(s, what) for s in slots for what in ("grad", "low") if getattr(s, what) is not None]
    owners: list[Projected | _Plain] = [s for s, _ in pairs]
    owners += [item for mine in plain.values() for item in mine]
    whats = [what for _, what in pairs] + ["grad"] * (len(owners) - len(pairs))
    grads = [sharded.local(getattr(owner, what)) for owner, what in zip(owners, whats, strict=True)]
    alone = optimizer._layerwise.stepping
    skip = optimizer._guard.check(grads, [owner.name for owner in owners], params, wait, alone, matrices=len(pairs))
    for i in optimizer._guard.spikes:
        owner, what = owners[i], whats[i]
        setattr(owner, what, optimizer._guard.limited(getattr(owner, what), owner))
    for some in chunks(slots, params[0].device):
        _projected(optimizer, some, skip)
    for mine in plain.values():
        group = lookup[mine[0].p].group
        for same in split(mine, lambda item: (moments.steps_taken(item.state), item.p.dtype, item.grad.dtype)):
            _plain(same, group, skip)


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
        ms.append(fit(m, low, slot.name, "first moment"))
        vs.append(fit(v, low, slot.name, "second moment"))
    minus_n = moments.directions(lows, ms, vs, step, group, skip)
    for slot, low, n, m, v in zip(slots, lows, minus_n, ms, vs, strict=True):
        if slot.local is None:
            slot.apply(low, n)
        else:
            slot.local.take(slot, n, float(group["lr"]) * group["weight_decay"])
        slot.write_moments(m, v)
        slot.grad = slot.low = None
    _decay([slot.p for slot in slots if slot.local is None], group, skip)


@dataclass(slots=True)
class _Plain:
    """A parameter of a group without a rank, in this step."""

    p: Tensor
    name: str
    grad: Tensor
    state: dict[str, Any]

    def second_moment(self) -> Tensor | None:
        """v, None before the first step."""
        like = sharded.local(self.p)
        return moments.read(self.state, like.shape, torch.float32, like.device)[1] if "exp_avg" in self.state else None


def _plain(items: list[_Plain], group: dict[str, Any], skip: Tensor | None) -> None:
    grads, weights = [sharded.local(item.grad) for item in items], [sharded.local(item.p) for item in items]
    step, lr = moments.steps_taken(items[0].state) + 1, float(group["lr"])
    dtype = moments.moment_dtype(group, grads[0].dtype)
    if dtype == weights[0].dtype:
        works, ms, vs = [dense(w) for w in weights], [], []
        for i, (work, item) in enumerate(zip(works, items, strict=True)):
            grads[i] = fit(grads[i], work, item.name, "gradient")
            m, v = _moments(item, work, work)
            ms.append(m)
            vs.append(v)
        moments.directions(grads, ms, vs, step, group, skip, into=works, lr=lr)
        for w, work in zip(weights, works, strict=True):
            if w is not work:
                w.copy_(work)
    else:
        pairs = [
            _moments(item, w, torch.empty(0, dtype=dtype, device=w.device)) for item, w in zip(items, weights, strict=True)
        ]
        ms, vs = [m for m, _ in pairs], [v for _, v in pairs]
        for item, weight, grad, m, v in zip(items, weights, grads, ms, vs, strict=True):
            check_shape(grad, weight, item.name, "gradient")
            for w, g, some_m, some_v in zip(*(slices(t) for t in (weight, grad, m, v)), strict=True):  # no full float32 copy
                w.add_(*moments.directions([g.to(dtype).contiguous()], [some_m], [some_v], step, group, skip, lr=lr))
    for item, m, v in zip(items, ms, vs, strict=True):
        m, v = sharded.wrap(m, item.p, item.p.shape, 0), sharded.wrap(v, item.p, item.p.shape, 0)
        moments.write(item.state, m, v, moments.kind(group) == "8bit")
        moments.count(item.state)
    _decay(weights, group, skip)


def _moments(item: _Plain, weight: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the moments in the weight's shape; in like's dtype, and in its layout if it is the weight."""
    m, v = moments.read(item.state, weight.shape, like.dtype, weight.device, like=weight)
    if like is weight:
        return fit(m, like, item.name, "first moment"), fit(v, like, item.name, "second moment")
    for t, what in ((m, "first moment"), (v, "second moment")):
        check_shape(t, weight, item.name, what)
    return tuple(t.to(like.device, like.dtype).contiguous() for t in (m, v))


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
