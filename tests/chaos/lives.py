"""Processes that live a run and are killed: forked from a server that has the heavy imports, or true ``python -m`` ones.

A forked run is the command line's own ``main`` with its own ``sys.argv``, in a process of its own; only the ten seconds of
imports are shared. Several workers are told their ranks by the environment, as torchrun would.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.place import Aim, last_seen

KILLED = -9
PATIENCE = 60.0  # seconds for a life to end by itself


def be(args: Sequence[str], directory: Path, rank: int, environment: dict[str, str], aim: Aim | None) -> None:
    """The forked process."""
    import faulthandler
    import warnings

    import lightning.pytorch as pl
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from lowrank_pretrain.run.train import main
    from tests.chaos import place

    log = os.open(directory / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    multiprocessing.set_start_method("fork", force=True)  # of its data workers: as on a command line, not as it was started
    os.environ.update(environment)
    rank_zero_only.rank = rank  # which a process of its own would learn while it imports Lightning
    os.chdir(directory)
    warnings.simplefilter("default")
    faulthandler.register(signal.SIGUSR1)  # where does it hang?
    place.watch(place.Here(directory / f"place.{rank}", aim))
    assert "timm" in sys.modules and pl.Trainer, "the server failed to import what it should"
    sys.argv = ["lowrank-pretrain", *args]
    main()


class Life:
    """One start of a run, to its end or its death.

    Args:
        args: of the command line.
        directory: where it is started; logs and places lie there.
        workers: processes, each with a rank.
        aims: rank -> where it dies by its own hand.
        true: a real ``python -m lowrank_pretrain``; of one worker, and nobody knows where it is.
    """

    preload = ["tests.chaos.preload", "tests.chaos.preload_text"]  # before the first life
    _context: Any = None

    def __init__(
        self, args: Sequence[str], directory: Path, workers: int = 1, aims: dict[int, Aim] | None = None, true: bool = False
    ) -> None:
        self.directory, self.began = directory, time.monotonic()
        for old in [*directory.glob("log.*"), *directory.glob("place.*")]:
            old.unlink()
        if true:
            self._true = self._start_true(args)
            self._processes: list[Any] = []
            return
        self._true = None
        if Life._context is None:
            os.environ["OMP_NUM_THREADS"] = "1"  # read once, where the server imports torch
            Life._context = multiprocessing.get_context("forkserver")
            Life._context.set_forkserver_preload(Life.preload)
        port = _free_port()
        self._processes = []
        for rank in range(workers):
            environment = {} if workers == 1 else {
                "RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{workers}", "LOCAL_WORLD_SIZE": f"{workers}",
                "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "TORCHELASTIC_RUN_ID": "chaos",
            }  # fmt: skip
            told = (list(args), directory, rank, environment, (aims or {}).get(rank))
            process = Life._context.Process(target=be, args=told)
            process.start()
            self._processes.append(process)

    def _start_true(self, args: Sequence[str]) -> subprocess.Popen:
        with (self.directory / "log.0").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}  # for callbacks
            command = [sys.executable, "-m", "lowrank_pretrain", *args]
            return subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=subprocess.STDOUT, env=environment)

    @property
    def codes(self) -> list[int | None]:
        """Exit codes, None while alive."""
        return [self._true.poll()] if self._true else [process.exitcode for process in self._processes]

    def kill(self, rank: int = 0) -> None:
        """SIGKILL, from outside."""
        (self._true or self._processes[rank]).kill()

    def log(self, rank: int = 0) -> str:
        """What it has said."""
        path = self.directory / f"log.{rank}"
        return path.read_text() if path.is_file() else ""

    def stacks(self, rank: int) -> str:
        """Where a living process hangs, if it has not said so already."""
        if not self._true and self.codes[rank] is None:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
            time.sleep(0.5)
        return self.log(rank)[-4000:]

    def place(self, rank: int = 0) -> str:
        """Where it is, or was."""
        return "not known" if self._true else last_seen(self.directory / f"place.{rank}")

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> bool:
        """Until those of `ranks` (all) have ended, at most so many seconds; whether they have."""
        deadline = time.monotonic() + seconds
        while any(self.codes[rank] is None for rank in (ranks if ranks is not None else range(len(self.codes)))):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def end(self) -> None:
        """Nobody is left."""
        for rank, code in enumerate(self.codes):
            if code is None:
                self.kill(rank)
        self.wait(PATIENCE)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
