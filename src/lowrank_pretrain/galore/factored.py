"""Keep a second moment in r + k numbers instead of r×k: a row and a column of means, by pure functions of tensors.

Adafactor's rank-1 form (Shazeer & Stern, arXiv 1804.04235) in a basis that moves. A new basis turns the row's part by C∘C, as
it turns the full second moment; the column's part is a mean over the subspace and stays.

Shapes: R r×k the projected gradient; a r, b k the decaying means of R² over columns and over rows; C = P_newᵀ P_old r×r.
Two-sided: k = r, and the column's part is turned by the other side's C.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # a sum over the ranks that R's columns are cut over


def alone(part: Tensor) -> Tensor:
    """Return a sum unchanged: all columns are on this rank."""
    return part


def average_squares(
    row: Tensor, col: Tensor, low: Tensor, beta2: float, keep: Tensor | None = None, total: Total = alone, columns: int = 0
) -> None:
    """Update a ← β₂ a + (1−β₂) mean_k R² and b ← β₂ b + (1−β₂) mean_r R², in place.

    Args:
        row: a, at least float32.
        col: b, in the same dtype.
        low: R, finite.
        beta2: β₂.
        keep: device scalar, 1.0 where the step counts and 0.0 where both must stay as they are.
        total: sums over ranks, where R and b are pieces.
        columns: k, where R is a piece.
    """
    squares = low.to(row.dtype).square()
    weight = 1 - beta2 if keep is None else (1 - beta2) * keep
    row.lerp_(total(squares.sum(1)) / (columns or squares.shape[1]), weight)
    col.lerp_(squares.mean(0), weight)


def root(row: Tensor, col: Tensor, total: Total = alone, columns: int = 0) -> Tensor:
    """Return √v (r×k) with v = a bᵀ / mean(b), the rank-1 matrix that has these means."""
    tiny = torch.finfo(col.dtype).tiny
    mean = total(col.sum()) / (columns or col.shape[0])
    return torch.outer(row.sqrt(), (col / mean.clamp_min(tiny)).sqrt())


def turn(part: Tensor, c: Tensor) -> Tensor:
    """Return a row's (or two-sided, a column's) part in the new basis, (C∘C) a."""
    return (c * c) @ part


def factor(v: Tensor, total: Total = alone, columns: int = 0) -> tuple[Tensor, Tensor]:
    """Return row and column of a full second moment (r×k), for a parameter that switches to the factored form."""
    return total(v.sum(1)) / (columns or v.shape[1]), v.mean(0)


def nesterov(m: Tensor, low: Tensor, beta1: float) -> Tensor:
    """Return U = β₁ m + (1−β₁) R, one step ahead of the momentum m, which already contains R."""
    return torch.lerp(low, m, beta1)
