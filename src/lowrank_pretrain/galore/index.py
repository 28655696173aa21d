"""What the optimizer knows of each parameter: its group, its name, and its projection if it has one."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from lowrank_pretrain.errors import ConfigError
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


def make_index(groups: list[dict[str, Any]], ranks: Mapping[Tensor, int]) -> dict[Tensor, Entry]:
    """Entries of all parameters, in order; ``ranks`` are those of adopted ones.

    Raises:
        ConfigError: a parameter with a rank is no matrix any more.
    """
    named = [
        (p, group, parameter_name(group, number, i), ranks.get(p) or group.get("rank") or 0)
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
    ]
    count, position, found = sum(1 for entry in named if entry[3]), 0, {}
    for p, group, name, rank in named:
        slot = None
        if rank:
            if p.ndim < 2 or not p.numel():
                raise ConfigError("params", name, "is flat now (FSDP1, DeepSpeed): use FSDP2 (ModelParallelStrategy)")
            offset = position * group["update_proj_gap"] // count if group["stagger"] else 0
            slot = Projected(p, group, {}, min(rank, largest_rank(p)), name, offset)
            position += 1
        found[p] = Entry(group, name, slot)
    return found
