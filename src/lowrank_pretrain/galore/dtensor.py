"""FSDP2: weights and gradients are DTensors, cut along their first dimension. The arithmetic works on the local piece.

Projected from the right (n×r basis) a step needs no communication: each rank projects and updates its own rows, and R's
columns are cut as W's rows are. From the left R = Σ PᵢᵀGᵢ is summed over the ranks and kept whole on each. A refresh
gathers the one gradient that it renews a basis from; the basis is whole on every rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lowrank_pretrain.core.errors import ConfigError


def local(t: Tensor) -> Tensor:
    """This rank's piece, sharing memory; a plain tensor itself."""
    return t.to_local() if isinstance(t, DTensor) else t


def is_distributed(t: Tensor) -> bool:
    """Whether it is a piece of a tensor on several ranks."""
    return isinstance(t, DTensor)


def whole(t: Tensor) -> Tensor:
    """The gathered tensor; a plain tensor itself."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard_group(p: Tensor) -> dist.ProcessGroup | None:
    """The ranks that the first dimension is cut over; None if it is not cut."""
    if not isinstance(p, DTensor):
        return None
    for i, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            return p.device_mesh.get_group(i)
    return None


def check(p: Tensor, group: dict[str, Any], name: str) -> None:
    """Refuse what is not done on pieces.

    Raises:
        ConfigError: another placement than pieces of whole rows; an option that needs the whole gradient at each step.
    """
    if not isinstance(p, DTensor):
        return
    cut = [q for q in p.placements if not isinstance(q, Replicate)]
    if len(cut) > 1 or any(type(q) is not Shard or q.dim != 0 for q in cut):
        raise ConfigError("params", name, f"is placed as {p.placements}: GaLore takes FSDP2's pieces of whole rows (Shard(0))")
    if group["residual"] or group["variant"] == "apollo":
        raise ConfigError("residual", group["residual"], "Fira and APOLLO need whole gradients: not with FSDP2")
    if group["moments"] == "8bit":
        raise ConfigError("moments", "8bit", "not with FSDP2, which already divides the moments: use float32 or grad")


def first_row(p: DTensor) -> int:
    """Global index of this rank's first row."""
    for i, placement in enumerate(p.placements):
        if isinstance(placement, Shard):
            ranks, mine = p.device_mesh.size(i), p.device_mesh.get_local_rank(i)
            return min(p.shape[0], -(-p.shape[0] // ranks) * mine)  # pieces of ceil(rows/ranks), as torch.chunk's
    return 0


def all_sum(t: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum over the ranks of ``group``, in place."""
    if group is not None:
        dist.all_reduce(t, group=group)
    return t


def wrap(t: Tensor, p: Tensor, shape: Sequence[int], cut: int | None) -> Tensor:
    """A piece of state as a DTensor on p's mesh, cut along dimension ``cut`` where p is cut; plain for a plain p."""
    if not isinstance(p, DTensor):
        return t
    places = [Replicate() if cut is None or isinstance(q, Replicate) else Shard(cut) for q in p.placements]
    stride = torch.empty(*shape, device="meta").stride()
    return DTensor.from_local(t, p.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


def agree(finite: Tensor, params: list[Tensor]) -> Tensor:
    """Flags that are true only if they are on every rank that holds a piece."""
    for p in params:
        if isinstance(p, DTensor):
            flags = finite.to(torch.int32)
            for i in range(p.device_mesh.ndim):
                dist.all_reduce(flags, op=dist.ReduceOp.MIN, group=p.device_mesh.get_group(i))
            return flags.bool()
    return finite
