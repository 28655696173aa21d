"""A mend of Lightning's: with ``max_steps`` set, a run resumed from the end of an epoch counted that epoch twice."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override


class LoopState(Callback):
    """Restores the fit loop as if there were no ``max_steps``. Put it first among the callbacks.

    Lightning asks "is there a max_steps?" where it means "did the checkpoint's epoch end?" (``FitLoop.restarting``,
    ``FitLoop.on_run_start``); with one, it goes through the finished epoch again without a batch, counts it twice and
    from then on trains on other data. The limit is put aside while the loop is restored, which ends with the first hook
    of training.
    """

    def __init__(self) -> None:
        self._resuming = False
        self._max_steps = -1

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resuming = trainer.state.fn == TrainerFn.FITTING

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resuming:
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = -1

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resuming:
            trainer.fit_loop.epoch_loop.max_steps = self._max_steps
            self._resuming = False
