"""Warn when a resumed run is longer than the checkpoint's and its schedule is not ours: the schedule may have ended."""

import math
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lowrank_pretrain.checkpoints.format import SIDE
from lowrank_pretrain.models.optim import Schedule

KEY = "steps"  # in a checkpoint's side entry
ENDS = ("T_max", "total_steps", "total_iters", "_milestones", "milestones", "lr_lambdas")  # what torch's schedulers know of it


class LongerRun(Callback):
    """Compare the run's length with the checkpoint's if the schedule is not ours.

    Torch's schedulers restore all their attributes from the file, including the length of the run.
    """

    def __init__(self) -> None:
        self._before: int | None = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        steps = _length(trainer)
        if steps is not None:
            checkpoint.setdefault(SIDE, {})[KEY] = steps

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._before = checkpoint.get(SIDE, {}).get(KEY)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, self._before, now = self._before, None, _length(trainer)
        if before is None or now is None or now == before:
            return
        for config in trainer.lr_scheduler_configs:
            if not isinstance(config.scheduler, Schedule) and any(hasattr(config.scheduler, name) for name in ENDS):
                name = type(config.scheduler).__name__
                warnings.warn(
                    f"the schedule ({name}) is the checkpoint's, whose run was of {before:,} steps; this one is of {now:,}: "
                    "the rate may come to its end on the way; start afresh, or have the optim group make the optimizer",
                    stacklevel=2,
                )


def _length(trainer: Trainer) -> int | None:
    """Return the optimizer steps of the whole run; None if unknown."""
    try:
        steps = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the number of batches per step changes during the run
        return None
    return None if math.isinf(steps) else int(steps)
