"""Compute GaLore's subspaces, by pure functions of tensors: find a basis, follow it, carry Adam's moments to the next one.

Shapes: G m×n a gradient; M d×k the same gradient with its projected side first (M = G, or its transpose); P d×r a basis,
PᵀP = I; R = PᵀM r×k the projected gradient; m, v r×k Adam's moments of R; C = P_newᵀ P_old r×r. Two-sided: Q n×r is the
basis of the other side and R = PᵀGQ is r×r.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32, multiplies_bfloat16
from lowrank_pretrain.galore.guard import has_values

PROJ_TYPES = ("std", "reverse_std", "right", "left", "full")
REFRESHES = ("svd", "subspace", "track")
OVERSAMPLE = 8  # extra columns of the cold start
COLD_ITERATIONS = 2  # power iterations of the cold start: with 8 extra columns .999 of a full SVD's energy
# Relative weight of the old basis in the new one: below every direction that carries signal, above float32's rounding. It
# is the shift of (MMᵀ + δI)P: same eigenvectors, but full column rank for any gradient (256 tokens have a
# gradient of rank 256), and in directions without a gradient the basis stays as it was.
RIDGE = 1e-6


def project_left(rows: int, cols: int, proj_type: str) -> bool:
    """Return whether an m×n matrix is projected from the left (P is m×r); a square one is tall, as in the published code.

    Example:
        >>> project_left(4, 8, "std"), project_left(8, 8, "std")
        (True, False)
    """
    tall = rows >= cols
    return {"std": not tall, "reverse_std": tall, "left": True, "right": False, "full": True}[proj_type]


def product32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``, in float32 for half-precision ``a`` without a full-size float32 copy of it; else in a's dtype."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b.to(a.dtype)
    if a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # torch 2.8 and later
        return torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    for some in torch.arange(a.shape[1], device="cpu").split(1024):
        cut = slice(int(some[0]), int(some[-1]) + 1)
        out.addmm_(a[:, cut].float(), b[cut].float())
    return out


class Sketched:
    """Multiply a matrix by thin ones in bfloat16, for products from which only a basis is made; float64 stays exact.

    The factors are rounded, and on a CPU the product too, whether it has instructions for bfloat16 or not: so all agree. M Z of
    384×1152 by rank 96 on one thread (AMD, AVX512-BF16): .22 ms, and .035 ms once for rounding M, against .83 ms in float32.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.exact = matrix.dtype == torch.float64
        self.matrix = matrix if self.exact else matrix.to(torch.bfloat16)
        self.quick = not has_values(matrix) or multiplies_bfloat16(matrix.device)
        if not self.exact and not self.quick:
            self.matrix = self.matrix.float()

    def before(self, thin: Tensor) -> Tensor:
        """Return M Z in float32."""
        return self._product(self.matrix, self.rounded(thin))

    def after(self, thin: Tensor) -> Tensor:
        """Return Z M in float32."""
        return self._product(self.rounded(thin), self.matrix)

    def rounded(self, thin: Tensor) -> Tensor:
        """Return a factor as the products take it."""
        return thin if self.exact else thin.to(torch.bfloat16).to(self.matrix.dtype)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.exact:
            return a @ b
        return product32(a, b) if a.is_cuda else (a @ b).to(torch.bfloat16).float()


def orthonormal(y: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Return orthonormal columns with the span of ``y`` (d×r), column j with a positive share of y's column j.

    Householder's QR; on CUDA, where a ``fallback`` basis is given for a failure, :func:`cholesky_qr`: far quicker there.
    """
    if y.is_cuda and fallback is not None:
        q, good = cholesky_qr(y)
        return torch.where(good, q, fallback.to(y.dtype))
    q, r = torch.linalg.qr(y)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same by two passes of CholeskyQR in float64, without waiting for the device, and a success flag.

    As exact as Householder's for the condition numbers that ``RIDGE`` leaves; in float32 it fails on one real gradient in
    ten, without an error.
    """
    q, good = y.double(), torch.ones((), dtype=torch.bool, device=y.device)
    for _ in range(2):
        factor, info = torch.linalg.cholesky_ex(q.mT @ q)
        q = torch.linalg.solve_triangular(factor.mT, q, upper=True, left=False)
        good &= info == 0
    return q.to(y.dtype), good


def svd_basis(grad: Tensor, rank: int, proj_type: str) -> list[Tensor]:
    """Return the published basis: leading singular vectors of G (m×n); [P], or [P, Q] for ``full``.

    Both sides have the signs that LAPACK gives for G itself, so that moments carried over without rotation mean the same
    as in the published code.
    """
    u, _, vh = torch.linalg.svd(grad.to(at_least_32(grad.dtype)), full_matrices=False)
    left, right = u[:, :rank].clone(), vh[:rank].t().clone()  # a view would keep the whole factor alive
    if proj_type == "full":
        return [left, right]
    return [left if project_left(grad.shape[0], grad.shape[1], proj_type) else right]


def range_finder(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Find a first basis d×r of M's (d×k) leading left singular space, by a randomized range finder (Halko et al. 2011)."""
    d, k = matrix.shape
    width = min(rank + OVERSAMPLE, d, k)
    sketch = torch.randn(k, width, generator=generator, dtype=torch.float32, device=generator.device).to(matrix.device)
    q = _any_basis(product32(matrix, sketch))
    for _ in range(COLD_ITERATIONS):
        q = _any_basis(product32(matrix, _any_basis(product32(matrix.t(), q))))
    if width == rank:
        return q
    b = unit(product32(matrix.t(), q))  # k×width; the Rayleigh-Ritz step picks the best r directions of the width found
    return q @ torch.linalg.eigh(b.t() @ b)[1].flip(1)[:, :rank]


def _any_basis(y: Tensor) -> Tensor:
    """Return orthonormal columns whose span contains y's, of any column rank; may wait for the device."""
    if y.is_cuda and has_values(y):
        q, good = cholesky_qr(unit(y.clone()))
        if good:
            return q
    return torch.linalg.qr(y)[0]


def unit_vectors(like: Tensor) -> Tensor:
    """Return the basis d×r of unit vectors, which stands for no direction at all: that of a zero gradient."""
    return torch.eye(*like.shape, dtype=like.dtype, device=like.device)


Mean = Callable[[Tensor], None] | None


def power_step(matrix: Tensor, p: Tensor, mean: Mean = None) -> Tensor:
    """Refresh a basis (d×r) by one power iteration orth(M MᵀP).

    ``mean`` averages the sketch M MᵀP over ranks, in place; from equal p it makes a basis of all their gradients.
    """
    z = unit(product32(matrix.t(), p))  # k×r; normalised because the square of a small gradient would underflow
    return orthonormal(_sketch(matrix, z, mean).add_(p, alpha=RIDGE), fallback=p)


def _sketch(matrix: Tensor, z: Tensor, mean: Mean) -> Tensor:
    """Return M z scaled to norm 1; with several ranks, the mean over them."""
    y = product32(matrix, z)
    if mean is not None:
        mean(y)
    return unit(y)


def track_step(matrix: Tensor, p: Tensor, m: Tensor, beta1: float) -> Tensor:
    """Take one power iteration on the momentum mixture Ĝ = β₁ P m + (1−β₁) M, which is never formed.

    PᵀĜ = β₁ m + (1−β₁) PᵀM =: Z, and Ĝ Zᵀ = β₁ P (m Zᵀ) + (1−β₁) M Zᵀ: two full products, as rough as :class:`Sketched`.

    Args:
        matrix: M, d×k.
        p: the basis of the last step, d×r.
        m: first moment in that basis, r×k.
        beta1: its decay.
    """
    gradient, momentum = Sketched(matrix), Sketched(m)
    z = gradient.rounded(unit(gradient.after(p.t()).lerp_(m, beta1)))  # r×k
    y = gradient.before(z.t()).mul_(1 - beta1).addmm_(p, momentum.before(z.t()), alpha=beta1)
    return orthonormal(unit(y).add_(p, alpha=RIDGE), fallback=p)


def two_sided_step(grad: Tensor, p: Tensor, q: Tensor, mean: Mean = None) -> tuple[Tensor, Tensor]:
    """Take one alternating power iteration for both sides of G (m×n): Q ← orth(GᵀP), P ← orth(GQ); ``mean`` as above."""
    q = orthonormal(_sketch(grad.t(), p, mean).add_(q, alpha=RIDGE))
    return orthonormal(_sketch(grad, q, mean).add_(p, alpha=RIDGE)), q


def two_sided_track(grad: Tensor, p: Tensor, q: Tensor, m: Tensor, beta1: float) -> tuple[Tensor, Tensor]:
    """Do the same on the mixture Ĝ = β₁ P m Qᵀ + (1−β₁) G, m r×r."""
    z = product32(grad.t(), p).mul_(1 - beta1).addmm_(q, m.t(), alpha=beta1)
    new_q = orthonormal(unit(z).add_(q, alpha=RIDGE))
    y = product32(grad, new_q).mul_(1 - beta1).addmm_(p, m @ (q.t() @ new_q), alpha=beta1)
    return orthonormal(unit(y).add_(p, alpha=RIDGE)), new_q


def change_of_basis(new: Tensor, old: Tensor) -> Tensor:
    """Return C = P_newᵀ P_old, r×r."""
    return new.t() @ old


def rotate(m: Tensor, v: Tensor, c: Tensor, c_right: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return Adam's moments in the new basis: C m, (C∘C) v; two-sided C m C_rightᵀ and (C∘C) v (C_right∘C_right)ᵀ.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])  # by a right angle
        >>> m, v = rotate(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]]), turn)
        >>> m.flatten().tolist(), v.flatten().tolist()
        ([2.0, -1.0], [4.0, 1.0])
    """
    m, v = c @ m, (c * c) @ v
    return (m, v) if c_right is None else (m @ c_right.t(), v @ (c_right * c_right).t())


def overlap(c: Tensor) -> Tensor:
    """Return the share of the old subspace that the new one keeps, ‖C‖²/r in [0, 1]; r/d for two random ones.

    Example:
        >>> overlap(torch.eye(4)).item()
        1.0
    """
    return c.square().sum() / c.shape[0]


def captured(matrix: Tensor, p: Tensor) -> Tensor:
    """Return the share of M's energy inside the subspace, ‖PᵀM‖²/‖M‖²."""
    return product32(matrix.t(), p).square().sum() / matrix.float().square().sum()


def unit(x: Tensor) -> Tensor:
    """Scale ``x`` to Frobenius norm 1, in place; zero stays zero."""
    tiny = torch.finfo(x.dtype).tiny
    norm = torch.linalg.vector_norm(x)
    # the squares of very small and very large entries leave the range
    if x.is_cuda or not has_values(x) or not tiny**0.25 < norm < tiny**-0.25:
        x.div_(x.abs().max().clamp_min(tiny)) if x.numel() else x
        norm = torch.linalg.vector_norm(x)
    return x.mul_(1 / norm.clamp_min(tiny))
