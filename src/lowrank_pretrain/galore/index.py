"""Make the index of all parameters: the group, the name and the projection of each, and what made the state that it has.

A rank or a side may be changed in the middle of a fit. Until the parameter's next step its state still has the former one's
form; at that step its moments enter the new basis. The form can be read from the state's own shapes, so a save, a copy or a
pickle in between loses nothing. (Both sides of a square matrix look alike at the same rank: there the present side is taken.)
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.groups import largest_rank, parameter_name
from lowrank_pretrain.galore.projection import Projected, refresh_gap
from lowrank_pretrain.galore.subspace import project_left

_CURE = "set it back, or drop the state (optimizer.state.pop(p))"


class Entry(NamedTuple):
    """Hold the optimizer's record of one parameter; ``slot`` is None if plain AdamW updates it."""

    group: dict[str, Any]
    name: str
    slot: Projected | None


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
        old: the last index. A parameter whose rank or side has changed switches at its next step. One that is not in it, as
            after a load or a copy, is judged by its state.

    Raises:
        ConfigError: a parameter with a rank is no longer a matrix; a change that its moments cannot follow.
    """
    named = list(_named_with_rank(groups, ranks))
    count, position, found = sum(1 for entry in named if entry[3]), 0, {}
    for p, group, name, rank in named:
        kept = states.get(p) or {}
        slot, before = None, old[p].slot if p in old and kept else None
        if rank:
            if p.ndim < 2 or not p.numel():
                raise ConfigError("params", name, "is flat now (FSDP1, DeepSpeed): use FSDP2 (ModelParallelStrategy)")
            offset = position * refresh_gap(group) // count if group["stagger"] else 0
            slot = Projected(p, group, {}, min(rank, largest_rank(p)), name, offset)
            position += 1
        if before is None and "proj" in kept:
            before = writer_of_state(p, group, kept, name)
        if before is not None:
            if slot is None:
                raise _cannot_follow("rank", None, before)
            follow(slot, before)
        elif slot is not None and slot.variant == "apollo" and "exp_avg" in kept and kept["exp_avg"].numel() != slot.numel_low:
            raise ConfigError(
                "rank", rank, f"variant=apollo has no subspace that the moments of {name} could move into: {_CURE}"
            )
        found[p] = Entry(group, name, slot)
    return found


def _named_with_rank(groups: list[dict[str, Any]], ranks: Mapping[Tensor, int]) -> Iterator[tuple[Tensor, dict, str, int]]:
    for number, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            yield p, group, parameter_name(group, number, i), ranks.get(p) or group.get("rank") or 0


def form_of_state(state: Mapping[str, Any], rows: int, cols: int, group: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings that a state with a basis was made with, as its shapes tell; None if no such matrix has it.

    Args:
        state: a parameter's.
        rows: m of its matrix.
        cols: n of its matrix.
        group: its group; its side counts where both fit.
    """
    proj = state.get("proj")
    if not isinstance(proj, Tensor) or proj.ndim != 2 or proj.shape[0] not in (rows, cols):
        return None
    two_sided, present = "proj_right" in state, group["proj_type"]
    usual = "std" if present == "full" else present
    left = project_left(rows, cols, usual) if rows == cols else rows == proj.shape[0]
    side = "full" if two_sided else usual if left == project_left(rows, cols, usual) else "left" if left else "right"
    second = "full" if "exp_avg_sq" in state else "factored" if "exp_avg_sq_row" in state else "none"
    found = {"rank": proj.shape[1], "proj_type": side, "variant": "galore", "rule": "muon" if second == "none" else "adam"}
    return found | {"second_moment": "full" if second == "none" else second}


def writer_of_state(p: Tensor, group: dict[str, Any], state: Mapping[str, Any], name: str) -> Projected | None:
    """Return a projection of the form that a state with a basis has; None if it is no state of this matrix."""
    if p.ndim < 2 or "exp_avg" not in state:
        return None
    form = form_of_state(state, p.shape[0], p.numel() // max(p.shape[0], 1), group)
    return None if form is None else Projected(p, {**group, **form}, {}, form["rank"], name, 0)


def follow(slot: Projected, before: Projected) -> None:
    """Let a slot take over from the one that wrote the parameter's state; at the next step its moments enter the new basis.

    Raises:
        ConfigError: the moments cannot follow the change.
    """
    if slot.form == before.form:
        slot.former = before.former
        return
    if slot.second != before.second:
        key = "rule" if "none" in (slot.second, before.second) else "second_moment"
        raise ConfigError(key, slot.group[key], f"was another when {slot.name} made its state: {_CURE}")
    if "apollo" in (slot.variant, before.variant) or slot.distributed or before.local is not None:
        key = "rank" if slot.rank != before.rank else "proj_type" if slot.variant == before.variant else "variant"
        raise _cannot_follow(key, getattr(slot, key), before)
    slot.former = before.former or before


def resized_error(slot: Projected, p: Tensor) -> ConfigError:
    """Return the error of a parameter that has another shape than when its state was made."""
    return ConfigError(
        "params", slot.name, f"had shape {tuple(slot.shape)} and has {tuple(p.shape)} now: a parameter that was resized needs "
        "a new optimizer, or no state (optimizer.state.pop(p))"
    )  # fmt: skip


def _cannot_follow(key: str, value: Any, before: Projected) -> ConfigError:
    return ConfigError(key, value, f"was {getattr(before, key)} so far ({before.name}) and the moments cannot follow: {_CURE}")
