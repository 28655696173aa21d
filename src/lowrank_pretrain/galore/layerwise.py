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

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import dtensor as sharded
from lowrank_pretrain.galore.surroundings import closed
from lowrank_pretrain.galore.used import UsedGradient

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
        self._arrivals: dict[Tensor, int] = {}  # in this closure
        self._expected: dict[Tensor, int] | None = None  # in the last one

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
        """Gradients that arrive within are applied at once, at the last of as many arrivals as in the last closure."""
        self.stepping, self._arrivals = True, {}
        try:
            yield
        finally:
            self.stepping = False
        if self._arrivals:
            self._expected = self._arrivals

    def waits(self, p: Tensor) -> bool:
        """Return whether there is something to step with."""
        if p.grad is None:  # after model.zero_grad() what is left in `low` is of a batch that was left out
            return p in self.low and sharded.is_distributed(p)
        return not isinstance(p.grad, UsedGradient) or (p in self.low and not p.grad.applied)

    def gradient(self, p: Tensor) -> Tensor | None:
        """Return the whole gradient, None where it was used."""
        return None if isinstance(p.grad, UsedGradient) else p.grad

    def taken(self, p: Tensor) -> Tensor | None:
        """Return R of earlier micro-batches, scaled as its gradient was, and forget it."""
        low = self.low.pop(p, None)
        if low is None or not isinstance(p.grad, UsedGradient) or _is_one(p.grad.factor):
            return low
        return low.mul_(p.grad.factor)

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
            # `_trainer`: the property raises where a module is used without a Trainer
            clip = getattr(getattr(argument, "_trainer", None), "gradient_clip_val", None)
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
        entry = optimizer.lookup()[p]
        if not entry.group["layerwise"]:  # switched off since
            return
        before = p.grad if isinstance(p.grad, UsedGradient) else None
        if before is not None:
            p.grad = before.arrived.clone()  # autograd's own buffer, which other parameters may share
        if self.stepping and self._last(p, entry.name):
            if before is not None and p in self.low and not _is_one(before.factor):
                self.low[p].mul_(before.factor)
            optimizer.update([p])
            p.grad = self._used(p, entry.name, optimizer._guard.norms[0], applied=True)
            return
        slot = optimizer.projected(p)
        if slot is None or slot.needs_gradient:
            return
        if before is not None and p in self.low:
            size = None
        else:  # the first, or what there was has been forgotten by model.zero_grad()
            size = torch.linalg.vector_norm(sharded.local(p.grad), dtype=torch.float32 if p.dtype != torch.float64 else None)
            if not sharded.is_distributed(p):
                self.low.pop(p, None)
        low, kept = slot.project(p.grad), self.low.get(p)
        if kept is not None and before is not None and not _is_one(before.factor):
            kept.mul_(before.factor)
        self.low[p] = low if kept is None else kept.add_(low)
        p.grad = self._used(p, entry.name, size, applied=False)

    def _last(self, p: Tensor, name: str) -> bool:
        """Return whether this closure brings no further gradient of ``p``, as far as the last one tells.

        The first closure's are all kept to its end on a CPU. On a device, where memory is what this mode is for, it is taken
        to bring one.

        Raises:
            ConfigError: it has brought more than the last one.
        """
        arrived = self._arrivals[p] = self._arrivals.get(p, 0) + 1
        if self._expected is None and p.device.type == "cpu":
            return False
        expected = (self._expected or {}).get(p, 1)
        if arrived > expected:
            raise ConfigError(
                "layerwise", True, f"has applied the gradient of {name}, but another one has arrived in the same step: run the "
                "same number of backward passes in each closure, the others before step, or use layerwise=False"
            )  # fmt: skip
        return arrived == expected

    def _used(self, p: Tensor, name: str, size: Tensor | None, applied: bool) -> Tensor | None:
        # FSDP2 adds to the local tensor of p.grad itself, and starts anew from None
        return None if sharded.is_distributed(p) else UsedGradient(p.grad, name, size, applied)


def _is_one(factor: float | Tensor) -> bool:
    return isinstance(factor, float) and factor == 1.0
