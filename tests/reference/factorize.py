"""Factoring as the literature writes it: the truncated SVD of W C^½, mapped back by C^-½, in float64.

W (O, D), C (D, D) the second moment of the inputs. Whitening by inputs: Chen et al., "DRONE", NeurIPS 2021.
"""

import torch
from torch import Tensor


def second_moment(x: Tensor) -> Tensor:
    """E[x xᵀ] of the rows of x (N, D)."""
    return sum(torch.outer(row, row) for row in x.double()) / len(x)


def weighted_svd(W: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best matrix of this rank for inputs with second moment C, and all singular values of W C^½.

    Returns:
        W_k (O, D), the singular values, and E‖W x − W_k x‖².
    """
    W, C = W.double(), C.double()
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    back = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    P, s, Qt = torch.linalg.svd(W @ root, full_matrices=False)
    W_k = P[:, :rank] @ torch.diag(s[:rank]) @ Qt[:rank] @ back
    off = W - W_k
    return W_k, s, torch.trace(off @ C @ off.T)


def forward(x: Tensor, U: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
    """The layer with the product for its weight."""
    y = x @ (U @ V).T
    return y if bias is None else y + bias


def ranks_of_parts(W: Tensor, C: Tensor, parts: list[tuple[int, int]], error: float) -> list[int]:
    """The fewest columns for row blocks (first row, rows) to reach an error: one after the other, where it helps most."""
    spectra = [weighted_svd(W[at : at + rows], C, 1)[1].square() for at, rows in parts]
    ranks = [0] * len(parts)
    left = sum(float(s.sum()) for s in spectra)
    while left > error * (1 + 1e-9):
        best = max(range(len(parts)), key=lambda i: float(spectra[i][ranks[i]]) if ranks[i] < len(spectra[i]) else -1.0)
        left -= float(spectra[best][ranks[best]])
        ranks[best] += 1
    return [max(1, rank) for rank in ranks]
