"""Ask Lightning's Trainer about its steps and parts, and log a row to its loggers.

Some public attributes of the Trainer are set by its connectors, where a type checker does not see them: they are read here.
All was tried with Lightning 2.6.6.
"""

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer

from lowrank_pretrain.core.lightning_private import SHOULD_ACCUMULATE

# -- steps ----------------------------------------------------------------------------------------------------------


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


def accumulates(trainer: pl.Trainer) -> bool:
    """Return whether the running batch is not the last of its optimizer step.

    ``accumulate_grad_batches`` alone does not tell: the last batch of an epoch always ends a step.
    """
    return getattr(trainer.fit_loop.epoch_loop, SHOULD_ACCUMULATE)()


def log_row(trainer: pl.Trainer, metrics: Mapping[str, float], row: int | None = None) -> None:
    """Log metrics to every logger, independently of Lightning's own interval.

    Args:
        trainer: holds the loggers.
        metrics: by name.
        row: the row's number. None: that of the step just taken, one less than the steps taken, because Lightning counts
            rows from 0.
    """
    row = max(trainer.global_step - 1, 0) if row is None else row
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=row)


# -- parts ----------------------------------------------------------------------------------------------------------


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """Return ``trainer.callbacks``."""
    untyped: Any = trainer
    callbacks: list[pl.Callback] = untyped.callbacks
    return callbacks


def move_before_foreign(trainer: pl.Trainer, callback: pl.Callback) -> None:
    """Let a callback see the end of a batch before a user's callbacks do.

    One of them that writes a checkpoint there would write it without what this callback counts and decides at this batch's
    end, and nobody would count it after a resume. Lightning's own come in the user's order: its ModelCheckpoint is always last.
    """
    if type(callback).on_train_batch_end is pl.Callback.on_train_batch_end:
        return
    untyped: Any = trainer
    callbacks = callbacks_of(trainer)
    ours = ("lightning.", "lowrank_pretrain.")
    foreign = [one for one in callbacks[: callbacks.index(callback)]
               if not type(one).__module__.startswith(ours)
               and type(one).on_train_batch_end is not pl.Callback.on_train_batch_end]  # fmt: skip
    if foreign:
        others = [one for one in callbacks if one is not callback]
        others.insert(others.index(foreign[0]), callback)
        untyped.callbacks = others  # another list: Lightning walks over the old one now


def log_interval(trainer: pl.Trainer) -> int:
    """Return ``trainer.log_every_n_steps``."""
    untyped: Any = trainer
    steps: int = untyped.log_every_n_steps
    return steps


def datamodule_of(trainer: pl.Trainer) -> pl.LightningDataModule | None:
    """Return ``trainer.datamodule``."""
    untyped: Any = trainer
    return untyped.datamodule


def optimizers_inside(optimizer: Optimizer) -> list[Optimizer]:
    """Return the optimizers that an optimizer holds as attributes, nested ones included."""
    found: list[Optimizer] = []
    stack: list[Any] = list(vars(optimizer).values())
    while stack:
        value = stack.pop()
        if isinstance(value, Optimizer) and value is not optimizer and not any(value is other for other in found):
            found.append(value)
            stack += list(vars(value).values())
        elif isinstance(value, (list, tuple)) and len(value) < 16:
            stack += [item for item in value if isinstance(item, Optimizer)]
    return found


def profiler_of(trainer: pl.Trainer) -> Any:
    """Return ``trainer.profiler``."""
    untyped: Any = trainer
    return untyped.profiler


def run_length(trainer: pl.Trainer) -> tuple[float, float]:
    """Return ``max_steps`` and the optimizer steps of an epoch; infinite if unlimited or unknown."""
    untyped: Any = trainer
    batches = trainer.num_training_batches
    changes = any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks_of(trainer))
    changes = changes or bool(untyped.reload_dataloaders_every_n_epochs)  # a later epoch's loader may have another length
    known = math.isfinite(batches) and not changes
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if known else math.inf
    return (trainer.max_steps if trainer.max_steps not in (None, -1) else math.inf), per_epoch


def is_trial(trainer: pl.Trainer) -> bool:
    """Return whether ``trainer.fast_dev_run`` is on."""
    untyped: Any = trainer
    return bool(untyped.fast_dev_run)


RANKS = ("RANK", "LOCAL_RANK")  # environment variables from which Lightning takes `process_rank` when it is imported


def process_rank() -> int:
    """Return ``rank_zero_only.rank``: this process's number in the run."""
    return getattr(rank_zero_only, "rank", 0)
