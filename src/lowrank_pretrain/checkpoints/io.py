"""Write a checkpoint next to the old one, sync it, and only then replace the old one."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lowrank_pretrain.checkpoints.format import FORMAT, SIDE
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import whole_file
from lowrank_pretrain.core.versions import versions


class NotWritten(OSError):
    """Say that a checkpoint could not be written. The old file is unchanged."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Write next to the target, sync, then replace: a crash or a full disk leaves the old file unchanged.

    The command line always does this; your own script needs ``Trainer(plugins=[WholeCheckpointIO()])``. Lightning by itself
    writes to the temporary folder, then moves. Across file systems that copies over the old file, and a kill truncates it.

    A path on another file system (``s3://``, ``memory://``, …: fsspec's) is written there by that system's own transaction.

    Every file names its format and the versions that wrote it: ``checkpoint["lowrank_pretrain"]["format"]`` and
    ``["versions"]``.

    Raises:
        NotWritten: names the target and the cause.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        if "state_dict" in checkpoint:
            side = checkpoint.setdefault(SIDE, {})
            side.setdefault("format", FORMAT)
            side["versions"] = versions()
        if is_remote(path):
            try:  # Lightning writes into a transaction of the file system: the file appears only once it is complete
                super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            except Exception as error:  # each file system has its own errors
                raise NotWritten(f"{path} could not be written: {error or type(error).__name__}") from error
            return
        path = Path(without_scheme(path))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path, "wb", durable=True) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise NotWritten(f"{path} could not be written{_room(path.parent)}: {error}") from error


def is_remote(path: str | os.PathLike) -> bool:
    """Return whether a path is on a remote file system (fsspec's)."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and scheme not in ("file", "local")


def without_scheme(path: str | os.PathLike) -> str:
    """Return a local path without its scheme: ``file:///a`` is ``/a``."""
    scheme, found, rest = os.fspath(path).partition("://")
    return rest if found and scheme in ("file", "local") else os.fspath(path)


def local_path(path: str | os.PathLike, key: str) -> str:
    """Return a path on a local file system, where one file can replace another atomically.

    Args:
        path: as the user gave it.
        key: the argument's name.

    Raises:
        ConfigError: it names another file system; as a local path it would become a folder called ``s3:``.
    """
    if is_remote(path):
        raise ConfigError(key, os.fspath(path), "must be on a file system of this machine: write here and copy, or mount it")
    return without_scheme(path)


def _room(directory: Path) -> str:
    """Describe the free disk space: torch's own message does not say that the disk is full."""
    try:
        return f", {shutil.disk_usage(directory).free // 2**20} MiB were free on its disk"
    except OSError:  # no such directory
        return ""
