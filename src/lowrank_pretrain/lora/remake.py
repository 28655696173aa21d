"""Make a layer's input x again in backward, from what the operation that made x keeps anyway.

    h (N, D) ── gelu ── x (N, D) ── linear layer ── y        gelu keeps h for its own backward; the layer would keep x too

The layer needs x for nothing but the gradients of its weights. So it keeps h in place of x: the same storage once more, no new
bytes. Its backward computes gelu(h) again, by the same operation and to the same bits. A norm's output is made from the norm's
input, mean and 1/std, to rounding; a product (SwiGLU, GPT-2's gelu, RMSNorm) from its two factors.

An input is kept as before where what made it is not known here, where hooks may have replaced what autograd keeps (activation
checkpointing, offloading), and where x was written into afterwards. The first time that a layer's input is made in some way,
the result is compared with x, and a layer where they differ keeps its inputs from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pretrain.core.lightning_private import hooks_recompute, kept_by, output_of, scalar_of

Make = Callable[[Sequence[Tensor]], Tensor]
"""A function from all kept tensors to x, or to something on the way to x. It holds no tensor itself: nobody would free it."""

DEPTH = 5  # operations that are made again one after another, at most


class Recipe(NamedTuple):
    """Tell how to make x again."""

    name: str  # the operations, e.g. "mul(kept, gelu(kept))"
    kept: tuple[Tensor, ...]  # goes through ``save_for_backward``, which notices changes in place
    make: Make


class Remaker:
    """Find recipes for one layer's inputs; remember which kinds have been seen to be right.

    Example:
        >>> h = torch.ones(2, 3, requires_grad=True)
        >>> recipe = Remaker().recipe(F.gelu(h * 2), torch.float32, of=[h])
        >>> recipe.name, torch.equal(recipe.make(recipe.kept), F.gelu(h * 2))
        ('gelu(kept)', True)
    """

    def __init__(self) -> None:
        self.trusted: set[str] = set()
        self.stopped = False

    def recipe(self, x: Tensor, dtype: torch.dtype, of: Sequence[Tensor]) -> Recipe | None:
        """Return how to make ``x.to(dtype)`` again; None if x is to be kept, or is not needed.

        Args:
            x: the layer's input, before autocast's cast.
            dtype: what the layer's products take.
            of: the tensors whose gradients need x.
        """
        if not any(t.requires_grad for t in of):
            return None
        if self.stopped or x.grad_fn is None or not torch.is_grad_enabled() or x._version or hooks_recompute():
            return None
        kept: list[Tensor] = []
        try:
            found = _again(x.grad_fn, x.output_nr, kept, DEPTH)
        except LookupError:  # hooks
            return None
        except RuntimeError as error:  # of autograd: what the producer keeps is freed, or was changed in place
            if "inplace" in str(error):
                self._stop("what its input is made from was changed in place")
            return None
        if found is None:
            return None
        name, make, shape = found[0], found[1], x.shape
        recipe = Recipe(name, tuple(kept), lambda tensors: make(tensors).reshape(shape).to(dtype))
        if name not in self.trusted:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                if not _agree(recipe.make(recipe.kept), x.to(dtype)):
                    self._stop(f"its input is not {name}: it was changed after that, without a trace")
                    return None
            self.trusted.add(name)
        return recipe

    def _stop(self, why: str) -> None:
        self.stopped = True
        warnings.warn(f"recompute_inputs: a layer keeps its input, because {why}", stacklevel=2)


def keep(ctx: Any, x: Tensor | None, recipe: Recipe | None, *others: Tensor | None) -> None:
    """Save x for backward, or what it is made from; and other tensors. ``kept`` returns them.

    Args:
        ctx: of an autograd function's forward.
        x: None if backward does not need it.
        recipe: how to make x again; None: x is saved itself.
        others: saved as they are.
    """
    recipe = None if x is None else recipe
    ctx.make, ctx.others = None if recipe is None else recipe.make, len(others)
    ctx.save_for_backward(*others, *((x,) if recipe is None else recipe.kept))


def kept(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return x, made again where it is not kept (None if backward does not need it), and the other tensors.

    While a graph is recorded, an x that is made again is connected to it.

    Raises:
        RuntimeError: something saved was changed in place, or is freed already.
    """
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if ctx.make is None or "inplace" not in str(error):
            raise
        cure = "with recompute_inputs=true a layer's input is made again from this: set it to false, or do not write into it"
        raise RuntimeError(f"{error} ({cure})") from error
    others, rest = saved[: ctx.others], saved[ctx.others :]
    if ctx.make is None:
        return rest[0], others
    device = next(t for t in rest if t.ndim).device.type
    with torch.autocast(device, enabled=False):  # what was kept has been through autocast
        return ctx.make(rest), others


def _agree(made: Tensor, x: Tensor) -> bool:
    """Return whether two tensors are equal to rounding; NaN equals NaN."""
    if made.shape != x.shape or made.dtype != x.dtype or made.device != x.device:
        return False
    if torch.equal(made, x):
        return True
    near = 16 * torch.finfo(x.dtype).eps
    largest = x.abs().nan_to_num(0.0, 0.0, 0.0).max() if x.numel() else x.new_zeros(())
    return bool(torch.isclose(made, x, rtol=near, atol=near * float(largest), equal_nan=True).all())


# -- operations that can be made again --------------------------------------------------------------------------------


def _again(node: Any, index: int, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Return the name and the making of a node's output; add what it is made from to ``kept``.

    Raises:
        LookupError: hooks hold what the node keeps.
        RuntimeError: what it keeps is freed, or was changed in place.
    """
    rule = _RULES.get(node.name()) if node is not None and index == 0 and depth else None
    return None if rule is None else rule(node, kept, depth - 1)


def _input(node: Any, index: int, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Return the same for one of a node's inputs."""
    before, output = node.next_functions[index]
    return _again(before, output, kept, depth)


def _kept(node: Any, name: str, kept: list[Tensor]) -> Make | None:
    """Return how to get the tensor that the node keeps under this name; None if it keeps none."""
    tensor = kept_by(node, name)
    if tensor is None:
        return None
    kept.append(tensor)
    at = len(kept) - 1
    return lambda tensors: tensors[at]


def _of_kept(name: str, function: Callable[..., Tensor], *settings: str) -> Callable:
    """Return the rule of ``function(self, *settings)`` whose node keeps ``self``."""

    def rule(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
        h, values = _kept(node, "self", kept), [scalar_of(node, key) for key in settings]
        return None if h is None else (f"{name}(kept)", lambda tensors: function(h(tensors), *values))

    return rule


def _product(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Make a · b. A factor is kept for the other's gradient; where the other is frozen, it is made again itself."""
    found = []
    for index, name in enumerate(("self", "other")):
        factor = _kept(node, name, kept)
        one = _input(node, index, kept, depth) if factor is None else ("kept", factor)
        if one is None:
            return None
        found.append(one)
    (name_a, a), (name_b, b) = found
    return f"mul({name_a}, {name_b})", lambda tensors: torch.mul(a(tensors), b(tensors))


def _layer_norm(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Make (h − mean) / std · w + b from mean and 1/std: the eps that a call of ``layer_norm`` would need is not kept."""
    h, mean, rstd = (_kept(node, name, kept) for name in ("input", "result1", "result2"))
    w, b = (_kept(node, name, kept) for name in ("weight", "bias"))
    if h is None or mean is None or rstd is None:
        return None
    dims = len(scalar_of(node, "normalized_shape"))

    def make(tensors: Sequence[Tensor]) -> Tensor:
        weight, bias = None if w is None else w(tensors), None if b is None else b(tensors)
        return _normalised(h(tensors), mean(tensors), rstd(tensors), weight, bias, dims)

    return f"layer_norm(kept, {w is not None}, {b is not None})", make


def _normalised(
    h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int
) -> Tensor:  # h: (.., D) with dims last dimensions that are normalised; mean, rstd: (.., 1)
    """Return (h − mean) · rstd · weight + bias in two passes over h, rounded as torch's CPU kernel rounds it."""
    dtype, wide = h.dtype, torch.promote_types(rstd.dtype, torch.float32)
    if torch.is_grad_enabled():  # mean and std are functions of h; eps is what was added to the variance
        last = tuple(range(-dims, 0))
        h = h.to(wide)
        variance, mean = h.var(last, unbiased=False, keepdim=True), h.mean(last, keepdim=True)
        rstd = (variance + (rstd.detach().to(wide) ** -2 - variance.detach())) ** -0.5
        y = (h - mean) * rstd
        y = y if weight is None else y * weight
        return (y if bias is None else y + bias).to(dtype)
    rstd = rstd.to(wide)
    y = torch.addcmul(-mean.to(wide) * rstd, h.to(wide), rstd)
    if weight is None:
        return (y if bias is None else y + bias).to(dtype)
    weight = weight.to(wide)
    return (y.mul_(weight) if bias is None else torch.addcmul(bias.to(wide), y, weight)).to(dtype)


def _rms_norm(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Make h / rms · w as one kernel keeps it (on GPUs; elsewhere an RMSNorm is a product of products)."""
    h, rrms, w = (_kept(node, name, kept) for name in ("input", "result1", "weight"))
    if h is None or rrms is None:
        return None
    dims = len(scalar_of(node, "normalized_shape"))

    def make(tensors: Sequence[Tensor]) -> Tensor:
        x, r = h(tensors), rrms(tensors)
        if torch.is_grad_enabled():
            square = x.to(r.dtype).square().mean(tuple(range(-dims, 0)), keepdim=True)
            r = (square + (r.detach() ** -2 - square.detach())) ** -0.5
        y = x * r
        return (y if w is None else y * w(tensors)).to(x.dtype)

    return f"rms_norm(kept, {w is not None})", make


def _dropout(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
    """Make h · mask / (1 − p) with the mask that is kept (on GPUs; elsewhere dropout is a product)."""
    mask, inner = _kept(node, "result1", kept), _input(node, 0, kept, depth)
    if mask is None or inner is None:
        return None
    (name, h), scale = inner, 1 / (1 - scalar_of(node, "p"))
    return f"dropout({name})", lambda tensors: h(tensors) * mask(tensors) * scale


def _of_input(name: str, function: Callable[[Tensor, torch.Size, torch.dtype], Tensor]) -> Callable:
    """Return the rule of an operation that needs its input, and the shape or dtype of its output."""

    def rule(node: Any, kept: list[Tensor], depth: int) -> tuple[str, Make] | None:
        inner, (shape, dtype) = _input(node, 0, kept, depth), output_of(node)
        if inner is None:
            return None
        before, h = inner
        return f"{name}({before})", lambda tensors: function(h(tensors), shape, dtype)

    return rule


_cast = _of_input("cast", lambda h, shape, dtype: h.to(dtype))
_view = _of_input("view", lambda h, shape, dtype: h.reshape(shape))

_RULES: dict[str, Callable[[Any, list[Tensor], int], tuple[str, Make] | None]] = {
    "GeluBackward0": _of_kept("gelu", lambda h, approximate: F.gelu(h, approximate=approximate), "approximate"),
    "SiluBackward0": _of_kept("silu", F.silu),
    "MishBackward0": _of_kept("mish", F.mish),
    "HardswishBackward0": _of_kept("hardswish", F.hardswish),
    "PowBackward0": _of_kept("pow", torch.pow, "exponent"),  # the square of a relu
    "GluBackward0": _of_kept("glu", F.glu, "dim"),
    "MulBackward0": _product,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeDropoutBackward0": _dropout,
    "ToCopyBackward0": _cast,
    "ViewBackward0": _view,
    "UnsafeViewBackward0": _view,
    "ReshapeAliasBackward0": _view,
}
