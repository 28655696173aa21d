"""End a run at the next optimizer step after Ctrl-C or SIGTERM, with a checkpoint to resume from."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.core.trainer import log_interval

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """Say that the run was told to stop.

    Args:
        name: the signal's, ``"SIGINT"`` or ``"SIGTERM"``.
        checkpoint: the file written for the resume; None outside of training steps.
    """

    def __init__(self, name: str, checkpoint: Path | None = None) -> None:
        super().__init__(name, checkpoint)
        self.name, self.checkpoint = name, checkpoint

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal's number, as shells do."""
        return 128 + signal.Signals[self.name].value


class Interrupts(Callback):
    """Turn the first signal during training steps into a request to stop; elsewhere, a signal ends the run at once.

    A context manager around the whole run, and a callback that sees when the steps begin and end: Lightning would
    answer SIGTERM with an exception in the middle of an accumulated step, so its handler is replaced in between.
    A second signal ends the process as if there were no handler.
    """

    def __init__(self) -> None:
        self._wish: str | None = None
        self._stepping = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._listen()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_before": {}}  # handlers do not travel to spawned processes

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._wish:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._wish = name
        if not self._stepping:
            raise Interrupted(name)
        print(f"\n{name}: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def agreed(self, trainer: Trainer) -> str | None:
        """Return the signal that this process has received, or any process when all are asked, every few steps."""
        if trainer.world_size == 1:
            return self._wish
        if trainer.global_step % max(1, log_interval(trainer)) and not trainer.is_last_batch:
            return None  # asking all processes costs a sync
        if trainer.strategy.reduce_boolean_decision(self._wish is not None, all=False):
            return self._wish or "SIGTERM"
        return None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepping = True
        if threading.current_thread() is threading.main_thread():
            self._listen()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stepping = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stepping = False
