"""Show a run while it trains: a bar with loss, throughput and phase, or a line per epoch without a terminal."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from typing_extensions import override

from lowrank_pretrain.core.text import format_number
from lowrank_pretrain.observe.monitor import RECENT, Monitor

HOME = Path(__file__).parents[1]  # the package: warnings from there are ours
FORMAT = warnings.formatwarning  # Lightning's, which is imported by now

# Remarks of Lightning and related libraries at every run that need no action
REMARKS: tuple[str, ...] = (
    "💡",
    "GPU available",
    "TPU available",
    "HPU available",
    "Restor",
    "Loaded model weights",
    "Loading `train_data",
)
REMARKS += ("`Trainer.fit` stopped", "`weights_only` was not set", "Pretrained mean does not", "Pretrained std does not")
REMARKS += ("`Trainer(limit_", "Initializing distributed", "-" * 80)  # the last: which backend, how many processes
REMARKS += ("Failed to load CPU gemm_4bit",)  # bitsandbytes, whose 8-bit moments do without
WARNINGS = (
    r".*treespec, LeafSpec",
    r".*does not have many workers",
    r".*This DataLoader will create",  # more workers than cores: data.num_workers may suit another machine
    r".*Checkpoint directory .* exists and is not empty",
    r".*smaller than the logging interval",
    r".*You have overridden `on_before_batch_transfer`",
    r".*functional.all_gather is deprecated",
    r".*all_gather_into_tensor` is deprecated",  # its successor is younger than the oldest torch that we support
    r"MLFlow only allows",  # families have stars in their names
    r"Grad strides do not match bucket view strides",
)


def progress(monitor: Monitor, bar: bool | None = True) -> list[Callback]:
    """Return the callbacks that show a line per epoch and, if stdout is a terminal and `bar` is not false, a bar."""
    lines: list[Callback] = [EpochLines(monitor)]
    return [*lines, PhaseBar(monitor)] if sys.stdout.isatty() and bar is not False else lines


def quiet_lightning() -> None:
    """Hide remarks that need no action, and print our own warnings on one line without source code."""
    warnings.formatwarning = _one_line
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    names = ("lightning.pytorch", "lightning.fabric", None)
    for handler in [handler for name in names for handler in logging.getLogger(name).handlers]:
        if not any(isinstance(f, _NoRemarks) for f in handler.filters):
            handler.addFilter(_NoRemarks())


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Format a warning; ours as the message alone, because its source line does not help a user."""
    if Path(filename).is_relative_to(HOME):
        return f"warning: {message}\n"
    return FORMAT(message, category, filename, lineno, line)


class _NoRemarks(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(REMARKS)


class PhaseBar(RichProgressBar):
    """Show Lightning's rich bar with phase, loss and samples per second, narrow enough for a terminal of 80 columns."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._monitor = monitor

    @override
    def configure_columns(self, trainer: Trainer) -> list:
        description, bar, batches, times, _batches_per_second = super().configure_columns(trainer)
        bar.bar_width = 12
        return [description, bar, batches, times]

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        record, shown = self._monitor.record, _shown(trainer, self._monitor, ("train/loss",))
        return {record.phase: " · ".join(shown[1:])} if record.phase and len(shown) > 1 else {}


class EpochLines(Callback):
    """Print one line of plain text per epoch, which Lightning counts from 0, here as in its bar and in metrics.csv."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs - 1}"
            shown = _shown(trainer, self._monitor, ("train/loss", "val/loss", "val/acc1", "val/ppl"))
            print(f"epoch {trainer.current_epoch}{last} · step {trainer.global_step} · {' · '.join(shown)}", flush=True)


def _shown(trainer: Trainer, monitor: Monitor, keys: tuple[str, ...]) -> list[str]:
    """Return phase, some metrics and throughput as words; leave out unknown values."""
    record, found = monitor.record, trainer.callback_metrics
    shown = [record.phase] if record.phase else []
    shown += [f"{key.removeprefix('train/')} {format_number(float(found[key]))}" for key in keys if key in found]
    rate = record.samples_per_sec(last=RECENT)
    return shown + ([f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"] if rate else [])
