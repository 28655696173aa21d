"""Slow twins of the factored second moment, Nesterov's mixture and Muon's rule in the subspace: every matrix in full.

v is the rank-1 matrix of its row and column means; the basis is carried by the full v's rule applied to that matrix, and its
row means are taken again (the column's means are kept). The orthogonal factor is
found by Newton-Schulz on the whole d×k matrix.
"""

import math

import torch

from tests.reference.galore import GROWTH, TINY, Twin, bf16

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
        low = self.project(g)
        self.t += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        u = b1 * self.m + (1 - b1) * low if self.nesterov else self.m
        if self.rule == "muon" and self.residual == "muon":  # the momentum of all, whose past is known in the subspace alone
            return self.whole(g, low, u, 1 - b1)
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
        correction = math.sqrt(1 - b2**self.t) / (1 - b1 ** (self.t + 1 if self.nesterov else self.t))
        if self.residual == "muon":
            n = correction * n
            inside = torch.maximum(low.norm(dim=0), 0.1 * math.sqrt(self.r / len(g)) * g.norm(dim=0))
            return self.whole(g, low, n, n.norm(dim=0) / (inside + TINY))
        return correction * self.outcome(g, low, n)

    def whole(self, g, low, n, s):
        """The orthogonal factor of direction and scaled residual together, at the size of AdamW's update."""
        return 0.2 * math.sqrt(max(g.shape)) * newton_schulz(self.p @ n + (g - self.p @ low) * s)

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


class HalfTwin(ModeTwin):
    """The same for weights and gradients in bfloat16, rounded to it where the optimizer rounds, and nowhere else.

    It rounds W after each of its updates, P (and Q) where they meet a gradient or W, N and the residual's scale where they
    meet W, and in two-sided projection GQ and NQᵀ. R, moments, N and the bases are float32. Everything is held in float32.
    """

    def step(self, grad):
        g = grad.T if self.turned else grad
        w = self.w.T if self.turned else self.w
        self.weight = w
        self.update(g)  # changes it
        w.copy_(bf16(w - self.lr * self.weight_decay * w))

    def follow(self, state):
        """Take over the optimizer's state, for the next step to begin from it."""
        self.p, self.q, self.m = state["proj"].clone(), state.get("proj_right", self.q), state["exp_avg"].clone()
        self.q = self.q if self.q is None else self.q.clone()
        self.v, self.last_norm = state.get("exp_avg_sq", self.v), state.get("residual_norm")
        self.v = self.v.clone() if torch.is_tensor(self.v) else self.v
        if "exp_avg_sq_row" in state:
            self.row, self.col = state["exp_avg_sq_row"].clone(), state["exp_avg_sq_col"].clone()

    def project(self, g):
        return bf16(self.p).T @ (bf16(g @ bf16(self.q)) if self.two_sided else g)

    def outcome(self, g, low, n):
        b1, b2 = self.betas
        correction = math.sqrt(1 - b2**self.t) / (1 - b1 ** (self.t + 1 if self.nesterov else self.t))
        n = n if self.rule == "muon" else correction * n
        eta, s = self.lr * self.scale, None
        if self.residual == "fira":
            s = n.norm(dim=0) / (low.norm(dim=0) + TINY)
            whole, inside = g.norm(dim=0) ** 2, low.norm(dim=0) ** 2
            outside = torch.where(whole - inside > 100 * torch.finfo(g.dtype).eps * whole, whole - inside, 0.0)
            length = (s**2 * outside).sum().sqrt() / (1 if self.rule == "muon" else correction)
            factor = 1.0
            if self.last_norm:
                factor = 1 / (max(length / (self.last_norm + TINY), GROWTH) / GROWTH)
            self.last_norm, s = length * factor, s * factor
            n = n - low * s
        back = bf16(n)
        if self.two_sided:
            back = bf16(back @ bf16(self.q).T)
        self.weight.copy_(bf16(self.weight - eta * (bf16(self.p) @ back)))
        if s is not None:
            self.weight.copy_(bf16(self.weight - eta * g * bf16(s)))
        return torch.zeros_like(g)

    def whole(self, g, low, n, s):
        back = bf16(self.p) @ bf16(n - low * s)
        eta = self.lr * self.scale * 0.2 * math.sqrt(max(g.shape))
        self.weight.copy_(bf16(self.weight - eta * rounded_newton_schulz(g * s + back)))
        return torch.zeros_like(g)


def rounded_newton_schulz(whole, steps=5):
    """Muon's iteration as Muon computes it: the matrix, its Gram matrix and the polynomial in bfloat16."""
    a, b, c = QUINTIC
    if whole.shape[0] > whole.shape[1]:
        return rounded_newton_schulz(whole.T, steps).T
    x = bf16(whole / (whole.norm() or 1))
    for _ in range(steps):
        gram = bf16(x @ x.T)
        x = bf16(a * x + bf16(b * gram + c * gram @ gram) @ x)
    return x


def newton_schulz(whole, steps=5):
    """Muon's iteration, on the matrix itself."""
    a, b, c = QUINTIC
    x = whole / (whole.norm() or 1)
    if x.shape[0] > x.shape[1]:
        return newton_schulz(whole.T, steps).T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
