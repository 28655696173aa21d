"""What the ranks of test_lte_data do: short fits of a toy model on loaders of every make."""

import os
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, Subset, TensorDataset

from lowrank_pretrain.lte import LTEStrategy
from tests.lte_workers import Net, Samples

N, BATCH = 32, 4


def rank():
    return int(os.environ["RANK"])


@dataclass
class Bag:
    """A batch class of one's own."""

    parts: dict
    worker: int


class Reads(Net):
    """Finds its three tensors in whatever it is given."""

    def training_step(self, batch, batch_idx):
        batch = batch.parts["samples"] if isinstance(batch, Bag) else batch
        return super().training_step(batch, batch_idx)


class Stream(IterableDataset):
    """Samples by number; with a length if it is told one, be it true or not."""

    def __init__(self, numbers):
        self.data, self.numbers = Samples(N), list(numbers)

    def __iter__(self):
        return (self.data[i] for i in self.numbers)


class Sized(Stream):
    """A stream that says how long it is."""

    def __init__(self, numbers, length):
        super().__init__(numbers)
        self.length = length

    def __len__(self):
        return self.length


class ByRank(Sampler):
    """Shares out by rank, as a sampler of one's own."""

    def __init__(self):
        self.numbers = range(rank(), N, 2)

    def __iter__(self):
        return iter(self.numbers)

    def __len__(self):
        return len(self.numbers)


class Few(ByRank):
    """A sampler of one's own that deals the same few samples to all."""

    def __init__(self):
        self.numbers = range(8)


class Buckets:
    """Likewise a batch sampler."""

    def __init__(self, mine=True):
        self.begin = BATCH * rank() if mine else 0

    def __iter__(self):
        return iter([list(range(i, i + BATCH)) for i in range(self.begin, N, 2 * BATCH)])

    def __len__(self):
        return N // BATCH // 2


def mine():
    return range(rank(), N, 2)


def dropping(which):
    """A collate that gives None for the batches that hold these samples."""

    def collate(samples):
        return None if {i for i, *_ in samples} & set(which) else torch.utils.data.default_collate(samples)

    return collate


def bagged(samples):
    return Bag({"samples": torch.utils.data.default_collate(samples)}, worker=rank())


def batches(numbers):
    """A loader that is an iterator itself."""
    return iter(DataLoader(Subset(Samples(N), list(numbers)), BATCH))


class Again:
    """An iterable of one's own, which is no DataLoader."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def __iter__(self):
        return batches(self.numbers)


def constant(numbers):
    """Samples of which the first two batches are alike on all workers."""
    return Stream([*range(2 * BATCH), *[i for i in numbers if i >= 2 * BATCH]])


def sampled(**kwargs):
    data = Samples(N)
    return DataLoader(data, BATCH, sampler=DistributedSampler(data, **{"num_replicas": 2, "rank": rank(), **kwargs}))


LOADERS = {
    # runs: (loader, batches per worker and epoch)
    "lightnings sampler": lambda: DataLoader(Samples(N), BATCH),
    "sampler": lambda: DataLoader(Samples(N), BATCH, sampler=ByRank()),
    "batch sampler": lambda: DataLoader(Samples(N), batch_sampler=Buckets()),
    "split set": lambda: DataLoader(Subset(Samples(N), list(mine())), BATCH),
    "split tensors": lambda: DataLoader(
        TensorDataset(*(t[mine()] for t in (torch.arange(N), Samples(N).x, Samples(N).y))), BATCH
    ),
    "few": lambda: DataLoader(Samples(N), BATCH, sampler=Few()),
    "same half": lambda: DataLoader(Subset(Samples(N), range(16)), BATCH),
    "distributed sampler": lambda: sampled(),
    "none for all": lambda: DataLoader(Stream(mine()), BATCH, collate_fn=dropping([8, 9])),
    "none for one": lambda: DataLoader(Stream(mine()), BATCH, collate_fn=dropping([8])),
    "none in a set": lambda: DataLoader(Samples(N), collate_fn=dropping([8]), batch_sampler=Buckets()),
    "says too much": lambda: DataLoader(Sized(list(mine())[: 16 - 4 * rank()], 16), BATCH),
    "says too little": lambda: DataLoader(Sized(mine(), 16 - 4 * rank()), BATCH),
    "a length for one": lambda: DataLoader((Sized(mine(), 16) if rank() else Stream(mine())), BATCH),
    "iterator": lambda: batches(mine()),
    "short iterator": lambda: batches(list(mine())[: 16 - 4 * rank()]),
    "own iterable": lambda: Again(mine()),
    "first batches alike": lambda: DataLoader(constant(mine()), BATCH),
    "own class": lambda: DataLoader(Stream(mine()), BATCH, collate_fn=bagged),
    # refused
    "rank 0 for all": lambda: sampled(rank=0, shuffle=False),
    "world of one": lambda: sampled(num_replicas=1, rank=0),
    "world of four": lambda: sampled(num_replicas=4),
    "other seeds": lambda: sampled(seed=rank()),
    "everything, shuffled apart": lambda: DataLoader(
        Samples(N), BATCH, sampler=RandomSampler(Samples(N), generator=torch.Generator().manual_seed(rank()))
    ),
    "same batches": lambda: DataLoader(Samples(N), batch_sampler=Buckets(mine=False)),
    "same stream": lambda: DataLoader(Stream(range(N)), BATCH),
    "same stream, own class": lambda: DataLoader(Stream(range(N)), BATCH, collate_fn=bagged),
    "nothing for one": lambda: DataLoader(Sized(list(mine())[: 16 - 16 * rank()], 16 - 16 * rank()), BATCH),
    "no stream for one": lambda: DataLoader(Stream(list(mine())[: 16 * rank()]), BATCH),
    "an empty one that says otherwise": lambda: DataLoader(Sized(list(mine())[: 16 * rank()], 16), BATCH),
}


def outcomes(world, names, injected=False):
    """By name of the loader: the samples seen in one epoch, or the error."""
    found = {}
    for name in names:
        module = Reads()
        run = pl.Trainer(
            accelerator="cpu", devices=world, strategy=LTEStrategy(rank=2, heads=2, merge_every=2, merge_timeout=20),
            max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
            use_distributed_sampler=injected,
        )  # fmt: skip
        try:
            run.fit(module, LOADERS[name]())
            found[name] = module.seen, run.strategy.local.clock
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def said(world, names):
    """By name of the loader: what is warned of, with Lightning's own sampler over it."""
    found = {}
    for name in names:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen = outcomes(world, [name], injected=True)[name]
        assert not isinstance(seen, str), (name, seen)
        found[name] = [str(w.message) for w in caught]
    return found
