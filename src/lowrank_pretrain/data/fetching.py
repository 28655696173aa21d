"""How batches come out of worker processes: what a dataset hands over, bad inputs on the way, starting and ending workers."""

import warnings
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader


class Fetched(NamedTuple):
    """What a dataset hands over, from whatever process: a batch, and what went wrong on the way."""

    batch: Any
    bad: list[str]  # one line per input that could not be read and was replaced or left out
    error: Exception | None = None  # carried, not raised: torch would turn a worker's exception into a traceback as text


class BadInputs:
    """Counts the inputs that could not be read and warns once of each, by name."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def unwrap(self, fetched: Fetched) -> Any:
        """The batch; warns of new bad inputs and raises the error that a worker carried over."""
        for line in fetched.bad:
            if line not in self.seen:
                self.seen.add(line)
                warnings.warn(f"unreadable input number {len(self.seen)}, left out: {line}", stacklevel=3)
        if fetched.error is not None:
            raise fetched.error
        return fetched.batch


def torch_loader(cls: type[DataLoader], dataset: Any, num_workers: int, **kwargs: Any) -> DataLoader:
    """A loader of whole batches."""
    # batch_size=None: the dataset makes whole batches. The generator is ours because a loader without one draws its
    # workers' base seed from the global generator at every iteration, validation included
    return cls(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        collate_fn=_identity,
        generator=torch.Generator().manual_seed(0),
        **kwargs,
    )


def end_workers(loader: DataLoader) -> None:
    """End the worker processes now."""
    # Not left to the garbage collector: when it comes while another loader forks, each worker takes 5 seconds to end
    iterator, loader._iterator = loader._iterator, None
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()


def _identity(item: Any) -> Any:
    return item
