"""Compute a LoRA linear as one function: y = x Wₑᵀ + b with Wₑ = W + scale · B A (LoRA, arXiv 2106.09685, eq. 3).

N rows of x, D in, O out, R rank. A fused layer has row blocks (parts) p with ranks R_p, ΣR = sum of R_p.

Why not ``linear(x, W) + linear(linear(x, A), B)``: that costs six products as long as the batch (x Aᵀ, z Bᵀ, dy B, dz A,
dzᵀ x, dyᵀ z), all of them thin and bound by memory. Forming Wₑ costs one R-deep product of the size of W, small against a
batch of N ≫ R rows, and leaves four; while W trains too, dWₑ = dyᵀ x gives both factors' gradients without any
(dA = Bᵀ dWₑ, dB = dWₑ Aᵀ). Nothing is kept for backward but x: Wₑ is formed again.
With few rows, or weights stored in half precision (W + BA would round the small update away), the two-step form is used.

That function serves ordinary training. Whatever must look inside (tracers, exporters, functorch's transforms, forward-mode AD,
nested tensors) gets the same linear layer as plain operations on ``effective_weight``; second derivatives come from
``_gradients``, which are plain operations too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank_pretrain.core.lightning_private import (
    forward_mode_active,
    is_legacy_batched,
    is_traced,
    is_view,
    transforms_active,
)
from lowrank_pretrain.lora.frozen import Stored, base_weight, gradient_product, product, widened

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


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
    """Describe a layer with adapters, apart from its tensors."""

    parts: tuple[Part, ...]
    rest: tuple[RestPart, ...]
    transposed: bool  # W is D×O (transformers' Conv1D)
    stored: str | None = None  # kind of `frozen.KINDS` in which a frozen W is stored and multiplied


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
    stored: Stored | None = None,
) -> Tensor:
    """Apply a linear layer with low-rank adapters on its row blocks.

    Args:
        x: (..., D).
        weight: (O, D), or (D, O) if ``transposed`` (transformers' Conv1D).
        bias: (O,) or None.
        lora_A: (ΣR, D), the parts' factors stacked by row.
        lora_B: per part (O_p, R_p).
        parts: where each part lies in W and in ``lora_A``.
        transposed: layout of ``weight``.
        rest: row blocks that train in full while the others are frozen.
        rest_weight: per rest block a view of its rows of ``weight`` (gradients only; ``weight`` already holds the values).
        rest_bias: the same for the bias, empty if there is none.
        stored: what belongs to a frozen ``weight`` that is stored in a cheaper type; then there are no rest blocks.

    Returns:
        (..., O), in autocast's dtype under autocast.

    Example:
        >>> x, W, A, B = torch.ones(1, 2), torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> lora_linear(x, W, None, A, [B], (Part("W", 0, 2, 0, 1, 0.5),))  # 0.5 B A x = (1, 0)
        tensor([[2., 1.]])
    """
    if not is_ordinary(x):
        if stored is not None:
            weight = widened(weight, stored.kind, stored.scale, stored.dtype)
        return affine(
            x,
            effective_weight(weight, lora_A, lora_B, parts, transposed, rest, rest_weight),
            effective_bias(bias, rest, rest_bias),
            transposed,
        )
    # autograd casts, not the function: what the function keeps for backward is then its input, which second derivatives need
    if stored is not None:
        layout = Layout(parts, (), transposed, stored.kind)
        return _LoRALinear.apply(for_autocast(x), weight, bias, lora_A, layout, *lora_B, *stored.operands())
    layout = Layout(parts, rest, transposed)
    return _LoRALinear.apply(for_autocast(x), weight, bias, lora_A, layout, *lora_B, *rest_weight, *rest_bias)


def is_ordinary(x: Any) -> bool:
    """Return whether our own function may take ``x``: a plain tensor that only autograd's backward follows."""
    if torch.compiler.is_dynamo_compiling():
        return not _is_exporting()
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and not x.is_nested
        and not transforms_active()
        and not forward_mode_active()
        and not is_traced()
        and not _is_exporting()
    )


def for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast gives to products; without autocast, x itself."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x


def effective_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: list[Tensor],
    parts: tuple[Part, ...],
    transposed: bool,
    rest: tuple[RestPart, ...] = (),
    rest_weight: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return Wₑ as an expression in W, A, B and the rest blocks, in the layout and dtype of ``weight``; bits as ``merged``.

    Nothing here reads a size or a dtype that a tracer does not know.
    """
    if isinstance(weight, Tensor) and torch.is_autocast_enabled(weight.device.type):
        with torch.autocast(weight.device.type, enabled=False):  # it would form B A in half precision
            return effective_weight(weight, lora_A, lora_B, parts, transposed, rest, rest_weight)
    rows = weight.t() if transposed else weight  # (O, D)
    real = isinstance(weight, Tensor)  # torch.fx's stand-ins tell no dtype
    half = real and weight.dtype in (torch.float16, torch.bfloat16)
    inner = torch.float32 if half else weight.dtype
    blocks = {
        (span.start, span.rows): block.t() if transposed else block for span, block in zip(rest, rest_weight, strict=True)
    }
    for part, B in zip(parts, lora_B, strict=True):
        terms = rows[part.start : part.start + part.rows], B, lora_A[part.a : part.a + part.rank]
        block = torch.addmm(*(t.to(inner) for t in terms) if real else terms, alpha=part.scale)
        blocks[part.start, part.rows] = block.to(weight.dtype) if half else block
    out = _in_order(rows, blocks)
    return out.t() if transposed else out


def effective_bias(bias: Tensor | None, rest: tuple[RestPart, ...], rest_bias: tuple[Tensor, ...]) -> Tensor | None:
    """Return the bias as an expression in b and the rest blocks' own."""
    if bias is None or not rest_bias:
        return bias
    return _in_order(bias, {(span.start, span.rows): block for span, block in zip(rest, rest_bias, strict=True)})


def _in_order(whole: Tensor, blocks: dict[tuple[int, int], Tensor]) -> Tensor:
    """Return ``whole`` with some of its row blocks, by (first row, number of rows), replaced."""
    pieces, at = [], 0
    for (start, rows), block in sorted(blocks.items(), key=lambda item: item[0]):
        pieces += [whole[at:start], block] if start > at else [block]
        at = start + rows
    pieces.append(whole[at:])  # may have no rows: a tracer cannot tell
    return torch.cat(pieces)


def merged(
    weight: Tensor, lora_A: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], transposed: bool, stored: Stored | None = None
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
            block.copy_(torch.addmm(block.float(), B.float(), A.float(), alpha=part.scale))
    return out


def forms_merged_weight(n: int, weight: Tensor) -> bool:
    """Return whether to form Wₑ: W holds float32 or more, and N is large (measured: break-even at 2 to 4 DO/(D+O))."""
    d, o = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and n * (d + o) >= 3 * d * o


class _Needs(NamedTuple):
    """Tell which inputs of ``_LoRALinear`` need a gradient."""

    x: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: tuple[bool, ...]
    rest_weight: tuple[bool, ...]
    rest_bias: tuple[bool, ...]  # empty if there is none

    @property
    def factors(self) -> bool:
        """Return whether A or any B needs one."""
        return self.lora_A or any(self.lora_B)

    @property
    def rest(self) -> bool:
        """Return whether any rest block needs one."""
        return any(self.rest_weight) or any(self.rest_bias)


def _needs(ctx: Any, layout: Layout) -> _Needs:
    x, weight, bias, lora_A, _, *factors = ctx.needs_input_grad
    p, r = len(layout.parts), len(layout.rest)
    if layout.stored is not None:  # what follows the factors are the stored W's scales
        return _Needs(x, False, bias, lora_A, tuple(factors[:p]), (), ())
    return _Needs(x, weight, bias, lora_A, tuple(factors[:p]), tuple(factors[p : p + r]), tuple(factors[p + r :]))


class _LoRALinear(torch.autograd.Function):
    """Save the float32 Parameters themselves, and cast again in backward (see the module docstring)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, layout: Layout,
                *factors: Tensor) -> Tensor:  # fmt: skip
        parts, transposed = layout.parts, layout.transposed
        lora_B = list(factors[: len(parts)])
        device, dtype, cols = x.device.type, x.dtype, x.shape[-1]
        # in-place products after an autocast op fail ("BFloat16 and Float"), so all casts are made here and before
        with torch.autocast(device, enabled=False):
            use_merged = layout.stored is None and forms_merged_weight(x.numel() // cols, weight)
            b = None if bias is None else bias.to(dtype)
            if layout.stored is not None:
                y = product(x.reshape(-1, cols), weight, layout.stored, factors[len(parts) :], b, transposed)
                y = own_memory(y.view(*x.shape[:-1], y.shape[-1]))
            else:
                w = (merged(weight, lora_A, lora_B, parts, transposed) if use_merged else weight).to(dtype)
                y = own_memory(affine(x, w, b, transposed))
            z = None
            if not use_merged and parts:
                z = x.reshape(-1, cols) @ lora_A.to(dtype).t()  # (N, ΣR)
                add_low_rank(y.view(-1, y.shape[-1]), z, lora_B, parts, dtype)

        # x if something needs it, else only the R-wide z (LoRA-FA); never both
        needs = _needs(ctx, layout)
        needs_x = needs.weight or needs.lora_A or needs.rest
        if not needs_x and z is None and any(needs.lora_B):
            with torch.autocast(device, enabled=False):
                z = x.reshape(-1, cols) @ lora_A.to(dtype).t()
        operands = factors[len(parts) :] if layout.stored is not None else ()
        ctx.save_for_backward(weight, lora_A, x if needs_x else None, z if not needs_x else None, *lora_B, *operands)
        ctx.layout, ctx.use_merged, ctx.dtype, ctx.x_shape = layout, use_merged, dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.rest_dtypes = [f.dtype for f in factors[len(parts) :]]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if wants_graph(dy):
            return _gradients(ctx, dy)
        weight, lora_A, x, z, *factors = ctx.saved_tensors
        layout, dtype, needs = ctx.layout, ctx.dtype, _needs(ctx, ctx.layout)
        lora_B, operands = factors[: len(layout.parts)], tuple(factors[len(layout.parts) :])
        dy = dy.reshape(-1, dy.shape[-1])  # (N, O)
        if x is not None:
            x = x.reshape(-1, x.shape[-1])  # (N, D)
        dx = dW = dz = None

        # W, A and B
        if layout.parts and ((needs.factors and not needs.weight) or (needs.x and not ctx.use_merged)):
            dz = times_B(dy, lora_B, layout.parts, lora_A.shape[0], dtype)  # (N, ΣR)
        if needs.weight:
            dW, dA, dB = _joint_gradients(dy, x, weight, lora_A, lora_B, layout, needs)
        else:
            dA, dB = _factor_gradients(dy, dz, x, z, lora_A, lora_B, layout, needs, dtype)

        # x
        if needs.x and layout.stored is not None:
            dx = gradient_product(dy, weight, layout.stored, operands, layout.transposed)
        elif needs.x:
            w = merged(weight, lora_A, lora_B, layout.parts, layout.transposed) if ctx.use_merged else weight
            w = w.to(dtype)
            dx = dy @ (w.t() if layout.transposed else w)
        if dx is not None:
            if dz is not None and not ctx.use_merged:
                dx.addmm_(dz, lora_A.to(dtype))
            dx = dx.view(ctx.x_shape)

        # what trains in full
        db = dy.sum(0).to(ctx.bias_dtype) if needs.bias else None
        d_rest = [None] * len(operands) or _rest_gradients(dy, x, layout, needs, ctx.rest_dtypes)
        return dx, dW, db, dA, None, *dB, *d_rest


def _joint_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: list[Tensor], layout: Layout, needs: _Needs
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return dW, dA and dB while W trains: one full gradient dWₑ = dyᵀ x serves all three."""
    G = dy.t() @ x  # (O, D)
    dW = G.to(weight.dtype)
    dW = dW.t() if layout.transposed else dW
    dB: list[Tensor | None] = [None] * len(lora_B)
    if not needs.factors:
        return dW, None, dB
    G = G.to(lora_A.dtype)
    dA = torch.empty_like(lora_A)
    for i, (p, B) in enumerate(zip(layout.parts, lora_B, strict=True)):
        rows, ranks = G[p.start : p.start + p.rows], slice(p.a, p.a + p.rank)
        torch.mm(B.t(), rows, out=dA[ranks]).mul_(p.scale)  # dA = Bᵀ dWₑ
        dB[i] = (rows @ lora_A[ranks].t()).mul_(p.scale)  # dB = dWₑ Aᵀ
    return dW, dA if needs.lora_A else None, dB


def _factor_gradients(
    dy: Tensor, dz: Tensor | None, x: Tensor | None, z: Tensor | None, lora_A: Tensor, lora_B: list[Tensor], layout: Layout,
    needs: _Needs, dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Return dA and dB while W is frozen: dA = dzᵀ x, dB = dyᵀ z."""
    dA = None
    dB: list[Tensor | None] = [None] * len(lora_B)
    if needs.lora_A:
        assert x is not None and dz is not None  # kept for this
        dA = (x.t() @ dz).t().to(lora_A.dtype, memory_format=torch.contiguous_format)
    if any(needs.lora_B):
        if z is None:
            assert x is not None
            z = x @ lora_A.to(dtype).t()  # (N, ΣR)
        for i, (p, B) in enumerate(zip(layout.parts, lora_B, strict=True)):
            block = dy[:, p.start : p.start + p.rows].t() @ z[:, p.a : p.a + p.rank]
            dB[i] = block.to(B.dtype).mul_(p.scale)
    return dA, dB


def _rest_gradients(
    dy: Tensor, x: Tensor | None, layout: Layout, needs: _Needs, dtypes: list[torch.dtype]
) -> list[Tensor | None]:
    """Return the gradients of the rest blocks' weights, then of their biases."""
    found: list[Tensor | None] = []
    for span, need in zip(layout.rest, needs.rest_weight, strict=True):
        block = None
        if need:
            assert x is not None
            block = dy[:, span.start : span.start + span.rows].t() @ x
            block = (block.t() if layout.transposed else block).to(dtypes[len(found)])
        found.append(block)
    for span, need in zip(layout.rest, needs.rest_bias, strict=False):
        found.append(dy[:, span.start : span.start + span.rows].sum(0).to(dtypes[len(found)]) if need else None)
    return found


def wants_graph(dy: Tensor) -> bool:
    """Return whether a backward pass is itself recorded: by autograd (``create_graph=True``) or for a batch of gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.is_grad_enabled()
    return transforms_active() or is_legacy_batched(dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    """Return the gradients of ``_LoRALinear.backward``, by operations that can be differentiated and batched.

    ``narrow`` and not ``[:, a:b]``: the old kind of vmap (``is_grads_batched``) fails on a slice that covers everything.
    """
    weight, lora_A, x, z, *factors = ctx.saved_tensors
    (parts, rest, transposed, stored), dtype, needs = ctx.layout, ctx.dtype, _needs(ctx, ctx.layout)
    lora_B, operands = factors[: len(parts)], factors[len(parts) :]
    dy = dy.reshape(-1, dy.shape[-1])  # (N, O)
    if z is not None and needs.x and torch.is_grad_enabled():
        z = _end_here(z)
    dx = dW = dA = None
    if needs.x:
        W = weight.to(dtype) if stored is None else widened(weight, stored, operands[0] if operands else None, dtype)
        dx = dy @ (W.t() if transposed else W)
        for p, B in zip(parts, lora_B, strict=True):
            dz = dy.narrow(1, p.start, p.rows) @ B.to(dtype) * p.scale
            dx = dx + dz @ lora_A.narrow(0, p.a, p.rank).to(dtype)
        dx = dx.reshape(ctx.x_shape)
    G = None if x is None else dy.t() @ x.reshape(-1, x.shape[-1])  # (O, D)
    if needs.weight and G is not None:
        dW = (G.t() if transposed else G).to(weight.dtype)
    dB: list[Tensor | None] = [None] * len(parts)
    d_ranks = []
    for i, (p, B) in enumerate(zip(parts, lora_B, strict=True)):
        rows = None if G is None else G.narrow(0, p.start, p.rows).to(B.dtype)
        if needs.lora_A:
            d_ranks.append(B.t() @ rows * p.scale)
        if needs.lora_B[i]:
            A, thin = lora_A.narrow(0, p.a, p.rank).to(B.dtype), dy.narrow(1, p.start, p.rows)
            block = thin.t() @ z.narrow(1, p.a, p.rank) if rows is None else rows @ A.t()
            dB[i] = (block * p.scale).to(B.dtype)
    if needs.lora_A:
        dA = torch.cat(d_ranks).to(lora_A.dtype)
    db = dy.sum(0).to(ctx.bias_dtype) if needs.bias else None
    d_rest: list[Tensor | None] = []
    for span, need in zip(rest, needs.rest_weight, strict=True):
        block = G.narrow(0, span.start, span.rows) if need and G is not None else None
        d_rest.append(None if block is None else (block.t() if transposed else block).to(ctx.rest_dtypes[len(d_rest)]))
    for span, need in zip(rest, needs.rest_bias, strict=False):
        d_rest.append(dy.narrow(1, span.start, span.rows).sum(0).to(ctx.rest_dtypes[len(d_rest)]) if need else None)
    return dx, dW, db, dA, None, *dB, *d_rest, *[None] * len(operands)


def _end_here(z: Tensor) -> Tensor:
    """Return z = A x as a leaf: it was kept instead of x, so a second derivative through it cannot reach x."""

    def refuse(_: Tensor) -> None:
        raise RuntimeError("a second derivative through the gradient of lora_B needs x, which train_A=False does not keep")

    z = z.detach().requires_grad_()
    z.register_hook(refuse)
    return z


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


def times_B(dy: Tensor, lora_B: list[Tensor], parts: tuple[Part, ...], total: int, dtype: torch.dtype) -> Tensor:
    """Return dz = scale · dy B, (N, ΣR), the parts' columns next to each other."""
    if len(parts) == 1:
        return (dy[:, parts[0].start : parts[0].start + parts[0].rows] @ lora_B[0].to(dtype)).mul_(parts[0].scale)
    dz = dy.new_empty(dy.shape[0], total)
    for p, B in zip(parts, lora_B, strict=True):
        dz[:, p.a : p.a + p.rank] = (dy[:, p.start : p.start + p.rows] @ B.to(dtype)).mul_(p.scale)
    return dz
