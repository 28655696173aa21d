"""Combine two rules in one optimizer: its own for matrices, torch's AdamW for everything else.

Lightning, schedules and checkpoints see one object: one list of groups, one state, one ``state_dict``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.models.optim import foreign_state, has_moment, refuse_foreign_state

MATRICES = "matrices"  # the key that marks a group of matrices


class MatrixPair(torch.optim.Optimizer):
    """Step the groups with ``matrices=True`` by :meth:`step_matrices`, the others by AdamW.

    Args:
        params: groups. A group without ``matrices`` is AdamW's.
        lr: for groups that set none.
        rule: default settings of the groups of matrices.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, rule: dict[str, Any]) -> None:
        self._rule = dict(rule)
        self._rest: torch.optim.AdamW | None = None
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do, with the default settings for its kind."""
        matrices = bool(param_group.setdefault(MATRICES, False))
        for key, value in (self._rule if matrices else _adamw().defaults).items():
            param_group.setdefault(key, self.defaults["lr"] if key == "lr" else value)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step both sides; a closure runs forward and backward first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.step_matrices([group for group in self.param_groups if group[MATRICES]])
        if self._rest is None:
            self._rest = _adamw()
        self._lend(self._rest, [group for group in self.param_groups if not group[MATRICES]])
        self._rest.step()
        return loss

    def step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Step the matrices that have gradients."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does.

        Raises:
            ConfigError: the state is another optimizer's.
        """
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            missing = [key for key in (MATRICES, *(self._rule if group[MATRICES] else ())) if key not in theirs]
            if missing or theirs[MATRICES] != group[MATRICES]:
                raise foreign_state(f"its groups have no {missing[0]}" if missing else "other matrices")

        def fits(group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
            return self.takes(p, state) if group[MATRICES] else has_moment(state, p)

        refuse_foreign_state(self, state_dict, fits)
        super().load_state_dict(state_dict)

    def takes(self, p: Tensor, state: Mapping[str, Any]) -> bool:
        """Return whether a matrix' state from a file can be this rule's."""
        return False

    def _lend(self, other: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        """Point another optimizer at these groups and this state: after a load, both may be new objects."""
        other.param_groups, other.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rest = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule}


def _adamw() -> torch.optim.AdamW:
    """Create an empty AdamW of torch's: its constructor demands one parameter."""
    return torch.optim.AdamW([torch.zeros(0)])


def gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, gradient) of each parameter in a group that has a gradient."""
    return [(p, p.grad) for p in group["params"] if p.grad is not None]
