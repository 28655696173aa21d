"""Report in one line, with an exit code, failures that a user can fix; others keep their traceback."""

import errno
import os
import re
import traceback
from pathlib import Path

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig

from lowrank_pretrain.checkpoints.files import NotWritten
from lowrank_pretrain.core.agreement import Disagreement
from lowrank_pretrain.core.errors import ConfigError, NotFinite
from lowrank_pretrain.core.extras import missing_module, missing_words
from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.text import one_line
from lowrank_pretrain.guards.divergence import DIVERGENCES
from lowrank_pretrain.guards.stall import Stalled
from lowrank_pretrain.lte.workers import lost
from lowrank_pretrain.run.build import blamed, in_group

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # full, over quota or a limit, read-only

# Raised by the owner of a checkpoint's part that is missing or of another kind
RESTORING = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)

# Modules whose complaints are about the Trainer's arguments
LIGHTNINGS = ("lightning.pytorch.trainer", "lightning.pytorch.loops")
ENVIRONMENTS = "lightning.fabric.plugins.environments"  # torchrun's, SLURM's: what was started does not fit the arguments

# Where an error that names a bare key comes from: the first of these modules in its traceback, from the inside out.
ROOMS = {
    "lowrank_pretrain.data": "data",
    "lowrank_pretrain.models.optim": "optim",
    "lowrank_pretrain.models": "model",
    "lowrank_pretrain": "method",
}


def describe(error: BaseException, cfg: DictConfig, run_dir: Path) -> tuple[str, int] | None:
    """Return one line and an exit code for an error; None if one line cannot explain it.

    Args:
        error: what ended the run.
        cfg: the run's configuration; a bare key that an error names gets its group from it.
        run_dir: the run directory, to name the last good checkpoint.
    """
    if isinstance(error, ConfigError):
        return f"error: {with_group(error, cfg)}", 2
    if (port := _port_in_use(error)) is not None:
        return f"error: MASTER_PORT={port}: is in use, perhaps by another job on this machine: give this one another", 2
    if _is_another_process(error):
        return f"error: another process died or did not answer ({one_line(error, 200)}); {last_good(run_dir)}", 1
    if isinstance(error, RESTORING) and _while_restoring(error):
        what = f"{type(error).__name__}: {one_line(error, 200)}"
        cure = "; another method or optimizer starts afresh, with hydra.run.dir=DIR" if "parameter group" in what else ""
        return f"error: ckpt_path={cfg.get('ckpt_path')!r}: its contents do not fit this run ({what}){cure}", 2
    if isinstance(error, ModuleNotFoundError) and (module := missing_module(error)) is not None:
        return f"error: {missing_words(module)}", 2
    if isinstance(error, MisconfigurationException) or _is_lightnings(error):
        return _trainers(one_line(error, None), cfg), 2
    if isinstance(error, Interrupted):
        return _farewell(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return _farewell(Interrupted("SIGINT")), 130
    if isinstance(error, DIVERGENCES):
        cures = "a lower optim.lr or trainer.gradient_clip_val=1 may help, on_divergence=rewind leaves such batches out"
        return f"error: {one_line(error, None)}; {last_good(run_dir)}; {cures}", 1
    if isinstance(error, (Stalled, Disagreement, NotFinite)):
        return f"error: {one_line(error, None)}; {last_good(run_dir)}", 1
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):  # killed, for want of memory perhaps
        cure = "fewer data.num_workers need less memory, 0 loads in this process and shows why"
        return f"error: a loading process died ({one_line(error, 200)}); {last_good(run_dir)}; {cure}", 1
    if isinstance(error, torch.OutOfMemoryError):
        return "error: the device is out of memory; lower data.batch_size and raise trainer.accumulate_grad_batches", 1
    if isinstance(error, NotWritten) or getattr(error, "errno", None) in DISK:
        return f"error: {one_line(error, None)}; {last_good(run_dir)}", 1
    return None


def _while_restoring(error: BaseException) -> bool:
    """Return whether the error came while Lightning handed a checkpoint's parts to their owners."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return "lightning.pytorch.trainer.connectors.checkpoint_connector" in modules


def _port_in_use(error: BaseException) -> str | None:
    """Return the port at which the processes were to meet, if another program has it."""
    if not isinstance(error, torch.distributed.DistError) or "EADDRINUSE" not in str(error):
        return None
    found = re.search(r"port: ?(\d+)", str(error))
    return found[1] if found else os.environ.get("MASTER_PORT", "")


def _is_another_process(error: BaseException) -> bool:
    """Return whether another process is missing: at a collective call (NCCL, gloo, ours), or at the meeting before it."""
    meeting = (torch.distributed.DistNetworkError, torch.distributed.DistStoreError)
    return isinstance(error, meeting) or "LTE: another worker" in str(error) or lost(error)


def _trainers(text: str, cfg: DictConfig) -> str:
    """Return Lightning's complaint about the Trainer's arguments, with the key if it is known."""
    values = cfg.get("trainer") or {}
    key = blamed(text, values)
    return f"error: {ConfigError(f'trainer.{key}', values[key], text)}" if key else f"error: trainer: {text}"


def last_good(run_dir: Path) -> str:
    """Describe the checkpoint from which a run in `run_dir` can resume."""
    found = [path for path in (run_dir / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")) if path.is_file()]
    return f"the last good checkpoint is {found[0]}" if found else "no checkpoint was written yet"


def with_group(error: ConfigError, cfg: DictConfig) -> ConfigError:
    """Return an error with the group added to a bare key, e.g. ``root`` -> ``data.root``."""
    if "." in error.key or error.key in cfg:
        return error
    owners = [group for group in (*dict.fromkeys(ROOMS.values()), "trainer") if error.key in (cfg.get(group) or {})]
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    for module in reversed(modules):
        for room, group in ROOMS.items():
            if module.startswith(room) and group in owners:
                return in_group(group, error)
    return in_group(owners[0], error) if owners else error


def _is_lightnings(error: BaseException) -> bool:
    """Return whether Lightning's own code complains about the Trainer's arguments, or those of torchrun or srun."""
    if not isinstance(error, (ValueError, TypeError, RuntimeError)) or error.__traceback__ is None:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return module.startswith(ENVIRONMENTS) or (not isinstance(error, RuntimeError) and module.startswith(LIGHTNINGS))


def _farewell(error: Interrupted) -> str:
    if error.checkpoint is None:
        return f"{error.name}: stopped; nothing written since the last checkpoint"
    return f"{error.name}: stopped with {error.checkpoint}; the same command with ckpt_path=last goes on from there"
