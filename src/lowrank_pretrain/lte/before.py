"""Let workers agree by merging from the first step, before a phase callback's freeze (``before="merge"``).

    full     workers train whole weights separately and merge their changes, as ``update="full"`` does
    switch   everybody merges once more, unless the clock has just merged; adapters or projections join, and all go on so
    joint    the same, adapters included
    freeze   everybody merges once more; from there on heads or projections of the strategy's own ``update`` train

Clock, wire and outer step are the same in all phases. What is handed over:

- At the switch everything continues by name: the clock, W_base, the outer step's momentum, what the wire has left out. New
  parameters (adapters, the own copy of a tied head) begin without momentum and with nothing left out.
- At the freeze W_base becomes the W that heads train next to, and the outer step begins anew: its momentum was that of whole
  weights. Dropped with it is what the last message left out, less than a quantisation step of one merge. A worker's optimizer
  state stays with it, except the rest's under ``sync_rest="step"``: that is averaged once, or equal gradients would make equal
  weights differ.

A callback decides by W_base, as the last merge left it: the same numbers on all workers, and nothing is sent or changed to
look at them. So its windows end with a merge, the first one at or after their last step.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.increments import Increments
from lowrank_pretrain.lte.local_targets import Fit, LocalTargets
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers


class MergedUntilFreeze(FullSet):
    """Train whole weights separately until a phase callback's freeze; then ``later`` takes over.

    Args:
        settings: the strategy's.
        workers: who merges with whom.
        later: the targets from the freeze on; their joint phase begins at the switch.

    Attributes:
        stage: ``full`` until the switch, then ``joint``.
    """

    def __init__(self, settings: Settings, workers: Workers, later: LocalTargets) -> None:
        super().__init__(settings, workers)
        self.later = later
        self.stage = "full"
        self._changed = False  # the model has other parameters than ``pieces``, until ``follow``

    # -- phases -----------------------------------------------------------------------------------------------------

    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Refuse what the later targets could not take over."""
        self.later.check_adopt(names, fit)

    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Begin the joint phase of the later targets."""
        self.stage, self._changed = "joint", True
        return self.later.adopt(plan, fit)

    def successor(self) -> LocalTargets:
        """Stop, and return the later targets, whose release comes next."""
        self.attached = self.begun = False
        self.fragments = []
        return self.later

    def follow(self, fit: Fit) -> bool:
        """Train the changed model's parameters separately, now that optimizers hold them; return whether it was changed."""
        if not self._changed:
            return False
        before, self._changed = self.fragments, False
        self.begin(fit)
        carry_over(before, self.fragments)
        here = self.parameters()
        self.outer.buffers = {name: buffer for name, buffer in self.outer.buffers.items() if name in here}
        self.optimizers = []
        return True

    def restart(self) -> None:
        """Take the weights now in place, which all workers have read from one file, for those of the last merge."""
        self.start(self.parameters())

    @torch.no_grad()
    def merge_outstanding(self) -> None:
        """Merge what was done since the last merge, so that all hold the same weights. All workers call it together."""
        just_sent = (self.clock // self.settings.interval - 1) if self.clock % self.settings.interval == 0 else None
        if self.pending is not None:
            self._finish()
        for number, increments in enumerate(self.fragments):
            if just_sent is None or number != just_sent % len(self.fragments):
                self._apply(increments, increments.mean(self.training_weights(), overwrite=True), {})

    # -- what a callback may decide by ------------------------------------------------------------------------------

    def settled(self, ahead: int = 0) -> bool:
        """Return whether a merge ends the step that is ``ahead`` of the last one."""
        return (self.clock + ahead) % self.settings.merge_every == 0

    @contextmanager
    def base_in_place(self) -> Iterator[None]:
        """Show W_base instead of W in this block."""
        base = {name: W for increments in self.fragments for name, W in increments.base.items()}
        for increments in self.fragments:
            increments.storage.wait()
        kept = {piece.name: piece.p.data for piece in self.pieces if piece.name in base}
        try:
            for piece in self.pieces:
                if piece.name in base:
                    piece.p.data = base[piece.name].to(piece.p)
            yield
        finally:
            for piece in self.pieces:
                if piece.name in kept:
                    piece.p.data = kept[piece.name]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def takes(self, state: Mapping[str, Any]) -> bool:
        """Return whether ``lte_state`` is for the targets as they are now: that of another phase waits for its replay."""
        return state.get("update") == "full" and state["stage"] == self.stage == "full"

    def saved_state(self) -> dict[str, Any] | None:
        """Return the targets' part of ``lte_state``."""
        found = super().saved_state()
        return None if found is None else {**found, "stage": self.stage}


@torch.no_grad()
def carry_over(before: Iterable[Increments], after: Iterable[Increments]) -> None:
    """Give what the wire has left out so far to the same weights in other flat buffers.

    What a worker's messages of the mean have left out joins what its own messages have, times w, because those are averaged:
    the sum stays, and nothing is sent.

    Args:
        before: the increments so far, by fragment.
        after: those of the changed model.
    """
    parts: dict[str, Tensor] = {}
    for old in before:
        old.storage.wait()
        pending, wire = old.wire.sent_error.clone(), old.wire
        if not len(pending):
            return
        chunk = len(wire.mean_error)
        first = old.workers.rank * chunk
        pending[first : first + chunk] += old.workers.size * wire.mean_error
        parts |= old.by_name(pending[: wire.n])
    for new in after:
        for name, place in new.by_name(new.wire.sent_error[: new.wire.n]).items():
            if name in parts:
                place.copy_(parts[name])
