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
from lowrank_pretrain.lte.storage import Storage


class OuterStep:
    """Step merged weights by their increments, as ``torch.optim.SGD(lr, momentum, nesterov=True)`` does.

    Args:
        lr: the outer learning rate, above 0.
        momentum: from 0 to below 1; 0 keeps no buffer.
        keep_on: where buffers are kept between merges, ``device`` or ``cpu`` (``storage.Storage``).

    Attributes:
        buffers: momentum by target name.

    Example:
        >>> outer = OuterStep(lr=0.5, momentum=0.0)
        >>> base, increment = torch.tensor([1.0]), torch.tensor([0.5])
        >>> outer.step("w", base, increment)
        >>> base
        tensor([1.2500])
    """

    def __init__(self, lr: float = 1.0, momentum: float = 0.0, keep_on: str = "device") -> None:
        self.lr = checks.number("outer_lr", lr, above=0)
        self.momentum = checks.number("outer_momentum", momentum, least=0, below=1)
        self.storage = Storage(keep_on)
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
        kept = self.buffers.get(name)
        if kept is None:
            buffer = increment.clone()
        else:
            buffer = self.storage.get(kept, increment.device).mul_(self.momentum).add_(increment)
        self.buffers[name] = self.storage.put(buffer, kept)
        base.add_(increment.add_(buffer, alpha=self.momentum), alpha=self.lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers, by target name."""
        self.storage.wait()
        return dict(self.buffers)

    def load_state_dict(self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        """Restore the buffers.

        Args:
            state: what ``state_dict`` gave.
            like: the merged weights by target name; buffers move to their devices, unless they are kept elsewhere.
        """
        self.buffers = {name: self.storage.put(state[name].to(like[name].device, copy=True)) for name in state}
