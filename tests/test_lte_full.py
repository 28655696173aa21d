"""Whole weights trained locally (DiLoCo, local SGD), the outer step of every update, and few-bit wires in real fits."""

import pytest
import torch
from torch import nn

from tests import lte_full_workers as workers
from tests import lte_workers
from tests.lte_workers import Net, Samples
from tests.reference.diloco import diloco

OUTER = {"outer_lr": 0.7, "outer_momentum": 0.9}


def close(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def same(results, key="weights"):
    for other in results[1:]:
        assert all(torch.equal(results[0][key][name], other[key][name]) for name in results[0][key])


class Plain(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.out = net.net, net.out

    def forward(self, x):
        return self.out(self.net(x))


def batches(workers_, steps=12, batch=8):
    data, per = Samples(), batch // workers_
    found = []
    for b in range(steps):
        first = b % (len(data) // batch) * batch
        parts = [slice(first + n * per, first + (n + 1) * per) for n in range(workers_)]
        found.append([(data.x[part], data.y[part]) for part in parts])
    return found


def loss_of(f, batch):
    return nn.functional.cross_entropy(f(batch[0]), batch[1])


def twin(workers_, net=None, every=4, steps=12, **outer):
    net = Net(**(net or {}))

    def optimizer_of(params):
        if net.kind == "sgd":
            return torch.optim.SGD(params, lr=net.lr, momentum=0.9)
        return torch.optim.AdamW(params, lr=net.lr, weight_decay=0.1)

    return diloco(Plain(net), batches(workers_, steps), loss_of, optimizer_of, every, *outer.values())


# ---- the mathematics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("outer", "every"), [({}, 4), (OUTER, 5)], ids=["local-sgd", "diloco"])
def test_it_is_algorithm_1(ranks, world, outer, every):
    how = {"merge_every": every, **outer}
    found = [workers.run(1, **how)] if world == 1 else ranks(world, workers.run, world, **how)
    same(found)
    close(found[0]["weights"], twin(world, every=every, **outer))
    assert found[0]["clock"] == (12, 12 // every) and found[0]["phase"] == "full"


def test_merging_at_each_step_with_sgd_is_ddp(ranks):
    merged = ranks(2, workers.run, 2, net={"optimizer": "sgd"}, merge_every=1)
    alone, _, _ = lte_workers.fit(module=Net("sgd"), strategy="auto")  # one process, both halves of each batch
    close(merged[0]["weights"], lte_workers.weights(alone))
