"""One optimizer that steps matrices by a rule of its own, and everything else by torch's AdamW.

Lightning, schedules and checkpoints see one object: one list of groups, one state, one ``state_dict``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MATRICES = "matrices"  # the key that marks a group; what has it is stepped by the rule


class MatrixPair(torch.optim.Optimizer):
    """Step the groups with ``matrices=True`` by :meth:`step_matrices`, the others by AdamW.

    Args:
        params: groups. A group without ``matrices`` is AdamW's.
        lr: of groups that have none.
        rule: settings of the groups of matrices that have none of their own.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, rule: dict[str, Any]) -> None:
        self._rule = dict(rule)
        self._rest: torch.optim.AdamW | None = None
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do, with the settings of its side."""
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
        """Step the matrices with the gradients that are there."""
        raise NotImplementedError

    def _lend(self, other: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        """Let another optimizer work on these groups and on this state: both may be new objects after a load."""
        other.param_groups, other.state = groups, self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rest = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule}


def _adamw() -> torch.optim.AdamW:
    """Make torch's AdamW of nothing: it wants one parameter to begin with."""
    return torch.optim.AdamW([torch.zeros(0)])


def gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters of a group that have a gradient, each with it."""
    return [(p, p.grad) for p in group["params"] if p.grad is not None]
