"""How a checkpoint reaches the disk: beside the old one, synced, and only then in its place."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from .plain_checkpoint import FORMAT, SIDE
from .versions import versions


class NotWritten(OSError):
    """A checkpoint could not be written; the one that was there is as it was."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs, then replaces: a crash or a full disk leaves the old file as it was.

    The command line always writes so; a script of one's own says ``Trainer(plugins=[WholeCheckpointIO()])``. Lightning alone
    writes into the temporary folder and moves: to another file system that is a copy over the old file, which a kill cuts off.

    Every file says in which format and by which versions it is written: ``checkpoint["lowrank_pretrain"]["format"]`` and
    ``["versions"]``.

    Raises:
        NotWritten: names the target and why.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        path = Path(path)
        if "state_dict" in checkpoint:
            side = checkpoint.setdefault(SIDE, {})
            side.setdefault("format", FORMAT)
            side["versions"] = versions()
        beside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            raise NotWritten(f"{path} could not be written{_room(path.parent)}: {error}") from error
        finally:
            with contextlib.suppress(OSError):  # what stopped the writing stops this too
                beside.unlink(missing_ok=True)


def replace(new: Path, old: Path) -> None:
    """`new`, whole and synced, takes the place of `old`, and the directory is synced, so that it has done so for good.

    Raises:
        OSError: from the system; `old` is as it was.
    """
    if new.is_dir() and old.is_dir():  # a sharded checkpoint; two directories cannot change places in one go
        shutil.rmtree(old)
    os.replace(new, old)
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    directory = os.open(old.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems know no such thing
            raise
    finally:
        os.close(directory)


def _room(directory: Path) -> str:
    """Torch's own message does not say that the disk is full."""
    try:
        return f", {shutil.disk_usage(directory).free // 2**20} MiB were free on its disk"
    except OSError:  # there is no such directory
        return ""
