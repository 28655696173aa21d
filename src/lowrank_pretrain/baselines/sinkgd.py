"""Run SinkGD (Scetbon et al., arXiv 2502.06742): normalise a matrix's gradient by rows and columns in turn, with no state.

Written from the paper's Algorithms 3 and 4. State of a matrix: nothing. The rest is AdamW's.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.baselines.muon import for_pair
from lowrank_pretrain.baselines.pair import MatrixPair, gradients
from lowrank_pretrain.core.checks import number, whole
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.models.optim import Optim


def sinkhorn(grad: Tensor, iterations: int) -> Tensor:
    """Return a gradient (m×n) whose rows have norm √n and whose columns have norm √m, as far as the iterations go.

    Its entries then have a root mean square of 1. A row or column of zeros stays zero.
    """
    rows, cols = grad.shape
    x = grad.to(at_least_32(grad.dtype))
    tiny = torch.finfo(x.dtype).tiny
    if not x.numel():
        return x
    x = x / x.abs().amax().clamp_min(tiny)  # squares of a small gradient would underflow; the scale cancels
    least = math.sqrt(tiny)  # no square below it is known; a smaller limit would make the factor of a row of zeros infinite
    for _ in range(iterations):
        x = x * (math.sqrt(cols) / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(least))
        x = x * (math.sqrt(rows) / torch.linalg.vector_norm(x, dim=0, keepdim=True).clamp_min(least))
    return x


class SinkGD(MatrixPair):
    """Step matrices by SinkGD and everything else by AdamW.

    Args:
        params: groups; those with ``matrices=True`` hold matrices only.
        lr: for groups that set none.
        iterations: number of normalisations; the paper uses 5.
        scale: times the rate, for matrices. 0.2 is the size of AdamW's updates, so that AdamW's rate carries over.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 1e-3, *, iterations: int = 5, scale: float = 0.2) -> None:
        rule = {"lr": lr, "weight_decay": 0.0, "iterations": iterations, "scale": scale}
        super().__init__(params, lr, rule)

    def step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Apply W ← (1 − ηλ) W − η·scale·sinkhorn(G)."""
        for group in groups:
            lr = float(group["lr"])
            for p, grad in gradients(group):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(sinkhorn(grad, group["iterations"]).to(p.dtype), alpha=-lr * group["scale"])


def sinkgd_optimizer(
    targets: str | Sequence[str] = "all", iterations: int = 5, scale: float = 0.2
) -> Callable[[nn.Module, Optim], SinkGD]:
    """Return a function (module, ``Optim``) -> :class:`SinkGD`.

    Raises:
        ConfigError: a wrong value.
    """
    whole("iterations", iterations, 1)
    number("scale", scale, above=0)

    def make(module: nn.Module, optim: Optim) -> SinkGD:
        groups = for_pair(optim.split(module, find_targets(module, targets)), optim)
        return SinkGD(groups, optim.lr, iterations=iterations, scale=scale)

    return make
