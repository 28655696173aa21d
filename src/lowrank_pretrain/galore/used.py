"""What stands in ``p.grad`` for a gradient that a layer-wise update has used and freed.

``p.grad = None`` would be a lie to everything that looks at gradients between backward and step: clipping would take the norm
of the few that are left, in silence. This tensor has the gradient's shape and norm but no memory. Scaling it (what
``clip_grad_norm_`` does) scales what was kept of the gradient; what cannot be done to it is an error.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError

_aten = torch.ops.aten


class UsedGradient(Tensor):
    """A gradient that is gone.

    Attributes:
        of: its parameter's.
        length: its norm; None after several micro-batches, whose sum nobody has seen.
        factor: what it was multiplied by since.
        applied: the weight has taken it in: it cannot be scaled any more.
        arrived: another micro-batch's gradient, once it was added.
    """

    @staticmethod
    def __new__(cls: type["UsedGradient"], grad: Tensor, name: str, size: Tensor | None, applied: bool) -> "UsedGradient":
        """Make one in the place of ``grad``."""
        made = Tensor._make_wrapper_subclass(cls, grad.shape, strides=grad.stride(), dtype=grad.dtype, device=grad.device)
        made.of, made.length, made.applied = name, size, applied
        made.factor, made.arrived = 1.0, None
        return made

    def __repr__(self) -> str:
        return f"UsedGradient({self.of}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Do what clipping, gradient accumulation and ``zero_grad`` do; refuse the rest."""
        packet, first = func.overloadpacket, args[0]
        if packet in (_aten._foreach_norm, _aten._foreach_mul_, _aten._foreach_zero_):
            single = {
                _aten._foreach_norm: torch.linalg.vector_norm,
                _aten._foreach_mul_: Tensor.mul_,
                _aten._foreach_zero_: Tensor.zero_,
            }
            return _each(single[packet], first, *args[1:])
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
            "layerwise", True, f"has used and freed the gradient of {_name(args)}, so {packet.__name__} has nothing to work "
            "on: leave it out (clipping by value, or inside the closure), or use layerwise=False"
        )  # fmt: skip

    def _norm(self) -> Tensor:
        if self.length is None:
            raise ConfigError(
                "layerwise", True, f"has freed the gradient of {self.of} micro-batch by micro-batch, so the norm of their sum "
                "is not known: clip without gradient accumulation, set clipping to null, or use layerwise=False"
            )  # fmt: skip
        return self.length * self.factor


def _each(function: Any, tensors: list[Tensor], *args: Any) -> Any:
    others = [
        args[0][i] if args and isinstance(args[0], (list, tuple)) else args[0] if args else None for i in range(len(tensors))
    ]
    found = [function(t) if other is None else function(t, other) for t, other in zip(tensors, others, strict=True)]
    return found if function is torch.linalg.vector_norm else None


def _name(args: Any) -> str:
    for arg in args:
        if isinstance(arg, UsedGradient):
            return arg.of
        if isinstance(arg, (list, tuple)) and (name := _name(arg)):
            return name
    return ""
