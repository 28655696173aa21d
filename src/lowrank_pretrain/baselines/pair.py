"""Combine two rules in one optimizer: its own for matrices, torch's AdamW for everything else.

Lightning, schedules and checkpoints see one object: one list of groups, one state, one ``state_dict``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.models.optim import SETTINGS, changed_setting, foreign_state, has_moments, refuse_foreign_state

MATRICES = "matrices"  # the key that marks a group of matrices
_TORCHS = ("lr", *SETTINGS)  # settings that schedules change, and that a run keeps for every optimizer


class MatrixPair(torch.optim.Optimizer):
    """Step the groups with ``matrices=True`` by :meth:`step_matrices`, the others by AdamW.

    Args:
        params: groups. A group without ``matrices`` is AdamW's.
        lr: for groups that set none.
        rule: default settings of the groups of matrices.

    Attributes:
        fixed: settings of the rule that the shapes of its state depend on.
    """

    fixed: tuple[str, ...] = ()

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, rule: dict[str, Any]) -> None:
        self._rule = dict(rule)
        self._rest: torch.optim.AdamW | None = None
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch's optimizers do, with the default settings for its kind.

        Raises:
            ConfigError: a parameter of a group of matrices is no matrix.
        """
        matrices = bool(param_group.setdefault(MATRICES, False))
        for key, value in (self._rule if matrices else _adamw().defaults).items():
            param_group.setdefault(key, self.defaults["lr"] if key == "lr" else value)
        super().add_param_group(param_group)
        shapes = [tuple(p.shape) for p in self.param_groups[-1]["params"] if matrices and not is_lazy(p) and p.ndim != 2]
        if shapes:
            del self.param_groups[-1]
            raise ConfigError(
                MATRICES, True, f"needs a group of matrices, but one parameter is {shapes[0]}: use {MATRICES}=False"
            )

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
        self._step_other(self._rest)
        return loss

    def step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Step the matrices that have gradients."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, but keep the rule's own settings of the code. One line names each that differs in the file.

        Rates, decay and AdamW's settings are the file's, as in torch: schedules change them. ``settings_win`` keeps these too.

        Raises:
            ConfigError: the state is another optimizer's; a changed setting that the state depends on.
        """
        ours: list[dict[str, Any]] = []
        changed: dict[str, str] = {}

        def check(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            self._refuse(saved)
            for group, theirs in zip(self.param_groups, saved["param_groups"], strict=False):
                own = {key: group[key] for key in self._rule if key not in _TORCHS} if group[MATRICES] else {}
                lacks = {key: value for key, value in group.items() if key not in (*theirs, "param_names")}  # of an older torch
                ours.append(lacks | own)
                for key, value in own.items():
                    if _plain(theirs[key]) != _plain(value):
                        changed.setdefault(key, changed_setting(key, value, theirs[key]))

        def put_back(_: torch.optim.Optimizer) -> None:
            for group, mine in zip(self.param_groups, ours, strict=True):
                group.update(mine)

        hooks = [  # after other hooks that may convert the file, and before those that may change the settings
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(put_back, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        for line in changed.values():
            rank_zero_only(print)(line, flush=True)

    def _refuse(self, saved: Mapping[str, Any]) -> None:
        """Refuse a file of another optimizer, and one whose state has other shapes than the settings here make.

        Raises:
            ConfigError: naming what differs.
        """
        for group, theirs in zip(self.param_groups, saved["param_groups"], strict=False):
            missing = [key for key in (MATRICES, *(self._rule if group[MATRICES] else ())) if key not in theirs]
            if missing or theirs[MATRICES] != group[MATRICES]:
                raise foreign_state(f"its groups have no {missing[0]}" if missing else "other matrices")
            for key in self.fixed if group[MATRICES] and any(map(saved["state"].get, theirs["params"])) else ():
                if theirs[key] != group[key]:
                    cure = "use that, or start afresh with hydra.run.dir=DIR"
                    raise ConfigError(key, group[key], f"the checkpoint was written with {theirs[key]!r}: {cure}")

        def fits(group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
            return self.takes(group, p, state) if group[MATRICES] else has_moments(state, p)

        refuse_foreign_state(self, saved, fits)

    def takes(self, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
        """Return whether a matrix' state from a file can be this rule's."""
        return False

    def _lend(self, other: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
        """Point another optimizer at these groups and this state: after a load, both may be new objects."""
        other.param_groups, other.state = groups, self.state

    def _step_other(self, other: torch.optim.Optimizer) -> None:
        """Step another optimizer without torch's wrapper: hooks on the steps of all optimizers run once, for this one."""
        step: Any = type(other).step
        (step.__wrapped__ if getattr(step, "hooked", False) else step)(other)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rest = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule}


def _adamw() -> torch.optim.AdamW:
    """Create an empty AdamW of torch's: its constructor demands one parameter."""
    return torch.optim.AdamW([torch.zeros(0)])


def _plain(value: Any) -> Any:
    """Return a setting to compare: a list from a file as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return (parameter, gradient) of each parameter in a group that has a gradient."""
    return [(p, p.grad) for p in group["params"] if p.grad is not None]
