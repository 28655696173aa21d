"""Name a run directory in a sweep, refuse one that holds a run, and choose the checkpoint that a run starts from."""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from lowrank_pretrain.checkpoints.files import check_sums, inspect, newest_whole, remove_unfinished
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.ownership import LOCK, owned, refuse_full
from lowrank_pretrain.core.trainer import process_rank

TRACES = ("metrics.csv", "summary.json", "checkpoints/*.ckpt")  # any of these and the directory holds a run
LONGEST_NAME = 120  # bytes; file systems end at 255


def job_dir(overrides: str) -> str:
    """Return a directory name for a sweep's job from its comma-separated overrides.

    It has no slashes, every key is in it, values are cut where it would be too long, and a hash of the whole tells
    names apart that were changed or cut.
    """
    if not overrides:  # a sweep of one job, over no key
        return "job"
    parts = [[_plain(word) for word in part.partition("=")[::2]] for part in _split(overrides)]
    name = ",".join("=".join(part) for part in parts) or "job"
    if name == overrides and len(name.encode()) <= LONGEST_NAME:
        return name
    widths = [(LONGEST_NAME, width) for width in range(LONGEST_NAME, 5, -1)]  # of keys and values: first values are cut
    widths += [(width, 5) for width in range(LONGEST_NAME, 1, -1)]
    cut = (",".join(f"{_cut(key, most)}={_cut(value, least)}" for key, value in parts) for most, least in widths)
    short = next((name for name in cut if len(name.encode()) <= LONGEST_NAME), name)
    return f"{_cut(short, LONGEST_NAME)}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)


def _plain(text: str) -> str:
    return "".join(c if c.isalnum() or c in ",.-_+~" else "_" for c in text)


def _cut(text: str, most: int) -> str:
    """Return the first `most` bytes of a text, whole characters only."""
    return text.encode()[:most].decode(errors="ignore")


def _split(overrides: str) -> list[str]:
    """Split overrides: ``a=1,b=[2,3]`` -> ``["a=1", "b=[2,3]"]``."""
    parts, depth = [""], 0
    for character in overrides:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part]


def holds_run(directory: Path) -> bool:
    """Return whether a run has left something in `directory`."""
    return any(any(directory.glob(trace)) for trace in TRACES)


def refuse_old_run(directory: Path, ckpt_path: str | None, sweep: bool = False) -> None:
    """Refuse to start a new run in a directory that already holds one.

    Args:
        directory: the run directory.
        ckpt_path: null for a run that starts afresh.
        sweep: whether it is a job of a sweep, whose directory has another key.

    Raises:
        ConfigError: it would; keyed ``hydra.run.dir`` or ``hydra.sweep.dir``, with the cures.
    """
    if ckpt_path is None and holds_run(directory):
        if sweep:
            cures = f"{directory.name} in it holds a run; go on with ckpt_path=last, or start another with hydra.sweep.dir=DIR"
            raise ConfigError("hydra.sweep.dir", os.path.relpath(directory.parent), cures)
        cures = "holds a run; go on with ckpt_path=last, or start another with seed=N or hydra.run.dir=DIR"
        raise ConfigError("hydra.run.dir", os.path.relpath(directory), cures)


def refuse_unwritable(directory: Path) -> None:
    """Refuse a directory that the run cannot write into; Hydra would end in a traceback.

    Raises:
        ConfigError: it cannot; keyed ``hydra.run.dir``.
    """
    try:
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        longest = os.pathconf(existing, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    except OSError as error:  # the same of a name in a directory that exists, or of the whole path
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be made: {error.strerror}") from error
    if any(len(os.fsencode(name)) > longest for name in directory.parts):
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be made: a name may have up to {longest} bytes")
    if not existing.is_dir():
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be made: {existing} is no directory")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be written to ({existing} is read-only for this user)")


class RefuseOldRun(Callback):
    """Refuse before Hydra has written anything; for a sweep's jobs, `start_from` does."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a run; Hydra's hook."""
        directory = Path(config.hydra.run.dir)
        self._refuse(directory, lambda: refuse_old_run(directory, config.get("ckpt_path")))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a sweep; Hydra's hook."""
        self._refuse(Path(config.hydra.sweep.dir), lambda: None)

    def _refuse(self, directory: Path, first: Callable[[], None]) -> None:
        if process_rank() != 0:  # a data-parallel run's other processes find process 0's files
            return
        try:
            refuse_unwritable(directory)
            first()
            if (directory / LOCK).is_file():
                with owned(directory):
                    pass
            refuse_full(directory)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def hydra_files(mode: str, sweep_dir: str, subdir: str, ckpt_path: str | None) -> str | None:
    """Return where a run's configuration is written in its directory; None for a sweep's job that will be refused.

    Hydra writes before the job can check: the configuration of the run already there would be lost.
    """
    refused = "MULTIRUN" in str(mode) and ckpt_path is None and holds_run(Path(sweep_dir, subdir))
    return None if refused else ".hydra"


OmegaConf.register_new_resolver("hydra_files", hydra_files, replace=True)


def start_from(directory: Path, ckpt_path: str | None, sweep: bool = False) -> Path | None:
    """Return the checkpoint that a run starts from; None: from the beginning.

    Args:
        directory: the run directory.
        ckpt_path: null, ``last`` (the directory's newest whole checkpoint, or none), or a file.
        sweep: whether it is a job of a sweep.

    Raises:
        ConfigError: the directory holds a run and `ckpt_path` is null, or the named file cannot be resumed from.
    """
    if ckpt_path is not None and not (isinstance(ckpt_path, str) and ckpt_path):
        raise ConfigError("ckpt_path", ckpt_path, "must be a checkpoint's file, last, or null to start afresh")
    if process_rank() == 0:
        refuse_old_run(directory, ckpt_path, sweep)
        remove_unfinished(directory / "checkpoints")
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return newest_whole(directory / "checkpoints")
    inspect(Path(ckpt_path))
    check_sums(Path(ckpt_path))
    return Path(ckpt_path)
