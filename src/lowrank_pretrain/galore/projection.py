"""Hold one projected weight: its views, its state, its refresh and its update.

Shapes: W, G m×n (an N-D weight is taken as out × the rest); M d×k = G or Gᵀ, projected side first; P d×r; R, m, v r×k. For
``proj_type="full"`` M = G, P m×r, Q n×r and R, m, v are r×r. The arithmetic of bases is in ``subspace``.

State: ``proj`` P (``proj_right`` Q), ``exp_avg``, ``exp_avg_sq``, ``step``: plain tensors. A factored second moment is
``exp_avg_sq_row`` (r) and ``exp_avg_sq_col`` (k) instead; Muon's rule keeps none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.galore import dtensor, residual, subspace
from lowrank_pretrain.galore.adam import (
    count_step,
    moment_dtype,
    moment_kind,
    read_moments,
    steps_taken,
    write_moments,
)
from lowrank_pretrain.galore.factored import Total, alone, factor
from lowrank_pretrain.galore.guard import has_values, wide_dtype
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.modes import PARTS, mode_direction, read_kept, second_form, turn_moments, whole_second


class SharedBasis(Protocol):
    """Keep one common basis on several ranks."""

    def same(self, bases: list[Tensor], averaged: bool) -> None:
        """Give all ranks rank 0's bases; ``averaged`` says that they come from a sketch that went through ``mean``."""

    def mean(self, sketch: Tensor) -> None:
        """Average M MᵀP over the ranks, in place."""

    def agree(self, flag: Tensor) -> Tensor:
        """Return a flag that is true only if it is true on all ranks."""


@dataclass
class Projected:
    """Hold a weight of a group with a rank.

    Attributes:
        p: the parameter.
        group: its group.
        state: its state.
        rank: of its projection, at most min(m, n).
        name: for messages and seeds.
        offset: steps by which its refresh is shifted, 0 without ``stagger``.
        grad: this step's gradient, in the parameter's shape, or None where only ``low`` was kept.
        low: R accumulated over earlier micro-batches (layer-wise updates only).
        step: steps taken before this one.
        local: the steps of this worker since the last merge (LTE × GaLore), else None.
        shared: makes one basis for several ranks, else None.
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
    _blank: bool | None = None  # None: not looked at yet

    def __post_init__(self) -> None:
        self.rows, self.cols = self.p.shape[0], self.p.numel() // self.p.shape[0]
        # settings that the state's shapes depend on are kept here: the group may be changed in the middle of a fit
        self.shape, self.variant, self.proj_type = self.p.shape, self.group["variant"], self.group["proj_type"]
        self.second = second_form(self.group)
        self.left = subspace.project_left(self.rows, self.cols, self.proj_type)
        self.two_sided = self.proj_type == "full"
        self.numel_low = self.rank * (self.rank if self.two_sided else self.cols if self.left else self.rows)  # elements of R
        self.shards = dtensor.shard_group(self.p)
        self.distributed = dtensor.is_distributed(self.p)
        dtensor.check_placement(self.p, self.group, self.name)

    def attach(self, state: dict[str, Any], local: LocalUpdate | None, shared: SharedBasis | None) -> "Projected":
        """Take the parameter's state for this step; it may have been dropped or replaced since the last one."""
        self.state, self.step, self.local, self.shared = state, steps_taken(state), local, shared
        if "exp_avg" in state and state["exp_avg"].device != self.p.device:  # the model was moved after the optimizer was made
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step":
                    state[key] = value.to(self.p.device)
        return self

    @property
    def viewable(self) -> bool:
        """Return whether the weight has a matrix view; without one (channels_last) the update works on a copy."""
        if self.p.ndim == 2 or self.p.is_contiguous():
            return True
        here = dtensor.local_piece(self.p)
        joined = [(size, step) for size, step in zip(here.shape[1:], here.stride()[1:], strict=True) if size != 1]
        return all(step == size * below for (_, step), (size, below) in pairwise(joined))

    @property
    def form(self) -> tuple[Any, ...]:
        """Return the settings that decide the shapes and the meaning of the state."""
        return self.rank, self.left, self.two_sided, self.variant, self.second

    @property
    def cold(self) -> bool:
        """Return whether there is no basis yet, or one that no gradient has contributed to."""
        return self.variant == "galore" and ("proj" not in self.state or self.former is not None or self.blank)

    @property
    def blank(self) -> bool:
        """Return whether all gradients so far were zero, as they are below a layer that starts at zero.

        This is read after a basis is made or loaded, and not again once it is False. Moments alone do not tell: those of small
        gradients underflow, and some become zero again. The basis of a zero gradient has unit vectors, and no other has.
        """
        if self._blank is None:
            self._blank = False
            # the published code keeps such a basis for a gap
            if "proj" in self.state and self.group["refresh"] != "svd" and has_values(self.p):
                kept = [self.state.get(f"{key}_scale", self.state.get(key)) for key in ("exp_avg", *PARTS[self.second])]
                zero = [~dtensor.local_piece(t).any() for t in kept if t is not None]  # of 8-bit codes the scales
                sizes = self.state["proj"].abs()
                flag = torch.stack([*zero, (sizes == sizes.square()).all()]).all()
                flag = dtensor.agree_on_flags(flag.reshape(1), [self.p])
                self._blank = bool(flag if self.shared is None else self.shared.agree(flag))
        return self._blank

    @property
    def due(self) -> bool:
        """Return whether this step renews the basis: it then needs the whole gradient before anything else."""
        if self.variant == "apollo":
            return False
        if self.local is not None:  # between two merges D belongs to one P, at any number of the step
            return self.cold or self.local.fresh
        return self.cold or (self.step + self.offset) % refresh_gap(self.group) == 0

    @property
    def needs_gradient(self) -> bool:
        """Return whether R alone is not enough for this step."""
        return self.due or self.group["residual"] is not None or self.variant == "apollo"

    def matrix(self, t: Tensor) -> Tensor:
        """Return W or G as a d×k matrix (this rank's piece of it), a view wherever the layout allows one."""
        if self.distributed:
            t = dtensor.local_piece(t)
        if t.ndim != 2:
            t = t.reshape(t.shape[0], self.cols)
        return t if self.left else t.t()

    def project(self, grad: Tensor) -> Tensor:
        """Return R of a gradient in the present basis, in the moments' dtype."""
        matrix, dtype = self.matrix(grad), moment_dtype(self.group, grad.dtype)
        p = self.basis(grad).t()
        in_range = grad.dtype != torch.float16  # which cannot hold all sums of its own numbers
        if self.two_sided:
            q = self.state["proj_right"].to(grad.dtype)
            matrix = matrix @ q if in_range else subspace.product32(matrix, q)
        narrow = dtype == grad.dtype and in_range
        low = torch.mm(p, matrix) if narrow else subspace.product32(p.to(matrix.dtype), matrix)
        if self.shards is not None and self.left:
            low = dtensor.sum_over_ranks(low, self.shards)
        if dtype == torch.float16:  # an infinite R, or square of R, would be NaN in a weight or in the next basis
            most = torch.finfo(dtype).max if self.second == "none" else torch.finfo(dtype).max ** 0.5
            low = low.clamp(-most, most)
        return low.to(dtype)

    def project_back(self, low: Tensor, into: Tensor) -> None:
        """Write P R into a gradient."""
        low = low.view(self.rank, -1)
        if self.two_sided:
            low = low @ self.state["proj_right"].to(low.dtype).t()
        into.copy_((self.basis(into) @ low if self.left else low.t() @ self.basis(into).t()).view(into.shape))

    def basis(self, grad: Tensor) -> Tensor:
        """Return P in the gradient's dtype; for a matrix cut along its projected side, the rows of this rank."""
        if self.variant == "apollo":
            since = self.step // self.group["update_proj_gap"]
            device = grad.device if has_values(grad) else torch.device("cpu")
            rng = self._generator("apollo", since, device=device)  # on the device: a copy from the host would cost more
            return residual.gaussian(self.matrix(grad).shape[0], self.rank, rng, grad.dtype).to(grad.device)
        p = self.state["proj"]
        if p.dtype != grad.dtype:
            p = p.to(grad.dtype)
        return self._rows(p)

    def _rows(self, p: Tensor) -> Tensor:
        """Return P's rows of this rank's piece of the matrix: all, unless it is cut along its projected side."""
        if self.shards is None or not self.left:
            return p
        start = dtensor.first_local_row(self.p)
        return p[start : start + dtensor.local_piece(self.p).shape[0]]

    def read_moments(self, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the first moment r×k, and the stored second: [v], [row, column] or []; all as this rank's pieces.

        For a parameter that was just adopted, both are still AdamW's, for the whole matrix.
        """
        dtype = moment_dtype(self.group, grad.dtype)
        if self.former is not None:
            return self.former.whole_moments(self.state, dtype)
        device, columns = self.p.device, self.numel_low // self.rank
        if self.distributed:
            device = dtensor.local_piece(self.p).device
            columns = self.rank if self.two_sided else self.matrix(self.p).shape[1]
        shape = (self.rank, columns)
        if self.second == "full" or self._is_whole:
            m, *second = read_moments(self.state, shape, dtype, device)
        else:
            m, second = read_kept(self.state, self.second, shape, dtype, device)
        return (dtensor.local_piece(m), list(map(dtensor.local_piece, second))) if self.distributed else (m, second)

    @property
    def _is_whole(self) -> bool:
        """Return whether the moments are those of the whole matrix: it was adopted, and has no basis yet."""
        return self.variant == "galore" and "exp_avg" in self.state and "proj" not in self.state

    def second_moment(self) -> Tensor | None:
        """Return v, or the squares of the first moment where there is none; None before the first step."""
        if "exp_avg" not in self.state:
            return None
        m, second = self.read_moments(self.p)
        return whole_second(m, second, *self._over_ranks) if second else m.square()

    def whole_moments(self, state: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Return the moments outside the basis, m×n: P m and (P∘P) v, for a basis of another form to take them over."""
        shape = (self.rank, self.numel_low // self.rank)
        kept, second = read_kept(state, self.second, shape, dtype, self.p.device)
        low_m, low_v = (t.to(state["proj"].dtype) for t in (kept, whole_second(kept, second)))
        m, v = subspace.rotate(low_m, low_v, state["proj"], state.get("proj_right"))
        return (m.to(dtype), [v.to(dtype)]) if self.left else (m.t().to(dtype), [v.t().to(dtype)])

    def write_moments(self, m: Tensor, second: list[Tensor]) -> None:
        """Store the moments, and count the step."""
        for key, kept in zip(PARTS[self.second], second, strict=True):
            if self.shards is not None:  # of the row's part each rank has all, of the column's its piece
                kept = self._as_dtensor(kept, 1 if key == "exp_avg_sq" else 0 if key == "exp_avg_sq_col" else None)
            self.state[key] = kept
        v = self.state["exp_avg_sq"] if self.second == "full" else None
        m = m if self.shards is None else self._as_dtensor(m, 1)
        write_moments(self.state, m, v, moment_kind(self.group) == "8bit")
        count_step(self.state)

    def _as_dtensor(self, piece: Tensor, columns: int | None) -> Tensor:
        """Return a piece of state on p's mesh; ``columns`` is the dimension of R's columns in it, None if it has none."""
        whole = list(piece.shape)
        if columns is not None:
            whole[columns] = self.numel_low // self.rank
        return dtensor.as_dtensor(piece, self.p, whole, None if self.left else columns)

    @property
    def _over_ranks(self) -> tuple[Total, int]:
        """Return the sum over the ranks that share R's columns, and the number of columns (0: all are on this rank)."""
        if self.shards is None or self.left:
            return alone, 0
        shards = self.shards
        return lambda part: dtensor.sum_over_ranks(part, shards), self.numel_low // self.rank

    def direction(self, low: Tensor, m: Tensor, second: list[Tensor], skip: Tensor | None) -> Tensor:
        """Return −N for rules that the fused kernel lacks, updating the moments in place."""
        d, k = (self.rows, self.cols) if self.left else (self.cols, self.rows)
        return mode_direction(low, m, second, self.step + 1, self.group, (d, k), skip, self._over_ranks[0])

    def refresh(
        self, grad: Tensor, m: Tensor, second: list[Tensor], skip: Tensor | None
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Renew the basis; return the moments in it, and its overlap with the old one (None if new)."""
        matrix = self.matrix(dtensor.gather_whole(grad))
        keys = [] if self.cold else self._keys()
        old = [self.state[key].to(wide_dtype(matrix.dtype)) for key in keys]
        new = self._new_basis(matrix, old, m)
        if self.shared is not None:
            self.shared.same(new, averaged=bool(old) and self.group["refresh"] == "subspace")
        if self.local is not None:
            self.local.fresh = False
        stored = wide_dtype(matrix.dtype) if moment_kind(self.group) == "float32" else matrix.dtype
        if not old:
            # a blank basis is made anew; its moments are in a basis already
            again = "proj" in self.state and self.former is None
            for key, basis in zip(self._keys(), new, strict=True):
                # always one memory layout: a distributed checkpoint keeps none, and products would then round differently
                self.state[key] = basis.to(stored).contiguous()
            if not self.two_sided:
                self.state.pop("proj_right", None)
            self._blank = self.former = None
            return (m, second, None) if again else (*self._enter(m, second, new), None)
        turns = [subspace.change_of_basis(after, before) for before, after in zip(old, new, strict=True)]
        if self.group["rotate_moments"]:
            wide = [t.to(old[0].dtype) for t in (m, *second)]
            right = turns[1] if self.two_sided else None
            turned: list[Tensor]
            if self.second == "full":
                turned = list(subspace.rotate(wide[0], wide[1], turns[0], right))
            else:
                first, others = turn_moments(wide[0], wide[1:], turns[0], right)
                turned = [first, *others]
            for kept, new_moment in zip((m, *second), turned, strict=True):
                _replace(kept, new_moment, skip)
        for key, basis in zip(self._keys(), new, strict=True):
            _replace(self.state[key], basis, skip)
        return m, second, subspace.overlap(turns[0])

    # ---- back to W: three updates, of which a group has one. η is the learning rate times ``scale`` -------------------------

    def add_update(self, low: Tensor, minus_n: Tensor, eta: float, correction: float, skip: Tensor | None) -> None:
        """Apply W ← W − ηP N in place."""
        weight = self.matrix(self.p)
        back = minus_n if minus_n.dtype == weight.dtype else minus_n.to(weight.dtype)
        if self.two_sided:
            back = back @ self.state["proj_right"].to(weight.dtype).t()
        weight.addmm_(self.basis(self.p), back, alpha=eta)
        self._copy_back(weight)

    def add_update_and_residual(self, low: Tensor, minus_n: Tensor, eta: float, correction: float, skip: Tensor | None) -> None:
        """Apply W ← W − ηP N and the scaled gradient outside the subspace, in place; ``residual="muon"``: orthogonalised."""
        weight, grad, p = self.matrix(self.p), self.matrix(self.whole_grad), self.basis(self.p)
        residual.add_update(weight, grad, p, low, minus_n, eta, correction, self.group, self.state, skip)
        self._copy_back(weight)

    def add_scaled_gradient(self, low: Tensor, minus_n: Tensor, eta: float, correction: float, skip: Tensor | None) -> None:
        """Apply W ← W − ηG·diag(s), APOLLO's scaled gradient, in place."""
        weight = self.matrix(self.p)
        residual.apollo(weight, self.matrix(self.whole_grad), low, minus_n, eta, correction, self.state, skip)
        self._copy_back(weight)

    @property
    def arrived(self) -> Tensor:
        """Return what the step has of the gradient: R of earlier micro-batches, or the gradient itself."""
        found = self.grad if self.low is None else self.low
        assert found is not None, self.name
        return found

    @property
    def whole_grad(self) -> Tensor:
        """Return this step's gradient, for steps that need all of it."""
        assert self.grad is not None, f"{self.name}: only R of this step's gradient is left"
        return self.grad

    def _copy_back(self, weight: Tensor) -> None:
        if not self.viewable:
            here = dtensor.local_piece(self.p)
            here.copy_((weight if self.left else weight.t()).reshape(here.shape))

    def _keys(self) -> list[str]:
        return ["proj", "proj_right"] if self.two_sided else ["proj"]

    def _generator(self, *words: object, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator of this weight; by default a CPU one, so that runs on different devices draw the same."""
        return generator("galore", self.name, *words, seed=self.group["seed"], device=device)

    def _new_basis(self, matrix: Tensor, old: list[Tensor], m: Tensor) -> list[Tensor]:
        how, beta1 = self.group["refresh"], self.group["betas"][0]
        if how == "svd":
            grad = matrix if self.left else matrix.t()
            return subspace.svd_basis(grad, self.rank, self.proj_type)
        if not old:
            p = subspace.range_finder(matrix, self.rank, self._generator("cold"))
            found = [p, torch.linalg.qr(subspace.product32(matrix.t(), p))[0]] if self.two_sided else [p]
            return [torch.where(matrix.any(), basis, subspace.unit_vectors(basis)) for basis in found]
        if how == "track":
            if self.shards is not None:  # the mixture needs all of m
                m = dtensor.gather_whole(self.state["exp_avg"])
            m = m.to(old[0].dtype)
            if self.two_sided:
                return list(subspace.two_sided_track(matrix, old[0], old[1], m, beta1))
            return [subspace.track_step(matrix, old[0], m, beta1)]
        mean = None if self.shared is None else self.shared.mean
        if self.two_sided:
            return list(subspace.two_sided_step(matrix, old[0], old[1], mean))
        return [subspace.power_step(matrix, old[0], mean)]

    def _enter(self, m: Tensor, second: list[Tensor], new: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Carry moments of the whole matrix (an adopted parameter's) into the first basis: m ← Pᵀm, v ← (P∘P)ᵀv."""
        if "exp_avg" not in self.state:
            return m, second
        wide_m, wide_v = (self.matrix(t).to(new[0].dtype) for t in (m, second[0]))
        right = new[1].t() if self.two_sided else None
        low_m, low_v = subspace.rotate(wide_m, wide_v, self._rows(new[0]).t(), right)
        if self.shards is not None and self.left:  # each rank has had its rows of the sum
            low_m, low_v = (dtensor.sum_over_ranks(t.contiguous(), self.shards) for t in (low_m, low_v))
        m, kept = low_m.to(m.dtype).contiguous(), m.dtype
        if self.second == "factored":
            total, columns = self._over_ranks
            return m, list(factor(low_v.to(wide_dtype(kept)), total, columns))
        return m, [low_v.to(kept).contiguous()] if self.second == "full" else []


def _replace(kept: Tensor, new: Tensor, skip: Tensor | None) -> None:
    """Write ``new`` in place, unless the step is skipped."""
    kept.copy_(new if skip is None else torch.where(skip > 0, kept.to(new.dtype), new))


def refresh_gap(group: Mapping[str, Any]) -> int:
    """Return the steps between two refreshes of a basis."""
    return group["track_every"] if group["refresh"] == "track" else group["update_proj_gap"]
