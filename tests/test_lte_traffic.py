"""What LTE sends: as computed for real models, and as the sockets of real processes count it."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from experiments.runs import by_socket
from torch import nn

from lowrank_pretrain import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lte.full import FullSet
from lowrank_pretrain.lte.heads.head_set import HeadSet
from lowrank_pretrain.lte.rest import SharedParameters
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.traffic import traffic
from lowrank_pretrain.lte.workers import Workers


def model(name):
    with torch.device("meta"):
        if name == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            return GPT2LMHeadModel(GPT2Config())
        import timm

        return timm.create_model(name)


@pytest.mark.parametrize(
    ("name", "targets", "with_merge", "with_step"),
    [
        ("vit_small_patch32_224", 1 / 40, 1 / 30, 1 / 10),
        ("vit_large_patch16_224", 1 / 90, 1 / 90, 1 / 55),
        ("gpt2", 1 / 90, 1 / 20, 1 / 3),
    ],
)
def test_eight_workers_beside_ddp(name, targets, with_merge, with_step):
    bare = model(name)
    before = list(bare.state_dict())
    merge, step = (traffic(bare, "all", 16, 1, 8, 10, sync) for sync in ("merge", "step"))
    assert list(bare.state_dict()) == before
    assert merge["ddp"] == step["ddp"] == 2 * 7 / 8 * 4 * sum(p.numel() for p in bare.parameters())
    assert merge["targets"] == step["targets"] <= targets * merge["ddp"]
    assert merge["all"] <= with_merge * merge["ddp"]
    assert step["rest"] == pytest.approx(10 * merge["rest"])  # these models have no buffers to average
    assert step["all"] <= with_step * step["ddp"]
    assert merge["routes"] == {"factors": len(find_targets(bare))}


@pytest.mark.parametrize("update", ["lora", "galore"])
@pytest.mark.parametrize(
    ("name", "frozen", "most"),
    [("vit_large_patch16_224", (), 1 / 55), ("gpt2", (), 1 / 20), ("gpt2", ("transformer.wte", "transformer.wpe"), 1 / 60)],
)
def test_composed_methods_behind_the_switch(name, frozen, most, update):
    """Everything counted, eight workers, rank 16, a merge every ten steps, beside DDP on the whole model."""
    bare = model(name)
    ddp = 2 * 7 / 8 * 4 * sum(p.numel() for p in bare.parameters())
    for layer in frozen:
        bare.get_parameter(f"{layer}.weight").requires_grad_(False)
    got = traffic(bare, "all", 16, 1, 8, 10, "merge", update=update)
    assert got["all"] <= most * ddp
    if update == "galore":
        shared = traffic(bare, "all", 16, 1, 8, 10, "merge", update=update, basis="shared")
        assert shared["targets"] < got["targets"] / 3  # D once around the ring, instead of P and D to all


class Net(nn.Module):
    """A fused layer, a plain one, a bias and a norm with running statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(128)
        self.qkv = nn.Linear(128, 384)
        self.out = nn.Linear(384, 64, bias=False)

    def forward(self, x):
        return self.out(torch.relu(self.qkv(self.norm(x))))


WEIGHTS, REST, BUFFERS = 384 * 128 + 64 * 384, 2 * 128 + 384, 2 * 128


@pytest.mark.parametrize("half", [False, True])
def test_small_net_by_hand(half):
    net, size = Net(), 2 if half else 4
    net = net.bfloat16() if half else net
    got = traffic(net, rank=4, heads=2, workers=3, merge_every=5, sync_rest="step")
    own = 2 * 4 * (3 * (128 + 128) + 384 + 64)  # 2 heads, rank 4: D + O of q, k, v and out
    assert got["routes"] == {"factors": 4} and got["merge"] == 2 * own * size and got["targets"] == got["merge"] / 5
    assert got["rest"] == pytest.approx(4 / 3 * REST * size) and got["ddp"] == pytest.approx(4 / 3 * (WEIGHTS + REST) * size)
    assert got["all"] == got["targets"] + got["rest"]
    # sums travel in float32, and with the rest go the running statistics
    merge = traffic(net, rank=4, heads=2, workers=3, merge_every=5, sync_rest="merge", route="dense")
    assert merge["routes"] == {"dense": 4} and merge["merge"] == pytest.approx(4 / 3 * WEIGHTS * 4)
    assert merge["rest"] == pytest.approx(4 / 3 * (REST + BUFFERS) * 4 / 5)
    alone = traffic(net, rank=4, sync_rest="merge")
    assert alone["all"] == alone["ddp"] == 0
    # 16 heads of rank 32 outweigh any of these matrices
    assert traffic(net, rank=32, heads=16, workers=2)["routes"] == {"dense": 4}
    assert all(p.device.type == "cpu" for p in net.parameters()) and type(net.qkv) is nn.Linear


def test_a_preset_gives_a_narrow_layer_what_it_can_have_as_the_strategy_does():
    with pytest.warns(UserWarning, match="rank=100: out .64 x 384. gets at most 64"):
        got = traffic(Net(), rank=100, heads=1, workers=2, route="factors")
    assert got["merge"] == 4 * (3 * 100 * (128 + 128) + 64 * (384 + 64))


def test_a_row_block_that_is_no_target_and_a_tied_head_belong_to_the_rest():
    some = traffic(Net(), targets=["qkv.q", "qkv.v"], rank=4, heads=1, workers=2)
    assert some["merge"] == 4 * 4 * 2 * 256 and some["rest"] == 4 * (REST + 128 * 128 + 64 * 384)
    bare = model("gpt2")
    with pytest.warns(UserWarning, match="no longer shares"):
        untied = traffic(bare, targets=["all", "head"], heads=1, workers=2)
    tied = traffic(bare, targets="all", heads=1, workers=2)
    assert untied["rest"] == tied["rest"]  # the embedding trains on as it did
    assert untied["merge"] - tied["merge"] == 4 * 16 * (50257 + 768)
    assert bare.lm_head.weight is bare.transformer.wte.weight


@pytest.mark.parametrize(
    ("wrong", "key"),
    [({"workers": 0}, "workers"), ({"heads": 0}, "heads"), ({"merge_every": 0}, "merge_every"),
     ({"rank": 65, "targets": ["out"]}, "rank"),
     ({"sync_rest": "never"}, "sync_rest"), ({"route": "sparse"}, "route"), ({"targets": "mlp"}, "targets")],
)  # fmt: skip
def test_wrong_values(wrong, key):
    with pytest.raises(ConfigError) as caught:
        traffic(Net(), **wrong)
    assert str(caught.value).startswith(key)


def on_the_wire(call):
    """What one call sends, by the sockets' count."""
    dist.barrier()
    before = by_socket()
    call()
    dist.barrier()  # all have received all: nothing waits in a buffer to be sent (its own bytes are few)
    after = by_socket()
    dist.barrier()
    # a socket of an earlier test's group may be closed in between
    return sum(sent - before.get(inode, 0) for inode, sent in after.items())


def measured(world, route):
    """Bytes that a merge of the heads, one of the rest and a step of DDP put on this rank's sockets, and our own count."""
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world)
    torch.manual_seed(0)
    ddp = nn.parallel.DistributedDataParallel(nn.Sequential(Net()))
    ddp(torch.randn(2, 128)).sum().backward()  # the first step also agrees on buckets
    found = {"ddp": on_the_wire(lambda: ddp(torch.randn(2, 128)).sum().backward())}
    net = Net()
    for statistic in (net.norm.running_mean, net.norm.running_var):
        statistic.add_(dist.get_rank())  # as training makes them: what is equal is not sent
    workers = Workers(dist.group.WORLD)
    heads = HeadSet(Settings(heads=2, route=route, seed=0), workers)
    chosen = find_targets(net)
    heads.convert(chosen, dict.fromkeys(chosen, 16))
    owned = {id(p) for p in heads.parameters().values()}
    rest = SharedParameters(net, owned, heads.hidden(net), workers, "merge")
    found["merge"] = on_the_wire(lambda: heads.exchange().wait())
    found["rest"] = on_the_wire(rest.merge)
    return found, workers.sent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's count of each socket")
@pytest.mark.parametrize(("world", "route"), [(2, "factors"), (2, "dense"), (4, "factors"), (4, "dense")])
def test_sockets_send_what_is_computed(ranks, world, route):
    want = traffic(Net(), rank=16, heads=2, workers=world, merge_every=10, sync_rest="merge", route=route)
    results = ranks(world, measured, world, route)
    for _, counted in results:
        assert counted == pytest.approx(want["merge"] + 10 * want["rest"])
    for key, computed in (("merge", want["merge"]), ("rest", 10 * want["rest"]), ("ddp", want["ddp"])):
        mean = sum(found[key] for found, _ in results) / world
        assert computed <= mean <= 1.02 * computed + 4096  # and the library's headers


def measured_weights(world, wire, fragments):
    """Bytes that a merge of whole weights, part by part, puts on this rank's sockets, and our own count."""
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=world)
    net, workers = Net(), Workers(dist.group.WORLD)
    full = FullSet(Settings(heads=1, wire=wire, fragments=fragments), workers)
    full.start(full.chosen(net, dict(net.named_parameters())))
    found = [on_the_wire(lambda one=one: one.mean(full.training_weights())) for one in full.fragments]
    return sum(found), workers.sent


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's count of each socket")
@pytest.mark.parametrize(
    ("world", "wire", "fragments"), [(2, "float32", 2), (2, "bfloat16", 1), (2, "int2", 1), (4, "int8", 1), (4, "int4", 2)]
)
def test_sockets_send_what_is_computed_for_whole_weights(ranks, world, wire, fragments):
    want = 10 * traffic(Net(), workers=world, merge_every=10, update="full", wire=wire, fragments=fragments)["targets"]
    results = ranks(world, measured_weights, world, wire, fragments)
    assert all(counted == pytest.approx(want) for _, counted in results)
    mean = sum(found for found, _ in results) / world
    assert want <= mean <= 1.02 * want + 4096 * fragments  # and the library's headers
