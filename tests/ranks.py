"""A pool of processes that serve the whole test session: ``ranks(2, function, …)`` runs a function as so many ranks.

Each call is a world of its own, seen by Lightning as started by torchrun (the environment says so), and torn down after it.
"""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

SIZE = 4


def serve(connection: Any) -> None:
    """A rank's life: a task comes in, its result or traceback goes out."""
    import warnings

    torch.set_num_threads(1)
    import lightning.pytorch  # noqa: F401  # a second each, before the first task is timed

    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        function, environment, args, kwargs = pickle.loads(task)
        os.environ.update(environment)
        os.environ.pop("PL_GLOBAL_SEED", None)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = (True, function(*args, **kwargs), [str(w.message) for w in caught])
        except BaseException as error:
            result = (False, f"{type(error).__name__}: {error}", traceback.format_exc())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        connection.send_bytes(pickle.dumps(result))


class Ranks:
    """Starts its processes at the first call."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Any]] = []

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def __call__(self, world: int, function: Callable, *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        """``function(*args, **kwargs)`` on ranks 0 … world−1; their results, or an AssertionError with the first traceback."""
        outcomes = self.outcomes(world, function, *args, timeout=timeout, **kwargs)
        for rank, (fine, value, detail) in enumerate(outcomes):
            assert fine, f"rank {rank}: {value}\n{detail}"
        return [value for _, value, _ in outcomes]

    def outcomes(self, world: int, function: Callable, *args: Any, timeout: float = 120, **kwargs: Any) -> list[tuple]:
        """(True, result, warnings) or (False, error, traceback) per rank."""
        self._start(world)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world):
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests",
            }  # fmt: skip
            task = function, {k: str(v) for k, v in environment.items()}, args, kwargs
            self._workers[rank][1].send_bytes(pickle.dumps(task))
        outcomes = []
        for process, connection in self._workers[:world]:
            if not connection.poll(timeout):
                self.close()
                raise AssertionError(f"a rank did not answer within {timeout} s")
            try:
                outcomes.append(pickle.loads(connection.recv_bytes()))
            except EOFError:
                outcomes.append((False, f"the process died with {process.exitcode}", ""))
        if any(not process.is_alive() for process, _ in self._workers):
            self.close()
        return outcomes

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        self._workers.clear()
