"""Checkpoint files: written whole or not at all, found again, and checked before anything is built on them."""

import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from .errors import ConfigError
from .interrupts import Interrupted, Interrupts

PARTS = ("state_dict", "optimizer_states", "loops", "global_step")  # what a checkpoint that resumes must hold


class NotWritten(OSError):
    """A checkpoint could not be written; the one that was there is as it was."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then replaces: a crash or a full disk leaves the old file as it was.

    Raises:
        NotWritten: names the target and why.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            free = shutil.disk_usage(path.parent).free // 2**20  # torch's own message does not say that the disk is full
            raise NotWritten(f"{path} could not be written, {free} MiB were free on its disk: {error}") from error
        finally:
            beside.unlink(missing_ok=True)


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` where a run can go on from exactly, and ends the run there when it was interrupted.

    That is at the end of every epoch, and within one every `every_n_steps` optimizer steps; but never at a batch which
    validation follows, for Lightning would skip that validation on resume.

    Args:
        directory: where ``last.ckpt`` lies.
        every_n_steps: optimizer steps between two writings within an epoch; 0: only at epochs' ends.
        interrupts: who knows whether the run was told to stop; None: nobody.
    """

    def __init__(self, directory: str | os.PathLike, every_n_steps: int = 0, interrupts: Interrupts | None = None) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 0:
            raise ConfigError("save_every", every_n_steps, "must be 0 (only at epochs' ends) or more optimizer steps")
        self.path = Path(directory) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self.interrupts = interrupts
        self._seen_step = 0
        self._leaving: str | None = None

    @property
    @override
    def state_key(self) -> str:
        return "LastCheckpoint"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step or trainer.fast_dev_run:  # gradients still accumulate
            return
        self._seen_step = step
        if trainer.is_last_batch or _validation_follows(trainer, batch_idx):
            return
        signal = self._told_to_stop(trainer)
        if signal or (self.every_n_steps and step % self.every_n_steps == 0):
            self._write(trainer, signal)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:
            self._write(trainer, self._told_to_stop(trainer))

    def _told_to_stop(self, trainer: Trainer) -> str | None:
        return self.interrupts.agreed(trainer) if self.interrupts else None

    def _write(self, trainer: Trainer, signal: str | None) -> None:
        trainer.save_checkpoint(self.path)
        self._leaving = signal

    # An interrupted run ends only after Lightning has logged the step that the checkpoint holds.
    def _leave(self, *_: Any) -> None:
        if self._leaving:
            raise Interrupted(self._leaving, self.path)

    on_train_batch_start = on_train_epoch_start = on_train_end = _leave


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    if not trainer.enable_validation or trainer.val_check_batch in (None, float("inf")):
        return False
    # Lightning counts batches through all epochs where check_val_every_n_epoch is None
    batches = batch_idx + 1 if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx + 1
    return batches % trainer.val_check_batch == 0


def inspect(path: Path) -> dict[str, Any]:
    """The checkpoint at `path`, its tensors mapped and not read.

    Raises:
        ConfigError: there is none, it is truncated, or it is not a checkpoint that resumes; keyed ``ckpt_path``.
    """
    if not path.is_file():
        raise ConfigError("ckpt_path", str(path), "no such file; must be a checkpoint, last, or null to start afresh")
    if not zipfile.is_zipfile(path):  # the directory of a zip file is its end: a truncated one has none
        raise ConfigError("ckpt_path", str(path), "is truncated or not a checkpoint; must be a whole one, or last")
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here; all mean the same to whoever named the file
        reason = str(error).strip().splitlines()[0][:120]
        raise ConfigError("ckpt_path", str(path), f"cannot be read as a checkpoint ({reason})") from error
    lacking = [part for part in PARTS if not isinstance(checkpoint, dict) or part not in checkpoint]
    if lacking:
        allowed = f"is no checkpoint that training can go on from: it lacks {', '.join(lacking)}"
        raise ConfigError("ckpt_path", str(path), allowed)
    return checkpoint


def newest_whole(directory: Path) -> Path | None:
    """The checkpoint in `directory` that is whole and furthest on; None where there is none. Warns of broken ones."""
    found = []
    for path in sorted(directory.glob("*.ckpt")):
        try:
            found.append((inspect(path)["global_step"], path.name == "last.ckpt", path))
        except ConfigError as error:
            warnings.warn(f"skipped {path}: {error.allowed}", stacklevel=2)
    return max(found)[-1] if found else None


def check_fits(path: Path, module: LightningModule) -> int:
    """The number of optimizer steps behind the checkpoint at `path`, which must be of a model like `module`.

    Raises:
        ConfigError: it is of another model; names the first tensor that differs.
    """
    checkpoint = inspect(path)
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            here, there = ours.get(name, "absent"), theirs.get(name, "absent")
            raise ConfigError("ckpt_path", str(path), f"is of another model: {name} is {there} there and {here} here")
    return checkpoint["global_step"]


def take_states(callbacks: list[Callback], path: Path) -> None:
    """Give the callbacks the states that they had when the checkpoint at `path` was written."""
    states = inspect(path)["callbacks"] if path.is_file() else {}
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def remove_unfinished(directory: Path) -> None:
    """Delete what a killed process left half written."""
    for path in directory.glob(".*.part"):
        path.unlink(missing_ok=True)
