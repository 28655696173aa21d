"""Load batches and resume in the middle of an epoch, with the batches of an uninterrupted run, bit for bit.

The content of a batch is a pure function of (run seed, epoch, indices): order, augmentation and mixing draw from generators
seeded by those, never from torch's global one. So the whole state of a map-style loader is two numbers, (epoch, batches),
and it may resume with another number of workers. A stream keeps its readers' positions instead (``loaders.stream``).

All are plain iterables around a torch loader, not subclasses of it: Lightning then leaves their samplers alone and asks
only for ``len``, ``state_dict`` and ``batch_sampler.sampler.set_epoch``.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Sampler

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.loaders.batch import BadInputs, Fetched, end_workers, torch_loader


class BatchSet(Protocol):
    """Describe a map-style dataset that is asked for whole batches."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        """Return the batch of the samples ``indices`` in ``epoch``."""
        ...


class EpochBatches(Sampler):
    """Yield ``(epoch, indices)`` for one rank, in an order that depends on seed and epoch alone.

    Every rank takes every N-th sample of the global order, so batch b of all ranks together is the same slice of it for
    any number of ranks with the same product of ranks and batch size.

    Args:
        size: number of samples in the set.
        batch_size: samples per batch on this rank.
        shuffle: a new order every epoch; the last incomplete batch is dropped. Otherwise the natural order, whole, where
            the ranks beyond the remainder repeat a sample so that all have equally many batches.
        rank: this process.
        world_size: number of processes N.
        seed: the run's seed; None: the one given to ``seed_everything``.
    """

    def __init__(
        self, size: int, batch_size: int, shuffle: bool, rank: int = 0, world_size: int = 1, seed: int | None = None
    ) -> None:
        self.size, self.batch_size, self.shuffle = size, batch_size, shuffle
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch = 0
        self.start = 0  # batches to leave out at the next iteration
        per_rank = size // world_size if shuffle else -(-size // world_size)
        self.batches = per_rank // batch_size if shuffle else -(-per_rank // batch_size)

    @property
    def sampler(self) -> "EpochBatches":
        """Return the sampler itself: Lightning looks for :meth:`set_epoch` under this name."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator("order", self.epoch, seed=self.seed))
        elif extra := -self.size % self.world_size:
            order = torch.cat([order, order[:extra]])
        mine = order[self.rank :: self.world_size].tolist()
        for batch in range(self.start, self.batches):
            yield self.epoch, mine[batch * self.batch_size : (batch + 1) * self.batch_size]


class EpochLoader:
    """Yield batches of a map-style set; ``state_dict`` holds the position in the epoch.

    Args:
        dataset: fetches whole batches.
        batches: which ones.
        num_workers: processes that fetch; 0 fetches in this one.
    """

    def __init__(self, dataset: BatchSet, batches: EpochBatches, num_workers: int = 0) -> None:
        self.dataset, self.batch_sampler, self.num_workers = dataset, batches, num_workers
        self.batch_size = batches.batch_size
        self._loader = torch_loader(DataLoader, _ByKey(dataset), num_workers, sampler=batches)
        self._position = (0, 0)  # epoch, batches handed out in it
        self._resume: dict[str, int] | None = None
        self._bad = BadInputs("the next one that can be read takes its place")

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: nothing runs before the first `next`, and Lightning sets the epoch after it creates the iterator
        batches, resume = self.batch_sampler, self._resume
        self._resume = None
        # A position belongs to its epoch: saved at the end of one, it says nothing about the next
        start = 0
        if resume and resume["epoch"] == batches.epoch and resume["batches"]:
            start = resume["batches"]
            self._check_same_order(resume)
        batches.start = start
        self._position = (batches.epoch, start)
        for done, fetched in enumerate(self._loader, start + 1):
            self._position = (self._position[0], done)
            yield self._bad.unwrap(fetched)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the batches handed out in it, and what their order depends on."""
        epoch, done = self._position
        batches = self.batch_sampler
        here = {"epoch": epoch, "batches": done, "size": batches.size, "samples": batches.batch_size * batches.world_size}
        return self._resume or here

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from ``state`` at the next iteration, if that is still in the same epoch.

        That iteration raises a ConfigError if the position is inside an epoch of another set or of other global batches.
        """
        self._resume = dict(state)

    def _check_same_order(self, state: dict[str, int]) -> None:
        batches = self.batch_sampler
        if state["samples"] != batches.batch_size * batches.world_size:
            allowed = (
                f"times {batches.world_size} processes must be {state['samples']}, as in the checkpoint, until its epoch ends"
            )
            raise ConfigError("batch_size", batches.batch_size, allowed)
        if state["size"] != batches.size:
            raise ConfigError("root", batches.size, f"must hold the {state['size']} samples of the checkpoint's run")

    def close(self) -> None:
        """End the worker processes."""
        end_workers(self._loader)


class _ByKey(torch.utils.data.Dataset):
    """Take what the sampler yields as an index, so that one index is one batch."""

    def __init__(self, dataset: BatchSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, list[int]]) -> Fetched:
        try:
            return self.dataset.fetch(*key)
        except ConfigError as error:
            return Fetched(None, [], error)
