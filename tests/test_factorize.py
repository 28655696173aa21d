"""Factored weights: the decomposition and the ranks against their slow twin, the layer, and the model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.targets import all_targets
from lowrank_pretrain.factorize import moments
from lowrank_pretrain.factorize.cost import largest_rank, numbers_of
from lowrank_pretrain.factorize.decompose import Spectrum, damped, factors, spectrum
from lowrank_pretrain.factorize.layer import FactoredLinear, follow_weight, give_factors, take_factors
from lowrank_pretrain.factorize.model import Factors, exact_factors, expand, factor_parameters, load_exact_factors
from lowrank_pretrain.factorize.ranks import Block, Cut, best_cut, ranks_of_budget
from lowrank_pretrain.lora import model as lora
from tests.reference import factorize as reference

SHARE = 0.85


def inputs(n, d, decay=0.7, seed=0):
    """Rows whose second moment has a falling spectrum, as a trained network's."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(d, d, generator=g))[0] * decay ** torch.arange(d)
    return torch.randn(n, d, generator=g) @ mix.T


def matrix(o, d, seed=1):
    return torch.randn(o, d, generator=torch.Generator().manual_seed(seed))


def cut_of(W, rank, parts=(("W", 0, None),)):
    blocks, U, V, at = [], {}, [], 0
    for name, start, rows in parts:
        part = W[start:] if rows is None else W[start : start + rows]
        U[name], v = factors(part, torch.linalg.svd(part, full_matrices=False)[0][:, :rank])
        blocks.append(Block(name, start, len(part), at, rank))
        V.append(v)
        at += rank
    return Cut(tuple(blocks), U, torch.cat(V), 1.0)


# -- the decomposition --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("o", "d", "rank"), [(60, 40, 4), (40, 60, 5), (120, 100, 9), (48, 48, 30)])
def test_weighted_svd_equals_its_twin(o, d, rank):
    W, C = matrix(o, d), damped(reference.second_moment(inputs(400, d)).float())
    found = spectrum(W, C, rank, generator("test"))
    U, V = factors(W, found.basis)
    W_k, s, error = reference.weighted_svd(W, C, rank)
    assert U.shape == (o, rank) and V.shape == (rank, d)
    torch.testing.assert_close(found.energies, s[:rank].square(), rtol=1e-4, atol=0)
    scale = float(torch.linalg.vector_norm(W_k))
    assert float(torch.linalg.vector_norm(U @ V - W_k)) < 2e-3 * scale
    assert found.total * (1 - found.kept(rank)) == pytest.approx(float(error), rel=1e-3)
    torch.testing.assert_close(U.T @ U, V @ V.T, rtol=1e-3, atol=1e-4 * float(s[0]))  # split evenly


def test_the_generator_is_private_and_decides():
    W, C = matrix(200, 200), damped(reference.second_moment(inputs(400, 200, 0.97)).float())
    before = torch.get_rng_state()
    first, again, other = (spectrum(W, C, 8, generator(word)).basis for word in ("a", "a", "b"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_the_default_dtype_changes_no_draw():
    W, C = matrix(200, 200), damped(reference.second_moment(inputs(400, 200, 0.97)).float())
    plain = spectrum(W, C, 8, generator("a")).basis
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(plain, spectrum(W, C, 8, generator("a")).basis)
        layer = nn.Linear(4, 4, dtype=torch.float32)
        moments.begin(layer)
        assert layer._moment.dtype == layer._rows_seen.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_full_rank_changes_nothing():
    for o, d in ((24, 16), (16, 24)):
        W, C = matrix(o, d), damped(torch.zeros(d, d))
        U, V = factors(W, spectrum(W, C, 16, generator("test")).basis)
        torch.testing.assert_close(U @ V, W, rtol=1e-5, atol=1e-5)


def test_no_pair_of_columns_is_zero():
    W = torch.zeros(8, 6)
    W[0, 0] = 1.0
    U, V = factors(W, torch.linalg.svd(W)[0][:, :4])
    torch.testing.assert_close(U @ V, W)
    assert (torch.linalg.vector_norm(U, dim=0) > 0).all()


def test_inputs_count_and_not_the_spectrum_of_the_weight():
    x = inputs(500, 32, 0.6)
    W, C = matrix(32, 32), damped(reference.second_moment(x).float())
    P = torch.linalg.svd(W)[0][:, :8]
    weighted, plain = factors(W, spectrum(W, C, 8, generator("t")).basis), factors(W, P)
    off = [float(torch.linalg.vector_norm(x @ (W - U @ V).T) / torch.linalg.vector_norm(x @ W.T)) for U, V in (weighted, plain)]
    assert off[0] < 0.1 * off[1]


# -- ranks --------------------------------------------------------------------------------------------------------------------


def test_factors_that_do_not_pay_are_left():
    assert numbers_of(largest_rank(384, 1536, SHARE), 384, 1536) < SHARE * 384 * 1536
    assert numbers_of(largest_rank(384, 1536, SHARE) + 1, 384, 1536) >= SHARE * 384 * 1536
    W, C = matrix(32, 32), torch.eye(32)
    assert best_cut(W, C, [("W", 0, 32)], SHARE, generator("t"), rank=14) is None
    assert best_cut(W, C, [("W", 0, 32)], SHARE, generator("t"), rank=12).V.shape == (12, 32)
    assert best_cut(W * 0, C, [("W", 0, 32)], SHARE, generator("t"), rank=4) is None
    assert best_cut(W, C, [("W", 0, 32)], SHARE, generator("t"), energy=0.999) is None


def test_parts_are_cut_together_or_separately_as_it_is_smaller():
    parts = [("q", 0, 32), ("k", 32, 32), ("v", 64, 32)]
    C = damped(reference.second_moment(inputs(400, 32, 0.9)).float())
    alike = matrix(96, 6) @ matrix(6, 32, 2)  # the three read the same few directions
    together = best_cut(alike + 0.01 * matrix(96, 32, 3), C, parts, SHARE, generator("t"), rank=6)
    assert [b.name for b in together.blocks] == ["W"]
    own = torch.cat([matrix(32, 3, seed) @ matrix(3, 32, seed + 10) for seed in range(3)]) + 0.01 * matrix(96, 32, 3)
    apart = best_cut(own, C, parts, SHARE, generator("t"), rank=9)
    error = float(reference.weighted_svd(own, C, 9)[2])
    assert [b.rank for b in apart.blocks] == reference.ranks_of_parts(own, C, [(0, 32), (32, 32), (64, 32)], error)
    assert sum(numbers_of(b.rank, 32, 32) for b in apart.blocks) < numbers_of(9, 96, 32)
    total = float(torch.trace(own.double() @ C.double() @ own.double().T))
    assert (1 - apart.kept) * total <= error * 1.001


def test_energy_gives_the_smallest_rank_that_keeps_it():
    W, C = matrix(64, 64), damped(reference.second_moment(inputs(400, 64, 0.8)).float())
    cut = best_cut(W, C, [("W", 0, 64)], SHARE, generator("t"), energy=0.9)
    s = reference.weighted_svd(W, C, 1)[1].square()
    assert cut.blocks[0].rank == int((s.cumsum(0) / s.sum() < 0.9).sum()) + 1
    assert 0.9 <= cut.kept < 0.93


def test_a_budget_is_spent_where_it_keeps_most():
    steep = Spectrum(torch.zeros(1, 0), 0.1 ** torch.arange(8, dtype=torch.float64), 1.2)
    flat = Spectrum(torch.zeros(1, 0), torch.ones(8, dtype=torch.float64), 8.0)
    sizes = {"steep": (16, 16), "flat": (16, 16)}
    ranks = ranks_of_budget({"steep": steep, "flat": flat}, sizes, 0.5)
    assert sum(ranks.values()) * 32 <= 0.5 * 2 * 256
    assert ranks == {"steep": 1, "flat": 7}


# -- the layer ----------------------------------------------------------------------------------------------------------------


class Renamed(nn.Linear):
    """A subclass without a forward of its own."""


def layer_of(kind, d=12, o=18):
    torch.manual_seed(3)
    if kind == "conv1d":
        return pytest.importorskip("transformers.pytorch_utils").Conv1D(o, d)
    return {"linear": nn.Linear, "subclass": Renamed}[kind](d, o)


@pytest.mark.parametrize("kind", ["linear", "subclass", "conv1d"])
@pytest.mark.parametrize("separate", [False, True])
def test_computes_the_product_and_its_gradients_are_autograds(kind, separate):
    layer = layer_of(kind).double()
    rows = (layer.weight.t() if kind == "conv1d" else layer.weight).detach().clone()
    parts = (("q", 0, 6), ("k", 6, 6), ("v", 12, 6)) if separate else (("W", 0, None),)
    cut = cut_of(rows, 2, parts)
    give_factors(layer, cut)
    assert isinstance(layer, FactoredLinear) and "weight" not in dict(layer.named_parameters())
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    U = {name: u.detach().requires_grad_() for name, u in layer.factor_U.items()}
    V, bias = layer.factor_V.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    slow = torch.cat([
        reference.forward(x, U[b.name], V[b.at : b.at + b.rank], bias[b.start : b.start + b.rows]) for b in layer._blocks
    ], -1)  # fmt: skip
    torch.testing.assert_close(y, slow, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    fast_grads = torch.autograd.grad(y, [x, layer.factor_V, *layer.factor_U.values(), layer.bias], g)
    slow_grads = torch.autograd.grad(slow, [x, V, *U.values(), bias], g)
    for one, other in zip(fast_grads, slow_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight, layer.product())
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_is_plain_for_whoever_asks(kind):
    layer = layer_of(kind)
    plain, whole = copy.deepcopy(layer), layer.weight
    rows = (layer.weight.t() if kind == "conv1d" else layer.weight).detach().clone()
    give_factors(layer, cut_of(rows, 4))
    state = layer.state_dict()
    assert list(state) == list(plain.state_dict()) and state["weight"].shape == plain.weight.shape
    plain.load_state_dict(state)
    x = torch.randn(7, 12)
    torch.testing.assert_close(plain(x), layer(x))
    assert isinstance(copy.deepcopy(layer).to("meta").to_empty(device="cpu"), FactoredLinear)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    y = layer(x)
    layer.load_state_dict(state)  # its own state, by way of the product
    torch.testing.assert_close(layer(x), y)
    with pytest.raises(RuntimeError, match="state_dict for .*:\n\tweight has a rank above 4"):  # and no factor is missing
        layer.load_state_dict({**state, "weight": torch.randn_like(state["weight"])})
    assert whole.numel() == 0
    take_factors(layer)
    assert layer.weight is whole and list(dict(layer.named_parameters())) == ["weight", "bias"] and type(layer) is type(plain)
    torch.testing.assert_close(layer(x), y)


def test_follows_autocast_and_true_bfloat16():
    layer, x = layer_of("linear"), torch.randn(7, 12, requires_grad=True)
    give_factors(layer, cut_of(layer.weight.detach().clone(), 4))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.factor_V.grad.dtype == torch.float32
    half = layer_of("linear").to(torch.bfloat16)
    give_factors(half, cut_of(half.weight.detach().float(), 4))
    assert half.factor_V.dtype == torch.bfloat16 and half(x.bfloat16()).dtype == torch.bfloat16
    assert half.state_dict()["weight"].dtype == torch.bfloat16


def test_an_average_follows_in_the_trained_ones_frame():
    layer = layer_of("linear")
    W = layer.weight.detach().clone()
    give_factors(layer, cut_of(W, 5))
    V = layer.factor_V.detach().clone()
    follow_weight(layer, W)
    torch.testing.assert_close(layer.factor_V.detach(), V)
    follow_weight(layer, layer.product() * 2)
    torch.testing.assert_close(layer.factor_V.detach(), 2 * V)


# -- a whole model ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.fc2(torch.relu(self.fc1(x + torch.tanh(q * k) * v)))


def factored_net(steps=3, rank=8, **settings):
    torch.manual_seed(0)
    net = Net()
    factors_ = Factors(seed=1, **settings)
    factors_.adopt(Plan(dict.fromkeys(all_targets(net), rank)), net)
    for step in range(steps):
        net(inputs(64, 32, 0.8, seed=step)).sum().backward()
    return net, factors_


def test_a_model_is_factored_and_expands():
    net, taker = factored_net()
    plain_state = {name: p.shape for name, p in net.state_dict().items()}
    names = list(dict(net.named_parameters()))
    inherited = taker.release()
    assert {len(i.new.shape) for i in inherited} == {2} and all(i.rows == 0 for i in inherited)
    assert set(taker.plan) == {"fc1", "fc2", "qkv.q", "qkv.k", "qkv.v"}
    assert sum(p.numel() for p in net.parameters()) < 0.5 * (32 * 32 * 11)
    assert {name: p.shape for name, p in net.state_dict().items()} == plain_state
    x = inputs(64, 32, 0.8, seed=9)
    y, exact = net(x), {name: t.clone() for name, t in exact_factors(net).items()}
    expand(net)
    assert list(dict(net.named_parameters())) == names
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)
    again = Factors(exact=exact)
    again.adopt(taker.plan, net)
    again.release()
    assert again.plan == taker.plan and torch.equal(net(x), y)
    load_exact_factors(net, exact)
    assert torch.equal(net(x), y)
    with pytest.raises(ConfigError, match="another rank"):
        load_exact_factors(net, exact | {"fc1.factor_V": exact["fc1.factor_V"][:3]})


def test_moments_go_through_a_resume():
    net, taker = factored_net()
    exact = {name: t.clone() for name, t in exact_factors(net).items()}
    other, resumed = factored_net(0)
    load_exact_factors(other, exact)
    taker.release()
    resumed.release()
    for (name, p), (_, q) in zip(factor_parameters(net), factor_parameters(other), strict=True):
        assert torch.equal(p, q), name


def test_parts_that_are_factored_separately_resume_in_their_order():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for part, rank in enumerate((3, 1, 2)):
            net.qkv.weight[32 * part : 32 * part + 32] = torch.randn(32, rank) @ torch.randn(rank, 32)
    again = copy.deepcopy(net)
    taker = Factors(energy=0.999, seed=1)
    taker.adopt(Plan(dict.fromkeys(("qkv.q", "qkv.k", "qkv.v"), 8)), net)
    net.qkv(inputs(400, 32))
    taker.release()
    assert taker.plan == {"qkv.q": 3, "qkv.k": 1, "qkv.v": 2}
    resumed = Factors(exact=exact_factors(net))
    resumed.adopt(taker.plan, again)
    resumed.release()
    assert again.qkv._blocks == net.qkv._blocks
    assert torch.equal(again(inputs(64, 32)), net(inputs(64, 32)))


class Locked(nn.Linear):
    """Whose attributes are fixed."""

    def __setattr__(self, name, value):
        if name not in ("in_features", "out_features", "weight", "bias", "training"):
            raise AttributeError(f"no attribute {name}")
        super().__setattr__(name, value)

    def __delattr__(self, name):
        raise AttributeError(f"{name} stays")


def test_a_class_that_guards_its_attributes_is_not_asked():
    net = nn.Sequential(Locked(32, 128))
    before = net.state_dict()
    taker = Factors()
    taker.adopt(Plan({"0": 8}), net)
    net(inputs(64, 32))
    taker.release()
    expand(net)
    assert type(net[0]) is Locked and list(net.state_dict()) == list(before)
    lora.inject(net, {"0": 4})
    lora.freeze(net, {"0": 4}, frozen_dtype="int8")
    lora.eject(net)
    assert type(net[0]) is Locked and list(net.state_dict()) == list(before)


@pytest.mark.parametrize("settings", [{"energy": 0.95}, {"flops": 0.4}])
def test_other_rules_for_the_rank(settings):
    net, taker = factored_net(rank=1, **settings)
    taker.release()
    if "energy" in settings:
        assert all(kept >= 0.95 for kept in taker.kept.values())
    else:
        spent = sum(numbers_of(p.shape[1], p.shape[0], 0) for n, p in factor_parameters(net) if "factor_U" in n)
        spent += sum(p.numel() for n, p in factor_parameters(net) if "factor_V" in n)
        assert spent <= 0.41 * 32 * 32 * 11
    assert len(set(taker.plan.values())) > 1


def test_bad_input_is_one_line():
    net = Net()
    with pytest.raises(ConfigError, match="a fused layer is factored whole"):
        Factors().check_adopt(["qkv.q", "fc1"], net)
    tied = Net()
    tied.fc3 = nn.Linear(32, 128, bias=False)
    tied.fc3.weight = tied.fc1.weight
    with pytest.raises(ConfigError, match="factors cannot be shared"):
        Factors().check_adopt(["fc1"], tied)

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    net.fc1 = Scaled(32, 128)
    with pytest.raises(ConfigError, match="a forward of its own"):
        Factors().check_adopt(["fc1"], net)
    net, taker = factored_net()
    net(inputs(8, 32) * 1e30)
    with pytest.raises(ConfigError, match="NaN or infinite inputs"):
        taker.release()
    net, taker = factored_net(0)
    with pytest.raises(ConfigError, match="factors would pay for none"):
        taker.release()
    with pytest.raises(ConfigError, match="plan=0: is every target's rank: give at least one"):
        Factors().adopt({"fc1": 0}, Net())
    square = {"qkv.q": all_targets(net)["qkv.q"], "fc1": all_targets(net)["fc1"]}
    taker.check_fraction(0.6, square)  # qkv is 96 x 32
    with pytest.raises(ConfigError, match="ranks=0.9: factors of this fraction would pay for no target"):
        taker.check_fraction(0.9, square)


def test_a_layer_that_nobody_called_stays_whole():
    net, taker = factored_net(0)
    net.fc1(inputs(64, 32)).sum().backward()
    with pytest.warns(UserWarning, match="stays whole and trains on"):
        taker.release()
    assert list(taker.plan) == ["fc1"] and type(net.fc2) is nn.Linear and net.fc2.weight.requires_grad
