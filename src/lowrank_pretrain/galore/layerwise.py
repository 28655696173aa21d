"""Update layer by layer: each parameter steps as soon as its gradient is ready, and the gradient is freed.

A backward that runs inside ``step(closure)``, as Lightning's does, updates in place. One outside (an earlier micro-batch)
adds R = PᵀG into an r×k buffer and frees G; ``step`` applies what is left there. So accumulation needs no flag. A parameter
that refreshes at this step keeps its full gradient until the last micro-batch: its new basis must see all of it.

A :class:`UsedGradient` stands in ``p.grad`` for a gradient that was used and freed. ``p.grad = None`` would mislead code that
looks at gradients between backward and step: clipping would silently take the norm of the few that are left.
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
from lowrank_pretrain.core.lightning_private import aten_norms, trainer_of
from lowrank_pretrain.galore.dtensor import is_distributed, local_piece
from lowrank_pretrain.galore.guard import closed

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW
    from lowrank_pretrain.galore.projection import Projected

# parameter -> its hook. A second optimizer on the same parameters (a second fit) takes the hook over from the first.
_handles: Any = WeakIdKeyDictionary()
_aten = torch.ops.aten


class Layerwise:
    """Install the gradient hooks of one optimizer, and keep what they accumulate.

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
        """Apply gradients that arrive in this block, each at its last arrival, as counted in the previous closure."""
        self.stepping, self._arrivals = True, {}
        try:
            yield
        finally:
            self.stepping = False
        if self._arrivals:
            self._expected = self._arrivals

    def waits(self, p: Tensor) -> bool:
        """Return whether a parameter has a gradient to apply."""
        if p.grad is None:  # after model.zero_grad() `low` holds a batch that was left out
            return p in self.low and is_distributed(p)
        return not isinstance(p.grad, UsedGradient) or (p in self.low and not p.grad.applied)

    def gradient(self, p: Tensor) -> Tensor | None:
        """Return the whole gradient; None if it was already used."""
        return None if isinstance(p.grad, UsedGradient) else p.grad

    def take_low(self, p: Tensor) -> Tensor | None:
        """Return R of earlier micro-batches, scaled as its gradient was, and forget both."""
        low = self.low.pop(p, None)
        if low is None or not isinstance(p.grad, UsedGradient):
            return low
        factor, p.grad = p.grad.factor, None
        return low if _is_one(factor) else low.mul_(factor)

    def unfold(self, projected: Callable[[Tensor], "Projected | None"]) -> None:
        """Turn what was accumulated into gradients P R: the bases that it belongs to are about to be replaced."""
        for p in list(self.low):
            if not self.waits(p):  # left out by zero_grad(), or applied
                self.low.pop(p)
                continue
            slot, whole = projected(p), p.grad
            low = self.take_low(p)
            if slot is None or low is None or slot.distributed:
                continue
            into = torch.empty_like(p)
            slot.project_back(low.to(p.dtype), into)
            p.grad = into.add_(whole) if whole is not None and not isinstance(whole, UsedGradient) else into

    def clear(self, free: Iterable[Tensor] = ()) -> None:
        """Forget what was accumulated, and free the gradients of ``free``."""
        self.low.clear()
        for p in free:
            p.grad = None

    def refuse_clipping(self, closure: Callable[[], Any]) -> None:
        """Refuse clipping by Lightning: it clips inside the closure, after the backward that has already stepped.

        Raises:
            ConfigError: with the cure.
        """
        # Lightning hands over a functools.partial with the LightningModule among its arguments
        for argument in getattr(closure, "args", ()):
            clip = getattr(trainer_of(argument), "gradient_clip_val", None)
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
        before = p.grad if isinstance(p.grad, UsedGradient) else None
        if before is not None and before.arrived is not None:
            p.grad = before.arrived.clone()  # autograd's own buffer, which other parameters may share
        if not entry.group["layerwise"]:  # switched off meanwhile
            if before is not None and p in self.low and not _is_one(before.factor):
                self.low[p].mul_(before.factor)
            return
        if self.stepping and self._is_last(p, entry.name):
            if before is not None and p in self.low and not _is_one(before.factor):
                self.low[p].mul_(before.factor)
            optimizer.update([p])
            p.grad = _used_gradient(p, entry.name, optimizer.gradient_norm(), applied=True)
            return
        slot, grad = optimizer.projected(p), p.grad
        if grad is None or slot is None or slot.needs_gradient:
            return
        if before is not None and p in self.low:
            size = None
        else:  # the first, or model.zero_grad() has cleared the earlier ones
            size = torch.linalg.vector_norm(local_piece(grad), dtype=torch.float32 if p.dtype != torch.float64 else None)
            if not is_distributed(p):
                self.low.pop(p, None)
        low, kept = slot.project(grad), self.low.get(p)
        if kept is not None and before is not None and not _is_one(before.factor):
            kept.mul_(before.factor)
        self.low[p] = low if kept is None else kept.add_(low)
        p.grad = _used_gradient(p, entry.name, size, applied=False)

    def _is_last(self, p: Tensor, name: str) -> bool:
        """Return whether ``p`` gets no further gradient in this closure, judging by the previous one.

        On a CPU the first closure's gradients are all kept to its end. On a device, where this mode is to save memory, the
        first closure is expected to bring one gradient of each.

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


def _used_gradient(p: Tensor, name: str, size: Tensor | None, applied: bool) -> Tensor | None:
    # FSDP2 adds to the local tensor of p.grad itself, and starts anew from None
    return None if p.grad is None or is_distributed(p) else UsedGradient(p.grad, name, size, applied)


def _is_one(factor: float | Tensor) -> bool:
    return isinstance(factor, float) and factor == 1.0


class UsedGradient(Tensor):
    """Stand in for a gradient that was used and freed.

    It has the gradient's shape and norm, but no memory. Scaling it, as ``clip_grad_norm_`` does, scales what was kept of the
    gradient; any other operation is an error.

    Attributes:
        of: its parameter's name.
        length: its norm; None after several micro-batches, whose sum was never formed.
        factor: the product of all factors since.
        applied: the weight has already been updated, so it can no longer be scaled.
        arrived: another micro-batch's gradient, once added.
    """

    of: str
    length: Tensor | None
    factor: float | Tensor
    applied: bool
    arrived: Tensor | None

    @staticmethod
    def __new__(cls: type["UsedGradient"], grad: Tensor, name: str, size: Tensor | None, applied: bool) -> "UsedGradient":
        """Create a stand-in for ``grad``."""
        made: UsedGradient = Tensor._make_wrapper_subclass(
            cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device
        )
        made.of, made.length, made.applied = name, size, applied
        made.factor, made.arrived = 1.0, None
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's own has no types
        return f"UsedGradient({self.of}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the disabled form, which is not a class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what clipping, gradient accumulation and ``zero_grad`` do; refuse the rest."""
        packet, first = func.overloadpacket, args[0]
        if packet in (aten_norms, _aten._foreach_mul_, _aten._foreach_zero_):
            single = {
                aten_norms: torch.linalg.vector_norm,
                _aten._foreach_mul_: Tensor.mul_,
                _aten._foreach_zero_: Tensor.zero_,
            }
            return _each_tensor(single[packet], first, *args[1:])
        if packet is _aten.add_ and isinstance(first, cls):  # autograd adds the next micro-batch
            first.arrived = args[1] if first.arrived is None else first.arrived + args[1]
            return first
        if packet is _aten.detach or packet is _aten.alias:
            return first
        if packet is _aten.linalg_vector_norm and len(args) < 3 and (len(args) < 2 or args[1] == 2):
            return first._norm()
        if packet in (_aten.mul_, _aten.div_, _aten.zero_) and not (first.applied and packet is not _aten.zero_):
            by = 0.0 if packet is _aten.zero_ else args[1] if packet is _aten.mul_ else 1 / args[1]
            first.factor = first.factor * by
            return first
        raise ConfigError(
            "layerwise", True, f"has used and freed the gradient of {_name_of_used(args)}, so {packet.__name__} has nothing to "
            "work on: leave it out (clipping by value, or inside the closure), or use layerwise=False"
        )  # fmt: skip

    def _norm(self) -> Tensor:
        if self.length is None:
            raise ConfigError(
                "layerwise", True, f"has freed the gradient of {self.of} micro-batch by micro-batch, so the norm of their sum "
                "is not known: clip without gradient accumulation, set clipping to null, or use layerwise=False"
            )  # fmt: skip
        return self.length * self.factor


def _each_tensor(function: Any, tensors: list[Tensor], *args: Any) -> Any:
    others = [
        args[0][i] if args and isinstance(args[0], (list, tuple)) else args[0] if args else None for i in range(len(tensors))
    ]
    found = [function(t) if other is None else function(t, other) for t, other in zip(tensors, others, strict=True)]
    return found if function is torch.linalg.vector_norm else None


def _name_of_used(args: Any) -> str:
    for arg in args:
        if isinstance(arg, UsedGradient):
            return arg.of
        if isinstance(arg, (list, tuple)) and (name := _name_of_used(arg)):
            return name
    return ""
