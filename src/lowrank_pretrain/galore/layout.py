"""The one check in front of the fused kernel: weight, gradient and moments agree in shape, layout, dtype and device.

The kernel walks raw memory from the first element on and checks nothing: a transposed gradient would be a wrong update, an
expanded one would be read past its end. What does not agree is copied into the weight's layout; another shape is an error.
"""

import torch
from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError


def is_dense(t: Tensor) -> bool:
    """Return whether the elements fill one stretch of memory, each once, in any order of the dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(weight: Tensor) -> Tensor:
    """Return the weight, or a dense copy of one with gaps (a slice of a larger tensor)."""
    return weight if is_dense(weight) else weight.clone()


def fit(t: Tensor, like: Tensor, name: str, what: str) -> Tensor:
    """Return ``t`` where it agrees with the dense tensor ``like``, else a copy that does.

    Raises:
        ConfigError: another shape.
    """
    if t.shape == like.shape and t.dtype is like.dtype and t.device == like.device and not t.is_neg():
        if t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous()):  # sizes of 1 may have any stride
            return t
    check_shape(t, like, name, what)
    return torch.empty_like(like).copy_(t)


def check_shape(t: Tensor, like: Tensor, name: str, what: str) -> None:
    """Refuse a gradient or moment of another shape than the weight's.

    Raises:
        ConfigError: the parameter was resized under the optimizer.
    """
    if t.shape == like.shape:
        return
    raise ConfigError(
        "params", name, f"has shape {tuple(like.shape)}, but its {what} has {tuple(t.shape)}: a parameter that was resized "
        "needs a new optimizer, or no state (optimizer.state.pop(p)) and a new gradient"
    )  # fmt: skip
