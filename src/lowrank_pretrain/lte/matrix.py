"""One matrix that a worker trains apart from the others, by GaLore, as a merge sees it: W = C·W_base + P·D.

Layout d×k, the projected side first: P d×r, D r×k.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.projection import Projected
from lowrank_pretrain.lora.function import Part
from lowrank_pretrain.lte.merge import Factors


class Matrix:
    """One target, as ``Exchange`` wants its pieces.

    Args:
        name: the parameter's name in the module.
        p: the parameter.
        optimizer: whose target it is.
    """

    def __init__(self, name: str, p: nn.Parameter, optimizer: GaLoreAdamW) -> None:
        self.name, self.p, self.optimizer = name, p, optimizer
        self.local: LocalUpdate | None = None
        self.exact: Tensor | None = None  # W from a checkpoint, where others had written into it
        self.route = "factors"
        self.share = 1.0  # of W_base in the merge that is being formed: the workers' mean of C
        self.shape = tuple(self.slot.matrix(p).shape)  # d, k
        self.part = Part(name, 0, self.shape[0], 0, self.slot.rank, 1.0)

    @property
    def slot(self) -> Projected:
        """Its projection as it stands."""
        return self.optimizer.projected(self.p)

    @property
    def base(self) -> Tensor:
        """mean(C)·W_base, d×k."""
        return self.slot.matrix(self.local.base) * self.share

    def factors(self) -> Factors:
        """D (1, r, k) and P (1, d, r); zeros before the first step."""
        if self.local is None or self.local.D is None:
            kind = {"dtype": torch.float32 if self.local is None else self.local.base.dtype, "device": self.p.device}
            return torch.zeros(1, self.part.rank, self.shape[1], **kind), torch.zeros(1, self.shape[0], self.part.rank, **kind)
        P, D = self.local.factors(self.optimizer.state[self.p])
        return D[None].contiguous(), P[None].contiguous()

    def whole(self, matrix: Tensor) -> Tensor:
        """A d×k tensor in the parameter's own shape."""
        return (matrix if self.slot.left else matrix.t()).reshape(self.p.shape)


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse settings with which P D is not what a worker did.

    Raises:
        ConfigError: naming the optimizer's key.
    """
    for key, wrong, why in (
        ("refresh", "track", "moves the basis at every step, and between merges it must stay: use subspace or svd"),
        ("residual", "fira", "leaves the subspace, so that no factors could tell what a worker did: use null"),
        ("variant", "apollo", "leaves the subspace, so that no factors could tell what a worker did: use galore"),
        ("layerwise", True, "steps before the rest is averaged: use false"),
    ):
        if group[key] == wrong:
            raise ConfigError(key, wrong, f"{why} (LTE with update=galore)")
