r"""ReLoRA's jagged schedule: the learning rate falls to almost nothing at every merge and ramps up again.

        lr  |  /‾‾‾-__              the schedule's own warm-up and decay, cut by a ramp behind each merge
            | /       | /‾--__
            |/        |/      | /‾-
            +---------+-------+----- optimizer steps

A merge that draws new factors leaves their optimizer without a history: its first steps are as long as lr whatever the
gradient is, so lr has to be small (ReLoRA, arXiv 2307.05695, section 3).
"""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lr_factor import LRFactor
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.lte.strategy import LTEStrategy


def jagged_factor(step: int, every: int, warmup: int, start: int = 0) -> float:
    """What optimizer step `step` (counted from 0) multiplies its learning rate by.

    The first step after the k-th restart, ``step = start + k · every``, k = 1, 2, …, has 1/(warmup+1); step `warmup` after
    it has 1 again. No step is spent at rate 0.

    Args:
        step: optimizer steps taken before it.
        every: steps between two restarts.
        warmup: length of the ramp in steps; 0: no ramp.
        start: steps before the first cycle begins (ReLoRA's full-rank warm start).
    """
    into = step - start
    if into < every:
        return 1.0
    return min(1.0, (into % every + 1) / (warmup + 1))


class JaggedRestarts(Callback):
    """Cut the learning rate after every merge and ramp it up linearly to what the scheduler says.

    It acts on all groups of all optimizers, beneath whatever scheduler there is; ``group["lr"]``, what loggers show and what
    schedulers compute from, stays the schedule's own. The factor follows from the strategy's clock alone (from the trainer's
    step under a strategy that never merges), so a resumed run has the same.

    Example::

        Trainer(strategy=LTEStrategy(heads=1, merge_every=1000, reset=True), callbacks=[JaggedRestarts(1000, warmup=50)])

    Args:
        every: optimizer steps between two restarts; ``None``: the strategy's ``merge_every``.
        warmup: optimizer steps of the ramp, fewer than `every`.
        start: optimizer steps before the first cycle begins, under another strategy; under ours the merges' clock says it.

    Raises:
        ConfigError: a wrong value; at the start of fit, an `every` that is not the strategy's ``merge_every``, or none at all.
    """

    def __init__(self, every: int | None = None, warmup: int = 50, start: int = 0) -> None:
        for key, value, least in (("every", every, 1), ("warmup", warmup, 0), ("start", start, 0)):
            if key == "every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(key, value, f"must be an integer of {least} or more optimizer steps")
        self.every, self.warmup, self.start = every, warmup, start
        if every is not None:
            self._check(every)
        self._cycle = every
        self._hooks: LRFactor | None = None
        self._held: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Pinned: a subclass must find this state too."""
        return "JaggedRestarts"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree with the strategy on when merges are."""
        if stage != "fit":
            return
        merges = trainer.strategy.merge_every if isinstance(trainer.strategy, Merges) else None
        if self.every is None and merges is None:
            name = type(trainer.strategy).__name__
            raise ConfigError("every", None, f"must be a number of optimizer steps: {name} has no merge_every to take it from")
        if self.every is not None and merges is not None and self.every != merges:
            raise ConfigError("every", self.every, f"must be the strategy's merge_every, {merges} (or null)")
        self._cycle = merges if self.every is None else self.every
        self._check(self._cycle)
        self._held = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to go on with another rhythm than the checkpoint's."""
        mine = self.state_dict()
        for key, value in (self._held or mine).items():
            if value != mine[key]:
                raise ConfigError(key, mine[key], f"the checkpoint was trained with {value}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lay the ramps over the optimizers, behind the hooks that others have."""
        self._hooks = LRFactor(trainer.optimizers, lambda: self._factor(trainer))

    def _factor(self, trainer: pl.Trainer) -> float:
        """By the clock of the merges where there is one: it begins anew with a fit, and at a phase callback's freeze."""
        if not isinstance(trainer.strategy, LTEStrategy):
            return jagged_factor(trainer.global_step, self._cycle, self.warmup, self.start)
        heads = trainer.strategy.heads
        return 1.0 if heads is None else jagged_factor(heads.clock, self._cycle, self.warmup)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        """The rhythm; where in it a run stands is the trainer's step."""
        return {"every": self._cycle, "warmup": self.warmup, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept for the comparison at the start of fit."""
        self._held = dict(state_dict)

    def _check(self, every: int) -> None:
        if self.warmup >= every:
            raise ConfigError("warmup", self.warmup, f"must be fewer than the {every} optimizer steps between two restarts")
