"""Compute a LoRA linear as one function: y = x Wₑᵀ + b with Wₑ = W + scale · B A (LoRA, arXiv 2106.09685, eq. 3).

N rows of x, D in, O out, R rank. A fused layer has row blocks (parts) p with ranks R_p, ΣR = sum of R_p.

Why not ``linear(x, W) + linear(linear(x, A), B)``: that costs six products as long as the batch (x Aᵀ, z Bᵀ, dy B, dz A,
dzᵀ x, dyᵀ z), all of them thin and bound by memory. Forming Wₑ costs one R-deep product of the size of W, small against a
batch of N ≫ R rows, and leaves four; while W trains too, dWₑ = dyᵀ x gives both factors' gradients without any
(dA = Bᵀ dWₑ, dB = dWₑ Aᵀ). With few rows, or weights stored in half precision (W + BA would round the small update away),
the two-step form is used: ``forms_merged_weight`` decides.

Kept for backward: x, or what it is made from (``lora.remake``); in the two-step form the R-wide z = x Aᵀ; and under autocast W
or Wₑ in its dtype, as the plain layer keeps its cast. Otherwise Wₑ is formed again. A cast lives from one forward to its
backward and no longer. Keeping it over steps would save a pass over W, and so would cost a way to notice every write into W:
none but a pass over W sees them all (``.data``, numpy and other processes move no version counter).

That function serves ordinary training. Whatever must look inside (tracers, exporters, functorch's transforms, forward-mode AD,
nested tensors) gets the same linear layer as plain operations on ``effective_weight``; second derivatives come from
``_gradients``, which are plain operations too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_pretrain.core.lightning_private import (
    forward_mode_active,
    is_legacy_batched,
    is_traced,
    transforms_active,
)
from lowrank_pretrain.lora.frozen import OPERANDS, Stored, gradient_product, product, widened
from lowrank_pretrain.lora.products import (
    Layout,
    Part,
    RestPart,
    add_low_rank,
    affine,
    forms_merged_weight,
    merged,
    own_memory,
    times_A,
    times_B,
)
from lowrank_pretrain.lora.remake import Recipe, Remaker, keep, kept

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


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
    remaker: Remaker | None = None,
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
        remaker: the layer's own: for backward, x is made again where that is possible. ``None``: x is kept.
        stored: what belongs to a ``weight`` that is stored in a cheaper type; it needs no gradient then.

    Returns:
        (..., O), in autocast's dtype under autocast.

    Example:
        >>> x, W, A, B = torch.ones(1, 2), torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [0.0]])
        >>> lora_linear(x, W, None, A, [B], (Part("W", 0, 2, 0, 1, 0.5),))  # 0.5 B A x = (1, 0)
        tensor([[2., 1.]])
    """
    if not is_ordinary(x):
        weight = weight if stored is None else widened(weight, stored.kind, stored.scale, stored.dtype)
        return affine(
            x,
            effective_weight(weight, lora_A, lora_B, parts, transposed, rest, rest_weight),
            effective_bias(bias, rest, rest_bias),
            transposed,
        )
    if stored is not None and not x.is_floating_point():
        raise TypeError(
            f"a layer with frozen_dtype={stored.kind} was given {x.dtype}, as by a cast to its weight's dtype: do without the "
            "cast, or use frozen_dtype=bfloat16"
        )
    layout = Layout(parts, rest, transposed, None if stored is None else stored.kind)
    operands = () if stored is None else stored.operands()
    recipe = None
    if remaker is not None and not torch.compiler.is_compiling():
        recipe = remaker.recipe(x, autocast_dtype(x), (weight, lora_A, *rest_weight))
    factors = (*lora_B, *rest_weight, *rest_bias, *operands)
    # autograd casts, not the function: what the function keeps for backward is then its input, which second derivatives need
    return _LoRALinear.apply(for_autocast(x), weight, bias, lora_A, layout, recipe, *factors)


def is_ordinary(x: Any) -> bool:
    """Return whether our own function may take ``x``: a plain tensor that only autograd's backward follows."""
    if torch.compiler.is_dynamo_compiling():
        return not is_exporting()
    return (
        (type(x) is Tensor or type(x) is torch.nn.Parameter)
        and not x.is_nested
        and not transforms_active()
        and not forward_mode_active()
        and not is_traced()
        and not is_exporting()
    )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast gives to products of x; without autocast, that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype


def for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast gives to products; without autocast, x itself."""
    return x.to(autocast_dtype(x))


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context without autocast, which costs nothing where there is none: small layers notice the Python in a step."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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
    x, weight, bias, lora_A, _, _, *factors = ctx.needs_input_grad
    p, r = len(layout.parts), len(layout.rest)
    factors = factors[: len(factors) - OPERANDS.get(layout.stored, 0)]
    return _Needs(x, weight, bias, lora_A, tuple(factors[:p]), tuple(factors[p : p + r]), tuple(factors[p + r :]))


class _LoRALinear(torch.autograd.Function):
    """Save the float32 Parameters themselves, and cast again in backward (see the module docstring)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, layout: Layout,
                recipe: Recipe | None, *factors: Tensor) -> Tensor:  # fmt: skip
        parts, transposed = layout.parts, layout.transposed
        lora_B, operands = list(factors[: len(parts)]), factors[len(factors) - OPERANDS.get(layout.stored, 0) :]
        device, dtype, cols = x.device.type, x.dtype, x.shape[-1]
        # in-place products after an autocast op fail ("BFloat16 and Float"), so all casts are made here and before
        with without_autocast(device):
            use_merged = layout.stored is None and forms_merged_weight(x.numel() // cols, weight)
            b = None if bias is None else bias.to(dtype)
            if layout.stored is None:
                w = _multiplied_weight(weight, lora_A, lora_B, layout, use_merged, dtype)
                y = own_memory(affine(x, w, b, transposed))
            else:  # W is a constant in a cheaper type: its product is made in that one, and is not kept
                w, y = None, product(x.reshape(-1, cols), weight, layout.stored, operands, b, transposed)
                y = own_memory(y.view(*x.shape[:-1], y.shape[-1]))
            z = None
            if parts and not use_merged:
                z = times_A(x.reshape(-1, cols), lora_A, dtype)
                add_low_rank(y.view(-1, y.shape[-1]), z, lora_B, parts, dtype)

        # x if something needs it; the R-wide z where it was made, and in place of x (LoRA-FA)
        needs = _needs(ctx, layout)
        needs_x = needs.weight or needs.lora_A or needs.rest
        if not needs_x and z is None and any(needs.lora_B):
            with without_autocast(device):
                z = times_A(x.reshape(-1, cols), lora_A, dtype)
        keeps_z = any(needs.lora_B) and not needs.weight
        w = w if needs.x and dtype != weight.dtype else None
        keep(ctx, x if needs_x else None, recipe, weight, lora_A, z if keeps_z else None, w, *lora_B, *operands)
        ctx.layout, ctx.use_merged, ctx.dtype, ctx.x_shape = layout, use_merged, dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.rest_dtypes = [f.dtype for f in factors[len(parts) : len(factors) - len(operands)]]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if wants_graph(dy):
            return _gradients(ctx, dy)
        x, (weight, lora_A, z, w, *factors) = kept(ctx)
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
        if needs.x:
            if layout.stored is not None:
                dx = gradient_product(dy, weight, layout.stored, operands, layout.transposed)
            else:
                w = _multiplied_weight(weight, lora_A, lora_B, layout, ctx.use_merged, dtype) if w is None else w
                dx = dy @ (w.t() if layout.transposed else w)
            if dz is not None and not ctx.use_merged:
                dx.addmm_(dz, lora_A.to(dtype))
            dx = dx.view(ctx.x_shape)

        # what trains in full
        db = dy.sum(0).to(ctx.bias_dtype) if needs.bias else None
        d_rest = _rest_gradients(dy, x, layout, needs, ctx.rest_dtypes)
        return dx, dW, db, dA, None, None, *dB, *d_rest, *[None] * len(operands)


def _multiplied_weight(
    weight: Tensor, lora_A: Tensor, lora_B: list[Tensor], layout: Layout, use_merged: bool, dtype: torch.dtype
) -> Tensor:
    """Return what x and dy are multiplied with, in the dtype of the products: Wₑ where it is formed, else W."""
    return (merged(weight, lora_A, lora_B, layout.parts, layout.transposed) if use_merged else weight).to(dtype)


def _joint_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: list[Tensor], layout: Layout, needs: _Needs
) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Return dW, dA and dB while W trains: one full gradient dWₑ = dyᵀ x serves all three."""
    G = x.t() @ dy if layout.transposed else dy.t() @ x  # dWₑ, in W's layout
    dW = G.to(weight.dtype)
    dB: list[Tensor | None] = [None] * len(lora_B)
    if not needs.factors:
        return dW, None, dB
    G = G.t() if layout.transposed else G  # (O, D)
    A, dA = lora_A.to(G.dtype), torch.empty_like(lora_A)
    for i, (p, B) in enumerate(zip(layout.parts, lora_B, strict=True)):
        rows, ranks = G[p.start : p.start + p.rows], slice(p.a, p.a + p.rank)
        dA[ranks] = (B.to(G.dtype).t() @ rows).mul_(p.scale)  # dA = Bᵀ dWₑ
        dB[i] = (rows @ A[ranks].t()).to(B.dtype).mul_(p.scale)  # dB = dWₑ Aᵀ
    return dW, dA if needs.lora_A else None, dB


def _factor_gradients(
    dy: Tensor, dz: Tensor | None, x: Tensor | None, z: Tensor | None, lora_A: Tensor, lora_B: list[Tensor], layout: Layout,
    needs: _Needs, dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """Return dA and dB while W is frozen: dA = dzᵀ x, dB = dyᵀ z.

    dB is made as (zᵀ dy)ᵀ. Measured on one thread of an AMX machine, 3152 rows, O 1152 in three parts, ΣR 32, ms:
    1.8 in float32 and 1.1 in bfloat16, where dyᵀ z takes 5.2 and 1.6.
    """
    dA = None
    dB: list[Tensor | None] = [None] * len(lora_B)
    if needs.lora_A:
        assert x is not None and dz is not None  # kept for this
        dA = (dz.t() @ x).to(lora_A.dtype)
    if any(needs.lora_B):
        if z is None:
            assert x is not None
            z = times_A(x, lora_A, dtype)
        zt = z.t()  # (ΣR, N)
        for i, (p, B) in enumerate(zip(layout.parts, lora_B, strict=True)):
            block = zt[p.a : p.a + p.rank] @ dy[:, p.start : p.start + p.rows]
            dB[i] = block.t().to(B.dtype, memory_format=torch.contiguous_format).mul_(p.scale)
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
    x, (weight, lora_A, z, _, *factors) = kept(ctx)  # not the kept cast: no derivative goes through it to W
    (parts, rest, transposed, stored), dtype, needs = ctx.layout, ctx.dtype, _needs(ctx, ctx.layout)
    lora_B, operands = factors[: len(parts)], factors[len(parts) :]
    dy = dy.reshape(-1, dy.shape[-1])  # (N, O)
    if x is None and z is not None and needs.x and torch.is_grad_enabled():
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
    return dx, dW, db, dA, None, None, *dB, *d_rest, *[None] * len(operands)


def _end_here(z: Tensor) -> Tensor:
    """Return z = A x as a leaf: it was kept instead of x, so a second derivative through it cannot reach x."""

    def refuse(_: Tensor) -> None:
        raise RuntimeError("a second derivative through the gradient of lora_B needs x, which train_A=False does not keep")

    z = z.detach().requires_grad_()
    z.register_hook(refuse)
    return z
