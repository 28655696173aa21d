"""Make one attempt of a run: build everything, fit from a checkpoint or from the beginning, test, export."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.loggers import Logger

from lowrank_pretrain.checkpoints.files import check_fits
from lowrank_pretrain.core.interrupts import Interrupts
from lowrank_pretrain.guards.divergence import DivergenceGuard
from lowrank_pretrain.loggers.csv import RunCSVLogger, forget_after
from lowrank_pretrain.run.callbacks import RunCallbacks
from lowrank_pretrain.run.finish import finish_run
from lowrank_pretrain.run.loggers import finish, more_loggers, publish
from lowrank_pretrain.run.parts import build_parts
from lowrank_pretrain.run.trainer import (
    build_trainer,
    check_values,
    refuse_popen_directory,
    refuse_popen_sweep,
    with_chosen_precision,
)


def attempt(config: dict[str, Any], run_dir: Path, ckpt: Path | None, guard: DivergenceGuard, multirun: bool) -> dict[str, Any]:
    """Fit, test, export and summarize once, with everything built anew.

    Args:
        config: the run's plain configuration.
        run_dir: the run directory.
        ckpt: where to resume from; None: from the beginning.
        guard: watches loss and gradients, and remembers earlier attempts.
        multirun: whether this is one job of a sweep.

    Returns:
        The contents of summary.json.
    """
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    config, precision = with_chosen_precision(config)
    check_values(config["trainer"])  # what is cheap to check comes first
    watched = RunCallbacks(config, run_dir, ckpt, guard)
    parts = build_parts(config)
    loggers = [RunCSVLogger(run_dir), *more_loggers(config.get("logger") or {}, run_dir, config, multirun)]

    with _tidied_up(loggers), Interrupts() as interrupts:
        callbacks = watched.in_order(parts, interrupts)
        trainer = build_trainer(config["trainer"], run_dir, callbacks, loggers, parts.method.strategy)
        refuse_popen_sweep(trainer, multirun)
        refuse_popen_directory(trainer)

        step = 0 if ckpt is None else check_fits(ckpt, parts.module)
        if trainer.is_global_zero:
            forget_after(run_dir / "metrics.csv", step)
        if ckpt is not None:
            announce(trainer, f"going on from {os.path.relpath(ckpt)} after step {step}")
        if precision is not None:
            announce(trainer, precision)
        announce(trainer, f"run directory: {os.path.relpath(run_dir)}")

        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=ckpt, weights_only=True)
        if ckpt is not None and trainer.global_step == step:
            limit = f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}"
            announce(trainer, f"nothing was left to train: the checkpoint is at the end of the run ({limit})")
        trainer.test(parts.module, datamodule=parts.data, verbose=False)
        found = finish_run(trainer, watched.monitor, parts, config, run_dir)
        publish(found, config, run_dir, loggers)
        return found


@contextmanager
def _tidied_up(loggers: list[Logger]) -> Iterator[None]:
    """Close the loggers, and LTE's process group on one device, when the run ends in any way.

    The next job of a sweep would take that group over, and processes forked then would wait for its threads.
    """
    grouped = dist.is_initialized()
    try:
        yield
    finally:
        finish(loggers)
        if not grouped and dist.is_initialized() and dist.get_world_size() == 1:
            dist.destroy_process_group()


def announce(trainer: pl.Trainer, line: str) -> None:
    """Print a line from one process only."""
    if trainer.is_global_zero:
        print(line, flush=True)
