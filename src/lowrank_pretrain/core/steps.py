"""Optimizer steps, as a callback sees them: a batch ends one, or its gradients only accumulate; and the row of a step."""

from collections.abc import Mapping

import lightning.pytorch as pl


class StepWatch:
    """Tell at the end of a batch whether it ended an optimizer step.

    Example:
        >>> from types import SimpleNamespace as Trainer
        >>> watch = StepWatch()
        >>> watch.begin(Trainer(global_step=3))
        >>> [watch.stepped(Trainer(global_step=step)) for step in (3, 4, 4, 5)]
        [False, True, False, True]
    """

    def __init__(self) -> None:
        self.step = 0  #: optimizer steps, when last asked

    def begin(self, trainer: pl.Trainer) -> None:
        """Note where training starts, in ``on_train_start``."""
        self.step = trainer.global_step

    def stepped(self, trainer: pl.Trainer) -> bool:
        """Return whether there was a step since the last call; call it once in each ``on_train_batch_end``."""
        before, self.step = self.step, trainer.global_step
        return self.step != before


def log_row(trainer: pl.Trainer, metrics: Mapping[str, float], row: int | None = None) -> None:
    """Log metrics to every logger, past Lightning's own rhythm.

    Args:
        trainer: it has the loggers.
        metrics: by name.
        row: the row's number. None: that of the step just taken, which is one less than the steps taken, for Lightning counts
            rows from 0.
    """
    row = max(trainer.global_step - 1, 0) if row is None else row
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=row)
