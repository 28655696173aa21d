"""Orthogonalise the momentum as Muon does, inside GaLore's subspace, by pure functions of tensors.

P O with O = (U Uᵀ)^(-1/2) U is the orthogonal factor of P U, because PᵀP = I: the iteration needs only the small matrix.

Shapes: U r×k the momentum in the basis, r ≤ k; d×k the whole matrix with its projected side first.
"""

import math

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import multiplies_bfloat16
from lowrank_pretrain.galore.factored import Total, alone
from lowrank_pretrain.galore.guard import has_values

QUINTIC = (3.4445, -4.7750, 2.0315)  # Muon's polynomial: singular values end between .7 and 1.2, after few steps
STEPS = 5
LIKE_ADAMW = 0.2  # root mean square of AdamW's updates (Liu et al., arXiv 2502.16982)


def orthogonalise(u: Tensor, steps: int = STEPS, total: Total = alone) -> Tensor:
    """Return Muon's Newton-Schulz iteration of U (r×k), computed in the r×r Gram matrix.

    X ← (αI + βA + γA²) X with A = XXᵀ multiplies X by polynomials in the first A alone. So these are multiplied up as Q (r×r,
    all commute), and X is touched twice for any number of steps: once for A and once for Q X. Where U is a piece of the
    columns, ``total`` sums over the ranks.
    """
    alpha, beta, gamma = QUINTIC
    x = _of_norm_one(u, total)
    gram = total(x @ x.mT)
    q: Tensor | None = None
    for _ in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=beta, alpha=gamma)
        polynomial.diagonal().add_(alpha)
        q = polynomial if q is None else polynomial @ q
        gram = polynomial @ gram @ polynomial
    return x if q is None else q @ x


def orthogonalise_whole(u: Tensor, steps: int = STEPS) -> Tensor:
    """Return Newton-Schulz of a whole matrix U (d×k), with products in bfloat16 as Muon's own; float64 stays exact.

    X, A and the polynomial are rounded to bfloat16 whether the device has instructions for it or not: so all agree.
    """
    alpha, beta, gamma = QUINTIC
    x = _of_norm_one(u if u.shape[0] <= u.shape[1] else u.mT)
    rounded = torch.float64 if x.dtype == torch.float64 else torch.bfloat16
    quick = rounded == torch.float64 or not has_values(x) or multiplies_bfloat16(x.device)
    x = x.to(rounded)
    for _ in range(steps):
        wide = x if quick else x.float()
        gram = (wide @ wide.mT).to(rounded).to(wide.dtype)
        polynomial = torch.addmm(gram, gram, gram, beta=beta, alpha=gamma).to(rounded).to(wide.dtype)
        x = torch.addmm(wide, polynomial, wide, beta=alpha).to(rounded)
    return x if u.shape[0] <= u.shape[1] else x.mT


def _of_norm_one(u: Tensor, total: Total = alone) -> Tensor:
    """Return U / ‖U‖, zeros for zeros; the norm in float64, since a small momentum's square would underflow."""
    if u.dtype == torch.float64:  # its own squares leave float64
        u = u / total(u.abs().sum()).clamp_min(torch.finfo(u.dtype).tiny)
    norm = total(torch.linalg.vector_norm(u, dtype=torch.float64).square()).sqrt()
    return u / norm.to(u.dtype).clamp_min(torch.finfo(u.dtype).tiny)


def like_adamw(d: int, k: int, rank: int) -> float:
    """Return the factor 0.2·√(dk/r) that gives P O (d×k, r singular values near 1) the size of AdamW's update.

    At full rank it is 0.2·√max(d, k), torch's ``match_rms_adamw``.
    """
    return LIKE_ADAMW * math.sqrt(d * k / rank)
