"""Run Muon on the targets' matrices (Jordan et al. 2024; scaled as in Liu et al., arXiv 2502.16982), AdamW on the rest.

The class is torch's own from 2.9 on, else timm's. State: one number per entry of a matrix, half of AdamW's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.baselines.pair import MATRICES, MatrixPair
from lowrank_pretrain.core.checks import flag, number, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.models.optim import Optim, has_moments

QUINTIC = (3.4445, -4.775, 2.0315)  # the polynomial of torch's class and of Muon's authors


class Muon(MatrixPair):
    """Step matrices by Muon and everything else by AdamW.

    The update is scaled to AdamW's size, 0.2·√max(m, n) times the orthogonalised momentum: rate and decay carry over.

    Args:
        params: groups; those with ``matrices=True`` hold matrices only.
        lr: for groups that set none.
        momentum: share of the old momentum.
        nesterov: step on the mixture of momentum and gradient.
        ns_steps: Newton-Schulz iterations.

    Raises:
        ConfigError: neither torch nor timm has Muon.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        self._of_matrices: torch.optim.Optimizer | None = None
        self._asked = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, lr, {**_muon(self._asked).defaults, "weight_decay": 0.0})

    def step_matrices(self, groups: list[dict[str, Any]]) -> None:
        """Step the matrices by the library's class."""
        if self._of_matrices is None:
            self._of_matrices = _muon(self._asked)
        self._lend(self._of_matrices, groups)
        self._step_other(self._of_matrices)

    def takes(self, group: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
        """Return whether a matrix' state from a file is Muon's."""
        return has_moments(state, p, "momentum_buffer")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._of_matrices = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_asked": self._asked}


def _muon(settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Create the library's optimizer, over one empty matrix."""
    common = {**settings, "adjust_lr_fn": "match_rms_adamw"}
    if hasattr(torch.optim, "Muon"):
        return torch.optim.Muon([torch.zeros(0, 0)], **common)
    try:
        from timm.optim import Muon as OfTimm
    except ImportError:
        raise ConfigError("method", "muon", "needs torch 2.9 or newer, or a timm that has Muon (1.0.20 or newer)") from None
    return OfTimm([{"params": [torch.zeros(0, 0)], "use_fallback": False}], ns_coefficients=QUINTIC, **common)


def muon_optimizer(
    targets: str | Sequence[str] = "all", momentum: float = 0.95, nesterov: bool = True, ns_steps: int = 5
) -> Callable[[nn.Module, Optim], Muon]:
    """Return a function (module, ``Optim``) -> :class:`Muon`.

    Raises:
        ConfigError: a wrong value; Nesterov without momentum.
    """
    number("momentum", momentum, least=0, below=1)
    whole("ns_steps", ns_steps, 1, most=99)
    if flag("nesterov", nesterov) and momentum == 0:
        raise ConfigError("nesterov", nesterov, "needs a momentum above 0")
    _muon({})

    def make(module: nn.Module, optim: Optim) -> Muon:
        groups = optim.split(module, find_targets(module, targets))
        return Muon(for_pair(groups, optim), optim.lr, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps)

    return make


def for_pair(groups: list[dict[str, Any]], optim: Optim) -> list[dict[str, Any]]:
    """Mark the group of matrices, and give the others AdamW's settings."""
    for group in groups:
        group[MATRICES] = group["name"] == "matrices"
        if not group[MATRICES]:
            group |= {"betas": optim.betas, "eps": optim.eps}
    return groups
