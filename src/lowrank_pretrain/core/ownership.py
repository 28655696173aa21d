"""Let one process at a time write into a run directory, and only where the disk has room."""

import errno
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.trainer import process_rank

if sys.platform != "win32":  # directories are not locked there
    import fcntl

NEEDED = 64 * 1024  # bytes; what Hydra writes into .hydra is a third of it


def refuse_full(directory: Path) -> None:
    """Refuse a disk without room for what Hydra writes first; Hydra itself would end in a traceback.

    Raises:
        ConfigError: nothing can be written; keyed ``hydra.run.dir``.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    probe = existing / f".room.{os.getpid()}.part"
    try:
        with probe.open("wb") as file:
            file.write(bytes(NEEDED))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be written to: {error.strerror}") from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


LOCK = ".lock"
_owned: set[Path] = set()  # by this process, which the system's locks do not exclude


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own a run directory, which is made if missing: no other process of this or another machine may write there.

    The lock is the system's, so a process that is killed leaves none; the file says who holds it. Process 0 of a run owns
    for all of them.

    Raises:
        ConfigError: another process owns it; keyed ``hydra.run.dir``, with the cures.
    """
    path = directory.resolve() / LOCK
    if process_rank() != 0 or sys.platform == "win32":
        yield
        return
    file = None if path in _owned else _locked(path)
    if file is None:
        cures = "wait for it, or start another run with seed=N or hydra.run.dir=DIR"
        raise ConfigError(
            "hydra.run.dir", os.path.relpath(directory), f"belongs to a run that goes on ({_holder(path)}); {cures}"
        )
    _owned.add(path)
    try:
        yield
    finally:
        _owned.discard(path)
        with suppress(OSError):
            path.unlink()  # before it is given back: whoever waits for it finds that it is no longer the file of this name
        file.close()


def _locked(path: Path) -> IO[str] | None:
    """Return the file at `path`, locked and signed; None if another process has locked it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return None
            # some network file systems know no locks
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): let no other run write there", stacklevel=3)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()  # its owner has just deleted it


def is_owned(directory: Path) -> bool:
    """Return whether a process, this one or another, writes a run into a directory now.

    Where the system knows no locks, the answer is False.
    """
    path = directory.resolve() / LOCK
    if path in _owned:  # to open and close the file here would give the lock away
        return True
    if sys.platform == "win32":
        return False
    try:
        with path.open() as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # readers do not exclude each other
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN) and path.exists()
    return False


def _holder(path: Path) -> str:
    if path in _owned:  # to open and close the file here would give the lock away
        return f"process {os.getpid()}, this one"
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
