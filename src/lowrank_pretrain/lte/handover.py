"""Answer a phase callback: take its plan at the switch, begin heads or projections at the freeze, follow each change.

``before="ddp"``: until the freeze this is plain DDP. ``before="merge"``: workers train separately from the first step, and
``before.MergedUntilFreeze`` stands where heads or projections will be.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
from torch import nn

from lowrank_pretrain.checkpoints.format import SIDE
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import leave_out_of_ddp
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Adopter, HasPhase, Inherit, phase_of
from lowrank_pretrain.lte import checkpoint as files
from lowrank_pretrain.lte.before import MergedUntilFreeze
from lowrank_pretrain.lte.local_targets import Fit, LocalTargets
from lowrank_pretrain.lte.looking import ShowsMerged
from lowrank_pretrain.lte.sent import REST, BytesSent
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.phases import plain_checkpoint


class FollowsPhases(ShowsMerged, Adopter, HasPhase):
    """Hold a converted module that changes with a callback's phases: the part of ``LTEStrategy`` that speaks with the callback.

    Attributes:
        workers_differ: whether workers hold different weights between merges, heads aside.
        sent: the bytes of the run so far.
    """

    compares_ranks = True
    workers_differ: bool
    sent: BytesSent
    settings: Settings
    _resume: files.Resume
    _trains: bool  # whether training has started, and a resume has repeated its changes
    _gradient_bytes: float  # that a worker sends for an optimizer step where DDP has wrapped the model

    @property
    def local(self) -> LocalTargets:
        """Return what this worker trains on its own."""
        return self.converted.local

    @property
    def _merging(self) -> MergedUntilFreeze | None:
        """Return what merges until the freeze, while it does."""
        return self.local if isinstance(self.local, MergedUntilFreeze) else None

    @property
    def _module(self) -> pl.LightningModule:
        """Return the module, which a strategy has from the start of a fit."""
        return cast(pl.LightningModule, self.lightning_module)

    def _fit(self) -> Fit:
        of = self.converted
        return Fit(of.module, list(self.optimizers), of.workers, of.ignored, self._resume.left_out)

    # -- the protocol of core/protocols.py --------------------------------------------------------------------------

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Refuse, before training, targets that could not be taken over."""
        self.local.check_adopt(names, self._fit())

    def before_transition(self) -> None:
        """Merge what workers have done since the last merge, and have all weights compared."""
        if self._merging is not None:
            self._merging.merge_outstanding()
            self._count(phase_of(self._module.trainer))
            leave_out_of_ddp(self._module, self.converted.ignored)

    def adopt(self, plan: Plan, module: nn.Module) -> list[Inherit]:
        """Begin the joint phase: one adapter per target that all workers average; or the optimizer's projections.

        Raises:
            ConfigError: every target has rank 0.
        """
        if not any(plan.values()):
            raise ConfigError(
                "ranks", 0, "the plan gives 0 to every target, and LTE has nothing to train separately: leave 0 out"
            )
        return self.local.adopt(plan, self._fit())

    def release(self) -> list[Inherit]:
        """Make the targets this worker's own, at the freeze: every head starts from the joint phase's adapter."""
        return self.converted.release(self._fit())

    def after_transition(self) -> None:
        """Separate targets and rest, now that the optimizers hold both; restore a checkpoint's state; start the clock."""
        merged_before = not isinstance(self.local, MergedUntilFreeze) and self.settings.before == "merge"
        self.converted.follow(self._fit())
        if not self.local.begun:
            return
        if not self.local.optimizers:
            self.converted.assign_optimizers(list(self.optimizers))
            if merged_before:
                self._count("joint")  # heads began with the mean of their factors
                self.converted.rest.agree_on_moments(list(self.optimizers))
                self._count(REST)
            self.phase = "lowrank" if self.local.low_rank else "full"
            self.workers_differ = self.converted.rest.apart
            if self._resume.state is not None and self.local.takes(self._resume.state):
                self._resume.give_kept(self.converted)

    def after_replay(self) -> None:
        """Restore each worker's own weights of a joint phase that merges: the file's exact values are one worker's."""
        if self._merging is not None:
            self._merging.restart()
            if self._resume.state is not None:
                self._resume.give_kept(self.converted)

    def settled(self, ahead: int = 0) -> bool:
        """Return whether a callback may decide now: with ``before="merge"`` right after a merge."""
        return self._merging is None or self._merging.settled(ahead)

    @contextmanager
    def agreed_weights(self) -> Iterator[None]:
        """Show weights that all workers hold alike, in this block."""
        if self._merging is None:
            yield
            return
        with self._merging.base_in_place():
            yield

    def _note_merged(self, checkpoint: dict[str, Any]) -> None:
        """Have a file of a merging joint phase hold the merged W, A and B: the callback wrote this worker's own."""
        merging = self._merging
        exact = checkpoint.get(SIDE, {}).get("exact")
        if merging is None or not merging.attached or not exact:
            return
        if self.local.view.swapped_in:
            return
        with self.converted.swapped_in_to_write():
            now = plain_checkpoint.exact_values(self._module)
            exact |= {name: now[name].clone() for name in exact}

    # -- bytes ------------------------------------------------------------------------------------------------------

    def _count(self, what: str) -> None:
        """Put what workers have sent since the last call down to a phase, or to the rest."""
        self.sent.up_to(self.converted.workers.sent, what if self._trains else None)

    def _count_gradients(self) -> None:
        """Count what DDP has averaged for an optimizer step."""
        if self.model is not self.lightning_module:
            of_rest = self.local.begun and self.settings.mode != "joint"
            self.sent.add(self._gradient_bytes, REST if of_rest else phase_of(self._module.trainer))

    def sent_mebibytes(self) -> dict[str, float]:
        """Return what this worker has sent in the run so far, an interrupted part included; see ``sent``."""
        return self.sent.mebibytes()
