"""Slow twins of the GaLore optimizer: one matrix, every product formed in full, as the papers write it.

``W ← W − ηα P ρ(PᵀG)`` (GaLore, Algorithm 2) with Adam's ρ; refresh and rotation as this project settles them (subspace:
one power iteration of GGᵀ from the last basis; track: of ĜĜᵀ with Ĝ = β₁ P m + (1−β₁) G, LDAdam without error feedback);
Fira's residual (its Algorithm 1); APOLLO (its Algorithm 1). W, G m×n; P m×r, Q n×r.
"""

import math

import torch

from lowrank_pretrain.core.agreement import generator

RIDGE, GROWTH, TINY = 1e-6, 1.01, 1e-8


class Twin:
    """One matrix's optimizer.

    Args:
        weight: m×n, stepped in place.
        rank: r.
        name: as the optimizer names the parameter; seeds the random parts.
        offset: of the refresh clock.
    """

    def __init__(self, weight, rank, name, lr, *, scale=0.25, gap=200, proj_type="std", refresh="subspace", rotate=True,
                 residual=None, variant="galore", betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, offset=0,
                 seed=0, track_every=1):  # fmt: skip
        self.w, self.r, self.name, self.lr, self.scale = weight, rank, name, lr, scale
        self.gap = track_every if refresh == "track" else gap
        self.refresh, self.rotate, self.residual, self.variant = refresh, rotate, residual, variant
        self.betas, self.eps, self.weight_decay, self.offset, self.seed = betas, eps, weight_decay, offset, seed
        rows, cols = weight.shape
        self.two_sided = proj_type == "full"
        left = {"std": rows < cols, "reverse_std": rows >= cols, "left": True, "right": False, "full": True}[proj_type]
        self.turned = not left
        self.p = self.q = None
        self.m = self.v = 0.0
        self.t = 0
        self.last_norm = None

    def step(self, grad):
        g = grad.T if self.turned else grad
        w = self.w.T if self.turned else self.w
        w -= self.lr * self.scale * self.update(g)
        w *= 1 - self.lr * self.weight_decay

    def update(self, g):
        if self.variant == "apollo":
            rng = self.rng("apollo", self.t // self.gap)
            self.p = (torch.randn(g.shape[0], self.r, generator=rng) / math.sqrt(self.r)).to(g.dtype)
        elif self.p is None or not self.v.any():  # no gradient but zero so far: no basis yet
            self.p = None
            self.renew(g)
        elif (self.t + self.offset) % self.gap == 0:
            self.renew(g)
        low = self.project(g)
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low**2
        n = self.m / (self.v.sqrt() + self.eps)
        return math.sqrt(1 - b2**self.t) / (1 - b1**self.t) * self.outcome(g, low, n)

    def project(self, g):
        return self.p.T @ g @ self.q if self.two_sided else self.p.T @ g

    def outcome(self, g, low, n):
        if self.variant == "apollo":
            if self.r == 1:
                s = n.norm() / (low.norm() + TINY)
            else:
                s = n.norm(dim=0) / (low.norm(dim=0) + TINY)
            return self.limited(g * s)
        if self.two_sided:
            return self.p @ n @ self.q.T
        if self.residual == "fira":
            s = n.norm(dim=0) / (low.norm(dim=0) + TINY)
            outside = g - self.p @ (self.p.T @ g)
            real = outside.norm(dim=0) ** 2 > 100 * torch.finfo(g.dtype).eps * g.norm(dim=0) ** 2  # more than rounding
            return self.p @ n + self.limited(outside * s * real)
        return self.p @ n

    def renew(self, g):
        old, old_q = self.p, self.q
        if old is None:
            self.p = cold(g, self.r, self.rng("cold"))
            self.q = torch.linalg.qr(g.T @ self.p)[0] if self.two_sided else None
            return
        mixture = g
        if self.refresh == "track":
            momentum = old @ self.m @ old_q.T if self.two_sided else old @ self.m
            mixture = self.betas[0] * momentum + (1 - self.betas[0]) * g
        if self.two_sided:
            self.q = orth(mixture.T @ old, old_q)
            self.p = orth(mixture @ self.q, old)
        elif self.refresh == "track" and g.dtype != torch.float64:
            self.p = orth(rounded_sketch(g, old, self.m, self.betas[0]), old)
        else:
            self.p = orth(mixture @ mixture.T @ old, old)
        if self.rotate:
            c = self.p.T @ old
            self.m, self.v = c @ self.m, c**2 @ self.v
            if self.two_sided:
                c = self.q.T @ old_q
                self.m, self.v = self.m @ c.T, self.v @ (c**2).T

    def limited(self, s):
        if self.last_norm:
            s = s / (max(s.norm() / (self.last_norm + TINY), GROWTH) / GROWTH)
        self.last_norm = s.norm()
        return s

    def rng(self, *words):
        return torch.Generator().manual_seed(generator("galore", self.name, *words, seed=self.seed).initial_seed())


def rounded_sketch(g, p, m, beta1):
    """ĜĜᵀP as the optimizer takes it where it is not float64: of factors and products rounded to bfloat16."""
    z = beta1 * m + (1 - beta1) * bf16(bf16(p.T) @ bf16(g))
    z = z / z.norm()
    return beta1 * p @ bf16(bf16(m) @ bf16(z.T)) + (1 - beta1) * bf16(bf16(g) @ bf16(z.T))


def bf16(t):
    """Round to bfloat16."""
    return t.to(torch.bfloat16).to(torch.float32)


def orth(y, old):
    """Gram-Schmidt of Y/‖Y‖ + δ P_old, signs by a positive diagonal of R."""
    q, r = torch.linalg.qr(y / y.norm() + RIDGE * old)
    return q * r.diagonal().sign()


def cold(g, rank, rng, oversample=8, iterations=2):
    """Randomized range finder (Halko, Martinsson, Tropp 2011, algorithm 4.4), then the best ``rank`` directions of it."""
    width = min(rank + oversample, *g.shape)
    q = torch.linalg.qr(g @ torch.randn(g.shape[1], width, generator=rng).to(g.dtype))[0]
    for _ in range(iterations):
        q = torch.linalg.qr(g @ torch.linalg.qr(g.T @ q)[0])[0]
    if width == rank:
        return q
    u = torch.linalg.eigh((g.T @ q).T @ (g.T @ q))[1].flip(1)
    return q @ u[:, :rank]
