"""Settle the order in which DDP adds up gradients before the first real step.

DDP sends gradients in buckets. It lays them out when it wraps a model, and once more after the first backward pass, in the
order in which the gradients came. Where three or more processes add up, a number's place in its bucket decides who adds
first: the first step after wrapping rounds differently from all later ones. A resumed run wraps again, so its first step
would differ in its last bits from the same step of the run that was never interrupted.

``settle_buckets`` makes DDP do its second layout at once, by one backward pass of a made-up graph, whose gradients come in the
reverse order of the parameters, which is close to that of most models. The layout then stays. It costs one average per
wrapping, and reads nothing of the model but its trainable parameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import prepare_for_backward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_pretrain.core.lightning_private import comm_hooks, rebuild_buckets

_SETTLED = "_lowrank_pretrain_settled"


def settle_buckets(wrapper: Any) -> None:
    """Fix the layout of DDP's buckets. All processes must call it together, between two optimizer steps.

    Do nothing for a wrapper of another kind, one that is already settled, one that never lays out twice
    (``find_unused_parameters``), or one with a communication hook, which would take the made-up gradients for real ones;
    nor for fewer than three processes, where the order of adding makes no difference.

    Args:
        wrapper: what the strategy made of the model.
    """
    if not isinstance(wrapper, DistributedDataParallel) or getattr(wrapper, _SETTLED, False):
        return
    setattr(wrapper, _SETTLED, True)
    if comm_hooks(wrapper) or not wrapper.require_backward_grad_sync:
        return
    if dist.get_world_size(wrapper.process_group) < 3:
        return
    if wrapper.static_graph:
        _settle_static(wrapper)
        return
    if wrapper.find_unused_parameters or getattr(wrapper, "mixed_precision", None) is not None:
        return
    parameters = _reduced(wrapper)
    if not parameters:
        return
    for p in parameters:
        p.grad = None
    with torch.enable_grad(), torch.inference_mode(False), _without_hooks(parameters):
        loss = _made_up_loss(wrapper.module, parameters)
        prepare_for_backward(wrapper, loss)
        loss.backward()
        for p in parameters:
            p.grad = None  # it may be a view of the old layout's bucket
        rebuild_buckets(wrapper)  # what DDP's next forward pass would begin with


def _settle_static(wrapper: DistributedDataParallel) -> None:
    """Settle a static graph without a made-up backward pass, since DDP learns the graph from the first one.

    The order of the parameters is taken instead. Then no bucket is full before the backward pass ends. On a GPU, where
    sending overlaps with computing and the last bits are not promised, DDP's own layout stays.
    """
    if wrapper.device_type == "cpu":
        wrapper.reducer._push_all_rebuilt_params()
        rebuild_buckets(wrapper)


def _reduced(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """Return the parameters whose gradients the wrapper averages, each once, in the module's order."""
    left_out = wrapper.parameters_to_ignore
    named = wrapper.module.named_parameters()
    return [p for name, p in named if p.requires_grad and name not in left_out]


def _made_up_loss(module: nn.Module, parameters: list[nn.Parameter]) -> Tensor:
    """Return a sum over all parameters whose backward pass reaches the last one first.

    Autograd runs what was made later first, and delivers each gradient before it continues.
    """
    sparse = {id(m.weight) for m in module.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}
    total = parameters[0].new_zeros((), dtype=torch.float32)
    for p in parameters:
        if id(p) in sparse:  # DDP expects a sparse gradient here
            term = nn.functional.embedding(torch.zeros(1, dtype=torch.long, device=p.device), p, sparse=True).sum()
        else:
            term = torch.view_as_real(p).sum() if p.is_complex() else p.sum()
        total = total.to(p.device) + term.float()
    return total


@contextmanager
def _without_hooks(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hide the made-up gradients from hooks on parameters (a user's, or one that steps an optimizer)."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    held = [(hooks, dict(hooks)) for p in parameters for name in names if (hooks := getattr(p, name, None))]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in held:
            hooks.update(kept)
