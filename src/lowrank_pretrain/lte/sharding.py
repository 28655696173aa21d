"""Do the workers see different data, and equally much of it? Checked, because neither shows in any loss curve.

Lightning gives a map-style loader a ``DistributedSampler``; an ``IterableDataset`` it leaves alone, and then every worker
trains on the same stream. Workers with more batches than the others would wait for ever at the next merge.
"""

import hashlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lowrank_pretrain.errors import ConfigError


def check_sampler(loader: Any, workers: int) -> None:
    """Refuse a map-style training loader whose sampler does not share the samples out.

    Raises:
        ConfigError: naming the sampler.
    """
    if workers == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return
    sampler = loader.sampler
    inner = getattr(loader.batch_sampler, "sampler", None)
    if not any(isinstance(s, DistributedSampler) or getattr(s, "num_replicas", None) == workers for s in (sampler, inner)):
        raise ConfigError(
            "sampler", type(sampler).__name__, f"gives each of {workers} workers the same samples: "
            "leave Trainer(use_distributed_sampler=True), or use a DistributedSampler"
        )  # fmt: skip


def known_to_share(loader: Any, workers: int) -> bool:
    """Whether the loader is of a kind that is seen to share its data out; others' first batches are compared."""
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return True  # check_sampler has looked
    return workers == 1 or getattr(getattr(loader, "batch_sampler", None), "world_size", None) == workers


def check_batches_differ(batch: Any, workers: int) -> None:
    """Refuse a first training batch that two workers share. All workers must call it together.

    Raises:
        ConfigError: two workers hold the same batch.
    """
    if workers == 1:
        return
    digests: list[Any] = [None] * workers
    dist.all_gather_object(digests, _digest(batch))
    if len(set(digests)) < workers:
        raise ConfigError(
            "train_dataloader", "the same first batch", f"came to two of {workers} workers: an IterableDataset must share "
            "itself out by rank (datasets.distributed.split_dataset_by_node, or torch.distributed.get_rank() in __iter__)"
        )  # fmt: skip


def _digest(batch: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    pending = [batch]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found.update(item.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if item.numel() else b"")
        elif isinstance(item, dict):
            pending += [item[key] for key in sorted(item, key=str)]
        elif isinstance(item, (list, tuple)):
            pending += list(item)
        else:
            found.update(repr(item).encode())
    return found.hexdigest()


def equal_lengths(loader: Any, workers: int) -> Any:
    """The loader, or one that ends on all workers after the same number of batches: the longest are cut, with a warning.

    All workers must call it together.

    Args:
        loader: a training loader.
        workers: how many.
    """
    if workers == 1:
        return loader
    try:
        length = len(loader)
    except TypeError:
        length = -1  # an IterableDataset that does not know
    lengths: list[Any] = [None] * workers
    dist.all_gather_object(lengths, length)
    if min(lengths) < 0:
        return _UntilOneEnds(loader)
    if min(lengths) == max(lengths):
        return loader
    if dist.get_rank() == 0:
        warnings.warn(f"workers have {sorted(lengths)} batches: all stop after {min(lengths)}", stacklevel=2)
    return _Cut(loader, min(lengths))


class _Wrapped:
    """A loader in every respect but how long it goes on."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class _Cut(_Wrapped):
    """Ends after so many batches."""

    def __init__(self, loader: Any, length: int) -> None:
        super().__init__(loader)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self._length), self._loader, strict=False):
            yield batch


class _UntilOneEnds(_Wrapped):
    """Asks the others before every batch whether they still have one; for streams that do not know how long they are."""

    def __iter__(self) -> Iterator[Any]:
        # numbers on the CPU, also where gradients go over NCCL: a device sync per batch would cost more
        group = dist.group.WORLD if dist.get_backend() == "gloo" else _cpu_group()
        batches, ended = iter(self._loader), False
        while not ended:
            batch = next(batches, None)
            has = torch.tensor([batch is not None], dtype=torch.int32)
            mine = bool(has)
            dist.all_reduce(has, op=dist.ReduceOp.MIN, group=group)
            ended = not bool(has)
            if not ended:
                yield batch
            elif mine:
                warnings.warn("another worker has no more batches: this one stops too", stacklevel=2)


def _cpu_group() -> Any:
    if not hasattr(_cpu_group, "made"):
        _cpu_group.made = dist.new_group(backend="gloo")
    return _cpu_group.made
