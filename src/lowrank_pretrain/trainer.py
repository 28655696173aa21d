"""Lightning's Trainer from the ``trainer`` group, its complaints as one line that names the key."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from .build import build, build_nested
from .checkpoints import WholeCheckpointIO
from .errors import ConfigError

OURS = {"logger": "use the logger group", "default_root_dir": "use hydra.run.dir", "enable_checkpointing": "leave it out"}


def build_trainer(
    values: dict[str, Any], run_dir: Path, callbacks: list[pl.Callback], loggers: list[Logger], strategy: Any = None
) -> pl.Trainer:
    """The Trainer of a run.

    Args:
        values: the ``trainer`` group; ``callbacks`` and ``plugins`` in it are added to ours.
        run_dir: the run directory.
        callbacks: of the run, in order.
        loggers: of the run.
        strategy: the method's own; None: the group's.

    Raises:
        ConfigError: a key that Trainer has not, a value that it refuses, or a strategy beside the method's.
    """
    for key in OURS.keys() & values.keys():
        raise ConfigError(f"trainer.{key}", values[key], f"is set by the run; {OURS[key]}")
    values = {key: value for key, value in values.items() if key != "enable_progress_bar"}  # callbacks have the answer
    if strategy is not None:
        if values.get("strategy", "auto") != "auto":
            raise ConfigError("trainer.strategy", values["strategy"], "must be auto: the method brings its own strategy")
        values["strategy"] = strategy
    added = build_nested("trainer", {key: values.pop(key, None) or [] for key in ("callbacks", "plugins")})
    try:
        return build(
            "trainer",
            values,
            target=pl.Trainer,
            logger=loggers,
            callbacks=[*callbacks, *added["callbacks"]],
            plugins=[WholeCheckpointIO(), *added["plugins"]],
            default_root_dir=run_dir,
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        )
    except ConfigError:
        raise
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise MisconfigurationException(str(error)) from error  # Lightning itself is not of one mind which to raise


def refuse_popen_sweep(trainer: pl.Trainer, multirun: bool) -> None:
    """A sweep's job must not start processes by running the command line again: each would run the whole sweep.

    Raises:
        ConfigError: it would, with the two cures.
    """
    # Lightning has no public name for "this strategy runs sys.argv again"
    if multirun and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher) and trainer.world_size > 1:
        cures = "trainer=ddp_spawn (with LTE method.start_method=spawn), or trainer.devices=1 per job"
        allowed = f"would start the whole sweep in every process; use {cures}"
        raise ConfigError("trainer.strategy", type(trainer.strategy).__name__, allowed)
