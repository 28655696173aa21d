"""Measure what LTE's authors observed: effective rank of a matrix, and how far heads point in the same direction.

O out, D in, R rank, N heads; an update is s · B A with A (R, D) and B (O, R). Nothing here forms the O x D product of factors:
⟨B₁A₁, B₂A₂⟩ = tr((B₁ᵀB₂)(A₁A₂ᵀ)ᵀ), two products of R x R each.
"""

import torch
from torch import Tensor

_NO_FLOAT64 = ("mps",)


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of an (O, D) matrix, descending, in float64; NaN if an entry is not finite.

    From the eigenvalues of the smaller Gram matrix: many times faster than an SVD, and exact to 1e-8 of the largest.
    """
    if matrix.device.type in _NO_FLOAT64:
        matrix = matrix.cpu()
    M = matrix.detach().double()
    gram = M.t() @ M if M.shape[0] >= M.shape[1] else M @ M.t()
    if not torch.isfinite(gram).all():
        return torch.full_like(gram[0], torch.nan)
    return torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().flip(0)


def entropy_rank(values: Tensor) -> Tensor:
    """Return exp(−Σ p log p) of p = σ / Σσ (Roy & Vetterli 2007), from 1 to the number of values; 0 for all zeros."""
    total = values.sum()
    if total == 0:
        return total
    return torch.special.entr(values / total).sum().exp()


def tolerance_rank(values: Tensor, tol: float) -> Tensor:
    """Return how many singular values exceed `tol` times the largest, as a float scalar; NaN for NaN."""
    largest = values.max()
    return torch.where(largest.isnan(), largest, (values > tol * largest).sum().to(values.dtype))


def effective_rank(matrix: Tensor) -> Tensor:
    """Return the effective rank of an (O, D) matrix, a float64 scalar: `entropy_rank` of its singular values."""
    return entropy_rank(singular_values(matrix))


@torch.no_grad()
def update_inner(A: Tensor, B: Tensor) -> Tensor:
    """Return ⟨BᵢAᵢ, BⱼAⱼ⟩ for all pairs of heads, (N, N), of A (N, R, D) and B (N, O, R)."""
    N, R, _ = A.shape
    a, b = _precise(A).flatten(0, 1), _precise(B).transpose(1, 2).flatten(0, 1)  # (NR, D), (NR, O)
    AA, BB = (a @ a.t()).view(N, R, N, R), (b @ b.t()).view(N, R, N, R)
    return (AA * BB).sum((1, 3))


def update_cosines(A: Tensor, B: Tensor) -> Tensor:
    """Return the cosines between the heads' updates as vectors, (N, N); NaN for a head whose update is zero."""
    inner = update_inner(A, B)
    norms = inner.diagonal().clamp_min(0.0).sqrt()
    norms = torch.where(norms > 0, norms, torch.nan)
    return inner / norms.outer(norms)


@torch.no_grad()
def row_bases(A: Tensor) -> Tensor:
    """Return orthonormal bases of the row spaces of A (N, R, D) or (R, D), as columns: (N, D, R) or (D, R)."""
    return torch.linalg.qr(_precise(A).mT)[0]


def principal_cosines(A1: Tensor, A2: Tensor) -> Tensor:
    """Return cosines of principal angles between row spaces of A₁ (R₁, D) and A₂ (R₂, D), descending, (min(R₁, R₂),)."""
    return torch.linalg.svdvals(row_bases(A1).mT @ row_bases(A2)).clamp_max(1.0)


@torch.no_grad()
def row_space_overlaps(A: Tensor) -> Tensor:
    """Return the mean cos² of the principal angles between all pairs of row spaces, (N, N), of A (N, R, D).

    From 0 (orthogonal) to 1 (the same space); two random ones have R/D.
    """
    N, R, D = A.shape
    q = row_bases(A).permute(1, 0, 2).reshape(D, N * R)
    return (q.t() @ q).view(N, R, N, R).square().sum((1, 3)) / R  # ‖QᵢᵀQⱼ‖² is the sum of the cosines squared


def mean_of_pairs(matrix: Tensor) -> Tensor:
    """Return the mean of |entries| above the diagonal of (N, N), ignoring NaN; NaN if there are none."""
    rows, columns = matrix.shape
    i, j = torch.triu_indices(rows, columns, offset=1, device=matrix.device)
    return matrix[i, j].abs().nanmean()


def _precise(t: Tensor) -> Tensor:
    return t.detach().to(torch.promote_types(t.dtype, torch.float32))
