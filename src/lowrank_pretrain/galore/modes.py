"""Compute directions that torch's fused Adam cannot: factored second moment, Nesterov's mixture, Muon's rule.

What is kept of the second moment has one of three forms: ``full`` (v, r×k), ``factored`` (r + k numbers), ``none`` (Muon). The
functions here take it as a list of tensors: [v], [row, col] or []. Shapes: R, m, N r×k; W d×k.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.galore.adam import bias_correction, read_first_moment, read_moments
from lowrank_pretrain.galore.factored import Total, alone, average_squares, nesterov, root, turn
from lowrank_pretrain.galore.orthogonal import like_adamw, orthogonalise

SECOND_MOMENTS = ("full", "factored")
RULES = ("adam", "muon")
PARTS = {"full": ("exp_avg_sq",), "factored": ("exp_avg_sq_row", "exp_avg_sq_col"), "none": ()}  # keys of the state


def second_form(group: Mapping[str, Any]) -> str:
    """Return the form of a projected group's second moment: ``full``, ``factored`` or ``none``.

    Example:
        >>> second_form({"rule": "muon", "second_moment": "full"})
        'none'
    """
    return "none" if group["rule"] == "muon" else group["second_moment"]


def read_kept(
    state: Mapping[str, Any], form: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return the first moment (r×k) and the stored form of the second; zeros before the first step."""
    if form == "full":
        m, v = read_moments(state, shape, dtype, device)
        return m, [v]
    parts = zip(PARTS[form], shape, strict=False)
    wide = at_least_32(dtype)  # r + k numbers cost nothing; bfloat16 would round a decay of .001 to none
    second = [state[key] if key in state else torch.zeros(size, dtype=wide, device=device) for key, size in parts]
    return read_first_moment(state, shape, dtype, device), second


def whole_second(m: Tensor, second: list[Tensor], total: Total = alone, columns: int = 0) -> Tensor:
    """Return v (r×k) from its stored form; zeros if nothing is stored."""
    if len(second) == 2:
        return root(second[0], second[1], total, columns).square()
    return second[0] if second else torch.zeros_like(m)


def mode_direction(
    low: Tensor,
    m: Tensor,
    second: list[Tensor],
    step: int,
    group: Mapping[str, Any],
    shape: tuple[int, int],
    skip: Tensor | None = None,
    total: Total = alone,
) -> Tensor:
    """Update the moments in place and return −N.

    Args:
        low: R.
        m: first moment.
        second: the stored form of the second moment.
        step: this step's number, from 1.
        group: its ``betas``, ``eps``, ``correct_bias``, ``nesterov``, ``rule`` and ``residual``.
        shape: (d, k) of the whole matrix.
        skip: device scalar, 1.0 where a gradient of this step is not finite: then moments stay and 0 is returned.
        total: sums over ranks, where R's columns are cut over them.
    """
    beta1, beta2 = group["betas"]
    rank, columns = low.shape[0], shape[1] if total is not alone else 0
    keep = None
    if skip is not None:
        keep = (1 - skip).to(low.dtype)
        low = torch.where(skip > 0, 0, low)
    # momentum, or one step ahead of it
    m.lerp_(low, 1 - beta1 if keep is None else (1 - beta1) * keep)
    u = nesterov(m, low, beta1) if group["nesterov"] else m
    if group["rule"] == "muon" and group["residual"] == "muon":
        n = u.clone() if u is m else u  # orthogonalised later, together with what is outside the subspace
    elif group["rule"] == "muon":
        wide = u.to(at_least_32(u.dtype))
        n = orthogonalise(wide, total=total).mul_(like_adamw(*shape, rank)).to(low.dtype)
    else:
        # the root of the second moment, whose ε is outside of its bias correction, as published
        if len(second) == 2:
            row, col = second
            average_squares(row, col, low, beta2, keep, total, columns)
            scale = root(row, col, total, columns)
        else:
            scale = _average_full(second[0], low, 1 - beta2 if keep is None else (1 - beta2) * keep).sqrt()
        n = (u / scale.add_(group["eps"])).to(low.dtype)
        n.mul_(bias_correction(step, group))
    return n.neg_() if keep is None else n.mul_(-keep)


def _average_full(v: Tensor, low: Tensor, weight: float | Tensor) -> Tensor:
    """Update v ← (1−weight) v + weight R² in place; return it, in float32 for half precision, where R² leaves the range."""
    wide = at_least_32(v.dtype)
    if v.dtype == wide:
        return v.lerp_(low.square(), weight)
    new = v.to(wide).lerp_(low.to(wide).square(), weight).clamp_max_(torch.finfo(v.dtype).max)
    v.copy_(new)
    return new


def turn_moments(m: Tensor, second: list[Tensor], c: Tensor, c_right: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Return first moment and the factored (or no) second one in the new basis; a one-sided column's part stays."""
    m = c @ m if c_right is None else c @ m @ c_right.t()
    if not second:
        return m, []
    row, col = second
    return m, [turn(row, c), col if c_right is None else turn(col, c_right)]
