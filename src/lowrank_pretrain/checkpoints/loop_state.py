"""Repair Lightning's resume: with ``max_steps`` it counts an epoch twice, and it leaves hooks out."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lowrank_pretrain.core.buckets import settle_buckets
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.galore.state import follow_rates

KEY = "loop_state"


def _by_metric(trainer: Trainer) -> list[Any]:
    return [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau and config.interval == "epoch"]


class LoopState(Callback):
    """Restore the fit loop as if there were no ``max_steps``. Put it first among the callbacks.

    Lightning asks "is there a max_steps?" where it means "did the checkpoint's epoch end?" (``FitLoop.restarting``,
    ``FitLoop.on_run_start``); with one, it goes through the finished epoch again without a batch, counts it twice and
    from then on trains on other data. The limit is lifted while the loop is restored, which ends with the first hook
    of training.

    A run resumed in the middle of an epoch does not call ``on_train_epoch_start``, in which
    ``GradientAccumulationScheduler`` sets how many batches make a step: until the next epoch it would be 1.

    A run that was killed after its last step resumes without a step, and Lightning then skips ``on_train_end`` too,
    where ``WeightAveraging`` hands its weights to the model: the last step's weights would be tested and exported instead.

    A scheduler that follows a metric (``ReduceLROnPlateau``) is stepped after the last hook of an epoch; a file written in
    that hook lacks the step. Lightning also skips the step in an epoch that was resumed in its middle, because it does
    not save metrics.

    In the first step after a start, DDP adds gradients in another order than in all later steps: see ``buckets``.
    """

    def __init__(self) -> None:
        self._resuming = False
        self._first_batch = False
        self._max_steps = -1
        self._metrics: dict[str, float] = {}  # from the checkpoint, by the names that schedulers use
        self._owed = False  # the checkpoint was written after an epoch, but its schedulers have not been told
        self._resumed_inside = False  # until the end of the epoch

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resuming = trainer.state.fn == TrainerFn.FITTING
        state = checkpoint.get(KEY, {})
        self._metrics, self._owed = state.get("metrics", {}), state.get("owed", False)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        known = trainer.callback_metrics
        metrics = {c.monitor: float(known[c.monitor]) for c in _by_metric(trainer) if c.monitor in known}
        epochs: Any = trainer.fit_loop.epoch_progress.current
        owed = trainer.training and epochs.processed > epochs.completed and not self._resumed_inside
        if metrics:
            checkpoint[KEY] = {"metrics": self._metrics | metrics, "owed": owed}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resuming:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        settle_buckets(trainer.strategy.model)
        if self._resuming:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._resuming, self._first_batch = False, True
            for config in trainer.lr_scheduler_configs:
                follow_rates(config.scheduler)
            if self._owed:  # the last thing that the epoch owes
                self._step(trainer, pl_module, trainer.current_epoch)
            self._resumed_inside = not self._owed and trainer.fit_loop.restarting

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._first_batch:  # not earlier: the scheduler refuses a Trainer whose number is not 1 as training starts
            self._first_batch = False
            for callback in callbacks_of(trainer):
                if isinstance(callback, GradientAccumulationScheduler):
                    trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed_inside and trainer.fit_loop.restarting:
            self._metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
            self._step(trainer, pl_module, trainer.current_epoch + 1)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resumed_inside = False

    def _step(self, trainer: Trainer, pl_module: LightningModule, epochs: int) -> None:
        for config in _by_metric(trainer):
            if config.monitor in self._metrics and epochs % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, self._metrics[config.monitor])

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resuming:  # training has not even started
            self._resuming = False
            for callback in callbacks_of(trainer):
                if isinstance(callback, WeightAveraging):
                    callback.on_train_end(trainer, pl_module)
