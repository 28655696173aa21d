"""Store a frozen W in a cheaper type and multiply in it: y = x Wᵀ and dx = dy W, to which adapters add.

N rows of x, D in, O out. A frozen W is a constant, so it is cast once. Adapters are never cast with it: their products are made
separately, in x's dtype, and a small update is not rounded away.

| kind | W is kept as | the product |
|---|---|---|
| ``bfloat16`` | bfloat16 | bfloat16 |
| ``float16`` | float16 | float16, x and dy scaled by row into its range; on most CPUs float32 |
| ``float8`` | e4m3, a scale for each row; and Wᵀ likewise | e4m3, x and dy scaled by row (``torch._scaled_mm``) |
| ``int8`` | int8, a scale for each row | bfloat16: W is widened for each product, on every device |

The kernel wants float8's second operand column by column, scaled along the sum's dimension: y wants W, dx wants Wᵀ. So
both are kept, two bytes for a weight. Bytes of float8 are kept as int8, which every process group can send.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("bfloat16", "float16", "float8", "int8")
AUTO = "auto"  # a phase callback's choice: bfloat16 where the device has instructions for it, else W stays as it is
OPERANDS: dict[str | None, int] = {"float8": 3, "int8": 1}  # how many tensors products need besides W
FLOAT8 = torch.float8_e4m3fn
_LARGEST = {"float8": 448.0, "int8": 127.0, "float16": 1.0}  # of a row after scaling; sums of products in float16 must fit, too
MULTIPLE = 16  # of D and O, which float8's kernels want


class Stored(NamedTuple):
    """Hold what a layer whose W is stored in a cheaper type keeps next to it; the layer's ``weight`` is the stored W.

    Attributes:
        kind: one of ``KINDS``.
        dtype: W's own, which merges return to.
        scale: of int8 and float8: float32, (O, 1), or (1, O) next to a W that lies as (D, O); W = scale · stored.
        turned: of float8: Wᵀ, (D, O), as int8 bytes.
        turned_scale: its rows' scales, (D, 1).
        original: W itself, in the host's memory, if it is kept.
    """

    kind: str
    dtype: torch.dtype
    scale: Tensor | None = None
    turned: Tensor | None = None
    turned_scale: Tensor | None = None
    original: Tensor | None = None

    def operands(self) -> tuple[Tensor, ...]:
        """Return the tensors that products need besides W."""
        return tuple(t for t in (self.scale, self.turned, self.turned_scale) if t is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by its field's name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def moved(self, like: Tensor) -> "Stored":
        """Return the same on the device of ``like``; the original stays on the host."""
        scale, turned, turned_scale = (
            None if value is None else value.to(like.device) for value in (self.scale, self.turned, self.turned_scale)
        )
        return self._replace(scale=scale, turned=turned, turned_scale=turned_scale)


# -- storing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def store(weight: Tensor, kind: str, transposed: bool, keep_original: bool = False) -> tuple[Tensor, Stored]:
    """Return W as it is stored, in W's layout, and what to keep next to it.

    Args:
        weight: (O, D), or (D, O) if ``transposed``.
        kind: one of ``KINDS``.
        transposed: W's layout.
        keep_original: keep W itself on the host.
    """
    weight = weight.detach()
    original = weight.to("cpu", copy=True) if keep_original else None
    about = Stored(kind, weight.dtype, original=original)
    if kind in ("bfloat16", "float16"):
        return weight.to(getattr(torch, kind), copy=True), about
    rows = weight.t() if transposed else weight  # (O, D)
    if kind == "int8":
        scale = _scales(rows, kind)
        held = (rows.float() / scale).round_().to(torch.int8)
        return (held.t(), about._replace(scale=scale.t())) if transposed else (held, about._replace(scale=scale))
    (held, scale), (turned, turned_scale) = _float8_rows(rows), _float8_rows(rows.t())
    held, turned = held.view(torch.int8), turned.view(torch.int8)
    about = about._replace(scale=scale.t() if transposed else scale, turned=turned, turned_scale=turned_scale)
    return held.t() if transposed else held, about


def widened(weight: Tensor, kind: str, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the stored W as numbers of ``dtype``, a new tensor in W's layout: what the products multiply with."""
    if scale is None:
        return weight.to(dtype, copy=True)
    numbers = weight.view(FLOAT8) if kind == "float8" else weight
    return (numbers.float() * scale).to(dtype)


def base_weight(weight: Tensor, stored: Stored | None) -> Tensor:
    """Return W in its own dtype, to which a merge adds: the original if it was kept, else W as it is stored."""
    if stored is None:
        return weight.detach()
    if stored.original is not None:
        return stored.original.to(weight.device)
    return widened(weight.detach(), stored.kind, stored.scale, stored.dtype)


def _scales(rows: Tensor, kind: str) -> Tensor:
    """Return a scale for each row, (N, 1) in float32, such that the row's largest number becomes the largest allowed."""
    largest = rows.abs().amax(1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
    return largest.float().clamp_min_(1e-30).div_(_LARGEST[kind])


def _float8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in float8, contiguous, and their scales."""
    scale = _scales(rows, "float8")
    return (rows / scale).clamp_(-448.0, 448.0).to(FLOAT8).contiguous(), scale


# -- multiplying ------------------------------------------------------------------------------------------------------


def product(
    x: Tensor, weight: Tensor, kind: str, operands: tuple[Tensor, ...], bias: Tensor | None, transposed: bool
) -> Tensor:
    """Return x Wᵀ + b, (N, O) in x's dtype, a new tensor.

    Args:
        x: (N, D).
        weight: W as ``store`` returned it.
        kind: one of ``KINDS``.
        operands: ``Stored.operands``.
        bias: (O,) or None.
        transposed: W's layout.
    """
    rows = weight.t() if transposed else weight  # (O, D)
    if kind == "bfloat16":  # with its bias in one call: the sum is rounded once
        return F.linear(x.to(rows.dtype), rows, None if bias is None else bias.to(rows.dtype)).to(x.dtype)
    if kind == "float16":
        y = _half_product(x, rows.t())
    elif kind == "int8":
        wide = x.to(torch.bfloat16) @ rows.to(torch.bfloat16).t()
        y = wide.to(x.dtype).mul_(operands[0].view(1, -1))
    else:
        y = _float8_product(x, rows.view(FLOAT8).t(), operands[0])  # (D, O) by column
    return y if bias is None else y.add_(bias.to(y.dtype))


def gradient_product(dy: Tensor, weight: Tensor, kind: str, operands: tuple[Tensor, ...], transposed: bool) -> Tensor:
    """Return dx = dy W, (N, D) in dy's dtype, a new tensor. dy: (N, O); the others as for ``product``."""
    rows = weight.t() if transposed else weight  # (O, D)
    if kind == "bfloat16":
        return (dy.to(rows.dtype) @ rows).to(dy.dtype)
    if kind == "float16":
        return _half_product(dy, rows)
    if kind == "int8":
        return ((dy * operands[0].view(1, -1)).to(torch.bfloat16) @ rows.to(torch.bfloat16)).to(dy.dtype)
    return _float8_product(dy, operands[1].view(FLOAT8).t(), operands[2])


def _half_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weight by float16 numbers, in x's dtype; weight: (K, M). Each row of x is scaled into float16's range."""
    if x.device.type == "cpu" and not _CPU_HAS_FLOAT16:
        wide = torch.float32 if x.dtype != torch.float64 else torch.float64
        return (x.to(wide) @ weight.to(wide)).to(x.dtype)
    scale = _scales(x, "float16")
    y = (x / scale).to(torch.float16) @ weight
    return y.to(x.dtype).mul_(scale)


def _float8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x · weight by float8 numbers, in x's dtype; weight: (K, M) by column, scale: of its columns, M."""
    if not x.numel():
        return x.new_zeros(x.shape[0], weight.shape[1])
    held, mine = _float8_rows(x)
    if x.device.type == "cpu" and not _CPU_HAS_FLOAT8:
        return (held.float() @ weight.float()).mul_(mine).mul_(scale.view(1, -1)).to(x.dtype)
    wanted = torch.float32 if x.device.type == "cpu" and x.dtype != torch.bfloat16 else torch.bfloat16
    y = torch._scaled_mm(held, weight, scale_a=mine, scale_b=scale.view(1, -1), out_dtype=wanted)
    return y.to(x.dtype)


def _cpu_has_float16() -> bool:
    supported: Callable[[], bool] | None = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return supported is not None and supported()


def _cpu_has_float8() -> bool:
    """Return whether the CPU's kernel takes scales by row, which it does from torch 2.12 on."""
    scale = torch.ones(MULTIPLE, 1)
    held = scale.expand(MULTIPLE, MULTIPLE).to(FLOAT8).contiguous()
    try:
        torch._scaled_mm(held, held.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except Exception:  # each version raises its own kind
        return False
    return True


_CPU_HAS_FLOAT16 = _cpu_has_float16()  # asked once: dynamo cannot trace the question
_CPU_HAS_FLOAT8 = _cpu_has_float8()


# -- checks -----------------------------------------------------------------------------------------------------------


def obstacle(kind: str, shape: tuple[int, ...]) -> str | None:
    """Return why a W of this shape cannot be stored so, and the cure; ``None`` if it can."""
    if kind == "float8" and any(size % MULTIPLE for size in shape):
        sizes = " x ".join(str(size) for size in shape)
        return f"is {sizes}, and float8's kernel wants multiples of {MULTIPLE}: leave it out of the targets, or use bfloat16"
    return None


def overflows(weight: Tensor, kind: str) -> bool:
    """Return whether a finite W becomes infinite in this type; types with scales never do."""
    if kind not in ("bfloat16", "float16"):
        return False
    weight = weight.detach()
    return bool(torch.isinf(weight.to(getattr(torch, kind))).any()) and bool(torch.isfinite(weight).all())


def refuses(kind: str, device: torch.device) -> str | None:
    """Return why the device cannot multiply in this type, by trying it once; ``None`` if it can."""
    try:
        weight, stored = store(torch.ones(MULTIPLE, MULTIPLE, device=device), kind, False)
        x = torch.ones(MULTIPLE, MULTIPLE, device=device)
        y = product(x, weight, kind, stored.operands(), None, False)
        dx = gradient_product(x, weight, kind, stored.operands(), False)
        right = bool(torch.isfinite(y).all() & torch.isfinite(dx).all())
    except Exception as error:  # each backend raises its own kind for a type or a kernel that it lacks
        words = (str(error) or type(error).__name__).splitlines()[0].strip().rstrip(".")
        return f"{device} cannot multiply in it ({words[:160]})"
    return None if right else f"{device} multiplies wrongly in it"
