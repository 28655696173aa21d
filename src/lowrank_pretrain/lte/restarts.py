r"""Restart the learning rate at every merge, as ReLoRA does: it falls to almost nothing and ramps up again.

        lr  |  /‾‾‾-__              the schedule's own warm-up and decay, cut by a ramp after each merge
            | /       | /‾--__
            |/        |/      | /‾-
            +---------+-------+----- optimizer steps

A merge that draws new factors leaves their optimizer without a history: its first steps have length lr for any
gradient is, so lr has to be small (ReLoRA, arXiv 2307.05695, section 3).
"""

from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lowrank_pretrain.core import checks
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lr_factor import LRFactor
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.lte.strategy import LTEStrategy


def jagged_factor(step: int, every: int, warmup: int, start: int = 0) -> float:
    """Return the factor of the learning rate at optimizer step ``step``, counted from 0.

    The first step after the k-th restart, ``step = start + k · every``, k = 1, 2, …, has 1/(warmup+1); step ``warmup`` after
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

    It acts on all groups of all optimizers, on top of any scheduler; ``group["lr"]``, what loggers show and what schedulers
    compute from, stays the schedule's own. The factor follows from the strategy's clock alone (from the trainer's
    step under a strategy that never merges), so a resumed run has the same.

    Example::

        Trainer(strategy=LTEStrategy(heads=1, merge_every=1000, reset=True), callbacks=[JaggedRestarts(1000, warmup=50)])

    Args:
        every: optimizer steps between two restarts; ``None``: the strategy's ``merge_every``.
        warmup: optimizer steps of the ramp, fewer than ``every``.
        start: optimizer steps before the first cycle begins, under another strategy; under ours the merges' clock says it.

    Raises:
        ConfigError: a wrong value; at the start of fit, an ``every`` other than the strategy's ``merge_every``, or none.
    """

    def __init__(self, every: int | None = None, warmup: int = 50, start: int = 0) -> None:
        if every is not None:
            checks.whole("every", every, 1, "optimizer steps")
        checks.whole("warmup", warmup, 0, "optimizer steps")
        checks.whole("start", start, 0, "optimizer steps")
        self.every, self.warmup, self.start = every, warmup, start
        if every is not None:
            self._check(every)
        self._cycle = every  # the strategy's, from ``setup`` on
        self._hooks: LRFactor | None = None
        self._held: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Return a pinned key: a subclass must find this state too."""
        return "JaggedRestarts"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check the cycle against the strategy's merges."""
        if stage != "fit":
            return
        merges = trainer.strategy.merge_every if isinstance(trainer.strategy, Merges) else None
        cycle = merges if self.every is None else self.every
        if cycle is None:
            name = type(trainer.strategy).__name__
            raise ConfigError("every", None, f"must be a number of optimizer steps: {name} has no merge_every to take it from")
        if merges is not None and cycle != merges:
            raise ConfigError("every", self.every, f"must be the strategy's merge_every, {merges} (or null)")
        self._cycle = cycle
        self._check(cycle)
        self._held = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to resume with a cycle other than the checkpoint's."""
        mine = self.state_dict()
        for key, value in (self._held or mine).items():
            if value != mine[key]:
                raise ConfigError(key, mine[key], f"the checkpoint was trained with {value}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the ramps on the optimizers, after other code's hooks."""
        self._hooks = LRFactor(trainer.optimizers, lambda: self._factor(trainer))

    def _factor(self, trainer: pl.Trainer) -> float:
        """Return the factor at the merges' clock (restarted by each fit and freeze), else at the trainer's step."""
        cycle = cast(int, self._cycle)
        if not isinstance(trainer.strategy, LTEStrategy):
            return jagged_factor(trainer.global_step, cycle, self.warmup, self.start)
        strategy = trainer.strategy
        # merges of whole weights before a freeze draw no new factors
        restarts = strategy.local.begun and not (strategy.before == "merge" and not strategy.local.low_rank)
        return jagged_factor(strategy.local.clock, cycle, self.warmup) if restarts else 1.0

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove the ramps from the optimizers."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def state_dict(self) -> dict[str, Any]:
        """Return the cycle; the merges' clock or the trainer's step gives the position in it."""
        return {"every": self._cycle, "warmup": self.warmup, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the cycle for the comparison at the start of fit."""
        self._held = dict(state_dict)

    def _check(self, every: int) -> None:
        if self.warmup >= every:
            raise ConfigError("warmup", self.warmup, f"must be fewer than the {every} optimizer steps between two restarts")
