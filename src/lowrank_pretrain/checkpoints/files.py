"""Write checkpoint files whole or not at all, find them again, and check them before use."""

import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from typing_extensions import override

from lowrank_pretrain.checkpoints.format import SIDE, check_format
from lowrank_pretrain.checkpoints.io import NotWritten, WholeCheckpointIO, local_path
from lowrank_pretrain.checkpoints.safe_load import safe_load, unread
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import replace_durably
from lowrank_pretrain.core.interrupts import Interrupted, Interrupts
from lowrank_pretrain.core.protocols import PHASES
from lowrank_pretrain.core.text import first_line
from lowrank_pretrain.core.trainer import StepWatch, is_trial

__all__ = ["LastCheckpoint", "NotWritten", "WholeCheckpointIO"]

PARTS = ("state_dict", "optimizer_states", "loops", "global_step")  # what a checkpoint that resumes must hold
# and of what kind its parts are
KINDS = {
    "state_dict": (dict, "a dict"), "optimizer_states": (list, "a list"), "lr_schedulers": (list, "a list"),
    "loops": (dict, "a dict"), "callbacks": (dict, "a dict"), "global_step": (int, "an integer"), "epoch": (int, "an integer"),
    SIDE: (dict, "a dict"),
}  # fmt: skip


class LastCheckpoint(Checkpoint):
    """Write ``last.ckpt`` at points where a run can resume exactly, and end an interrupted run at one of them.

    Such points are the end of each epoch, and every `every_n_steps` optimizer steps within one; but never a batch that
    validation follows, because Lightning would skip that validation on resume. The file takes the old one's place at the next
    hook: Lightning logs a step after the last hook of the step, and a run killed in between would lack that row.

    Args:
        directory: where ``last.ckpt`` lies.
        every_n_steps: optimizer steps between two writes within an epoch; 0: only at the end of epochs.
        interrupts: tells whether the run was told to stop; None: it never is.
    """

    def __init__(self, directory: str | os.PathLike, every_n_steps: int = 0, interrupts: Interrupts | None = None) -> None:
        allowed = "must be 0 (only at epochs' ends) or more optimizer steps"
        self.path = Path(local_path(directory, "directory")) / "last.ckpt"
        self._waiting = self.path.with_name(".last.ckpt.part")  # written, but its step is not logged yet
        self.every_n_steps = whole("save_every", every_n_steps, 0, allowed=allowed)
        self.interrupts = interrupts
        self._steps = StepWatch()
        self._saved_step: int | None = None
        self._written = False
        self._leaving: str | None = None

    @property
    @override
    def state_key(self) -> str:
        return "LastCheckpoint"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.begin(trainer)
        from_here = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == self.path.resolve()
        self._saved_step = trainer.global_step if from_here else None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._steps.stepped(trainer) or is_trial(trainer):
            return
        if trainer.is_last_batch or _validation_follows(trainer, batch_idx):
            return
        signal = self._told_to_stop(trainer)
        if signal or (self.every_n_steps and self._steps.step % self.every_n_steps == 0):
            self._write(trainer, signal)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial(trainer):
            self._write(trainer, self._told_to_stop(trainer))

    def _told_to_stop(self, trainer: Trainer) -> str | None:
        return self.interrupts.agreed(trainer) if self.interrupts else None

    def _write(self, trainer: Trainer, signal: str | None) -> None:
        trainer.save_checkpoint(self._waiting)
        self._written, self._leaving, self._saved_step = True, signal, trainer.global_step

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_in_place(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._put_in_place(trainer)

    def _put_in_place(self, trainer: Trainer) -> None:
        if self._written and trainer.is_global_zero:
            try:
                replace_durably(self._waiting, self.path)
            except OSError as error:
                raise NotWritten(f"{self.path} could not be replaced: {error}") from error
        self._written = False
        if self._leaving:
            raise Interrupted(self._leaving, self.path)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # on resume from another file after the last epoch's last batch, this is the first hook
        if self._saved_step != trainer.global_step and not is_trial(trainer):
            self._write(trainer, None)
        self._put_in_place(trainer)


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the lowest ``val/loss`` as ``best.ckpt``, even if the run directory was moved.

    Lightning stores absolute paths, and forgets the best score if the directory's path has changed: the next epoch would
    then replace the best one, better or worse.

    Args:
        directory: where ``best.ckpt`` lies.
        resumed: the checkpoint that the run resumes from; if from another directory, its best is another run's.
    """

    def __init__(self, directory: str | os.PathLike, resumed: Path | None = None) -> None:
        super().__init__(Path(directory), "best", monitor="val/loss", enable_version_counter=False)
        self._moved = resumed is not None and resumed.resolve().parent == Path(directory).resolve()

    @property
    @override
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        if self._moved and state.get("best_model_path"):
            directory = str(self.dirpath)

            def here(path: str) -> str:
                return os.path.join(directory, os.path.basename(path)) if path else path

            if os.path.isfile(here(state["best_model_path"])):
                state["dirpath"] = self.dirpath
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = here(state.get(key, ""))
                state["best_k_models"] = {here(path): score for path, score in state.get("best_k_models", {}).items()}
        super().load_state_dict(state)


def _validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    if not trainer.enable_validation or trainer.val_check_batch in (None, float("inf")):
        return False
    # Lightning counts batches through all epochs where check_val_every_n_epoch is None
    batches = batch_idx + 1 if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx + 1
    return batches % trainer.val_check_batch == 0


def inspect(path: Path) -> dict[str, Any]:
    """Return a checkpoint, with its tensors mapped, not read. Nothing in it is executed.

    Raises:
        ConfigError: there is none, it is truncated, of a newer format, or not a checkpoint that resumes; keyed ``ckpt_path``.
    """
    if not path.is_file():
        raise ConfigError("ckpt_path", str(path), "no such file; must be a checkpoint, last, or null to start afresh")
    try:
        if not zipfile.is_zipfile(path):  # the directory of a zip file is its end: a truncated one has none
            raise ConfigError("ckpt_path", str(path), "is truncated or not a checkpoint; must be a whole one, or last")
        checkpoint = safe_load(path, mmap=True)
    except ConfigError:
        raise
    except Exception as error:  # torch raises half a dozen kinds here; all mean the same to the user
        reason = first_line(error)[:120]
        raise ConfigError("ckpt_path", str(path), f"cannot be read as a checkpoint ({reason})") from error
    lacking = [part for part in PARTS if not isinstance(checkpoint, dict) or part not in checkpoint]
    if lacking:
        allowed = f"is no checkpoint that training can go on from: it lacks {', '.join(lacking)}"
        raise ConfigError("ckpt_path", str(path), allowed)
    for part, (kind, words) in KINDS.items():
        if part in checkpoint and not isinstance(checkpoint[part], kind):
            found = type(checkpoint[part]).__name__
            raise ConfigError("ckpt_path", str(path), f"is no checkpoint of a run: its {part} is {found}, not {words}")
    for part, value in checkpoint.items():  # hyper-parameters may be of any type: nothing resumes from them
        foreign = None if part.endswith("hyper_parameters") else unread(value)
        if foreign is not None:
            raise ConfigError("ckpt_path", str(path), f"cannot be read as a checkpoint (its {part} holds a {foreign})")
    check_side(path, checkpoint.get(SIDE, {}))
    return checkpoint


def check_side(path: Path, side: dict[str, Any]) -> None:
    """Check a checkpoint's entries about the low-rank side of its run, before they are used.

    Raises:
        ConfigError: a newer format, or entries that no run of ours wrote; keyed ``ckpt_path``.
    """
    check_format(side, path)
    phase, plan = side.get("phase"), side.get("plan") or {}
    tensors = side.get("exact") or {}
    fine = {
        "phase": phase in (None, *PHASES),
        "plan": isinstance(plan, dict) and all(isinstance(n, str) and isinstance(r, int) and r >= 0 for n, r in plan.items()),
        "exact": isinstance(tensors, dict) and all(isinstance(t, torch.Tensor) for t in tensors.values()),
    }
    for key, good in fine.items():
        if not good:
            raise ConfigError(
                "ckpt_path", str(path), f"is damaged or not ours: its entry {SIDE}.{key} is {str(side[key])[:60]!r}"
            )


def check_sums(path: Path) -> None:
    """Read the whole file and compare it with the checksums inside (about 1 GiB/s): torch itself loads a flipped bit silently.

    Raises:
        ConfigError: a part differs; keyed ``ckpt_path``.
    """
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
    except Exception as error:  # a damaged directory fails in many ways
        broken = f"its directory ({type(error).__name__})"
    if broken is not None:
        raise ConfigError("ckpt_path", str(path), f"is damaged: the checksum of {broken} does not fit; use an earlier one")


def newest_whole(directory: Path) -> Path | None:
    """Return a directory's ``last.ckpt``, else its complete checkpoint with the most steps; None if there is none.

    Another file may be a few steps ahead when a run is killed, but only ``last.ckpt`` resumes exactly: with
    other files, hooks at the end of an epoch and rows of metrics may be missing. Warns of broken files.
    """
    found = []
    for path in sorted(directory.glob("*.ckpt")):
        try:
            found.append((path.name == "last.ckpt", inspect(path)["global_step"], path))
        except ConfigError as error:
            warnings.warn(f"skipped {path}: {error.allowed}", stacklevel=2)
    for *_, path in sorted(found, reverse=True):
        try:
            check_sums(path)
            return path
        except ConfigError as error:
            warnings.warn(f"skipped {path}: {error.allowed}", stacklevel=2)
    return None


def check_fits(path: Path, module: LightningModule) -> int:
    """Return a checkpoint's step count, after checking that its weights fit `module` and are finite.

    Raises:
        ConfigError: it belongs to another model, or holds NaN; the message names the first wrong tensor.
    """
    checkpoint = inspect(path)
    state = checkpoint["state_dict"]
    theirs = {name: tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "no tensor" for name, tensor in state.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            here, there = ours.get(name, "absent"), theirs.get(name, "absent")
            raise ConfigError("ckpt_path", str(path), f"is of another model: {name} is {there} there and {here} here")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                "ckpt_path", str(path), f"holds {name}, which is not finite: the run diverged; use an earlier one"
            )
    return checkpoint["global_step"]


def take_states(callbacks: list[Callback], path: Path) -> None:
    """Restore the callbacks' states from the checkpoint at `path`."""
    states = inspect(path)["callbacks"] if path.is_file() else {}
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def remove_unfinished(directory: Path) -> None:
    """Delete the partial files that a killed process left."""
    for path in directory.glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
