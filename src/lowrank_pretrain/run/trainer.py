"""Make Lightning's Trainer from the ``trainer`` group; turn its errors into one line that names the key."""

import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lowrank_pretrain.checkpoints.files import WholeCheckpointIO
from lowrank_pretrain.core.checks import flag, is_number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import reruns_command
from lowrank_pretrain.core.trainer import RANKS
from lowrank_pretrain.run.build import build, build_nested, check_arguments

MOST_DEVICES = 8192  # Lightning makes a list of so many
# values that Lightning takes and then divides by, ignores, or runs out of memory over: (least, most, what is allowed)
LIMITS: dict[str, tuple[float, float, str]] = {
    "accumulate_grad_batches": (1, math.inf, "must be 1 or more batches"),
    "check_val_every_n_epoch": (1, math.inf, "must be 1 or more epochs, or null to count batches through all epochs"),
    "gradient_clip_val": (0, math.inf, "must be 0 (off) or more, or null"),
    "log_every_n_steps": (0, math.inf, "must be 0 (never) or more optimizer steps"),
    "devices": (-1, MOST_DEVICES, f"must be auto, -1 (all), or a number of devices up to {MOST_DEVICES}"),
    "num_nodes": (1, MOST_DEVICES, f"must be a number of machines, 1 to {MOST_DEVICES}"),
}
OURS = {"logger": "use the logger group", "default_root_dir": "use hydra.run.dir", "enable_checkpointing": "leave it out"}
AUTO = "auto"  # trainer.precision: what the device likes


def with_chosen_precision(config: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Replace ``trainer.precision=auto`` by the device's best: bf16-mixed on a GPU, float32 elsewhere.

    Args:
        config: a run's plain configuration.

    Returns:
        The configuration, and the line that says what was chosen; None if nothing had to be chosen.
    """
    values = config["trainer"]
    if values.get("precision") != AUTO:
        return config, None
    on_gpu = values.get("accelerator", "auto") in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
    chosen, device, other = ("bf16-mixed", "a GPU", "32-true") if on_gpu else ("32-true", "no GPU", "bf16-mixed")
    said = f"precision: {chosen}, because the run has {device} (trainer.precision={other} for the other)"
    return {**config, "trainer": {**values, "precision": chosen}}, said


def build_trainer(
    values: dict[str, Any], run_dir: Path, callbacks: list[pl.Callback], loggers: list[Logger], strategy: Any = None
) -> pl.Trainer:
    """Return the Trainer of a run.

    Args:
        values: the ``trainer`` group; ``callbacks`` and ``plugins`` in it are added to ours.
        run_dir: the run directory.
        callbacks: of the run, in order.
        loggers: of the run.
        strategy: the method's own; None: the group's.

    Raises:
        ConfigError: a key that Trainer lacks, a value that it refuses, or a strategy next to the method's.
    """
    check_values(values)
    values = {key: value for key, value in values.items() if key != "enable_progress_bar"}  # callbacks have the answer
    if strategy is not None:
        if values.get("strategy", "auto") != "auto":
            raise ConfigError("trainer.strategy", values["strategy"], "must be auto: the method brings its own strategy")
        values["strategy"] = strategy
    added = build_nested("trainer", {key: values.pop(key, None) or [] for key in ("callbacks", "plugins")})
    try:
        trainer = build(
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
        raise MisconfigurationException(str(error)) from error  # Lightning raises any of the three
    refuse_leftover_rank(trainer)
    warn_of_a_crowd(trainer)
    return trainer


def refuse_leftover_rank(trainer: pl.Trainer) -> None:
    """Refuse a rank in the environment that is not this process's: its files would be protected from nobody.

    Process 0 alone refuses an old run's directory and owns its own. torchrun's variables are Lightning's to check.

    Raises:
        ConfigError: the variable was left over from another program, and is keyed by its name.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or 0 < trainer.global_rank < trainer.world_size:
        return
    for variable in RANKS:
        value = os.environ.get(variable, "0")
        if value.strip() != "0":
            allowed = f"is set in the environment, but the run has {trainer.world_size} process(es), and this is the first"
            raise ConfigError(variable, value, f"{allowed}: unset {variable}")


def warn_of_a_crowd(trainer: pl.Trainer) -> None:
    """Warn of more processes on the CPU than it has cores: each waits for the others at every exchange."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > cores:
        allowed = f"the run has {cores} core(s), which its processes share: use at most {cores}"
        rank_zero_warn(f"trainer.devices={trainer.num_devices}: {allowed}")


def check_values(values: dict[str, Any]) -> None:
    """Check keys and types, and values that Lightning checks too late or not at all.

    Raises:
        ConfigError: an unknown key, or an absurd value.
    """
    for key in OURS.keys() & values.keys():
        raise ConfigError(f"trainer.{key}", values[key], f"is set by the run; {OURS[key]}")
    check_arguments("trainer", pl.Trainer, {key: value for key, value in values.items() if key not in ("callbacks", "plugins")})
    for key, (least, most, allowed) in LIMITS.items():
        value: Any = values.get(key)
        if is_number(value) and not least <= value <= most:
            raise ConfigError(f"trainer.{key}", value, allowed)
    for key in ("accelerator", "strategy"):
        value = values.get(key, "auto")
        if not (isinstance(value, str) and value) and not hasattr(value, "setup"):
            raise ConfigError(f"trainer.{key}", value, "must be auto, or the name of one")
    if values.get("max_steps") == 0 and not isinstance(values["max_steps"], bool):
        raise ConfigError("trainer.max_steps", 0, "must be -1 (no limit) or 1 or more")
    bar, interval = values.get("enable_progress_bar"), values.get("val_check_interval")
    if bar is not None:
        flag("trainer.enable_progress_bar", bar)
    if interval is not None and (isinstance(interval, (bool, list)) or not interval):
        allowed = "must be a share of an epoch above 0, a number of batches, a time such as 00:00:30:00, or null"
        raise ConfigError("trainer.val_check_interval", interval, allowed)
    if values.get("limit_train_batches") == 0 and not isinstance(values["limit_train_batches"], bool):
        raise ConfigError("trainer.limit_train_batches", 0, "must be above 0, or null: nothing would be trained")


def refuse_popen_directory(trainer: pl.Trainer) -> None:
    """Refuse a directory that Lightning cannot hand to the processes it starts: it writes the name between double quotes.

    Raises:
        ConfigError: the name has such a quote, or ends in a backslash.
    """
    if not (reruns_command(trainer) and trainer.world_size > 1 and HydraConfig.initialized()):
        return
    name = str(HydraConfig.get().run.dir)
    if '"' in name or name.endswith("\\"):
        allowed = 'must have no " in it and no \\ at its end: several processes are started, with this name between quotes'
        raise ConfigError("hydra.run.dir", name, allowed)


def refuse_popen_sweep(trainer: pl.Trainer, multirun: bool) -> None:
    """Refuse a sweep's job that starts processes by running the command line again: each would run the whole sweep.

    Raises:
        ConfigError: it would, with the two cures.
    """
    if multirun and reruns_command(trainer) and trainer.world_size > 1:
        cures = "trainer=ddp_spawn (with LTE method.start_method=spawn), or trainer.devices=1 per job"
        allowed = f"would start the whole sweep in every process; use {cures}"
        raise ConfigError("trainer.strategy", type(trainer.strategy).__name__, allowed)
