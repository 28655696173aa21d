"""One projected weight: its views, its state, its refresh and its update. The arithmetic is in subspace, moments, residual.

Shapes: W, G m×n (an N-D weight is taken as out × the rest); M d×k = G or Gᵀ, projected side first; P d×r; R, m, v r×k. For
``proj_type="full"`` M = G, P m×r, Q n×r and R, m, v are r×r.

State: ``proj`` P (``proj_right`` Q), ``exp_avg``, ``exp_avg_sq``, ``step``: plain tensors.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_pretrain.core.seeds import generator
from lowrank_pretrain.galore import dtensor as sharded
from lowrank_pretrain.galore import moments, residual, subspace
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.surroundings import has_values


class SharedBasis(Protocol):
    """Makes the bases of several ranks one."""

    def same(self, bases: list[Tensor], averaged: bool) -> None:
        """Give all ranks rank 0's; ``averaged`` says that they were made of a sketch that went through ``mean``."""

    def mean(self, sketch: Tensor) -> None:
        """The ranks' mean of M MᵀP, in place."""

    def agree(self, flag: Tensor) -> Tensor:
        """A flag that is true only if it is on all ranks."""


@dataclass
class Projected:
    """A weight of a group with a rank.

    Attributes:
        p: the parameter.
        group: its group.
        state: its state.
        rank: of its projection, at most min(m, n).
        name: for messages and seeds.
        offset: steps by which its refresh is moved against the others', 0 without ``stagger``.
        grad: this step's gradient, in the parameter's shape, or None where only ``low`` was kept.
        low: R accumulated over earlier micro-batches (layer-wise updates only).
        step: steps taken before this one.
        local: what this worker has done since the last merge (LTE × GaLore), else None.
        shared: whoever makes one basis for several ranks, else None.
        former: the slot of another rank or side that made the present state, until the next step; else None.
    """

    p: Tensor
    group: dict[str, Any]
    state: dict[str, Any]
    rank: int
    name: str
    offset: int
    grad: Tensor | None = None
    low: Tensor | None = None
    step: int = 0
    local: LocalUpdate | None = None
    shared: SharedBasis | None = None
    former: "Projected | None" = None
    _blank: bool | None = None  # None: to be looked at

    def __post_init__(self) -> None:
        self.rows, self.cols = self.p.shape[0], self.p.numel() // self.p.shape[0]
        # what the state's shapes depend on is kept here: the group may be changed in the middle of a fit
        self.shape, self.variant, self.proj_type = self.p.shape, self.group["variant"], self.group["proj_type"]
        self.left = subspace.project_left(self.rows, self.cols, self.proj_type)
        self.shards = sharded.shard_group(self.p)
        self.distributed = sharded.is_distributed(self.p)
        sharded.check(self.p, self.group, self.name)

    @property
    def numel_low(self) -> int:
        """Elements of R."""
        return self.rank * (self.rank if self.two_sided else self.cols if self.left else self.rows)

    @property
    def viewable(self) -> bool:
        """Whether the weight has a matrix view; without one (channels_last) the update works on a copy of the weight."""
        return self.p.ndim == 2 or self.p.is_contiguous()

    @property
    def two_sided(self) -> bool:
        """Whether both sides are projected."""
        return self.proj_type == "full"

    @property
    def form(self) -> tuple[Any, ...]:
        """What decides the shapes and the meaning of the state."""
        return self.rank, self.left, self.two_sided, self.variant

    @property
    def cold(self) -> bool:
        """Whether there is no basis yet, or one that no gradient has had a part in."""
        return self.variant == "galore" and ("proj" not in self.state or self.former is not None or self.blank)

    @property
    def blank(self) -> bool:
        """Whether all gradients so far were zero, as they are in front of a layer that starts at zero.

        Looked up after a basis is made or loaded, and no more once it is False.
        """
        if self._blank is None:
            self._blank = False
            if (
                "proj" in self.state and self.group["refresh"] != "svd" and has_values(self.p)
            ):  # the published code keeps such a basis for a gap
                v = self.state.get("exp_avg_sq_scale", self.state["exp_avg_sq"])  # of 8-bit codes the scales
                flag = sharded.agree(~sharded.local(v).any().reshape(1), [self.p])
                self._blank = bool(flag if self.shared is None else self.shared.agree(flag))
        return self._blank

    @property
    def due(self) -> bool:
        """Whether this step renews the basis: it then needs the whole gradient before anything else."""
        if self.variant == "apollo":
            return False
        if self.local is not None:  # between two merges P must stay what D is told in, whatever the number of the step
            return self.cold or self.local.fresh
        gap = 1 if self.group["refresh"] == "track" else self.group["update_proj_gap"]
        return self.cold or (self.step + self.offset) % gap == 0

    @property
    def needs_gradient(self) -> bool:
        """Whether R alone is not enough for this step."""
        return self.due or self.group["residual"] is not None or self.variant == "apollo"

    def matrix(self, t: Tensor) -> Tensor:
        """W or G as a d×k matrix (this rank's piece of it), a view wherever the layout allows one."""
        if self.distributed:
            t = sharded.local(t)
        if t.ndim != 2:
            t = t.reshape(t.shape[0], self.cols)
        return t if self.left else t.t()

    def project(self, grad: Tensor) -> Tensor:
        """R of a gradient in the present basis, in the moments' dtype."""
        matrix, dtype = self.matrix(grad), moments.moment_dtype(self.group, grad.dtype)
        p = self.basis(grad)
        if self.two_sided:
            matrix = matrix @ self.state["proj_right"].to(grad.dtype)
        low = torch.mm(p.t(), matrix) if dtype == grad.dtype else subspace.product32(p.t(), matrix).to(dtype)
        return low if self.shards is None or not self.left else sharded.all_sum(low, self.shards)

    def project_back(self, low: Tensor, into: Tensor) -> None:
        """Write P R into a gradient."""
        low = low.view(self.rank, -1)
        if self.two_sided:
            low = low @ self.state["proj_right"].to(low.dtype).t()
        into.copy_((self.basis(into) @ low if self.left else low.t() @ self.basis(into).t()).view(into.shape))

    def basis(self, grad: Tensor) -> Tensor:
        """P in the gradient's dtype; of a matrix cut along its projected side, the rows of this rank."""
        if self.variant == "apollo":
            since = self.step // self.group["update_proj_gap"]
            rng = self._generator("apollo", since)
            return residual.gaussian(self.matrix(grad).shape[0], self.rank, rng, grad.dtype).to(grad.device)
        p = self.state["proj"]
        if p.dtype != grad.dtype:
            p = p.to(grad.dtype)
        return self._rows(p)

    def _rows(self, p: Tensor) -> Tensor:
        """P's rows that belong to this rank's piece of the matrix: all, unless it is cut along its projected side."""
        if self.shards is None or not self.left:
            return p
        start = sharded.first_row(self.p)
        return p[start : start + sharded.local(self.p).shape[0]]

    def read_moments(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment, r×k (or, just adopted, still of the whole matrix), this rank's piece."""
        if self.former is not None:
            return self.former.whole_moments(self.state, moments.moment_dtype(self.group, grad.dtype))
        shape = (self.rank, self.rank if self.two_sided else self.matrix(self.p).shape[1])
        dtype = moments.moment_dtype(self.group, grad.dtype)
        return moments.read(self.state, shape, dtype, sharded.local(self.p).device)

    def second_moment(self) -> Tensor | None:
        """v, None before the first step."""
        return self.read_moments(self.p)[1] if "exp_avg" in self.state else None

    def whole_moments(self, state: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the moments outside the basis, m×n: P m and (P∘P) v, for a basis of another form to take them over."""
        wide = [t.to(state["proj"].dtype) for t in moments.read(state, (), dtype, self.p.device)]
        m, v = subspace.rotate(*wide, state["proj"], state.get("proj_right"))
        return tuple((t if self.left else t.t()).to(dtype) for t in (m, v))

    def write_moments(self, m: Tensor, v: Tensor) -> None:
        """Keep them, and count the step."""
        if self.shards is not None:
            shape, cut = (self.rank, self.numel_low // self.rank), None if self.left else 1
            m, v = sharded.wrap(m, self.p, shape, cut), sharded.wrap(v, self.p, shape, cut)
        moments.write(self.state, m, v, moments.kind(self.group) == "8bit")
        moments.count(self.state)

    def refresh(self, m: Tensor, v: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Renew the basis from ``grad``; returns the moments in it, and its overlap with the old one (None if new)."""
        matrix = self.matrix(sharded.whole(self.grad))
        keys = [] if self.cold else self._keys()
        old = [self.state[key].to(subspace.at_least_32(matrix.dtype)) for key in keys]
        new = self._new_basis(matrix, old, m)
        if self.shared is not None:
            self.shared.same(new, averaged=bool(old) and self.group["refresh"] == "subspace")
        if self.local is not None:
            self.local.fresh = False
        keep = moments.kind(self.group)
        stored = subspace.at_least_32(matrix.dtype) if keep == "float32" else matrix.dtype
        if not old:
            again = (
                "proj" in self.state and self.former is None
            )  # a blank one is made anew; its moments are those of a basis already
            for key, basis in zip(self._keys(), new, strict=True):
                # one memory layout whatever made it: a distributed checkpoint keeps none, and products would round anew
                self.state[key] = basis.to(stored).contiguous()
            if not self.two_sided:
                self.state.pop("proj_right", None)
            self._blank = self.former = None
            return (m, v, None) if again else (*self._enter(m, v, new), None)
        turns = [subspace.change_of_basis(after, before) for before, after in zip(old, new, strict=True)]
        if self.group["rotate_moments"]:
            for kept, turned in zip((m, v), subspace.rotate(m.to(old[0].dtype), v.to(old[0].dtype), *turns), strict=True):
                _replace(kept, turned, skip)
        for key, basis in zip(self._keys(), new, strict=True):
            _replace(self.state[key], basis, skip)
        return m, v, subspace.overlap(turns[0])

    def apply(self, low: Tensor, minus_n: Tensor) -> None:
        """W ← W − ηα P N, and what the residual adds, in place; then the decoupled weight decay, as published.

        On CUDA the decay is left to the caller, who masks it.
        """
        group = self.group
        weight = self.matrix(self.p)
        eta = float(group["lr"]) * group["scale"]
        c = moments.correction(self.step + 1, group)
        if self.variant == "apollo":
            residual.apollo(weight, self.matrix(self.grad), low, minus_n, eta, c, self.state)
        elif group["residual"] == "fira":
            residual.fira(weight, self.matrix(self.grad), self.basis(self.p), low, minus_n, eta, c, self.state)
        else:
            back = minus_n if minus_n.dtype == weight.dtype else minus_n.to(weight.dtype)
            if self.two_sided:
                back = back @ self.state["proj_right"].to(weight.dtype).t()
            weight.addmm_(self.basis(self.p), back, alpha=eta)
        if not self.viewable:
            here = sharded.local(self.p)
            here.copy_((weight if self.left else weight.t()).reshape(here.shape))

    def _keys(self) -> list[str]:
        return ["proj", "proj_right"] if self.two_sided else ["proj"]

    def _generator(self, *words: object) -> torch.Generator:
        """On the CPU whatever the weight's device: a run that moves between devices draws the same."""
        return generator("galore", self.name, *words, seed=self.group["seed"])

    def _new_basis(self, matrix: Tensor, old: list[Tensor], m: Tensor) -> list[Tensor]:
        how, beta1 = self.group["refresh"], self.group["betas"][0]
        if how == "svd":
            grad = matrix if self.left else matrix.t()
            return subspace.svd_basis(grad, self.rank, self.proj_type)
        if not old:
            p = subspace.range_finder(matrix, self.rank, self._generator("cold"))
            return [p, torch.linalg.qr(subspace.product32(matrix.t(), p))[0]] if self.two_sided else [p]
        if how == "track":
            if self.shards is not None:  # the mixture needs all of m
                m = sharded.whole(self.state["exp_avg"])
            m = m.to(old[0].dtype)
            if self.two_sided:
                return list(subspace.two_sided_track(matrix, *old, m, beta1))
            low = subspace.product32(old[0].t().to(matrix.dtype), matrix)
            return [subspace.track_step(matrix, old[0], low, m, beta1)]
        mean = None if self.shared is None else self.shared.mean
        return (
            list(subspace.two_sided_step(matrix, *old, mean)) if self.two_sided else [subspace.power_step(matrix, *old, mean)]
        )

    def _enter(self, m: Tensor, v: Tensor, new: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Moments of the whole matrix (an adopted parameter's) enter the first basis: m ← Pᵀm, v ← (P∘P)ᵀv."""
        if "exp_avg" not in self.state:
            return m, v
        wide = [self.matrix(t).to(new[0].dtype) for t in (m, v)]
        mine = [self._rows(new[0]), *new[1:]]
        low_m, low_v = subspace.rotate(*wide, *[basis.t() for basis in mine])
        if self.shards is not None and self.left:  # each rank has had its rows of the sum
            low_m, low_v = (sharded.all_sum(t.contiguous(), self.shards) for t in (low_m, low_v))
        return low_m.to(m.dtype).contiguous(), low_v.to(v.dtype).contiguous()


def _replace(kept: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Write ``new`` in place, unless the step is skipped."""
    kept.copy_(new if skip is None else torch.where(skip > 0, kept.to(new.dtype), new))
