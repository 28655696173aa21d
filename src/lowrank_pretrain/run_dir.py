"""The run directory: its name in a sweep, whether it already holds a run, and which checkpoint a run starts from."""

import errno
import hashlib
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: directories are not locked there
    fcntl = None

from hydra.experimental.callback import Callback
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from .checkpoints import check_sums, inspect, newest_whole, remove_unfinished
from .errors import ConfigError

TRACES = ("metrics.csv", "summary.json", "checkpoints/*.ckpt")  # any of these and the directory holds a run
LONGEST_NAME = 120


def job_dir(overrides: str) -> str:
    """A directory name for a sweep's job from its comma-separated overrides: no slashes, not too long, still unique."""
    name = "".join(c if c.isalnum() or c in "=,.-_+~" else "_" for c in overrides) or "job"
    if name == overrides and len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


OmegaConf.register_new_resolver("job_dir", job_dir, replace=True)


def refuse_old_run(directory: Path, ckpt_path: str | None) -> None:
    """A run that starts afresh must not write into a directory that holds one.

    Raises:
        ConfigError: it would; keyed ``hydra.run.dir``, with the cures.
    """
    if ckpt_path is None and any(any(directory.glob(trace)) for trace in TRACES):
        cures = "holds a run; go on with ckpt_path=last, or start another with seed=N or hydra.run.dir=DIR"
        raise ConfigError("hydra.run.dir", os.path.relpath(directory), cures)


def refuse_unwritable(directory: Path) -> None:
    """A run must be able to write into its directory; Hydra would say so with a traceback.

    Raises:
        ConfigError: it cannot; keyed ``hydra.run.dir``.
    """
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be made: {existing} is no directory")
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ConfigError("hydra.run.dir", str(directory), f"cannot be written to ({existing} is read-only for this user)")


class RefuseOldRun(Callback):
    """Refuses before Hydra has written anything; for a sweep's jobs, `start_from` does."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook."""
        directory = Path(config.hydra.run.dir)
        self._refuse(directory, lambda: refuse_old_run(directory, config.get("ckpt_path")))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra's hook."""
        self._refuse(Path(config.hydra.sweep.dir), lambda: None)

    def _refuse(self, directory: Path, first: Callable[[], None]) -> None:
        if rank_zero_only.rank != 0:  # a data-parallel run's other processes find process 0's files
            return
        try:
            first()
            refuse_unwritable(directory)
            if (directory / LOCK).is_file():
                with owned(directory):
                    pass
            refuse_full(directory)
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


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
_owned: set[Path] = set()  # by this process: the system's locks do not keep a process from itself


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own the run directory `directory`, which is made if missing: no other process of this or another machine may write there.

    The lock is the system's, so a process that is killed leaves none; the file says who holds it. Process 0 of a run owns
    for all of them.

    Raises:
        ConfigError: another process owns it; keyed ``hydra.run.dir``, with the cures.
    """
    path = directory.resolve() / LOCK
    if rank_zero_only.rank != 0 or fcntl is None:
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
    """The file at `path`, locked and signed; None where another process has locked it."""
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


def _holder(path: Path) -> str:
    if path in _owned:  # to open and close the file here would give the lock away
        return f"process {os.getpid()}, this one"
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"


def start_from(directory: Path, ckpt_path: str | None) -> Path | None:
    """The checkpoint that a run in `directory` starts from; None: from the beginning.

    Args:
        directory: the run directory.
        ckpt_path: null, ``last`` (the directory's newest whole checkpoint, or none), or a file.

    Raises:
        ConfigError: the directory holds a run and `ckpt_path` is null, or the named file cannot be resumed from.
    """
    if ckpt_path is not None and not (isinstance(ckpt_path, str) and ckpt_path):
        raise ConfigError("ckpt_path", ckpt_path, "must be a checkpoint's file, last, or null to start afresh")
    if rank_zero_only.rank == 0:
        refuse_old_run(directory, ckpt_path)
        remove_unfinished(directory / "checkpoints")
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        return newest_whole(directory / "checkpoints")
    inspect(Path(ckpt_path))
    check_sums(Path(ckpt_path))
    return Path(ckpt_path)
