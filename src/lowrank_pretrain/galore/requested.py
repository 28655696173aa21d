"""Keep the settings that the code asks for, before any schedule or file, and compare them with those of a file's code.

At a resume a setting is taken from the code if the code has changed since, and from the file if not: a schedule may have moved
it there. So each group's settings are kept from the moment on when the group was added.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.groups import FORM_KEYS, KEYS, known_key

_RATES = ("lr", "betas", "weight_decay")  # schedules change these; they stay if a file does not tell the code's values


def requested_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings as plain numbers and words, to detect later changes."""
    found = {key: group[key] for key in KEYS if key in group}
    return {key: float(value) if isinstance(value, Tensor) else value for key, value in found.items()}


class RequestedSettings:
    """Keep what the code asked for in each group, by the identity of the group's dict.

    Groups are removed and replaced by other code (``del optimizer.param_groups[1]``, Lightning's BaseFinetuning at a restart),
    so their position tells nothing.
    """

    def __init__(self, groups: Sequence[dict[str, Any]] = (), settings: Sequence[dict[str, Any]] = ()) -> None:
        # by id, with the group itself: no other dict takes its identity
        self._known: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        if len(groups) == len(settings):  # a copy's or a pickle's
            for group, some in zip(groups, settings, strict=True):
                self.note(group, some)

    def note(self, group: dict[str, Any], settings: dict[str, Any] | None = None) -> None:
        """Note a group's settings: its present ones, unless others are given."""
        self._known[id(group)] = group, requested_settings(group) if settings is None else settings

    def of(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the settings of each group. Those of groups that are gone stay known: they may come back.

        A group that was put into ``param_groups`` by hand is noted as it is, at the rate that its schedule began with.
        """
        for group in groups:
            if id(group) not in self._known:
                self.note(group, requested_settings({**group, "lr": group.get("initial_lr", group["lr"])}))
        return [self._known[id(group)][1] for group in groups]


def check_form(
    here: dict[str, Any], there: dict[str, Any], now: dict[str, Any], then: dict[str, Any] | None, adopted: int, name: str
) -> None:
    """Refuse settings that the state depends on, if the code has changed them since the file; a run's own change may stay.

    Args:
        here: the group here.
        there: the group there.
        now: the settings in the code here.
        then: the settings in the code that wrote the file; None if the file does not say.
        adopted: the parameter's rank, if a plan gave it one.
        name: the parameter's.

    Raises:
        ConfigError: naming the key and both values.
    """
    for key in FORM_KEYS:
        if here.get(key) == there.get(key) or (then is not None and then.get(key) == now.get(key)):
            continue
        if key == "rank" or here.get("rank") or adopted:
            raise ConfigError(
                key, here.get(key), f"the checkpoint was written with {there.get(key)!r} ({name}): use that, or start afresh"
            )


def continued_settings(
    group: dict[str, Any], old: dict[str, Any], now: dict[str, Any], then: dict[str, Any] | None, has_state: bool, adopted: bool
) -> dict[str, Any]:
    """Return the group to continue with: the file's, with settings that the code has changed since.

    Args:
        group: the group here.
        old: the group there.
        now: the settings in the code here.
        then: the settings in the code that wrote the file; None if the file does not say.
        has_state: some parameter of the group has state in the file, which depends on ``FORM_KEYS``.
        adopted: some parameter of the group has its rank from a plan.
    """
    new = {key: value for key, value in old.items() if known_key(key)}
    new["params"] = group["params"]
    if "param_names" in group:
        new["param_names"] = group["param_names"]
    kept = {"seed", *(["scale"] if adopted else ())}  # an adoption sets the scale
    if adopted or (has_state and (old.get("rank") or group.get("rank"))):
        kept |= set(FORM_KEYS)
    for key in KEYS:
        if key in kept or (key not in now and key != "rank"):  # a rank alone may be absent
            continue
        if then is None:
            changed = key not in _RATES
        else:
            changed = (key in then or key == "rank") and then.get(key) != now.get(key)
        if changed and key == "lr" and then is not None:
            new[key] = _scheduled_rate(group, old, now[key], then[key], new)
        elif changed and key in group:
            new[key] = group[key]
        elif changed:
            new.pop(key, None)
    if new["seed"] != now.get("seed", new["seed"]) and (old.get("rank") or adopted):
        warnings.warn(f"seed={now['seed']}: the optimizer goes on with the checkpoint's {new['seed']}", stacklevel=5)
    return new


def rate_share(then: dict[str, Any] | None, now: dict[str, Any]) -> float:
    """Return the learning rate in the code over the one in the code that wrote the file."""
    return now["lr"] / then["lr"] if then is not None and then.get("lr") else 1.0


def _scheduled_rate(group: dict[str, Any], old: dict[str, Any], now: float, then: float, new: dict[str, Any]) -> Any:
    """Return the code's rate, at the file's position in the schedule."""
    share = float(old["lr"]) / then if then else 1.0
    for key in ("initial_lr", "max_lr", "min_lr"):
        if key in group:
            new[key] = group[key]
        elif key in old and then:
            new[key] = old[key] * now / then
    rate = now * share
    return torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
