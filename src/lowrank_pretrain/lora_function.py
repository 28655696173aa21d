"""One LoRA linear as one differentiable function: y = x Wₑᵀ + b with Wₑ = W + scale · B A (LoRA, arXiv 2106.09685, eq. 3).

N rows of x, D in, O out, R rank. A fused layer has row blocks (parts) p with ranks R_p, ΣR = sum of R_p.

Why not ``linear(x, W) + linear(linear(x, A), B)``: that costs six products as long as the batch (x Aᵀ, z Bᵀ, dy B, dz A,
dzᵀ x, dyᵀ z), all of them thin and bound by memory. Forming Wₑ costs one R-deep product of the size of W, small against a
batch of N ≫ R rows, and leaves four; while W trains too, dWₑ = dyᵀ x gives both factors' gradients without any
(dA = Bᵀ dWₑ, dB = dWₑ Aᵀ). Nothing is kept for backward but x: Wₑ is formed again.
With few rows, or weights stored in half precision (W + BA would round the small update away), the two-step form is used.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Part(NamedTuple):
    """A row block with an adapter: rows [start, start+rows) of W, rows [a, a+rank) of lora_A."""

    name: str
    start: int
    rows: int
    a: int
    rank: int
    scale: float


class RestPart(NamedTuple):
    """A row block that belongs to no target and trains in full although the layer's W is frozen."""

    name: str
    start: int
    rows: int


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: list[Tensor],
    parts: tuple[Part, ...],
    transposed: bool = False,
    rest: tuple[RestPart, ...] = (),
    rest_weight: tuple[Tensor, ...] = (),
    rest_bias: tuple[Tensor, ...] = (),
) -> Tensor:
    """Linear layer with low-rank adapters on its row blocks.

    Args:
        x: (..., D).
        weight: (O, D), or (D, O) if ``transposed`` (transformers' Conv1D).
        bias: (O,) or None.
        lora_A: (ΣR, D), the parts' factors one below the other.
        lora_B: per part (O_p, R_p).
        parts: where each part lies in W and in ``lora_A``.
        transposed: layout of ``weight``.
        rest: row blocks that train in full beside frozen others.
        rest_weight: per rest block a view of its rows of ``weight`` (gradients only; ``weight`` already holds the values).
        rest_bias: likewise for the bias, empty if there is none.

    Returns:
        (..., O), in autocast's dtype under autocast.
    """
    return _LoRALinear.apply(x, weight, bias, lora_A, parts, transposed, rest, *lora_B, *rest_weight, *rest_bias)


def merged(weight: Tensor, lora_A: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], transposed: bool) -> Tensor:
    """Wₑ = W + scale · B A per row block, a new tensor of the layout and dtype of ``weight``; float32 inside."""
    out = weight.detach().clone(memory_format=torch.contiguous_format)
    for part, factor in zip(parts, lora_B, strict=True):
        rows = slice(part.start, part.start + part.rows)
        block = out[:, rows].t() if transposed else out[rows]
        B, A = factor.detach(), lora_A.detach()[part.a : part.a + part.rank]
        if block.dtype in (torch.float32, torch.float64):
            block.addmm_(B.to(block.dtype), A.to(block.dtype), alpha=part.scale)
        else:
            block.copy_(torch.addmm(block.float(), B.float(), A.float(), alpha=part.scale))
    return out


def forms_merged_weight(n: int, weight: Tensor) -> bool:
    """Whether Wₑ is formed: W holds float32 or more, and N is large enough (measured: break-even at 2 to 4 DO/(D+O))."""
    d, o = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and n * (d + o) >= 3 * d * o


class _LoRALinear(torch.autograd.Function):
    """See the module's text; saves the float32 Parameters themselves and casts again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, parts: tuple[Part, ...],
                transposed: bool, rest: tuple[RestPart, ...], *factors: Tensor) -> Tensor:  # fmt: skip
        lora_B = list(factors[: len(parts)])
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        # in-place products after an autocast op fail ("BFloat16 and Float"), so all casts are made here
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        with torch.autocast(device, enabled=False):
            xc = x.to(dtype)
            n = x.numel() // x.shape[-1]
            use_merged = forms_merged_weight(n, weight)
            w = (merged(weight, lora_A, lora_B, parts, transposed) if use_merged else weight).to(dtype)
            b = None if bias is None else bias.to(dtype)
            y = affine(xc, w, b, transposed)
            z = None
            if not use_merged:
                z = xc.reshape(n, -1) @ lora_A.to(dtype).t()  # (N, ΣR)
                add_low_rank(y.view(n, -1), z, lora_B, parts, dtype)

        needs = ctx.needs_input_grad
        full_rows = any(needs[7 + len(parts) :])
        needs_x = needs[1] or needs[3] or full_rows  # W, A or a rest block trains
        if not needs_x and z is None and any(needs[7:]):
            with torch.autocast(device, enabled=False):
                z = xc.reshape(n, -1) @ lora_A.to(dtype).t()
        # x if something needs it, else only the R-wide z (LoRA-FA); never both
        ctx.save_for_backward(weight, lora_A, xc if needs_x else None, z if not needs_x else None, *lora_B)
        ctx.parts, ctx.rest, ctx.transposed, ctx.use_merged = parts, rest, transposed, use_merged
        ctx.dtype, ctx.x_dtype, ctx.x_shape = dtype, x.dtype, x.shape
        ctx.factor_dtypes = [f.dtype for f in factors]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        weight, lora_A, x, z, *lora_B = ctx.saved_tensors
        parts, needs, dtype, transposed = ctx.parts, ctx.needs_input_grad, ctx.dtype, ctx.transposed
        dy = dy.reshape(-1, dy.shape[-1])  # (N, O)
        if x is not None:
            x = x.reshape(-1, x.shape[-1])  # (N, D)
        dx = dW = db = dA = None
        dB: list[Tensor | None] = [None] * len(parts)
        wants_factors = needs[3] or any(needs[7 : 7 + len(parts)])
        dz = None
        if (wants_factors and not needs[1]) or (needs[0] and not ctx.use_merged):
            dz = times_B(dy, lora_B, parts, lora_A.shape[0], dtype)  # (N, ΣR)

        if needs[1]:  # joint phase: one full gradient serves W, A and B
            G = dy.t() @ x  # (O, D)
            Gw = G.to(weight.dtype)
            dW = Gw.t() if transposed else Gw
            if wants_factors:
                G = G.to(lora_A.dtype)
                dA = torch.empty_like(lora_A)
                for i, (p, B) in enumerate(zip(parts, lora_B, strict=True)):
                    rows, ranks = G[p.start : p.start + p.rows], slice(p.a, p.a + p.rank)
                    torch.mm(B.t(), rows, out=dA[ranks]).mul_(p.scale)
                    dB[i] = (rows @ lora_A[ranks].t()).mul_(p.scale)
                if not needs[3]:
                    dA = None
        elif wants_factors:
            if needs[3]:
                dA = (x.t() @ dz).t().to(lora_A.dtype, memory_format=torch.contiguous_format)
            if any(needs[7 : 7 + len(parts)]):
                z = x @ lora_A.to(dtype).t() if z is None else z
                for i, p in enumerate(parts):
                    block = dy[:, p.start : p.start + p.rows].t() @ z[:, p.a : p.a + p.rank]
                    dB[i] = block.to(ctx.factor_dtypes[i]).mul_(p.scale)

        if needs[0]:
            w = merged(weight, lora_A, lora_B, parts, transposed) if ctx.use_merged else weight
            w = w.to(dtype)
            dx = dy @ (w.t() if transposed else w)
            if not ctx.use_merged:
                dx.addmm_(dz, lora_A.to(dtype))
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        if needs[2]:
            db = dy.sum(0).to(ctx.bias_dtype)

        d_rest: list[Tensor | None] = [None] * (len(needs) - 7 - len(parts))
        for i, p in enumerate(ctx.rest):  # rest weights come first, then rest biases (if any)
            rows = dy[:, p.start : p.start + p.rows]
            if needs[7 + len(parts) + i]:
                block = rows.t() @ x
                d_rest[i] = (block.t() if transposed else block).to(ctx.factor_dtypes[len(parts) + i])
            j = len(ctx.rest) + i
            if j < len(d_rest) and needs[7 + len(parts) + j]:
                d_rest[j] = rows.sum(0).to(ctx.factor_dtypes[len(parts) + j])
        return dx, dW, db, dA, None, None, None, *dB, *d_rest


def affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """X W + b by the very call that the plain layer makes, so that an adapter of zeros changes no bit."""
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = torch.mm(flat, weight) if bias is None else torch.addmm(bias, flat, weight)
    return y.view(*x.shape[:-1], weight.shape[1])


def add_low_rank(y: Tensor, z: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], dtype: torch.dtype) -> None:
    """Y[:, rows of p] += scale · z_p B_pᵀ for every part, in place. y: (N, O), z: (N, ΣR)."""
    for p, B in zip(parts, lora_B, strict=True):
        y[:, p.start : p.start + p.rows].addmm_(z[:, p.a : p.a + p.rank], B.to(dtype).t(), alpha=p.scale)


def times_B(dy: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], total: int, dtype: torch.dtype) -> Tensor:
    """Dz = scale · dy B, (N, ΣR), the parts' columns side by side."""
    if len(parts) == 1:
        return (dy[:, parts[0].start : parts[0].start + parts[0].rows] @ lora_B[0].to(dtype)).mul_(parts[0].scale)
    dz = dy.new_empty(dy.shape[0], total)
    for p, B in zip(parts, lora_B, strict=True):
        dz[:, p.a : p.a + p.rank] = (dy[:, p.start : p.start + p.rows] @ B.to(dtype)).mul_(p.scale)
    return dz
