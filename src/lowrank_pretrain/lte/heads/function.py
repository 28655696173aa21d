"""Compute a linear layer with H heads, each on its own rows of the batch, as one differentiable function (arXiv 2402.16828).

    y_k = W x_k + b + scale · (B_k A_k − B'_k A'_k) x_k        k = 1 … H, x_k the k-th chunk of the rows

W holds every worker's heads as of the last merge, B' A' is what this head had put into it then: without that term its own
update would count twice. W is frozen here; x is what backward keeps.

n rows of x in all, n_k of head k, D in, O out, R rank per part, ΣR the parts' ranks added up, H heads.
"""

from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.lora.frozen import OPERANDS, Stored, gradient_product, product, widened
from lowrank_pretrain.lora.function import autocast_dtype, effective_weight, for_autocast, is_ordinary, wants_graph
from lowrank_pretrain.lora.products import (
    Layout,
    Part,
    add_low_rank,
    affine,
    forms_merged_weight,
    merged,
    own_memory,
    times_B,
)
from lowrank_pretrain.lora.remake import Recipe, Remaker, keep, kept


def heads_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: list[Tensor],
    prev_A: Tensor | None,
    prev_B: list[Tensor],
    spans: tuple[tuple[int, int], ...],
    layout: Layout,
    rest_weight: tuple[Tensor, ...] = (),
    remaker: Remaker | None = None,
    stored: Stored | None = None,
) -> Tensor:
    """Apply a linear layer whose batch is shared out among H heads.

    Args:
        x: (B, …, D).
        weight: (O, D), or (D, O) if transposed; must not need a gradient.
        bias: (O,) or None.
        lora_A: (H, ΣR, D).
        lora_B: per part (H, O_p, R_p).
        prev_A: like ``lora_A``, as of the last merge; ``None`` if nothing of these heads is in W.
        prev_B: like ``lora_B``; empty if ``prev_A`` is ``None``.
        spans: per head its first row and the one after its last, among x's n rows.
        layout: the parts, and how W lies.
        rest_weight: see ``lora.function.lora_linear``.
        remaker: likewise.
        stored: likewise.

    Returns:
        (B, …, O). Each head's gradient is that of the mean over its own samples: it is multiplied by n / n_k, as
        if it were alone on a worker with them.
    """
    if not is_ordinary(x):
        weight = weight if stored is None else widened(weight, stored.kind, stored.scale, stored.dtype)
        return _by_autograd(x, weight, bias, lora_A, lora_B, prev_A, prev_B, spans, layout, rest_weight)
    recipe = None
    if remaker is not None and not torch.compiler.is_compiling():
        recipe = remaker.recipe(x, autocast_dtype(x), (lora_A, *lora_B, *rest_weight))
    others = (*lora_B, *prev_B, *rest_weight)
    # autograd casts, not the function: what the function keeps for backward is then its input, which second derivatives need
    operands = () if stored is None else stored.operands()
    layout = layout if stored is None else layout._replace(stored=stored.kind)
    return _HeadsLinear.apply(for_autocast(x), weight, bias, lora_A, prev_A, spans, layout, recipe, *others, *operands)


def _by_autograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: list[Tensor], prev_A: Tensor | None,
    prev_B: list[Tensor], spans: tuple[tuple[int, int], ...], layout: Layout, rest_weight: tuple[Tensor, ...],
) -> Tensor:  # fmt: skip
    """Return the same by operations that torch.func, forward-mode derivatives and tracers can follow."""
    parts, rest, transposed, _ = layout

    def of_head(k: int, share: float) -> Tensor:
        """Return Wₑ of head k, whose factors' gradients are multiplied by ``share``."""
        A, B = lora_A[k : k + 1], [f[k : k + 1] for f in lora_B]
        if share != 1:
            A, *B = (f.detach() + (f - f.detach()) * share for f in (A, *B))
        old_A, old_B = (None, []) if prev_A is None else (prev_A[k : k + 1], [f[k : k + 1] for f in prev_B])
        A, B, wide = _with_prev(A, B, old_A, old_B, parts)
        return effective_weight(weight, A[0], [f[0] for f in B], wide, transposed, rest, rest_weight)

    if len(spans) == 1 or not x.numel():
        return affine(x, of_head(0, 1), bias, transposed)
    flat = x.reshape(-1, x.shape[-1])  # (n, D)
    shares = [(k, i, j) for k, (i, j) in enumerate(spans) if j > i]
    y = torch.cat([affine(flat[i:j], of_head(k, len(flat) / (j - i)), bias, transposed) for k, i, j in shares])
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _with_prev(
    lora_A: Tensor, lora_B: list[Tensor], prev_A: Tensor | None, prev_B: list[Tensor], parts: tuple[Part, ...]
) -> tuple[Tensor, list[Tensor], tuple[Part, ...]]:
    """Fold the subtracted factors in as further ranks: B A − B' A' = [B, −B'] [A; A'], part by part."""
    if prev_A is None:
        return lora_A, lora_B, parts
    rows = [x[:, p.a : p.a + p.rank] for p in parts for x in (lora_A, prev_A)]
    wide = tuple(p._replace(a=2 * p.a, rank=2 * p.rank) for p in parts)
    return torch.cat(rows, 1), [torch.cat([b, -old], 2) for b, old in zip(lora_B, prev_B, strict=True)], wide


def _forms(rows: int, weight: Tensor) -> bool:
    """Return whether to form each head's Wₑ for its rows.

    Measured on CPUs with 4 heads: break-even at 1 to 2 DO/(D+O), half of a single adapter's, because prev doubles the ranks.
    """
    return forms_merged_weight(2 * rows if weight.device.type == "cpu" else rows, weight)


class _HeadsLinear(torch.autograd.Function):
    """Form the products of ``lora.function`` for each head, on its own rows; the formula is at the top of this file."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, prev_A: Tensor | None,
        spans: tuple[tuple[int, int], ...], layout: Layout, recipe: Recipe | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        parts, p = layout.parts, len(layout.parts)
        lora_B, prev_B = list(factors[:p]), list(factors[p : 2 * p]) if prev_A is not None else []
        dtype = x.dtype
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1])  # (n, D)
            operands = factors[len(factors) - OPERANDS.get(layout.stored, 0) :]
            forms = layout.stored is None and _forms(flat.shape[0] // len(spans), weight)
            A, B, wide = _with_prev(lora_A, lora_B, prev_A, prev_B, parts)
            b = None if bias is None else bias.to(dtype)
            if forms:
                out = weight.shape[1 if layout.transposed else 0]
                y = x.new_empty(*x.shape[:-1], out)
                for k, (i, j) in enumerate(spans):
                    w = merged(weight, A[k], [f[k] for f in B], wide, layout.transposed).to(dtype)
                    y.view(-1, out)[i:j] = affine(flat[i:j], w, b, layout.transposed)
            else:
                if layout.stored is None:
                    y = own_memory(affine(x, weight.to(dtype), b, layout.transposed))
                else:
                    y = product(flat, weight, layout.stored, operands, b, layout.transposed)
                    y = own_memory(y.view(*x.shape[:-1], y.shape[-1]))
                for k, (i, j) in enumerate(spans):
                    add_low_rank(y.view(-1, y.shape[-1])[i:j], flat[i:j] @ A[k].to(dtype).t(), [f[k] for f in B], wide, dtype)
        keep(ctx, x, recipe, weight, lora_A, prev_A, *factors)
        ctx.layout, ctx.spans, ctx.forms, ctx.dtype, ctx.x_shape = layout, spans, forms, dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.rest_dtypes = [f.dtype for f in factors[p + len(prev_B) : len(factors) - len(operands)]]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        if wants_graph(dy):
            return _gradients(ctx, dy)
        x, (weight, lora_A, prev_A, *factors) = kept(ctx)
        (parts, rest, transposed, stored), dtype, needs = ctx.layout, ctx.dtype, ctx.needs_input_grad
        p = len(parts)
        lora_B, prev_B = factors[:p], factors[p : 2 * p] if prev_A is not None else []
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # (n, O), (n, D)
        n, total = dy.shape[0], lora_A.shape[1]
        A, B, wide = _with_prev(lora_A, lora_B, prev_A, prev_B, parts)
        dA = torch.zeros_like(lora_A) if needs[3] else None
        dB = [torch.zeros_like(f) for f in lora_B] if any(needs[8 : 8 + p]) else []
        dx = None
        operands = tuple(factors[len(factors) - OPERANDS.get(stored, 0) :])
        if needs[0] and stored is not None:
            dx = gradient_product(dy, weight, stored, operands, transposed)
        elif needs[0]:
            dx = torch.empty_like(x) if ctx.forms else dy @ _as_rows(weight.to(dtype), transposed)
        for k, (i, j) in enumerate(ctx.spans):
            if i == j:
                continue
            dy_k, x_k, share = dy[i:j], x[i:j], n / (j - i)
            B_k = [f[k] for f in lora_B]
            if dx is not None and ctx.forms:
                w = merged(weight, A[k], [f[k] for f in B], wide, transposed).to(dtype)
                torch.mm(dy_k, _as_rows(w, transposed), out=dx[i:j])
            dz = None
            if dx is not None and not ctx.forms:
                dz = times_B(dy_k, [f[k] for f in B], wide, A.shape[1], dtype)
                dx[i:j].addmm_(dz, A[k].to(dtype))
                dz = _live(dz, parts) if prev_A is not None else dz
            if dA is not None:
                dz = times_B(dy_k, B_k, parts, total, dtype) if dz is None else dz  # (n_k, ΣR), only what trains
                dA[k] = (x_k.t() @ dz).t().to(lora_A.dtype).mul_(share)
            if dB:
                z = x_k @ lora_A[k].to(dtype).t()  # (n_k, ΣR)
                for part, d in zip(parts, dB, strict=True):
                    block = dy_k[:, part.start : part.start + part.rows].t() @ z[:, part.a : part.a + part.rank]
                    d[k] = block.to(d.dtype).mul_(part.scale * share)
        db = dy.sum(0).to(ctx.bias_dtype) if needs[2] else None
        d_rest: list[Tensor | None] = [None] * len(ctx.rest_dtypes)
        first = len(needs) - len(operands) - len(d_rest)
        for index, span in enumerate(rest):
            if needs[first + index]:
                d = dy[:, span.start : span.start + span.rows].t() @ x
                d_rest[index] = (d.t() if transposed else d).to(ctx.rest_dtypes[index])
        dx = None if dx is None else dx.view(ctx.x_shape)
        d_lora_B: list[Any] = [*dB] or [None] * p
        grads = (*d_lora_B, *[None] * len(prev_B), *d_rest, *[None] * len(operands))
        return dx, None, db, dA, None, None, None, None, *grads


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    """Return the gradients of ``_HeadsLinear.backward``, by operations that can be differentiated and batched."""
    x, (weight, lora_A, prev_A, *factors) = kept(ctx)
    p, needs, graph = len(ctx.layout.parts), ctx.needs_input_grad, torch.is_grad_enabled()
    x = x if x.requires_grad or not needs[0] else x.requires_grad_()  # made again without a graph
    lora_B, prev_B = factors[:p], factors[p : 2 * p] if prev_A is not None else []
    last, stored = len(factors) - OPERANDS.get(ctx.layout.stored, 0), ctx.layout.stored
    rest_weight, operands = tuple(factors[p + len(prev_B) : last]), factors[last:]
    W = weight.to(ctx.dtype) if stored is None else widened(weight, stored, operands[0] if operands else None, ctx.dtype)
    wanted = [x, lora_A, *lora_B, *rest_weight]
    needed = [needs[0], needs[3], *needs[8 : 8 + p], *needs[8 + p + len(prev_B) : 8 + last]]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        y = _by_autograd(
            x, W, None, lora_A.to(ctx.dtype), [f.to(ctx.dtype) for f in lora_B],
            None if prev_A is None else prev_A.to(ctx.dtype), [f.to(ctx.dtype) for f in prev_B], ctx.spans, ctx.layout,
            tuple(f.to(ctx.dtype) for f in rest_weight),
        )  # fmt: skip
        chosen = [t for t, need in zip(wanted, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, chosen, dy, create_graph=graph, allow_unused=True) if chosen else ())
    dx, dA, *others = (next(found) if need else None for need in needed)
    db = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if needs[2] else None
    grads = (*others[:p], *[None] * len(prev_B), *others[p:], *[None] * len(operands))
    return dx, None, db, dA, None, None, None, None, *grads


def _live(dz: Tensor, parts: tuple[Part, ...]) -> Tensor:
    """Return the columns that train, out of those that ``_with_prev`` concatenated."""
    columns = [dz[:, 2 * p.a : 2 * p.a + p.rank] for p in parts]
    return columns[0] if len(columns) == 1 else torch.cat(columns, 1)


def _as_rows(weight: Tensor, transposed: bool) -> Tensor:
    """Return W as (O, D)."""
    return weight.t() if transposed else weight
