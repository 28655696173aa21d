"""Build a command-line run's callbacks, in the order in which each step calls them."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from lowrank_pretrain.checkpoints.bookkeeping import Bookkeeping
from lowrank_pretrain.core.interrupts import Interrupts
from lowrank_pretrain.export.facts import RememberFacts
from lowrank_pretrain.guards.divergence import DivergenceGuard
from lowrank_pretrain.guards.watchers import watchers
from lowrank_pretrain.observe.closing_loss import ClosingLoss
from lowrank_pretrain.observe.monitor import Monitor
from lowrank_pretrain.observe.norms import WeightNorms
from lowrank_pretrain.run.parts import Parts
from lowrank_pretrain.run.progress import progress


class RunCallbacks:
    """Make the callbacks of one attempt. Values of the configuration are checked here, before data and model are built.

    Args:
        config: the run's plain configuration.
        run_dir: the run directory.
        ckpt: the checkpoint that the run resumes from.
        guard: watches loss and gradients.

    Raises:
        ConfigError: a wrong value.
    """

    def __init__(self, config: dict[str, Any], run_dir: Path, ckpt: Path | None, guard: DivergenceGuard) -> None:
        self.monitor = Monitor()
        self._guards: list[Callback] = [guard, *watchers(config["stall_timeout"], config["agree_every"])]
        self._bookkeeping = Bookkeeping(run_dir / "checkpoints", config["save_every"], ckpt)
        self._bar = config["trainer"].get("enable_progress_bar")

    def in_order(self, parts: Parts, interrupts: Interrupts) -> list[Callback]:
        """Return the callbacks; each sees a step before those below it."""
        return [
            *self._bookkeeping.before_all(),
            *self._guards,
            RememberFacts(parts.data),
            ClosingLoss(),
            self.monitor,  # measures a step before the method changes the model after it
            *parts.method.callbacks,
            WeightNorms(),
            *progress(self.monitor, self._bar),
            interrupts,
            *self._bookkeeping.after_all(interrupts),
        ]
