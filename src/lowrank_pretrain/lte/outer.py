"""Take the outer step: an outer optimizer uses the workers' changes between two merges as its gradient (DiLoCo, Alg. 1).

DiLoCo (Douillard et al., arXiv 2311.08105): Δ = W_base − mean(Wₙ) is the outer gradient, and ``torch.optim.SGD`` with
Nesterov momentum steps W_base. ``lr=1, momentum=0`` is plain averaging (local SGD): W_base becomes mean(Wₙ).

The step is the same on all workers, because Δ is. Its buffer is as large as the weights that are merged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_pretrain.core import checks


class OuterStep:
    """Step merged weights by their increments, as ``torch.optim.SGD(lr, momentum, nesterov=True)`` does.

    Args:
        lr: the outer learning rate, above 0.
        momentum: from 0 to below 1; 0 keeps no buffer.
        device: where buffers are kept between merges; ``None``: with the weights.

    Attributes:
        buffers: momentum by target name.

    Example:
        >>> outer = OuterStep(lr=0.5, momentum=0.0)
        >>> base, increment = torch.tensor([1.0]), torch.tensor([0.5])
        >>> outer.step("w", base, increment)
        >>> base
        tensor([1.2500])
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.0, device: torch.device | None = None) -> None:
        self.lr = checks.number("outer_lr", lr, above=0)
        self.momentum = checks.number("outer_momentum", momentum, least=0, below=1)
        self.device = device
        self.buffers: dict[str, Tensor] = {}

    @property
    def plain(self) -> bool:
        """Return whether the step only adds the increment, so that nothing needs to be kept."""
        return self.lr == 1 and self.momentum == 0

    @torch.no_grad()
    def step(self, name: str, base: Tensor, increment: Tensor) -> None:
        """Move `base` in place by the mean increment of all workers.

        Args:
            name: the target's name.
            base: W_base, any shape.
            increment: mean(Wₙ) − W_base, of the same shape; overwritten.
        """
        if not self.momentum:
            base.add_(increment, alpha=self.lr)
            return
        # buffer ← μ·buffer + Δ;  W ← W + lr·(Δ + μ·buffer)
        buffer = self.buffers.get(name)
        buffer = increment.clone() if buffer is None else buffer.to(increment.device).mul_(self.momentum).add_(increment)
        self.buffers[name] = buffer if self.device is None else buffer.to(self.device)
        base.add_(increment.add_(buffer, alpha=self.momentum), alpha=self.lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers, by target name."""
        return dict(self.buffers)

    def load_state_dict(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Restore the buffers.

        Args:
            state: what ``state_dict`` gave.
            like: the merged weights by target name; buffers move to their devices, unless they are kept elsewhere.
        """
        self.buffers = {name: state[name].to(self.device or like[name].device, copy=True) for name in state}
