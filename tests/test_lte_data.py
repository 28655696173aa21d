"""Workers' data under LTE: different, of one length, in any container; and who gets which part of a batch."""

import time
from collections import UserDict, namedtuple
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.leaves import batch_size, digest, leaves
from tests import lte_data_workers as workers
from tests.lte_workers import WIDTH, Net, Samples

RUNS = {
    "sampler": 4, "batch sampler": 4, "split set": 4, "distributed sampler": 4, "none for all": 3, "none for one": 3,
    "none in a set": 3, "says too much": 3, "says too little": 3, "a length for one": 4, "iterator": 4, "short iterator": 3,
    "own iterable": 4, "own class": 4,
}  # fmt: skip
REFUSED = {
    "rank 0 for all": "ConfigError: sampler='DistributedSampler': gives workers 0 and 1 the same samples, those of rank 0",
    "world of one": "ConfigError: sampler='DistributedSampler': shares the samples out among 1 workers, and there are 2",
    "world of four": "ConfigError: sampler='DistributedSampler': shares the samples out among 4 workers, and there are 2",
    "other seeds": "ConfigError: sampler='DistributedSampler': is shuffled by other seeds",
    "everything, shuffled apart": "ConfigError: sampler='RandomSampler': gives each of 2 workers the same samples",
    "same batches": "ConfigError: train_dataloader='the same first batch': came to two of 2 workers, 0 and 1",
    "same stream": "ConfigError: train_dataloader='the same first batch'",
    "same stream, own class": "ConfigError: train_dataloader='the same first batch'",
    "nothing for one": "ConfigError: train_dataloader='0 batches': is what worker 1 has",
    "no stream for one": "ConfigError: train_dataloader='0 batches': is what worker 0 has",
    "an empty one that says otherwise": "ConfigError: train_dataloader='0 batches': is what worker 0 has",
}


def test_what_differs_is_welcome_whatever_shares_it_out_and_all_workers_end_together(ranks):
    first, second = ranks(2, workers.outcomes, 2, list(RUNS))
    for name, steps in RUNS.items():
        assert not isinstance(first[name], str), (name, first[name])
        (seen, clock), (others, other_clock) = first[name], second[name]
        assert clock == other_clock == steps == len(seen) // 4 == len(others) // 4, name
        assert len(set(seen)) == len(seen) and not set(seen) & set(others), name  # nothing twice
        if steps == 4:
            assert len(set(seen) | set(others)) == workers.N, name  # and nothing lost


def test_batches_that_are_alike_at_first_are_looked_at_further_and_none_is_lost(ranks):
    for found in ranks(2, workers.outcomes, 2, ["first batches alike"]):
        seen, _ = found["first batches alike"]
        assert seen[:8] == list(range(8)) and len(seen) == len(set(seen)) == 20


def test_data_that_workers_share_are_refused_in_one_line_on_all_of_them(ranks):
    for found in ranks(2, workers.outcomes, 2, list(REFUSED)):
        for name, line in REFUSED.items():
            assert found[name][: len(line)] == line and "\n" not in found[name], (name, found[name])


def test_lightnings_own_sampler_is_trusted(ranks):
    for found in ranks(2, workers.outcomes, 2, ["lightnings sampler", "distributed sampler"], injected=True):
        assert all(len(seen) == 16 for seen, _ in found.values())


TWICE = {
    "sampler": "gives 16 of 32 samples on each of 2 workers", "split set": "every worker has another training set",
    "split tensors": "every worker has another training set", "lightnings sampler": None, "few": None, "same half": None,
}  # fmt: skip


def test_what_is_shared_out_twice_is_said(ranks):
    results = ranks.outcomes(2, workers.said, 2, list(TWICE))
    assert results[0][0], results[0]
    for name, line in TWICE.items():
        found = [text for text in results[0][1][name] if "shared out once more" in text]
        assert len(found) == (line is not None) and all(line in text for text in found), (name, found)


# ---- what a batch consists of --------------------------------------------------------------------------------------------

g = torch.Generator().manual_seed(0)
x = torch.randn(4, 6, generator=g)
Pair = namedtuple("Pair", "a b")


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Graph:
    """Keeps its tensors in an object of its own, can be called, and knows itself."""

    def __init__(self, t):
        self.store, self.itself = SimpleNamespace(t=t), self

    def __call__(self):
        return self


CONTAINERS = {
    "dict": lambda t: {"b": t, "a": "name"}, "user dict": lambda t: UserDict(a=t), "nested": lambda t: [({"a": [t]},)],
    "named tuple": lambda t: Pair(1, t), "data class": lambda t: workers.Bag({"t": t}, 0), "slots": Slotted,
    "attributes": Graph, "set": lambda t: {str(t.flatten()[0].item())}, "numpy": lambda t: t.numpy(),
    "strings": lambda t: [str(v) for v in t.flatten().tolist()], "bytes": lambda t: t.numpy().tobytes(),
    "packed": lambda t: nn.utils.rnn.pack_sequence([t, t[:2]]), "ragged": lambda t: [t, t[:1]],
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_container_is_looked_into(name):
    make = CONTAINERS[name]
    assert digest(make(x)) == digest(make(x.clone())) != digest(make(x + 1e-3))


KINDS = {
    "0-d": lambda t: t[0, 0], "bfloat16": lambda t: t.bfloat16(), "bool": lambda t: t > 0, "int": lambda t: (9 * t).long(),
    "complex": lambda t: torch.complex(t, -t), "conjugate": lambda t: torch.complex(t, -t).conj(), "empty": lambda t: t[:0],
    "negated": lambda t: torch.complex(t, t).conj().imag, "strided": lambda t: t.t()[::2],
    "expanded": lambda t: t[:1].expand(9, 6),
    "sparse": lambda t: t.to_sparse(), "csr": lambda t: t.to_sparse_csr(), "csc": lambda t: t.to_sparse_csc(),
    "bsr": lambda t: t.to_sparse_bsr((2, 2)), "uncoalesced": lambda t: torch.sparse_coo_tensor([[0, 0]], t[0, :2], (4,)),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:2]]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t[:2]], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 3, torch.quint8), "float8": lambda t: t.to(torch.float8_e4m3fn),
    "parameter": lambda t: nn.Parameter(t), "meta": lambda t: t.to("meta"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_kind_is_told_from_another(kind):
    make = KINDS[kind]
    one, same, other = ({"x": make(t)} for t in (x, x.clone(), 3 * x + 1))
    assert digest(one) == digest(same)
    assert digest(one) != digest(other) or kind in ("empty", "meta")


def test_numbers_that_stand_alone_do_not_make_the_same_samples_others():
    for a, b in ((0, 1), (torch.tensor(0.5), torch.tensor(0.6)), (np.float32(1), np.float32(2)), (time.time(), 0.0)):
        assert digest({"x": x, "worker": a}) == digest({"x": x, "worker": b})
        assert digest({"worker": a}) != digest({"worker": b})  # unless there is nothing else
    assert digest({"x": x, "path": "a.png"}) != digest({"x": x, "path": "b.png"})


def test_nothing_is_used_up_and_nothing_is_too_odd():
    class Bad:
        def __reduce__(self):
            raise TypeError("not to be pickled")

    gen = (i for i in range(3))
    assert digest([gen, Bad(), lambda: 0, object(), nn.Linear(2, 2)]) and list(gen) == [0, 1, 2]
    loop: list = [x]
    loop.append(loop)
    assert len([leaf for leaf in leaves(loop) if isinstance(leaf, torch.Tensor)]) == 1


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ((x, x[:, 0]), 4), ({"t": torch.tensor(0.5), "x": x, "y": x}, 4), ({"mask": torch.ones(3, 3), "x": x, "y": x[:, 0]}, 4),
        ({"a": (x, x), "b": (x[:2], x[:2])}, 0), ([x[:1], x[:2], x[:3]], 0), ("text", 0),
        (nn.utils.rnn.pack_sequence([x, x]), 0),
        (workers.Bag({"x": x}, 0), 4), (None, 0),
    ],
    ids=str,
)  # fmt: skip
def test_the_batch_is_as_large_as_most_of_its_tensors_say(batch, size):
    assert batch_size(batch) == size


# ---- whose part of the batch is which -------------------------------------------------------------------------------------


class Fed(Net):
    """Is given anything, and calls its targets as it is told."""

    def __init__(self, forward):
        super().__init__(dtype=torch.float32)
        self.how = forward

    def run(self, x, y):
        return F.cross_entropy(self.out(self.net(x)), y)

    def training_step(self, batch, batch_idx):
        return self.how(self, batch)


def feed(forward, loader, **lte):
    run = pl.Trainer(
        accelerator="cpu", strategy=LTEStrategy(**{"rank": 2, "heads": 2, "merge_every": 2, **lte}), max_epochs=1, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    module = Fed(forward)
    run.fit(module, loader)
    return module, run


def with_front(**front):
    def collate(samples):
        _, x, y = torch.utils.data.default_collate(samples)
        return {**front, "x": x.float(), "y": y}

    return DataLoader(Samples(16), 8, collate_fn=collate)


def plainly(self, batch):
    return self.run(batch["x"], batch["y"])


FRONTS = [
    {"t": torch.tensor(0.5)}, {"mask": torch.ones(3, 3)}, {"mask": torch.ones(3, 3), "other": torch.ones(3, 3)}, {"name": "a"},
    {"grid": torch.zeros(1, 64, 2)}, {"scale": torch.ones(1)},
]  # fmt: skip


@pytest.mark.parametrize(
    "front", FRONTS, ids=lambda front: "-".join(front) + str([getattr(v, "shape", v) for v in front.values()])
)
def test_what_comes_before_the_samples_does_not_matter(front):
    torch.manual_seed(0)
    plain, _ = feed(plainly, with_front())
    torch.manual_seed(0)
    fronted, _ = feed(plainly, with_front(**front))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fronted.parameters(), strict=True))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_two_loaders_at_once_share_out_each_its_own_batch(order):
    def both(self, batch):
        return sum(self.run(x.float(), y) for _, x, y in batch.values())

    _, run = feed(both, {k: DataLoader(Samples(16), {"a": 4, "b": 8}[k]) for k in order})
    assert run.strategy.local.clock == 4


def part(self, batch):
    return plainly(self, batch) + self.run(batch["x"][:3], batch["y"][:3])  # three samples of eight for two heads


def graphs(self, batch):
    return self.run(batch["x"].repeat_interleave(3, 0)[:-5], batch["y"].repeat_interleave(3, 0)[:-5])  # 19 nodes


def windows(self, batch):
    y = batch["y"].repeat_interleave(3)
    return self.run(batch["x"].repeat_interleave(3, 0), y)


@pytest.mark.parametrize("forward", [part, graphs, windows])
def test_a_layers_own_first_dimension_is_shared_out(forward):
    _, run = feed(forward, with_front())
    assert run.strategy.local.clock == 2


class Experts(pl.LightningModule):
    """Tokens go to one of three experts by a rule; the third sees one of eight, or none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 3)

    def get_classifier(self):
        return self.out

    def training_step(self, batch, batch_idx):
        where = torch.tensor([0, 0, 1, 1, 0, 1, 0, 2 if batch_idx == 0 else 0])
        x, y = batch["x"], torch.zeros_like(batch["x"])
        for k, expert in enumerate(self.experts):
            y = y.index_put((torch.where(where == k)[0],), expert(x[where == k]))
        return F.cross_entropy(self.out(y), batch["y"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def test_an_expert_that_few_tokens_reach_is_no_reason_to_stop():
    run = pl.Trainer(
        accelerator="cpu", strategy=LTEStrategy(rank=2, heads=2, merge_every=2), max_epochs=1, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(Experts(), with_front())
    assert run.strategy.local.clock == 2


def test_a_layer_that_sees_no_batch_is_named_before_the_first_step():
    def conditioned(self, batch):
        shift = self.net[0](torch.ones(1, WIDTH))  # a time step's embedding, the same for all samples
        return F.cross_entropy(self.out(self.net[4](batch["x"] + shift)), batch["y"])

    with pytest.raises(ConfigError, match=r"targets='net.0': its input has 1 in dim 0, fewer than the 2 heads"):
        feed(conditioned, with_front(), targets=["net.0", "net.4"])
    with pytest.warns(UserWarning, match=r"leaves out what cannot be a target: net.0 its input has 1 in dim 0"):
        module, run = feed(conditioned, with_front())
    assert [piece.name for piece in run.strategy.local.pieces] == ["net.4"]
    with pytest.raises(ConfigError, match=r"heads=9: a batch holds 8 samples"):
        feed(plainly, with_front(), heads=9)


def test_time_first_is_refused_where_the_sizes_show_it():
    def turned(self, batch):
        x = batch["x"][None].expand(5, -1, -1)
        return F.cross_entropy(self.out(self.net(x))[0], batch["y"])

    with pytest.raises(ConfigError, match=r"does not have the batch of 8 first"):
        feed(turned, with_front())


class Batches:
    """A batch sampler that Lightning cannot take apart."""

    def __iter__(self):
        return iter([[0, 1, 2, 3], [4, 5, 6, 7]])

    def __len__(self):
        return 2


def test_on_one_device_a_batch_sampler_of_ones_own_runs_as_it_is():
    seen = []

    def look(self, batch):
        seen.extend(batch[0].tolist())
        return self.run(batch[1].float(), batch[2])

    _, run = feed(look, DataLoader(Samples(16), batch_sampler=Batches()))
    assert seen == list(range(8)) and run.strategy.local.clock == 2
    assert run._accelerator_connector.use_distributed_sampler  # as it was asked for
    run.test(Net(dtype=torch.float64), DataLoader(Samples(16), batch_sampler=Batches()), verbose=False)
    assert run._accelerator_connector.use_distributed_sampler  # as it was asked for
