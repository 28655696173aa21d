"""A pool of processes that serve the whole test session: ``ranks(2, function, …)`` runs a function as so many ranks.

Each call is a world of its own, seen by Lightning as started by torchrun (the environment says so), and torn down after it.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import torch

SIZE = 4


def serve(connection: Any) -> None:
    """A rank's life: a task comes in, its result or traceback goes out."""
    import warnings

    torch.set_num_threads(1)
    import lightning.pytorch  # noqa: F401  # a second each, before the first task is timed

    held: list[Any] = []  # the last call's process group
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        held.clear()
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
            # A hook's last future may still hold the group in one of gloo's own threads. If that thread were the last to let
            # go, it would have to join itself and the process would die ("Resource deadlock avoided"): so we let go last.
            held.append(torch.distributed.group.WORLD)
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
        failed = [f"rank {rank}: {value}\n{detail}" for rank, (fine, value, detail) in enumerate(outcomes) if not fine]
        if failed:
            self.close()  # what an unexpected failure leaves in a process must not fail the tests after it
        assert not failed, "\n".join(sorted(failed, key=len, reverse=True))  # who did not answer has the least to say
        return [value for _, value, _ in outcomes]

    def outcomes(
        self, world: int, function: Callable, *args: Any, timeout: float = 120, grace: float = 20, **kwargs: Any
    ) -> list[tuple]:
        """(True, result, warnings) or (False, error, traceback) per rank; once one fails the others have ``grace`` seconds."""
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
        outcomes: dict[int, tuple] = {}
        deadline = time.monotonic() + timeout
        while len(outcomes) < world:
            waiting = {self._workers[rank][1]: rank for rank in range(world) if rank not in outcomes}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                try:
                    outcome = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    outcome = False, "the process died", ""
                outcomes[waiting[connection]] = outcome
                if not outcome[0]:  # the others may wait for it in vain
                    deadline = min(deadline, time.monotonic() + grace)
        if len(outcomes) < world or any(not process.is_alive() for process, _ in self._workers):
            self.close()
        return [outcomes.get(rank, (False, f"no answer within {timeout} s", "")) for rank in range(world)]

    def close(self) -> None:
        """End the processes; the next call starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        self._workers.clear()
