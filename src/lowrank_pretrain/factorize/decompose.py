r"""Compute a weighted truncated SVD: the rank-k matrix that changes a layer's outputs least on its actual inputs.

W is O x D, C = E[x xᵀ] is D x D, the second moment of its inputs. Among all matrices of rank k,

    W_k = P Pᵀ W   minimises   E‖W x − W_k x‖²,      P (O x k): leading eigenvectors of the outputs' second moment G = W C Wᵀ,

which is the truncated SVD of W C^½ mapped back by C^-½ (``tests/reference/factorize.py`` writes it so), without C^-½. The i-th
eigenvalue of G is what its direction adds to E‖W x‖², its *energy*. W's own spectrum is the wrong measure: in the middle of
training it is mostly the noise of the initialisation, which no input excites.

C is damped by a share of its mean diagonal, so that directions without input in the window are not lost needlessly.
O out, D in, k rank, l the columns of a sketch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1e-3  # of C's mean diagonal, added to its diagonal
_OVERSAMPLING = 16  # columns of the sketch beyond those asked for
_ITERATIONS = 4  # of the subspace iteration; each is two power iterations on W C^½
_EXACT_FROM = 0.6  # of min(D, O): with more columns the exact decomposition is as cheap
_LEAST = 1e-3  # of the largest scale: the least scale of a column of U, so that no pair of columns is zero and gets no gradient


class Spectrum(NamedTuple):
    """Hold the leading directions of a layer's outputs.

    Attributes:
        basis: P (O, l), orthonormal columns by falling energy.
        energies: (l,) what each column adds to E‖W x‖², float64.
        total: E‖W x‖².
    """

    basis: Tensor
    energies: Tensor
    total: float

    def kept(self, rank: int) -> float:
        """Return the share of E‖W x‖² that rank k keeps."""
        return min(1.0, float(self.energies[:rank].sum()) / self.total) if self.total > 0 else 1.0

    def rank_for(self, energy: float) -> int:
        """Return the smallest rank that keeps this share, or one more than the number of known directions."""
        if self.total <= 0:
            return 1
        share = self.energies.cumsum(0) / self.total
        return int((share < energy).sum()) + 1


def damped(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Return C + ``damping`` · mean(diag C) · I; a zero moment becomes the identity.

    Args:
        moment: (D, D), E[x xᵀ].
        damping: the share of the mean diagonal.
    """
    mean = moment.diagonal().mean()
    C = moment.clone()
    C.diagonal().add_(damping * mean if mean > 0 else 1.0)
    return C


def spectrum(W: Tensor, C: Tensor, most: int, generator: torch.Generator) -> Spectrum:
    """Find the leading output directions of W under inputs with second moment C.

    A randomised range finder (Halko, Martinsson and Tropp, 2011, algorithm 4.4) where few directions are asked for: W C Wᵀ is
    applied, never formed. Else the exact decomposition in float64.

    Args:
        W: (O, D), float32 or float64.
        C: (D, D), as ``damped`` returns it, in W's dtype.
        most: how many directions are wanted; at most min(D, O) are returned.
        generator: a private one, on the CPU.
    """
    small = min(W.shape)
    most = min(most, small)
    total = float(((W @ C).double() * W.double()).sum())
    if most + _OVERSAMPLING >= _EXACT_FROM * small:
        factor = torch.linalg.cholesky(C.double())  # any square root of C will do: G = (W L)(W L)ᵀ
        P, s, _ = torch.linalg.svd(W.double() @ factor, full_matrices=False)
        return Spectrum(P[:, :most].to(W.dtype), s[:most].square(), total)
    Q = torch.randn(W.shape[0], most + _OVERSAMPLING, generator=generator, dtype=torch.float32, device="cpu").to(W)
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(W @ (C @ (W.t() @ Q)))[0]  # (O, l)
    A = W.t() @ Q  # (D, l)
    inside = (A.t() @ (C @ A)).double()  # (l, l): G seen from inside the range of Q
    energies, rotation = torch.linalg.eigh((inside + inside.t()) / 2)
    order = energies.flip(0)[:most].clamp_min(0.0)
    return Spectrum(Q @ rotation.flip(1)[:, :most].to(W.dtype), order, total)


def factors(W: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (O, k) and V (k, D) with U V = P Pᵀ W, with its singular values split evenly between them.

    Args:
        W: (O, D).
        basis: P (O, k), orthonormal columns.
    """
    B = basis.t() @ W  # (k, D) = R diag(s) Vt; R and s from the k x k of B Bᵀ: B's own SVD takes longer
    squares, R64 = torch.linalg.eigh(B.double() @ B.double().t())
    R, half = R64.flip(1).to(W.dtype), squares.flip(0).clamp_min(0.0).sqrt().sqrt().to(W.dtype)
    of_U = torch.maximum(half, _LEAST * half[:1]).clamp_min(torch.finfo(W.dtype).tiny)
    return (basis @ R) * of_U, (R.t() @ B) / of_U[:, None]
