"""Find the optimizer that holds the state, where one wraps another (Lookahead, SAM, a user's own).

Such a wrapper steps an optimizer of the same parameters, which keeps moments in its own ``state``; the wrapper's stays empty.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.trainer import optimizers_inside


def with_wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those inside it that step the same parameters: any of them may hold their state."""
    mine = _ids(optimizer)
    return [optimizer, *(inner for inner in optimizers_inside(optimizer) if _ids(inner) == mine)]


def state_holder(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the state of an optimizer's parameters: itself, or one that it wraps.

    Raises:
        ConfigError: an optimizer inside steps only some of the parameters; or the state lies in several optimizers.

    Example:
        >>> import torch
        >>> plain = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
        >>> state_holder(plain) is plain
        True
    """
    inside = [inner for inner in optimizers_inside(optimizer) if inner.state is not optimizer.state]  # one lent it has no own
    if not inside:
        return optimizer
    mine, found = _ids(optimizer), with_wrapped(optimizer)
    partial = next((inner for inner in inside if _ids(inner) & mine and all(inner is not same for same in found)), None)
    if partial is not None:
        raise ConfigError(
            "optimizer", type(optimizer).__name__, f"steps a {type(partial).__name__} inside it that holds other parameters, "
            "and its state cannot be told apart: share all param_groups with it, or return both from configure_optimizers"
        )  # fmt: skip
    held = [each for each in found if any(isinstance(key, Tensor) and kept for key, kept in each.state.items())]
    states = {id(each.state) for each in held}
    if len(states) > 1:
        raise several_hold_state(held)
    if held:
        return held[0]
    # before the first step: the innermost, which steps
    ends = [each for each in found[1:] if len(with_wrapped(each)) == 1]
    if len(ends) > 1:
        raise several_hold_state([optimizer, *ends])
    return ends[0] if ends else optimizer


def several_hold_state(optimizers: list[Optimizer]) -> ConfigError:
    """Return the error of an optimizer whose state lies in several, the outermost of which comes first."""
    names = [type(each).__name__ for each in optimizers]
    return ConfigError(
        "optimizer", names[0], f"keeps the state of one parameter in several optimizers ({', '.join(names)}), of which "
        f"only one can be followed: use {names[-1]} itself"
    )  # fmt: skip


def state_of(optimizer: Optimizer, p: Tensor) -> Mapping[str, Any]:
    """Return a parameter's state, wherever an optimizer keeps it; empty if there is none. Raises as ``state_holder``."""
    return state_holder(optimizer).state.get(p, {})


def forget(optimizer: Optimizer, p: Tensor) -> None:
    """Delete a parameter's state from an optimizer and from all that it wraps."""
    for each in with_wrapped(optimizer):
        each.state.pop(p, None)


def _ids(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
