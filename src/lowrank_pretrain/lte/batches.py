"""Check that workers see different data and the same amount of it: a loss curve shows neither.

Lightning gives a map-style loader a ``DistributedSampler``. Other loaders (a sampler or a batch sampler of the user's own, a
data set that was split beforehand, a stream) are judged by what arrives: the first batches of all workers are compared. A
worker with more batches than the others would wait for ever at the next merge: if a loader may have fewer than it says, the
workers ask one another before every batch.
"""

import itertools
import warnings
from collections import deque
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from lowrank_pretrain.checkpoints import random_state
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import wrapped_sampler
from lowrank_pretrain.data.loaders.epoch import EpochLoader
from lowrank_pretrain.data.loaders.stream import StreamLoader
from lowrank_pretrain.lte.leaves import digest

LOOKED_AT = 4  # two workers share their data if this many first batches are equal
_END = object()


@dataclass(frozen=True)
class Facts:
    """Describe a worker's training loader to the other workers.

    Attributes:
        length: number of batches; ``None``: unknown.
        name: kind of sampler, for messages.
        share: (workers, rank, seed) of the sampler that shares the samples out; ``None``: there is none.
        trusted: whether the batches are what the sampler says, so that they need not be compared.
        exact: whether it is certain to have as many batches as it says.
        first: a hash of the data set's first sample, where a sampler would give it to every worker.
        part: a hash of which samples the data set has, if it is in memory; ``None``: unknown.
        own: samples that the user's sampler yields, and the total, if Lightning shares them out again.
    """

    length: int | None
    name: str
    share: tuple[int, int, Any] | None = None
    trusted: bool = False
    exact: bool = False
    first: str | None = None
    part: str | None = None
    own: tuple[int, int] | None = None


def shared_out(loader: Any, workers: int) -> Any:
    """Return the training loader, made safe: it yields only this worker's data, and ends when any worker's ends.

    All workers call it together. A loader that is known to be right is returned unchanged.

    Args:
        loader: a training loader; anything that can be iterated.
        workers: number of workers.

    Raises:
        ConfigError: on all workers: a ``DistributedSampler`` of another number of workers, or of one rank twice; workers
            without a batch.
    """
    if workers == 1:
        return loader
    everyone: list[Any] = [None] * workers
    dist.all_gather_object(everyone, _facts(loader))
    _check_samplers(everyone, workers)
    _warn_of_parts(everyone, workers)
    lengths = [facts.length for facts in everyone if facts.length is not None]
    known = min(lengths) if len(lengths) == workers else None
    if known == 0 and max(lengths) > 0:
        raise _no_batch(lengths.index(0))
    shares = all(facts.trusted for facts in everyone)
    exact = known is not None and all(facts.exact for facts in everyone)
    if exact and shares and max(lengths) == known:
        return loader
    if known is not None and max(lengths) > known and dist.get_rank() == 0:
        warnings.warn(f"workers have {sorted(lengths)} batches: all stop after {known}", stacklevel=2)
    stateful = callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))
    kind = _KINDS[known is not None, stateful]
    return kind(loader, workers, known, compared=not shares, asks=not exact)


def _facts(loader: Any) -> Facts:
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        length = None
    name = type(loader).__name__
    if isinstance(loader, (EpochLoader, StreamLoader)):  # ours: shared out by rank, and sure of their length
        owner = loader.batch_sampler if isinstance(loader, EpochLoader) else loader
        return Facts(length, name, (owner.world_size, owner.rank, getattr(owner, "seed", None)), trusted=True, exact=True)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return Facts(length, name)
    whole = type(loader.batch_sampler) in (BatchSampler, type(None))  # it takes what the sampler gives, in that order
    sampler = loader.sampler if whole else loader.batch_sampler
    dealt = sampler if whole else getattr(sampler, "sampler", None)
    share, trusted, part, own = None, False, None, None
    if isinstance(dealt, DistributedSampler):
        _check_shared_once(dealt)
        share = dealt.num_replicas, dealt.rank, dealt.seed if dealt.shuffle else None
        trusted = whole and type(dealt) in (DistributedSampler, DistributedSamplerWrapper)
        part, own = _part(loader.dataset), _dealt(dealt, loader.dataset)
    alike = type(sampler) in (RandomSampler, SequentialSampler)
    # a user's collate may return None for a bad batch, a user's sampler may be short
    exact = (trusted or alike) and loader.collate_fn is default_collate
    return Facts(length, type(sampler).__name__, share, trusted, exact, _first_sample(loader) if alike else None, part, own)


def _first_sample(loader: DataLoader) -> str | None:
    """Return a hash of the data set's first sample, drawn without a trace in the random generators."""
    drawn = random_state.capture()
    try:
        return digest(loader.dataset[0])
    except (IndexError, KeyError, TypeError):  # it counts otherwise
        return None
    finally:
        random_state.restore(drawn)


def _check_shared_once(sampler: DistributedSampler) -> None:
    """Refuse a sampler that shares out already: Lightning's own would share its part out again."""
    if not isinstance(sampler, DistributedSamplerWrapper):
        return
    inner = wrapped_sampler(sampler)
    if any(isinstance(n := getattr(inner, key, 1), int) and n > 1 for key in ("num_replicas", "world_size")):
        raise ConfigError(
            "sampler", type(inner).__name__, "shares the samples out already, and Lightning would do so once more: set "
            "Trainer(use_distributed_sampler=False)"
        )  # fmt: skip


def _part(data: Any) -> str | None:
    """Return a hash of a data set's choice of samples, if it can be read without side effects."""
    if isinstance(data, Subset):
        return digest(np.asarray(data.indices))
    return digest(data[0]) if isinstance(data, TensorDataset) and len(data) else None


def _dealt(sampler: DistributedSampler, data: Any) -> tuple[int, int] | None:
    """Return the number of samples that a user's sampler yields, and the total, if Lightning wraps it in its own."""
    inner = wrapped_sampler(sampler) if isinstance(sampler, DistributedSamplerWrapper) else None
    if inner is None or type(inner).__module__.startswith("torch.") or not isinstance(data, Sized):
        return None
    return (len(inner), len(data)) if isinstance(inner, Sized) else None


def _warn_of_parts(everyone: list[Facts], workers: int) -> None:
    """Warn of data that are shared out twice, so that only a part of each part trains. Overlap may be intended."""
    again = f"is shared out once more by Lightning's sampler, so that only 1/{workers} of it is seen"
    cure = "set Trainer(use_distributed_sampler=False), if each worker's part is its own already"
    parts = {facts.part for facts in everyone}
    own = [facts.own for facts in everyone if facts.own is not None]
    if None not in parts and len(parts) == workers:
        rank_zero_warn(f"LTE: every worker has another training set, and each {again}: {cure}")
    elif len(own) == len(everyone) and all(0 <= of - workers * dealt + workers - 1 <= 2 * (workers - 1) for dealt, of in own):
        dealt, of = own[0]
        rank_zero_warn(f"LTE: the sampler gives {dealt} of {of} samples on each of {workers} workers, and that {again}: {cure}")


def _check_samplers(everyone: list[Facts], workers: int) -> None:
    """Refuse samplers that do not give each part of the data to exactly one worker."""
    cure = "leave Trainer(use_distributed_sampler=True), or give DistributedSampler the right rank and num_replicas"
    firsts = {(facts.first, facts.length) for facts in everyone}
    if len(firsts) == 1 and everyone[0].first is not None:
        raise ConfigError("sampler", everyone[0].name, f"gives each of {workers} workers the same samples: {cure}")
    shares = [facts.share for facts in everyone if facts.share is not None]
    if len(shares) < len(everyone):
        return
    for facts, (among, _, _) in zip(everyone, shares, strict=True):
        if among != workers:
            raise ConfigError(
                "sampler", facts.name, f"shares the samples out among {among} workers, and there are {workers}: {cure}"
            )
    ranks = [rank for _, rank, _ in shares]
    if len(set(ranks)) < workers:
        twice = next(rank for rank in ranks if ranks.count(rank) > 1)
        others = [n for n, rank in enumerate(ranks) if rank == twice]
        raise ConfigError(
            "sampler", everyone[0].name, f"gives workers {' and '.join(map(str, others))} the same samples, those of rank "
            f"{twice}: {cure}"
        )  # fmt: skip
    seeds = list(dict.fromkeys(seed for *_, seed in shares))
    if len(seeds) > 1:
        raise ConfigError(
            "sampler", everyone[0].name, f"is shuffled by other seeds on other workers ({seeds[0]}, {seeds[1]}), so that their "
            "parts overlap: give all the same seed"
        )  # fmt: skip


class _Shared:
    """Behave like the user's loader, except for where it ends.

    Args:
        loader: the user's loader.
        workers: number of workers.
        length: batches after which all end; ``None``: unknown.
        compared: whether its first batches are compared with the other workers'.
        asks: whether the workers ask one another before every batch.
    """

    def __init__(self, loader: Any, workers: int, length: int | None, compared: bool, asks: bool) -> None:
        self._loader, self._workers, self._length = loader, workers, length
        self._compared, self._asks = compared, asks
        self._warned = self._begun = False

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        # a generator: the first `next` begins, after Lightning has set the epoch
        batches: Iterator[Any] = iter(self._loader)
        ahead: deque[Any] = deque()
        if self._compared:
            self._compare(batches, ahead)
        for _ in itertools.count() if self._length is None else range(self._length):
            batch = ahead.popleft() if ahead else self._next(batches)
            if self._asks:
                ended = _who_ended(batch is _END, self._workers)
                if ended:
                    if not self._begun and len(ended) < self._workers:
                        raise _no_batch(ended[0])
                    if batch is not _END:
                        self._say(f"worker {ended[0]} has no more batches: this one stops too")
                    return
            if batch is _END:
                return
            self._begun = True
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch that is not None. A worker that skipped a step would leave the others waiting."""
        batch = next(batches, _END)
        while batch is None and self._asks:
            self._say("the training loader gave None: this worker takes its next batch instead")
            batch = next(batches, _END)
        return batch

    def _say(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)

    def _compare(self, batches: Iterator[Any], ahead: deque[Any]) -> None:
        """Refuse two workers with the same batches. The compared batches are then handed out.

        One batch is enough where they differ; equal ones may be chance (a constant, a label), so more are compared.
        """
        same: set[tuple[int, int]] | None = None
        for looked in range(1, LOOKED_AT + 1):
            batch = self._next(batches) if self._length is None or looked <= self._length else _END
            ended = _who_ended(batch is _END, self._workers)
            if batch is not _END:
                ahead.append(batch)
            if ended:
                ahead.extend([_END] if batch is _END else [])
                break
            seen: list[Any] = [None] * self._workers
            dist.all_gather_object(seen, digest(batch), group=_cpu_group())
            pairs = {pair for pair in itertools.combinations(range(self._workers), 2) if seen[pair[0]] == seen[pair[1]]}
            same = pairs if same is None else same & pairs
            if not same:
                return
        if same:
            one, other = min(same)
            raise ConfigError(
                "train_dataloader", "the same first batch", f"came to two of {self._workers} workers, {one} and {other}: share "
                "the data out by rank (a DistributedSampler; datasets.distributed.split_dataset_by_node; or "
                "torch.distributed.get_rank() where samples are chosen)"
            )  # fmt: skip


class _Sized(_Shared):
    """Add a length; Lightning tests for it by type."""

    _length: int

    def __len__(self) -> int:
        return self._length


class _State:
    """Add a checkpoint state; Lightning tests for it by type."""

    _loader: Any
    _begun: bool

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's state."""
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Pass the state to the loader, which may be at its end."""
        self._begun = True
        self._loader.load_state_dict(state)


class _StatefulShared(_State, _Shared):
    """Share data, with a checkpoint state."""


class _StatefulSized(_State, _Sized):
    """Share data, with a length and a checkpoint state."""


# by whether it has a length, and whether it has a state
_KINDS = {(False, False): _Shared, (True, False): _Sized, (False, True): _StatefulShared, (True, True): _StatefulSized}


def _no_batch(worker: int) -> ConfigError:
    """Return the error of a worker that would end the others' fit before its first step."""
    return ConfigError("train_dataloader", "0 batches", f"is what worker {worker} has; each needs at least one")


def _who_ended(mine: bool, workers: int) -> list[int]:
    """Return the workers that have no more batches."""
    # numbers on the CPU, also if gradients use NCCL: a device sync per batch would cost more
    ended = torch.zeros(workers, dtype=torch.int32, device="cpu")
    ended[dist.get_rank()] = mine
    dist.all_reduce(ended, group=_cpu_group())
    return ended.nonzero().flatten().tolist()


_cpu_groups: dict[Any, Any] = {}  # of the present world


def _cpu_group() -> Any:
    """Return a process group that communicates on the CPU."""
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _cpu_groups:  # a new world since the last group was made
        _cpu_groups.clear()
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]
