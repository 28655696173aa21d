"""Layer-wise updates: each parameter steps as soon as its gradient is there, and the gradient is freed.

A backward that runs inside ``step(closure)``, as Lightning's does, updates in place. One outside (an earlier micro-batch)
adds R = PᵀG into an r×k buffer and frees G; ``step`` applies what is left there. So accumulation needs no flag. A parameter
that refreshes at this step keeps its full gradient until the last micro-batch: its new basis must see all of it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.galore.surroundings import closed

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW

# parameter -> its hook. A second optimizer on the same parameters (a second fit) takes the hook over from the first.
_handles: Any = WeakIdKeyDictionary()


class Layerwise:
    """The gradient hooks of one optimizer and what they have accumulated.

    Attributes:
        low: parameter -> R summed over micro-batches outside ``step``.
        stepping: whether a backward inside ``step`` runs, so that gradients are applied as they arrive.
    """

    def __init__(self, optimizer: "GaLoreAdamW") -> None:
        self._optimizer = weakref.ref(optimizer)
        self.stepping = False
        self.low: dict[Tensor, Tensor] = {}

    def install(self, params: Iterable[Tensor]) -> None:
        """Register the hooks."""
        mine = weakref.ref(self)

        def hook(p: Tensor) -> None:
            layerwise = mine()
            if layerwise is not None:
                layerwise._arrived(p)

        for p in params:
            if p in _handles:
                _handles[p].remove()
            if p.requires_grad:
                _handles[p] = p.register_post_accumulate_grad_hook(hook)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Gradients that arrive within are applied at once."""
        self.stepping = True
        try:
            yield
        finally:
            self.stepping = False

    def gradient(self, p: Tensor) -> Tensor | None:
        return p.grad

    def taken(self, p: Tensor) -> Tensor | None:
        return self.low.pop(p, None)

    def clear(self, free: Iterable[Tensor] = ()) -> None:
        """Forget what was accumulated, and free the gradients of ``free``."""
        self.low.clear()
        for p in free:
            p.grad = None

    def refuse_clipping(self, closure: Callable[[], Any]) -> None:
        """Lightning clips inside the closure, after the backward that has already stepped: refuse instead of not clipping.

        Raises:
            ConfigError: with the cure.
        """
        optimizer = self._optimizer()
        if optimizer is None or not any(group["layerwise"] for group in optimizer.param_groups):
            return
        # Lightning hands over a functools.partial with the LightningModule among its arguments
        for argument in getattr(closure, "args", ()):
            clip = argument.trainer.gradient_clip_val if hasattr(type(argument), "trainer") else None
            if clip:
                raise ConfigError(
                    "gradient_clip_val", clip, "cannot clip gradients that layerwise has already used: set it to null, or "
                    "method.layerwise=false"
                )  # fmt: skip

    @closed
    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None or p not in optimizer.lookup():
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not hasattr(p, "device_mesh"):
            raise ConfigError(
                "layerwise", True, "steps before DDP has averaged the gradients: use FSDP2 (ModelParallelStrategy), or "
                "layerwise=False with galore_ddp_hook"
            )  # fmt: skip
        if self.stepping:
            optimizer.update([p])
            p.grad = None
            return
        slot = optimizer.projected(p)
        if slot is None or slot.needs_gradient:
            return
        low = slot.project(p.grad)
        self.low[p] = low if p not in self.low else self.low[p].add_(low)
        p.grad = None
