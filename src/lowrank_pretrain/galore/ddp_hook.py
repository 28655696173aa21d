"""Send projected gradients under DDP, by a communication hook: between refreshes R (r×k) travels instead of G (m×n).

Exact, as the projection is linear: the mean of PᵀGᵢ is Pᵀ of the mean. At a refresh of a matrix its whole gradient is
sent, and the new basis is rank 0's. ``p.grad`` then holds P R̄, the same on every rank; its norm is that of the projection,
so clipping by norm is consistent over the ranks, but not the same as without the hook.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.guard import closed
from lowrank_pretrain.galore.optimizer import GaLoreAdamW
from lowrank_pretrain.galore.projection import Projected


@dataclass
class HookState:
    """Count what the hook has done.

    Attributes:
        optimizer: the owner of the bases.
        process_group: the ranks whose gradients are averaged.
        calls: calls of the hook (one for each bucket of a backward pass).
        sent_bytes: bytes handed to all-reduce.
        full_bytes: bytes that plain DDP would have handed to it.
    """

    optimizer: GaLoreAdamW
    process_group: Any
    calls: int = 0
    sent_bytes: int = 0
    full_bytes: int = 0


def galore_ddp_hook(ddp: DistributedDataParallel, optimizer: GaLoreAdamW) -> HookState:
    """Install the hook on a wrapped model, before its first backward.

    In Lightning call it from ``on_train_start`` with ``self.trainer.strategy.model`` and
    ``self.optimizers(use_pl_optimizer=False)``: on a CPU Lightning silently drops ``DDPStrategy(ddp_comm_hook=...)``.

    Args:
        ddp: the wrapped model.
        optimizer: the optimizer of its parameters.

    Returns:
        Counters of calls and bytes.

    Raises:
        ConfigError: ``ddp`` is not wrapped, or the optimizer updates layer-wise, or under LTE.
    """
    if not isinstance(ddp, DistributedDataParallel):
        raise ConfigError("ddp", type(ddp).__name__, "must be the DistributedDataParallel module (trainer.strategy.model)")
    if any(group["layerwise"] for group in optimizer.param_groups):
        raise ConfigError("layerwise", True, "steps before DDP has averaged: use layerwise=False with the hook")
    if optimizer.local:
        raise ConfigError("strategy", "lte", "averages no projected gradient: leave galore_ddp_hook out")
    state = HookState(optimizer, ddp.process_group)

    optimizer.shared = _BasisOfRank0(ddp.process_group)
    ddp.register_comm_hook(state, _hook)
    return state


class _BasisOfRank0:
    """Give all ranks rank 0's basis: all refresh from the same mean gradient, so bases differ at most by rounding."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def same(self, bases: list[Tensor], averaged: bool) -> None:
        for basis in bases:
            flat = basis.contiguous()
            dist.broadcast(flat, dist.get_global_rank(self._group, 0), group=self._group)
            basis.copy_(flat)

    def mean(self, sketch: Tensor) -> None:
        """Do nothing: the ranks' gradients are equal."""

    def agree(self, flag: Tensor) -> Tensor:
        return flag


@closed
@torch.no_grad()
def _hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    known = state.optimizer.lookup()
    pieces: list[tuple[Tensor, Projected | None]] = []  # gradient, and its projection if only R is sent
    payload = []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        slot = state.optimizer.projected(p) if p in known else None
        if slot is not None and slot.needs_gradient:
            slot = None
        pieces.append((grad, slot))
        payload.append((grad if slot is None else slot.project(grad).to(grad.dtype)).flatten())
    flat = torch.cat(payload).div_(dist.get_world_size(state.process_group))
    state.calls += 1
    state.sent_bytes += flat.numel() * flat.element_size()
    state.full_bytes += bucket.buffer().numel() * bucket.buffer().element_size()

    def spread(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        mean = future.value()[0]
        for (grad, slot), piece in zip(pieces, mean.split([t.numel() for t in payload]), strict=True):
            if slot is None:
                grad.copy_(piece.view(grad.shape))
            else:
                slot.project_back(piece, into=grad)
        return bucket.buffer()

    return dist.all_reduce(flat, group=state.process_group, async_op=True).get_future().then(spread)
