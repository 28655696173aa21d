"""Take batches out of worker processes: what a dataset hands over, unreadable inputs, and the start and end of workers."""

import os
import signal
import threading
import warnings
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from lowrank_pretrain.core.lightning_private import shut_down


class Fetched(NamedTuple):
    """Hold what a dataset hands over, from any process: a batch, and what went wrong on the way."""

    batch: Any
    bad: list[str]  # one line per input that could not be read and was replaced or left out
    error: Exception | None = None  # carried, not raised: torch would turn a worker's exception into a traceback as text


NAMED = 20  # unreadable inputs that are named one by one
REMEMBERED = 100_000  # lines kept, to recognise one in the next epoch


class BadInputs:
    """Count unreadable inputs and warn once of each by name; of many, name the first and give their number.

    Args:
        instead: what became of such an input.
    """

    def __init__(self, instead: str = "left out") -> None:
        self.seen: set[str] = set()
        self.instead = instead

    def add(self, lines: list[str]) -> None:
        """Warn of the lines that are new."""
        for line in lines:
            if line in self.seen or len(self.seen) >= REMEMBERED:
                continue
            self.seen.add(line)
            count = len(self.seen)
            if count <= NAMED or count in (100, 1000, 10_000, REMEMBERED):
                more = "; of further ones only the number" if count == NAMED else ""
                warnings.warn(f"unreadable input number {count}, {self.instead}: {line}{more}", stacklevel=1)

    def unwrap(self, fetched: Fetched) -> Any:
        """Return the batch, warn of new bad inputs, and raise the error that a worker carried over."""
        self.add(fetched.bad)
        if fetched.error is not None:
            raise fetched.error
        return fetched.batch


def torch_loader(cls: type[DataLoader], dataset: Any, num_workers: int, **kwargs: Any) -> DataLoader:
    """Create a loader of whole batches."""
    # batch_size=None: the dataset makes whole batches. The generator is ours because a loader without one draws its
    # workers' base seed from the global generator at every iteration, validation included
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata's own warning
        return _starts_deaf(cls)(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_identity,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_outlive_signals,
            **kwargs,
        )


HEARD = {signal.SIGINT, signal.SIGTERM}


def _starts_deaf(cls: type[DataLoader]) -> type[DataLoader]:
    """Make a kind of loader whose processes begin with the signals blocked that ``_outlive_signals`` takes.

    Libraries for linear algebra start threads in a new process at once; these must not hear the signals either.
    """

    def iterate(self: Any) -> Any:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
        try:
            return cls.__iter__(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    return type(cls.__name__, (cls,), {"__iter__": iterate}) if hasattr(signal, "sigwaitinfo") else cls


def _outlive_signals(worker: int) -> None:
    """Make a loading process ignore Ctrl-C, and SIGTERM unless the training process sends it.

    A terminal, ``timeout`` and SLURM signal the whole process group. The training process answers by a checkpoint; without its
    workers it would fail while it writes.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while True:
        info = signal.sigwaitinfo(HEARD)
        if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
            os._exit(0)


def end_workers(loader: DataLoader) -> None:
    """End the worker processes now."""
    # not left to the garbage collector: if it runs while another loader forks, each worker takes 5 seconds to end
    shut_down(loader)


def _identity(item: Any) -> Any:
    return item
