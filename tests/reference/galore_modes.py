"""Slow twins of the factored second moment, Nesterov's mixture and Muon's rule in the subspace: every matrix in full.

v is the rank-1 matrix of its row and column means; the basis is carried by the full v's rule applied to that matrix, and its
row means are taken again (the column's means are kept). The orthogonal factor is
found by Newton-Schulz on the whole d×k matrix.
"""

import math

import torch

from tests.reference.galore import TINY, Twin

QUINTIC = (3.4445, -4.7750, 2.0315)


class ModeTwin(Twin):
    """One matrix's optimizer; as ``Twin``, with the modes."""

    def __init__(self, *args, second_moment="full", nesterov=False, rule="adam", **settings):
        super().__init__(*args, **settings)
        self.factored, self.nesterov, self.rule = second_moment == "factored", nesterov, rule
        self.row = self.col = None

    def update(self, g):
        if self.p is None or not self.m.any():
            self.p = None
            self.renew(g)
        elif (self.t + self.offset) % self.gap == 0:
            self.renew(g)
        low = self.p.T @ g @ self.q if self.two_sided else self.p.T @ g
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        u = b1 * self.m + (1 - b1) * low if self.nesterov else self.m
        if self.rule == "muon":
            whole = self.p @ u @ self.q.T if self.two_sided else self.p @ u
            o = newton_schulz(whole)
            factor = 0.2 * math.sqrt(g.numel() / self.r)
            n = factor * (self.p.T @ o @ self.q if self.two_sided else self.p.T @ o)
            return self.outcome(g, low, n)
        if self.factored:
            row, col = (low**2).mean(1), (low**2).mean(0)
            self.row = (1 - b2) * row if self.row is None else b2 * self.row + (1 - b2) * row
            self.col = (1 - b2) * col if self.col is None else b2 * self.col + (1 - b2) * col
            v = self.row[:, None] * self.col[None] / max(self.col.mean().item(), torch.finfo(g.dtype).tiny)
        else:
            v = self.v = b2 * self.v + (1 - b2) * low**2
        n = u / (v.sqrt() + 1e-6)
        ahead = self.t + 1 if self.nesterov else self.t
        return math.sqrt(1 - b2**self.t) / (1 - b1**ahead) * self.outcome(g, low, n)

    def renew(self, g):
        old, old_q = self.p, self.q
        if self.row is not None and old is not None:
            self.v = self.row[:, None] * torch.ones_like(self.m)  # whose rows' means are the row's part
        elif self.rule == "muon":
            self.v = torch.zeros_like(self.m) if torch.is_tensor(self.m) else 0.0
        super().renew(g)
        if self.row is not None and old is not None and self.rotate:
            self.row = (self.p.T @ old) ** 2 @ self.row
            if self.two_sided:
                self.col = (self.q.T @ old_q) ** 2 @ self.col


def newton_schulz(whole, steps=5):
    """Muon's iteration, on the matrix itself."""
    a, b, c = QUINTIC
    x = whole / (whole.norm() + TINY * 0)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(whole.T, steps).T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
