"""What a run shows while it trains: a bar with loss, throughput and phase, or a line per epoch where nobody watches."""

import logging
import sys
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from .monitor import RECENT, Monitor

# What Lightning and its friends say at every run and nobody can act on.
REMARKS = ("💡", "GPU available", "TPU available", "HPU available", "Restor", "Loaded model weights", "Loading `train_data")
REMARKS += ("`Trainer.fit` stopped", "`weights_only` was not set", "Pretrained mean does not", "Pretrained std does not")
WARNINGS = (
    r".*treespec, LeafSpec",
    r".*does not have many workers",
    r".*Checkpoint directory .* exists and is not empty",
    r".*smaller than the logging interval",
    r".*You have overridden `on_before_batch_transfer`",
)


def progress(monitor: Monitor, bar: bool | None = True) -> Callback:
    """The bar where stdout is a terminal and `bar` is not false, else plain lines."""
    return PhaseBar(monitor) if sys.stdout.isatty() and bar is not False else EpochLines(monitor)


def quiet_lightning() -> None:
    """Keep remarks that nobody can act on out of the output."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for handler in [*logging.getLogger("lightning.pytorch").handlers, *logging.getLogger().handlers]:
        if not any(isinstance(f, _NoRemarks) for f in handler.filters):
            handler.addFilter(_NoRemarks())


class _NoRemarks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


class PhaseBar(RichProgressBar):
    """Lightning's rich bar with loss, samples per second, phase and the last validation beside it."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(leave=True)
        self._monitor = monitor

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _shown(trainer, self._monitor)


class EpochLines(Callback):
    """One line of plain text per epoch."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            shown = " · ".join(f"{key} {value}" for key, value in _shown(trainer, self._monitor).items())
            print(f"epoch {trainer.current_epoch + 1}{last} · step {trainer.global_step} · {shown}", flush=True)


def _shown(trainer: Trainer, monitor: Monitor) -> dict[str, str]:
    """Phase, loss, throughput and validation as words, in that order; what is not known yet is left out."""
    record, found = monitor.record, trainer.callback_metrics
    shown = {"phase": record.phase} if record else {}
    for key, name in (("train/loss", "loss"), ("val/loss", "val/loss"), ("val/acc1", "val/acc1"), ("val/ppl", "val/ppl")):
        if key in found:
            shown[name] = f"{float(found[key]):.4g}"
    rate = record.samples_per_sec(last=RECENT) if record else None
    return shown | ({"samples/s": f"{rate:.4g}"} if rate else {})
