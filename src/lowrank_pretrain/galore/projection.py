"""One projected weight: its views, its state, its refresh and its update. The arithmetic is in subspace, moments, residual.

Shapes: W, G m×n (an N-D weight is taken as out × the rest); M d×k = G or Gᵀ, projected side first; P d×r; R, m, v r×k. For
``proj_type="full"`` M = G, P m×r, Q n×r and R, m, v are r×r.

State: ``proj`` P (``proj_right`` Q), ``exp_avg``, ``exp_avg_sq``, ``step``: plain tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.galore import moments, residual, subspace
from lowrank_pretrain.seeds import generator


@dataclass
class Projected:
    """A weight of a group with a rank, for the length of one step.

    Attributes:
        p: the parameter.
        group: its group.
        state: its state.
        rank: of its projection, at most min(m, n).
        name: for messages and seeds.
        offset: steps by which its refresh is moved against the others', 0 without ``stagger``.
        grad: the gradient, in the parameter's shape, or None where only ``low`` was kept.
        low: R accumulated over earlier micro-batches (layer-wise updates only).
    """

    p: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    rank: int
    name: str
    offset: int
    grad: Tensor | None = None
    low: Tensor | None = None

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return int(self.state.get("step", 0))

    @property
    def two_sided(self) -> bool:
        """Whether both sides are projected."""
        return self.group["proj_type"] == "full"

    @property
    def cold(self) -> bool:
        """Whether there is no basis yet."""
        return self.group["variant"] == "galore" and "proj" not in self.state

    @property
    def due(self) -> bool:
        """Whether this step renews the basis: it then needs the whole gradient before anything else."""
        if self.group["variant"] == "apollo":
            return False
        gap = 1 if self.group["refresh"] == "track" else self.group["update_proj_gap"]
        return self.cold or (self.step + self.offset) % gap == 0

    @property
    def needs_gradient(self) -> bool:
        """Whether R alone is not enough for this step."""
        return self.due or self.group["residual"] is not None or self.group["variant"] == "apollo"

    def matrix(self, t: Tensor) -> Tensor:
        """W or G as a d×k matrix, a view wherever the layout allows one."""
        rows = t.detach().reshape(t.shape[0], -1)
        return rows if subspace.project_left(*rows.shape, self.group["proj_type"]) else rows.t()

    def project(self, grad: Tensor) -> Tensor:
        """R of a gradient in the present basis, in the moments' dtype."""
        matrix, dtype = self.matrix(grad), moments.moment_dtype(self.group, grad.dtype)
        p = self.basis(grad)
        if self.two_sided:
            return (p.t() @ (matrix @ self.state["proj_right"].to(grad.dtype))).to(dtype)
        low = p.t() @ matrix if dtype == grad.dtype else subspace.product32(p.t(), matrix)
        return low.to(dtype)

    def basis(self, grad: Tensor) -> Tensor:
        """P in the gradient's dtype."""
        if self.group["variant"] == "apollo":
            since = self.step // self.group["update_proj_gap"]
            rng = self._generator("apollo", since)
            return residual.gaussian(self.matrix(grad).shape[0], self.rank, rng, grad.dtype).to(grad.device)
        return self.state["proj"].to(grad.dtype)

    def read_moments(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment, r×k (or, just adopted, still of the whole matrix: d×k)."""
        d, k = self.matrix(self.p).shape
        shape = (self.rank, self.rank if self.two_sided else k)
        return moments.read(self.state, shape, moments.moment_dtype(self.group, grad.dtype), self.p.device)

    def refresh(
        self, m: Tensor, v: Tensor, skip: Tensor | None, share: Callable[[list[Tensor]], None] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Renew the basis from ``grad``; returns the moments in it, and the overlap with the old one (None if there was none)."""
        matrix = self.matrix(self.grad)
        old = [self.state[key].to(subspace.at_least_32(matrix.dtype)) for key in self._keys() if key in self.state]
        new = self._new_basis(matrix, old, m)
        if share is not None:
            share(new)
        keep = moments.kind(self.group)
        stored = subspace.at_least_32(matrix.dtype) if keep == "float32" else matrix.dtype
        if skip is not None and old:
            new = [torch.where(skip > 0, before, after) for before, after in zip(old, new, strict=True)]
        for key, basis in zip(self._keys(), new, strict=True):
            self.state[key] = basis.to(stored)
        if not old:
            return (*self._enter(m, v, new), None)
        turns = [subspace.change_of_basis(after, before) for before, after in zip(old, new, strict=True)]
        if self.group["rotate_moments"]:
            turned = subspace.rotate(m.to(turns[0].dtype), v.to(turns[0].dtype), *turns)
            m, v = (
                after.to(before.dtype) if skip is None else torch.where(skip > 0, before, after.to(before.dtype))
                for before, after in zip((m, v), turned, strict=True)
            )
        return m, v, subspace.overlap(turns[0])

    def apply(self, low: Tensor, minus_n: Tensor) -> None:
        """W ← W − ηα P N, and what the residual adds, in place; then the decoupled weight decay, as published.

        On CUDA the decay is left to the caller, who masks it.
        """
        group = self.group
        weight = self.matrix(self.p)
        eta = float(group["lr"]) * group["scale"]
        if group["variant"] == "apollo":
            residual.apollo(weight, self.matrix(self.grad), low, minus_n, eta, self.state)
        elif group["residual"] == "fira":
            residual.fira(weight, self.matrix(self.grad), self.basis(self.p), low, minus_n, eta, self.state)
        else:
            back = minus_n.to(weight.dtype)
            if self.two_sided:
                back = back @ self.state["proj_right"].to(weight.dtype).t()
            weight.addmm_(self.basis(self.p), back, alpha=eta)
        if not weight.is_set_to(self.matrix(self.p)):  # a layout of which there is no matrix view: it was a copy
            self.p.detach().copy_((weight if self._left() else weight.t()).reshape(self.p.shape))

    def _left(self) -> bool:
        return subspace.project_left(self.p.shape[0], self.p[0].numel(), self.group["proj_type"])

    def _keys(self) -> list[str]:
        return ["proj", "proj_right"] if self.two_sided else ["proj"]

    def _generator(self, *words: object) -> torch.Generator:
        seed = generator("galore", self.name, *words, seed=self.group["seed"]).initial_seed()
        return torch.Generator(self.p.device).manual_seed(seed)

    def _new_basis(self, matrix: Tensor, old: list[Tensor], m: Tensor) -> list[Tensor]:
        how, beta1 = self.group["refresh"], self.group["betas"][0]
        if how == "svd":
            grad = matrix if self._left() else matrix.t()
            return subspace.svd_basis(grad, self.rank, self.group["proj_type"])
        if not old:
            p = subspace.range_finder(matrix, self.rank, self._generator("cold"))
            return [p, torch.linalg.qr(subspace.product32(matrix.t(), p))[0]] if self.two_sided else [p]
        m = m.to(old[0].dtype)
        if how == "track":
            if self.two_sided:
                return list(subspace.two_sided_track(matrix, *old, m, beta1))
            low = subspace.product32(old[0].t().to(matrix.dtype), matrix)
            return [subspace.track_step(matrix, old[0], low, m, beta1)]
        return list(subspace.two_sided_step(matrix, *old)) if self.two_sided else [subspace.power_step(matrix, *old)]

    def _enter(self, m: Tensor, v: Tensor, new: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Moments of the whole matrix (an adopted parameter's) enter the first basis: m ← Pᵀm, v ← (P∘P)ᵀv."""
        d, k = self.matrix(self.p).shape
        if "exp_avg" not in self.state or tuple(m.shape) == (self.rank, k) != (d, k):
            return m, v
        m, v = self.matrix(m), self.matrix(v)
        return tuple(t.contiguous() for t in subspace.rotate(m.to(new[0].dtype), v.to(new[0].dtype), *[b.t() for b in new]))
