"""Form the products of a linear layer with low-rank adapters, and decide which of them are worth forming.

N rows of x, D in, O out, R rank; a fused layer has row blocks (parts) p with ranks R_p, ΣR = sum of R_p. ``lora.function`` puts
the products together to a layer, ``lte.heads.function`` to a layer with several heads.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pretrain.core.lightning_private import is_view
from lowrank_pretrain.lora.frozen import Stored, base_weight


class Part(NamedTuple):
    """Describe a row block with an adapter: rows [start, start+rows) of W, rows [a, a+rank) of lora_A."""

    name: str
    start: int
    rows: int
    a: int
    rank: int
    scale: float


class RestPart(NamedTuple):
    """Describe a row block that belongs to no target and trains in full although the layer's W is frozen."""

    name: str
    start: int
    rows: int


class Layout(NamedTuple):
    """Describe a layer with adapters or heads, without its tensors."""

    parts: tuple[Part, ...]
    rest: tuple[RestPart, ...]
    transposed: bool  # W is D×O (transformers' Conv1D)
    stored: str | None = None  # the kind (`frozen.KINDS`) in which a frozen W is stored and multiplied


def merged(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: list[Tensor],
    parts: tuple[Part, ...],
    transposed: bool,
    stored: Stored | None = None,
) -> Tensor:
    """Return Wₑ = W + scale · B A per row block, a new tensor in W's layout and own dtype; float32 inside."""
    out = base_weight(weight, stored).clone(memory_format=torch.contiguous_format)
    for part, factor in zip(parts, lora_B, strict=True):
        rows = slice(part.start, part.start + part.rows)
        block = out[:, rows].t() if transposed else out[rows]
        B, A = factor.detach(), lora_A.detach()[part.a : part.a + part.rank]
        if block.dtype in (torch.float32, torch.float64):
            block.addmm_(B.to(block.dtype), A.to(block.dtype), alpha=part.scale)
        else:
            block.copy_(block.float().addmm_(B.float(), A.float(), alpha=part.scale))  # in place: autocast leaves it alone
    return out


def forms_merged_weight(n: int, weight: Tensor) -> bool:
    """Return whether to form Wₑ: W holds float32 or more, and N is at least 2.5 DO/(D+O).

    Measured on one thread of loaded machines, median CPU time of a layer that trains in full over that of the adapted one
    (ViT-S, ViT-B and GPT-2 shapes, ΣR 16 or 32; 5 % of noise):

    | N(D+O)/DO                       | 0.9  | 1.7  | 2.7  | 4.1  | 5.1  | 10.5 | 1.7, W trains |
    |---------------------------------|------|------|------|------|------|------|---------------|
    | AMX, bf16-mixed: formed         | 1.16 | 1.29 | 1.08 |      | 1.25 | 1.32 | 0.78          |
    | AMX, bf16-mixed: two-step       | 1.29 | 1.29 | 0.99 |      | 1.23 | 1.28 | 0.88          |
    | AVX512-BF16, mixed: formed      |      | 1.32 | 1.32 | 1.30 |      | 1.33 | 0.94          |
    | AVX512-BF16, mixed: two-step    |      | 1.36 | 1.32 | 1.28 |      | 1.26 | 0.92          |
    | the same, float32: formed       |      | 1.37 | 1.37 | 1.34 |      | 1.32 |               |
    | the same, float32: two-step     |      | 1.39 | 1.38 | 1.33 |      | 1.28 |               |

    A W in half precision is never formed, at any price: its rounding would swallow a small B A.
    """
    d, o = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and 2 * n * (d + o) >= 5 * d * o


def own_memory(y: Tensor) -> Tensor:
    """Return y contiguous and not as a view: autograd forbids writing into views returned by custom functions."""
    y = y.contiguous()
    return y.data if not torch.compiler.is_compiling() and is_view(y) else y


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Return x Wᵀ + b by the same call as the plain layer's, so that an adapter of zeros changes no bit."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def add_low_rank(y: Tensor, z: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], dtype: torch.dtype) -> None:
    """Add scale · z_p B_pᵀ to the columns of y that are part p's, in place. y: (N, O), z: (N, ΣR)."""
    for p, B in zip(parts, lora_B, strict=True):
        y[:, p.start : p.start + p.rows].addmm_(z[:, p.a : p.a + p.rank], B.to(dtype).t(), alpha=p.scale)


def times_A(x: Tensor, lora_A: Tensor, dtype: torch.dtype) -> Tensor:
    """Return z = x Aᵀ, (N, ΣR), transposed in memory: the rows of zᵀ that a part needs then lie in one piece."""
    return (lora_A.to(dtype) @ x.t()).t()


def times_B(dy: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], total: int, dtype: torch.dtype) -> Tensor:
    """Return dz = scale · dy B, (N, ΣR), the parts' columns next to each other, transposed in memory as ``times_A``'s.

    Measured on one thread of an AMX machine, 2048 rows, O 672 in three parts, ΣR 32: 1.03 ms in float32 and 0.51 in bfloat16;
    with the parts' columns written next to each other in each row 1.65 and 0.90.
    """
    dzt = dy.new_empty(total, dy.shape[0])
    for p, B in zip(parts, lora_B, strict=True):
        scaled = (B if p.scale == 1 else B * p.scale).to(dtype)
        torch.mm(scaled.t(), dy[:, p.start : p.start + p.rows].t(), out=dzt[p.a : p.a + p.rank])
    return dzt.t()
