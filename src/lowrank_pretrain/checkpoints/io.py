"""Write a checkpoint next to the old one, sync it, and only then put it in its place."""

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
    """Say that a checkpoint could not be written; the one that was there is as it was."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Write next to the target, sync, then replace: a crash or a full disk leaves the old file as it was.

    The command line always writes so; a script of one's own says ``Trainer(plugins=[WholeCheckpointIO()])``. Lightning alone
    writes into the temporary folder and moves: to another file system that is a copy over the old file, which a kill cuts off.

    A path on another file system (``s3://``, ``memory://``, …: fsspec's) is written there by that system's own transaction.

    Every file names its format and the versions that wrote it: ``checkpoint["lowrank_pretrain"]["format"]`` and
    ``["versions"]``.

    Raises:
        NotWritten: names the target and why.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        if "state_dict" in checkpoint:
            side = checkpoint.setdefault(SIDE, {})
            side.setdefault("format", FORMAT)
            side["versions"] = versions()
        if is_remote(path):
            try:  # Lightning writes into a transaction of the file system: the file is there when all of it is, and not before
                super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            except Exception as error:  # each file system has errors of its own
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
    """Return whether a path names a file system of fsspec's other than this machine's."""
    scheme, found, _ = os.fspath(path).partition("://")
    return bool(found) and scheme not in ("file", "local")


def without_scheme(path: str | os.PathLike) -> str:
    """Return a path on this machine as the system knows it: ``file:///a`` is ``/a``."""
    scheme, found, rest = os.fspath(path).partition("://")
    return rest if found and scheme in ("file", "local") else os.fspath(path)


def local_path(path: str | os.PathLike, key: str) -> str:
    """Return a path on this machine's file systems, where a file can be replaced by another in one go.

    Args:
        path: as the user gave it.
        key: what it was given as.

    Raises:
        ConfigError: it names another file system; as a local path it would become a folder called ``s3:``.
    """
    if is_remote(path):
        raise ConfigError(key, os.fspath(path), "must be on a file system of this machine: write here and copy, or mount it")
    return without_scheme(path)


def _room(directory: Path) -> str:
    """Return words on the room that is left: torch's own message does not say that the disk is full."""
    try:
        return f", {shutil.disk_usage(directory).free // 2**20} MiB were free on its disk"
    except OSError:  # there is no such directory
        return ""
