"""Which parameters one call of the fused kernel takes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.galore.projection import Projected

# Bytes of R that are worked on at once: on a CPU what stays in the cache, on a device enough to fill it.
_BYTES_CPU, _BYTES_DEVICE = 4 << 20, 64 << 20


def split(items: list[Any], key: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Items with equal keys together, in the order of their first."""
    found: dict[Any, list[Any]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    yield from found.values()


def chunks(slots: list[Projected], device: torch.device) -> Iterator[list[Projected]]:
    """Neighbours of the same group, step and dtype, no more than fit."""
    limit = _BYTES_CPU if device.type == "cpu" else _BYTES_DEVICE
    for same in split(slots, lambda s: (id(s.group), s.step, s.p.dtype)):
        some, size = [], 0
        for slot in same:
            some.append(slot)
            size += 4 * slot.numel_low
            if size >= limit:
                yield some
                some, size = [], 0
        if some:
            yield some


def slices(t: Tensor) -> list[Tensor]:
    """Views of a tensor along its first dimension, none much larger than a chunk."""
    if t.ndim == 0 or not t.numel():
        return [t]
    rows = max(1, _BYTES_DEVICE // 4 * t.shape[0] // t.numel())
    return list(t.split(rows))
