"""Hand the optimizer's state of a parameter to those that take its rows over, at a change of the model."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.core.protocols import Inherit


def inherit_state(optimizer: Optimizer, inherited: Iterable[Inherit]) -> None:
    """Give new parameters their part of the state of those whose rows they take over."""
    for heir in inherited:
        state = optimizer.state.get(heir.old) if heir.rows else None
        if state:
            with suppress(LookupError):  # it starts afresh
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
