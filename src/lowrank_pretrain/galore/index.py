"""What the optimizer knows of each parameter: its group, its name, and its projection if it has one."""

import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.groups import largest_rank
from lowrank_pretrain.galore.projection import Projected


class Entry(NamedTuple):
    """One parameter; ``slot`` is None for one that plain AdamW updates."""

    group: dict[str, Any]
    name: str
    slot: Projected | None


def parameter_name(group: dict[str, Any], number: int, i: int) -> str:
    """Name of the i-th parameter of a group, by position where the optimizer was given none."""
    names = group.get("param_names", ())
    return names[i] if len(names) == len(group["params"]) else f"parameter {i} of group {number}"


# A change of any of these in the middle of a fit makes the index anew; lr, betas and decay are read at each step.
_SETTINGS = (
    "rank", "proj_type", "variant", "update_proj_gap", "stagger", "refresh", "rotate_moments", "moments", "residual",
    "layerwise", "scale", "eps", "correct_bias", "seed",
)  # fmt: skip


class Snapshot:
    """The groups as the index was made from them, to see whether a user has changed something since."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.settings = [settings(group) for group in groups]
        self._groups = list(groups)
        self._lists = [group["params"] for group in groups]  # kept, so that no other list takes their identity
        self._params = [list(group["params"]) for group in groups]

    def same_lists(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the groups hold the same lists, of the same length: quick, for use within a step."""
        return len(groups) == len(self._lists) and all(
            group["params"] is some and len(some) == len(params)
            for group, some, params in zip(groups, self._lists, self._params, strict=True)
        )

    def same(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the groups, their parameters and their settings are the same."""
        return (
            self.same_lists(groups)
            and all(map(operator.is_, groups, self._groups))
            and all(all(map(operator.is_, group["params"], params)) for group, params in zip(groups, self._params, strict=True))
            and all(settings(group) == old for group, old in zip(groups, self.settings, strict=True))
        )


def settings(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the group's settings that the index was made from."""
    return tuple(map(group.get, _SETTINGS))


def make_index(
    groups: list[dict[str, Any]],
    ranks: Mapping[Tensor, int],
    states: Mapping[Tensor, Mapping[str, Any]],
    old: Mapping[Tensor, Entry],
) -> dict[Tensor, Entry]:
    """Return the entries of all parameters, in order.

    Args:
        groups: the optimizer's.
        ranks: those of adopted parameters.
        states: the optimizer's.
        old: the last index. A parameter whose rank or side was changed since goes over to the new one at its next step.

    Raises:
        ConfigError: a parameter with a rank is no matrix any more; a change that its moments cannot follow.
    """
    named = [
        (p, group, parameter_name(group, number, i), ranks.get(p) or group.get("rank") or 0)
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]
    count, position, found = sum(1 for entry in named if entry[3]), 0, {}
    for p, group, name, rank in named:
        slot, before = None, old[p].slot if p in old and states.get(p) else None
        if rank:
            if p.ndim < 2 or not p.numel():
                raise ConfigError("params", name, "is flat now (FSDP1, DeepSpeed): use FSDP2 (ModelParallelStrategy)")
            offset = position * group["update_proj_gap"] // count if group["stagger"] else 0
            slot = Projected(p, group, {}, min(rank, largest_rank(p)), name, offset)
            position += 1
        if before is not None:
            _follow(before, slot, name)
        found[p] = Entry(group, name, slot)
    return found


def _follow(before: Projected, slot: Projected | None, name: str) -> None:
    """Let a slot take over from the one that made its parameter's state.

    Raises:
        ConfigError: its moments cannot follow the change.
    """
    if slot is not None and slot.form == before.form:
        slot.former = before.former
        return
    key = "rank" if slot is None or slot.rank != before.rank else "proj_type" if slot.variant == before.variant else "variant"
    now = None if slot is None else getattr(slot, key) if key != "proj_type" else slot.group["proj_type"]
    was = f"was {getattr(before, key, None)} so far ({name})"
    if slot is None or "apollo" in (slot.variant, before.variant) or slot.distributed or before.local is not None:
        raise ConfigError(
            key, now, f"{was} and the moments cannot follow: set it back, or drop the state (optimizer.state.pop(p))"
        )
    slot.former = before.former or before
