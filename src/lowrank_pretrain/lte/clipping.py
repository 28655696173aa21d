"""Clipping and loss scaling where workers hold different parameters.

One norm over everything would differ from worker to worker, and with it the factor by which the rest's (equal) gradients are
cut: the rest drifts apart for ever. So the rest is clipped by its own norm and each head by its own, which needs no
communication and does not depend on which heads share a worker. In the same way fp16's verdict "skip this step" must be the
verdict of all, where the rest is kept equal at every step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def clip_norms(rest: Iterable[Tensor], heads: Sequence[Tensor], max_norm: float, stacked: bool = True) -> None:
    """Cut the gradients of the rest to ``max_norm``, and those of each head to ``max_norm``, in place.

    Args:
        rest: parameters that no head owns.
        heads: the heads' factors, each (H, …); or the weights that one worker trains apart.
        max_norm: largest 2-norm allowed.
        stacked: whether ``heads`` are factors of H heads.
    """
    torch.nn.utils.clip_grad_norm_(list(rest), max_norm)
    if not stacked:
        torch.nn.utils.clip_grad_norm_(list(heads), max_norm)
        return
    grads = [p.grad for p in heads if p.grad is not None]
    if not grads:
        return
    squares = torch.stack([g.detach().flatten(1).float().square().sum(1).to(grads[0].device) for g in grads])  # (factors, H)
    factor = (max_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)  # (H,), as torch's own does
    for grad in grads:
        grad.mul_(factor.to(grad).view(-1, *[1] * (grad.ndim - 1)))


def share_overflow(scaler: Any, group: Any) -> None:
    """Have every worker skip a step of which one worker's gradients overflowed (fp16).

    Args:
        scaler: a ``GradScaler``; its ``unscale_`` is wrapped, once.
        group: the workers' process group.
    """
    if getattr(scaler.unscale_, "_shares_overflow", False):
        return
    unscale = scaler.unscale_

    def unscale_together(optimizer: Any) -> None:
        unscale(optimizer)
        # torch keeps the verdict in this private record only
        for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)

    unscale_together._shares_overflow = True
    scaler.unscale_ = unscale_together
