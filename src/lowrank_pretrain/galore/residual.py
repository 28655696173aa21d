"""Add an update outside the subspace: Fira's scaled residual, or APOLLO's scaled gradient.

Both take a scale per column from Adam's direction N in the subspace, s_j = ‖N_j‖/‖R_j‖, and limit how fast the norm of this
addition may grow (Fira, arXiv 2410.01623, eq. 8; APOLLO, arXiv 2412.05270, section 4). Written from the papers' formulae.

Shapes: W d×k the weight with its projected side first, M d×k its gradient alike, P d×r, R r×k, N r×k, s k.
W ← W − ηα(P N + (M − P R)·diag(s)) = W − ηα P(N − R·diag(s)) − ηα M·diag(s): no d×k temporary.

A step that is masked on the device (``skip``) changes nothing: M and R are taken as zero there, and the residual's norm stays.

The limiter compares norms before Adam's bias correction c = √(1−β₂ᵗ)/(1−β₁ᵗ), as Fira's code does: corrected ones begin small,
and a residual that may grow by 1 % a step would be held back for hundreds of steps.
"""

from typing import Any

import torch
from torch import Tensor

GROWTH = 1.01  # γ: a step's residual may be at most this much longer than the last one's
_TINY = 1e-8


def fira(
    weight: Tensor, matrix: Tensor, p: Tensor, low: Tensor, minus_n: Tensor, eta: float, c: float, state: dict[str, Any],
    skip: Tensor | None = None,
) -> None:  # fmt: skip
    """Update the weight with the scaled residual, in place.

    Args:
        weight: W.
        matrix: M.
        p: P in W's dtype.
        low: R.
        minus_n: −N, overwritten.
        eta: ηα.
        c: bias correction that N contains.
        state: keeps ``residual_norm``, the last residual's norm (0 before the first).
        skip: device scalar, 1.0 where nothing may change; −N is 0 then.
    """
    matrix, low = _unless(skip, matrix), _unless(skip, low)
    scale = _columns(minus_n) / (_columns(low) + _TINY)
    outside = _outside(_columns(matrix).square(), _columns(low).square())
    scale = scale * _limit((scale.square() * outside).sum().sqrt() / c, state, skip)
    minus_n.addcmul_(low, scale)
    weight.addmm_(p, minus_n.to(weight.dtype), alpha=eta)
    _add_columns(weight, matrix, scale, eta)


def apollo(
    weight: Tensor, matrix: Tensor, low: Tensor, minus_n: Tensor, eta: float, c: float, state: dict[str, Any],
    skip: Tensor | None = None,
) -> None:  # fmt: skip
    """Update W ← W − ηα M·diag(s), in place; at rank 1 (APOLLO-Mini) one scale for the whole matrix."""
    matrix, low = _unless(skip, matrix), _unless(skip, low)
    if low.shape[0] == 1:
        ratio = torch.linalg.vector_norm(minus_n.float()) / (torch.linalg.vector_norm(low.float()) + _TINY)
        scale = ratio.expand(low.shape[1])
    else:
        scale = _columns(minus_n) / (_columns(low) + _TINY)
    scale = scale * _limit((scale * _columns(matrix)).square().sum().sqrt() / c, state, skip)
    _add_columns(weight, matrix, scale, eta)


def _add_columns(weight: Tensor, matrix: Tensor, scale: Tensor, eta: float) -> None:
    """Apply W ← W − η M·diag(s). A small gradient's s is larger than float16 can hold: there the product is in s's dtype."""
    if weight.dtype != torch.float16:
        scale = scale.to(weight.dtype)
    weight.addcmul_(matrix, scale, value=-eta)


def gaussian(d: int, rank: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return APOLLO's random projection d×r, entries N(0, 1/r); it is redrawn from its seed at each step, never stored."""
    p = torch.randn(d, rank, generator=generator, dtype=torch.float32, device=generator.device)
    return p.mul_(rank**-0.5).to(dtype)


def _outside(whole: Tensor, inside: Tensor) -> Tensor:
    """Return ‖(I−PPᵀ)M_j‖² of each column, using PᵀP = I; 0 where it may be only rounding.

    A gradient of rank r or less has no residual. Rounding taken for a residual would hold the next, real one back for
    hundreds of steps.
    """
    outside = whole - inside
    return torch.where(outside > 100 * torch.finfo(whole.dtype).eps * whole, outside, 0.0)


def _columns(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32 if x.dtype != torch.float64 else None)


def _unless(skip: Tensor | None, t: Tensor) -> Tensor:
    """Return t, or zeros where the step is skipped: NaN times a mask would still be NaN."""
    return t if skip is None else torch.where(skip > 0, torch.zeros((), dtype=t.dtype, device=t.device), t)


def _limit(norm: Tensor, state: dict[str, Any], skip: Tensor | None) -> Tensor:
    last = state.get("residual_norm")
    if last is None:
        last = torch.zeros_like(norm)
    # a residual that is exactly zero, or absent, tells nothing about the next one's size
    factor = torch.where(last > 0, 1 / ((norm / (last + _TINY)).clamp_min(GROWTH) / GROWTH), 1.0)
    state["residual_norm"] = norm * factor if skip is None else torch.where(skip > 0, last, norm * factor)
    return factor
