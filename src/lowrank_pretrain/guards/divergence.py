"""Stop when training diverges, or go back to the last good checkpoint and skip the batches in between.

A rewind is a resume. The last good checkpoint is written again with the data's position moved on to where training stood,
and the run resumes from that file like from any other: weights, moments, schedules, phases and random states are those of
the checkpoint, except that the batches between it and the failure are skipped. So it works wherever a resume works, in every
phase and across a switch, and a process that is killed after a rewind resumes after it.
"""

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.checkpoints.files import newest_whole
from lowrank_pretrain.checkpoints.io import WholeCheckpointIO, local_path
from lowrank_pretrain.core.checks import choice, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import LOGGED_STEPS
from lowrank_pretrain.core.trainer import datamodule_of, log_interval
from lowrank_pretrain.guards.finite import Diverged, FiniteGuard

POLICIES = ("stop", "rewind")
# Lightning's counters of optimizer steps, which go back. Counters of batches and epochs stay.
STEPS = (
    "epoch_loop.automatic_optimization.optim_progress",
    "epoch_loop.manual_optimization.optim_step_progress",
    "epoch_loop.scheduler_progress",
)


DIVERGENCES = (Diverged, FloatingPointError)  # the latter is raised by GaLoreAdamW's own guard


class DivergenceGuard(FiniteGuard):
    """Detect a NaN or infinite loss or gradient and, if asked to, a loss that shoots up; stop the run or rewind it.

    To stop, it is a callback like any other. To rewind, start the fit with :meth:`fit`::

        guard = DivergenceGuard(on_divergence="rewind")
        trainer = Trainer(callbacks=[guard, ModelCheckpoint(every_n_train_steps=500)])
        guard.fit(trainer, module, loader)

    Rewinding needs a training loader that can resume (one with ``state_dict``, e.g. torchdata's StatefulDataLoader, or our
    data modules) and a single process. If the skipped batch was the epoch's last, that validation is skipped too.

    Args:
        on_divergence: ``stop`` or ``rewind``.
        max_rewinds: for the whole run, across interruptions; the next divergence stops it.
        loss_spike: the largest allowed loss, as a multiple of its running mean; None: no limit.
        patience: this many batches in a row must exceed that.

    Attributes:
        rewinds: number of rewinds so far.
        skipped: batches left out so far.

    Raises:
        ConfigError: a wrong value, or a run that cannot be rewound.
    """

    def __init__(
        self, on_divergence: str = "stop", max_rewinds: int = 3, loss_spike: float | None = None, patience: int = 5
    ) -> None:
        super().__init__(loss_spike, patience)
        choice("on_divergence", on_divergence, POLICIES)
        whole("max_rewinds", max_rewinds, 0, allowed="must be 0 or more")
        self.on_divergence, self.max_rewinds = on_divergence, max_rewinds
        self.rewinds = self.skipped = 0
        self._position: dict[str, Any] | None = None

    @property
    @override
    def state_key(self) -> str:
        return "DivergenceGuard"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.on_divergence == "rewind" and trainer.world_size > 1:
            allowed = f"must be stop on {trainer.world_size} processes: one process alone can be rewound"
            raise ConfigError("on_divergence", "rewind", allowed)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        loader = trainer.train_dataloader
        if self.on_divergence == "rewind" and not hasattr(loader, "state_dict") and not _data_state(trainer):
            allowed = f"needs a training loader that can resume, with state_dict; {type(loader).__name__} has none"
            raise ConfigError("on_divergence", "rewind", allowed)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        every = log_interval(trainer)
        if self.rewinds and every and trainer.global_step % every == 0:
            figures = {"divergence/rewinds": float(self.rewinds), "divergence/skipped_batches": float(self.skipped)}
            pl_module.log_dict(figures, on_step=True, on_epoch=False)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.on_divergence == "rewind" and isinstance(exception, DIVERGENCES) and trainer.training:
            self._position = position(trainer)

    def rewind(self, directory: Path, target: Path) -> str | None:
        """Write to `target` the last good checkpoint of `directory` with the data's position moved on.

        Returns:
            A line that reports the rewind; None if there is none left, or no good checkpoint.
        """
        here, self._position = self._position, None
        if here is None or self.rewinds >= self.max_rewinds:
            return None
        good = newest_whole(directory)
        if good is None:
            return None
        try:
            checkpoint = torch.load(good, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # hyper-parameters of any type, to be written again whole; the file is this run's own
            checkpoint = torch.load(good, map_location="cpu", weights_only=False)
        skipped = moved_on(checkpoint, here)
        self.rewinds, self.skipped = self.rewinds + 1, self.skipped + skipped
        mean = checkpoint["callbacks"].get(self.state_key, {}).get("mean", [0.0, 0.0])
        checkpoint["callbacks"][self.state_key] = {"mean": mean, "rewinds": self.rewinds, "skipped": self.skipped}
        WholeCheckpointIO().save_checkpoint(checkpoint, target)
        count = f"rewind {self.rewinds} of at most {self.max_rewinds}"
        return f"{count}: back to {good.name} after step {checkpoint['global_step']}, {skipped} batches left out"

    def fit(self, trainer: Trainer, model: LightningModule, *args: Any, ckpt_path: Any = None, **kwargs: Any) -> None:
        """Call ``trainer.fit``, and again from a rewound checkpoint (``rewound.ckpt`` next to the good one) after a divergence.

        Args:
            trainer: with this callback and a ModelCheckpoint that has a directory.
            model: the module.
            args: further arguments of ``trainer.fit``.
            ckpt_path: where to start from.
            kwargs: further arguments of ``trainer.fit``.

        Raises:
            Diverged: no rewind is left, or no checkpoint was written yet.
        """
        if self.on_divergence == "rewind":  # now, not after training has diverged
            saver = trainer.checkpoint_callback
            local_path(getattr(saver, "dirpath", None) or trainer.default_root_dir, "dirpath")
        while True:
            try:
                fit: Any = trainer.fit
                fit(model, *args, ckpt_path=ckpt_path, **kwargs)
                return
            except DIVERGENCES as error:
                saver = trainer.checkpoint_callback
                directory = Path(local_path(getattr(saver, "dirpath", None) or trainer.default_root_dir, "dirpath"))
                line = self.rewind(directory, directory / "rewound.ckpt")
                if line is None:
                    raise
                print(f"{error}; {line}", flush=True)
            ckpt_path = directory / "rewound.ckpt"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rewinds": self.rewinds, "skipped": self.skipped}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.rewinds, self.skipped = state_dict.get("rewinds", 0), state_dict.get("skipped", 0)


def _data_state(trainer: pl.Trainer) -> dict[str, Any]:
    module = datamodule_of(trainer)
    return {} if module is None else module.state_dict()


def position(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the position in the data: that of Lightning's loops, and the data module's own state."""
    loops = copy.deepcopy(trainer.fit_loop.state_dict())
    progress = loops["epoch_loop.batch_progress"]
    for count in (progress["total"], progress["current"]):
        # as in a checkpoint at the end of this batch, wherever in the batch the failure was
        count.update(started=count["ready"], processed=count["ready"], completed=count["ready"] - 1)
    module = datamodule_of(trainer)
    data = {} if module is None else {type(module).__qualname__: _data_state(trainer)}
    return {"loops": loops, "epoch": trainer.current_epoch, "data": data}


def moved_on(checkpoint: dict[str, Any], here: dict[str, Any]) -> int:
    """Put the data position `here` into `checkpoint`, keeping its optimizer steps; return the number of batches skipped."""
    then, now = checkpoint["loops"]["fit_loop"], copy.deepcopy(here["loops"])
    before, after = (loops["epoch_loop.batch_progress"]["total"] for loops in (then, now))
    for key in STEPS:
        if key in then:
            now[key] = then[key]
    logged = dict(then["epoch_loop.state_dict"])
    if before["completed"] == before["processed"] and LOGGED_STEPS in logged:
        logged[LOGGED_STEPS] -= 1  # written after its batch, while Lightning adds one for a file written at a batch's end
    now["epoch_loop.state_dict"] = logged
    checkpoint["loops"]["fit_loop"] = now
    checkpoint["epoch"] = here["epoch"]
    checkpoint.update(copy.deepcopy(here["data"]))
    return after["ready"] - before["ready"]
