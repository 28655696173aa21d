"""Load streams: an endless one for training, whose readers' positions are its state, and one pass for validation."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.data.loaders.batch import BadInputs, Fetched, end_workers, torch_loader


class StreamLoader:
    """Yield batches of an endless stream. An epoch is a number of batches; the stream continues from epoch to epoch.

    The readers' positions are kept by torchdata's StatefulDataLoader, one state for each worker of each rank.

    Args:
        dataset: an endless iterable of :class:`Fetched`, with ``state_dict`` and ``load_state_dict``.
        batches_per_epoch: how many make an epoch. So the loader has a length: without one Lightning fetches a batch
            ahead, and a checkpoint would skip it.
        num_workers: processes that read; 0 reads in this one.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self, dataset: IterableDataset, batches_per_epoch: int, num_workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        with optional_import():  # here: strategies import this class, but do not need torchdata
            from torchdata.stateful_dataloader import StatefulDataLoader

        self.num_workers, self.rank, self.world_size = num_workers, rank, world_size
        self.batches_per_epoch = batches_per_epoch
        self.epoch = 0
        # a copy: without workers this object itself advances, and another loader must start at the beginning
        self._loader: Any = torch_loader(StatefulDataLoader, copy.copy(dataset), num_workers)
        self._running: Iterator[Fetched] | None = None  # from the first batch to `close`
        self._last: dict[str, Any] | None = None  # the readers' state at `close`
        self._position = (0, 0)
        self._resume: tuple[int, int] | None = None
        self._bad = BadInputs()

    @property
    def sampler(self) -> "StreamLoader":
        """Return the loader itself: Lightning looks for :meth:`set_epoch` under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; the stream itself does not start again."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        start = self._resume[1] if self._resume and self._resume[0] == self.epoch else 0
        self._resume = None
        self._position = (self.epoch, start)
        if self._running is None:
            self._running, self._last = iter(self._loader), None
        for done in range(start + 1, self.batches_per_epoch + 1):
            fetched = next(self._running)
            self._position = (self._position[0], done)
            yield self._bad.unwrap(fetched)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the epoch and every rank's readers. All ranks must call it together."""
        epoch, done = self._resume or self._position
        readers: list[Any] = [self._last or self._loader.state_dict()]
        if self.world_size > 1:
            mine, readers = readers[0], [None] * self.world_size
            torch.distributed.all_gather_object(readers, mine)
        here = {"epoch": epoch, "batches": done, "workers": self.num_workers, "readers": readers}
        return here | {"block": getattr(self._loader.dataset, "block", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state`` at the next iteration.

        Raises:
            ConfigError: the stream was split differently, among other workers or processes.
        """
        if state["workers"] != self.num_workers:
            allowed = f"must be {state['workers']}, as in the checkpoint: each worker keeps its own place in the stream"
            raise ConfigError("num_workers", self.num_workers, allowed)
        if len(state["readers"]) != self.world_size:
            allowed = f"must be {len(state['readers'])}, as in the checkpoint: each process keeps its own place in the stream"
            raise ConfigError("trainer.devices", self.world_size, allowed)
        stream = self._loader.dataset
        block, mine = state.get("block"), getattr(stream, "block", None)
        if block is not None and mine is not None and block != mine:
            allowed = (
                f"makes blocks of {mine} sequences that are shuffled together, the checkpoint's have {block}: "
                f"use a batch size that divides {block}, with data.shuffle_block={block}"
            )
            raise ConfigError("batch_size", stream.batch_size, allowed)
        self._running = self._last = None
        self._loader.load_state_dict(state["readers"][self.rank])
        self._resume = (state["epoch"], state["batches"])

    def close(self) -> None:
        """End the worker processes; ``state_dict`` still returns their last positions."""
        if self._running is not None:
            self._running, self._last = None, self._loader.state_dict()
        end_workers(self._loader)


class PassLoader:
    """Yield batches of one pass over a stream, for validation; its length is not known.

    Args:
        dataset: an iterable of :class:`Fetched` that ends.
        num_workers: processes that read; 0 reads in this one.
    """

    def __init__(self, dataset: IterableDataset, num_workers: int = 0) -> None:
        self._loader = torch_loader(DataLoader, dataset, num_workers)
        self._bad = BadInputs()

    def __iter__(self) -> Iterator[Any]:
        for fetched in self._loader:
            yield self._bad.unwrap(fetched)

    def close(self) -> None:
        """End the worker processes."""
        end_workers(self._loader)
