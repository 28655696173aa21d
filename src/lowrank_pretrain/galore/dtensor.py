"""Work on FSDP2's DTensors: weights and gradients are cut along their first dimension, and each rank steps with its piece.

Projected from the right (n×r basis) a step needs no communication: each rank projects and updates its own rows, and R's
columns are cut as W's rows are. From the left R = Σ PᵢᵀGᵢ is summed over the ranks and kept whole on each. A refresh
gathers the one gradient that it renews a basis from; the basis is whole on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lowrank_pretrain.core.errors import ConfigError


def local_piece(t: Tensor) -> Tensor:
    """Return this rank's piece of a DTensor, sharing memory; a plain tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def is_distributed(t: Tensor) -> bool:
    """Return whether a tensor is one piece of a tensor on several ranks."""
    return isinstance(t, DTensor)


def gather_whole(t: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all ranks; a plain tensor itself."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard_group(p: Tensor) -> dist.ProcessGroup | None:
    """Return the ranks that the first dimension is cut over; None if it is not cut."""
    if not isinstance(p, DTensor):
        return None
    for i, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            return p.device_mesh.get_group(i)
    return None


def check_placement(p: Tensor, group: dict[str, Any], name: str) -> None:
    """Refuse placements and options that do not work on pieces of a matrix.

    Raises:
        ConfigError: another placement than pieces of whole rows; an option that needs the whole gradient at each step.
    """
    if not isinstance(p, DTensor):
        return
    cut = [q for q in p.placements if not isinstance(q, Replicate)]
    if len(cut) > 1 or any(type(q) is not Shard or q.dim != 0 for q in cut):
        raise ConfigError("params", name, f"is placed as {p.placements}: GaLore takes FSDP2's pieces of whole rows (Shard(0))")
    if group["residual"] or group["variant"] == "apollo":
        raise ConfigError("residual", group["residual"], "a residual and APOLLO need whole gradients: not with FSDP2")
    if group["moments"] == "8bit":
        raise ConfigError("moments", "8bit", "not with FSDP2, which already divides the moments: use float32 or grad")


def first_local_row(p: Tensor) -> int:
    """Return the global index of this rank's first row."""
    if not isinstance(p, DTensor):
        return 0
    for i, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            ranks, mine = p.device_mesh.size(i), p.device_mesh.get_local_rank(i)
            return min(p.shape[0], -(-p.shape[0] // ranks) * mine)  # pieces of ceil(rows/ranks), as torch.chunk's
    return 0


def sum_over_ranks(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum a tensor over the ranks of ``group``, in place."""
    if group is not None:
        dist.all_reduce(t, group=group)
    return t


def as_dtensor(t: Tensor, p: Tensor, shape: Sequence[int], cut: int | None) -> Tensor:
    """Return a piece of state as a DTensor on p's mesh, cut along dimension ``cut`` if p is cut; plain if p is."""
    if not isinstance(p, DTensor):
        return t
    places: list[Placement] = [Replicate() if cut is None or isinstance(q, Replicate) else Shard(cut) for q in p.placements]
    stride = torch.empty(*shape, device="meta").stride()
    return DTensor.from_local(t, p.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


def agree_on_flags(flags: Tensor, params: list[Tensor]) -> Tensor:
    """Return flags that are true only if they are true on every rank that holds a piece of ``params``."""
    for p in params:
        if isinstance(p, DTensor):
            counts = flags.to(torch.int32)
            for i in range(p.device_mesh.ndim):
                dist.all_reduce(counts, op=dist.ReduceOp.MIN, group=p.device_mesh.get_group(i))
            return counts.bool()
    return flags
