"""Keep the steps of one worker on one matrix since the last merge (LTE × GaLore), in the form W = C·W_base + P·D + X.

A GaLore step with decoupled weight decay is W ← (W + η·P·(−N))(1 − ηλ). With P fixed between two merges this keeps the form
C·W_base + P·D: D ← (D − η·N)(1 − ηλ), C ← C(1 − ηλ). W is formed anew from the right-hand side at every step instead of being
updated: that costs what the update and the decay cost, a resumed worker finds its W to the bit from r(m+n) numbers, and
weights in half precision lose no small update.

X holds what was written into W by other code than the optimizer (clamps, masks, ``load_state_dict``); usually there is none.
W's version counter shows such a write. A write through ``.data`` does not count there, so on a CPU, and on any device before
the first merge, W's bits are compared as well.

Shapes: W m×n; in the layout of ``Projected.matrix`` d×k, P d×r, D r×k (two-sided: D r×r, and Q k×r).
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_pretrain.core.bits import stamp
from lowrank_pretrain.core.dtypes import at_least_32

if TYPE_CHECKING:
    from lowrank_pretrain.galore.projection import Projected


class LocalUpdate:
    """Keep one matrix in this form. It costs a copy of W in at least float32, and D.

    Args:
        p: the weight; what it holds now is W_base.

    Attributes:
        base: W_base, in p's shape.
        D: the update in the basis; ``None`` before the first step.
        C: the share of W_base that weight decay has left.
        X: the sum of what other code added since the last merge, in p's shape; ``None`` if nothing.
        fresh: the next step renews the basis; only then is D zero.
    """

    def __init__(self, p: Tensor) -> None:
        self.base = p.detach().to(at_least_32(p.dtype), copy=True)
        self.D: Tensor | None = None
        self.C = 1.0
        self.X: Tensor | None = None
        self.fresh = True
        self._reads_bits = not p.is_meta
        self.mark(p)

    def mark(self, p: Tensor) -> None:
        """Record the present W: any later difference was written by other code."""
        self._version = p._version
        self._stamp = int(stamp(p)) if self._reads_bits else None

    @torch.no_grad()
    def absorb(self, slot: "Projected", weight: Tensor | None = None) -> None:
        """Add to X what other code wrote into W since the last step; W is not changed.

        Args:
            slot: the matrix' projection.
            weight: the W being trained, if another tensor is in its place now.
        """
        p = slot.p if weight is None else weight
        if slot.p._version == self._version if self._stamp is None else int(stamp(p)) == self._stamp:
            return
        added = (p.detach() - self.formed(slot).to(p.dtype)).to(self.base.dtype)
        if self.X is not None or added.any():
            self.X = added if self.X is None else self.X.add_(added)
        self._version, self._stamp = slot.p._version, int(stamp(p)) if self._reads_bits else None

    @torch.no_grad()
    def take(self, slot: "Projected", minus_n: Tensor, rate: float) -> None:
        """Take one step: −N in the basis, and ``rate`` = ηλ of decay."""
        self.absorb(slot)
        if self.X is not None:
            self.X.mul_(1 - rate)
        if self.D is None:
            self.D = torch.zeros_like(minus_n, dtype=self.base.dtype)
        self.D.add_(minus_n.to(self.D.dtype), alpha=float(slot.group["lr"]) * slot.group["scale"]).mul_(1 - rate)
        self.C *= 1 - rate
        self.form(slot)

    @torch.no_grad()
    def form(self, slot: "Projected") -> None:
        """Write C·W_base + P·D + X into the weight."""
        if self.D is not None and self.X is None and slot.viewable and slot.p.dtype == self.base.dtype:
            P, D = self.factors(slot.state)
            torch.addmm(slot.matrix(self.base), P, D, beta=self.C, out=slot.matrix(slot.p))
        else:
            slot.p.copy_(self.formed(slot))
        self.mark(slot.p)

    def formed(self, slot: "Projected") -> Tensor:
        """Return C·W_base + P·D + X in the weight's shape, a new tensor."""
        if self.D is None:
            new = self.base * self.C
        else:
            P, D = self.factors(slot.state)
            new = torch.addmm(slot.matrix(self.base), P, D, beta=self.C)
            new = (new if slot.left else new.t()).reshape(slot.p.shape)
        return new if self.X is None else new + self.X

    def factors(self, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return P d×r, and D (two-sided: D Qᵀ) r×k."""
        assert self.D is not None, "there are factors from the first step on"
        P, D = state["proj"].to(self.base.dtype), self.D
        return P, D if "proj_right" not in state else D @ state["proj_right"].to(self.base.dtype).t()

    @torch.no_grad()
    def restart(self, p: Tensor, base: Tensor) -> None:
        """Start again from a merge's result, which becomes W_base and W."""
        self.base.copy_(base)
        p.copy_(self.base)
        if self.D is not None:
            self.D.zero_()
        self.C, self.X, self.fresh = 1.0, None, True
        self._reads_bits = p.device.type == "cpu"  # elsewhere reading them stalls the device at each step
        self.mark(p)
