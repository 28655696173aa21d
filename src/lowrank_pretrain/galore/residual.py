"""Add an update outside the subspace: Fira's scaled residual, the same orthogonalised, or APOLLO's scaled gradient.

Fira and APOLLO take a scale per column from Adam's direction N in the subspace, s_j = ‖N_j‖/‖R_j‖, and limit how fast the norm
of this addition may grow (Fira, arXiv 2410.01623, eq. 8; APOLLO, arXiv 2412.05270, section 4). Written from the papers'
formulae. Orthogonalised, the addition needs no limit: Newton-Schulz brings all directions to one size.

Shapes: W d×k the weight with its projected side first, M d×k its gradient alike, P d×r, R r×k, N r×k, s k.
W ← W − ηα(P N + (M − P R)·diag(s)) = W − ηα P(N − R·diag(s)) − ηα M·diag(s): no d×k temporary.

A step that is masked on the device (``skip``) changes nothing: M and R are taken as zero there, and the residual's norm stays.

The limiter compares norms before Adam's bias correction c = √(1−β₂ᵗ)/(1−β₁ᵗ), as Fira's code does: corrected ones begin small,
and a residual that may grow by 1 % a step would be held back for hundreds of steps.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.galore.orthogonal import like_adamw, orthogonalise_whole
from lowrank_pretrain.galore.subspace import product32

GROWTH = 1.01  # γ: a step's residual may be at most this much longer than the last one's
_TINY = 1e-8
LEAST = 0.1  # ‖R_j‖ over √(r/d)·‖M_j‖, a random subspace's, at least


def add_update(
    weight: Tensor, matrix: Tensor, p: Tensor, low: Tensor, minus_n: Tensor, eta: float, c: float, group: Mapping[str, Any],
    state: dict[str, Any], skip: Tensor | None,
) -> None:  # fmt: skip
    """Update the weight by the direction and the residual that the group asks for; arguments as in ``fira`` and ``muon``."""
    if group["residual"] == "fira":
        fira(weight, matrix, p, low, minus_n, eta, c, state, skip)
    else:
        muon(weight, matrix, p, low, minus_n, eta, 1 - group["betas"][0] if group["rule"] == "muon" else None, skip)


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


def muon(
    weight: Tensor, matrix: Tensor, p: Tensor, low: Tensor, minus_n: Tensor, eta: float, scale: float | None,
    skip: Tensor | None = None,
) -> None:  # fmt: skip
    """Update the weight by the orthogonal factor of direction and residual together, in place: W ← W − ηα·0.2·√max(d,k)·O.

    O = (U Uᵀ)^(-1/2) U with U = P N + (M − P R)·diag(s) = P(N − R·diag(s)) + M·diag(s), one d×k temporary. Memory of the past
    is in the subspace alone; what is outside comes from this step's gradient.

    Args:
        weight: W.
        matrix: M.
        p: P in W's dtype.
        low: R.
        minus_n: −N, overwritten; with Muon's rule the momentum itself, negative.
        eta: ηα.
        scale: s of every column, 1−β₁ with Muon's rule: then U is the momentum with the whole gradient as its newest term.
            None: Fira's, ‖N_j‖/‖R_j‖, where ‖R_j‖ counts as at least a tenth of what a random subspace would hold.
        skip: device scalar, 1.0 where nothing may change; −N is 0 then.
    """
    matrix, low = _unless(skip, matrix), _unless(skip, low)
    d, k = weight.shape
    if scale is not None:
        s = minus_n.new_full((1,), scale, dtype=at_least_32(minus_n.dtype))
    else:  # a column that is nearly outside of the subspace must not outweigh all others
        inside = torch.maximum(_columns(low), LEAST * (low.shape[0] / d) ** 0.5 * _columns(matrix))
        s = _columns(minus_n) / (inside + _TINY)
    whole = matrix * s  # at least float32
    whole -= product32(p, minus_n.addcmul_(low, s).to(p.dtype))
    update = orthogonalise_whole(whole).to(whole.dtype)  # at least float32: the weight is rounded once
    weight.sub_(update.mul_(eta * like_adamw(d, k, min(d, k))))


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
