"""Inputs that are made again in backward: the gradients of inputs that are kept, and less that is kept."""

import copy
import math
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_pretrain import LoRA, LTEStrategy
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.remake import Remaker
from tests import remake_workers
from tests.remake_workers import Mlp, adapted
from tests.test_lora import saved_bytes
from tests.toy import loader, toy, trainer

pytestmark = pytest.mark.filterwarnings("error:recompute_inputs")


def gelu_new(h):
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def rms_norm(h, weight):
    return weight * (h.float() * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


# producer of a layer's input from h (.., 16) and a weight (16,) -> what the recipe is called
PRODUCERS = {
    "gelu": (lambda h, w: F.gelu(h), "gelu(kept)"),
    "gelu, tanh": (lambda h, w: F.gelu(h, approximate="tanh"), "gelu(kept)"),
    "gelu_new": (lambda h, w: gelu_new(h), "mul(kept, kept)"),
    "silu": (lambda h, w: F.silu(h), "silu(kept)"),
    "mish": (lambda h, w: F.mish(h), "mish(kept)"),
    "hardswish": (lambda h, w: F.hardswish(h), "hardswish(kept)"),
    "squared relu": (lambda h, w: F.relu(h) ** 2, "pow(kept)"),
    "glu": (lambda h, w: F.glu(torch.cat([h, h.flip(-1)], -1)), "glu(kept)"),
    "swiglu": (lambda h, w: F.silu(h) * h.flip(-1), "mul(kept, kept)"),
    "rms_norm": (rms_norm, "mul(kept, kept)"),
    "rms_norm, frozen": (lambda h, w: rms_norm(h, w.detach()), "mul(kept, mul(kept, kept))"),
    "layer_norm": (lambda h, w: F.layer_norm(h, (16,), w, w.cos(), 1e-3), "layer_norm(kept, True, True)"),
    "layer_norm, frozen": (lambda h, w: F.layer_norm(h, (16,), w.detach(), None, 1e-6), "layer_norm(kept, True, False)"),
    "layer_norm, bare": (lambda h, w: F.layer_norm(h, (16,)), "layer_norm(kept, False, False)"),
    "dropout of 0": (lambda h, w: F.dropout(F.gelu(h), 0.0, True), "gelu(kept)"),
    "dropout": (lambda h, w: F.dropout(F.gelu(h), 0.5, True), "mul(gelu(kept), kept)"),
    "dropout with a mask": (lambda h, w: torch.native_dropout(F.gelu(h), 0.5, True)[0], "dropout(gelu(kept))"),
    "view": (lambda h, w: F.gelu(h).view(-1, 16), "view(gelu(kept))"),
    "cast": (lambda h, w: F.gelu(h.double()).to(h.dtype), "cast(gelu(kept))"),
}


class Produced(nn.Module):
    """embed → producer → fc1."""

    def __init__(self, producer) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.weight, self.producer = nn.Parameter(torch.rand(16) + 0.5), producer
        self.inputs = []  # weak references to fc1's inputs

    def forward(self, x):
        made = self.producer(self.embed(x), self.weight)
        self.inputs.append(weakref.ref(made))
        return self.fc2(self.fc1(made).sin())


def both(make, **settings):
    """Return the same model with kept inputs and with inputs that are made again."""
    torch.manual_seed(0)
    net = make()
    return tuple(adapted(again, copy.deepcopy(net), **settings) for again in (False, True))


def backward(net, x, **autocast):
    net.zero_grad()
    torch.manual_seed(5)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        y = net(x)
    y.float().square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm().clamp_min(1e-30)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("rows", [3, 300])  # two steps and Wₑ formed
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("name", PRODUCERS)
def test_gradients_are_those_of_kept_inputs(name, kind, rows):
    producer, called = PRODUCERS[name]
    kept, again = (net.bfloat16() if kind == "bfloat16" else net for net in both(lambda: Produced(producer)))
    x = torch.randn(rows, 16, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    settings = {"autocast": True} if kind == "autocast" else {}
    norm = "layer_norm" in name
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2, "autocast": 1e-2}[kind] if norm else 0.0
    for _ in range(2):
        assert_same(backward(again, x, **settings), backward(kept, x, **settings), tolerance)
    names = again.fc1._remaker.trusted
    assert len(names) == 1 and (names == {called} or kind != "float32" and called.split("(")[0] in names.copy().pop())


@pytest.mark.parametrize("name", [name for name in PRODUCERS if name != "view"])  # a view that nobody holds is free anyway
def test_the_input_is_free_after_forward(name):
    for net, free in zip(both(lambda: Produced(PRODUCERS[name][0])), (False, True), strict=True):
        y = net(torch.randn(4, 16))
        y = net(torch.randn(4, 16))  # not the first, in which the two are compared
        assert (net.inputs[-1]() is None) == free
        del y


@pytest.mark.parametrize("name", ["gelu", "swiglu", "layer_norm", "rms_norm", "rms_norm, frozen", "view"])
@pytest.mark.parametrize("frozen", [False, True])
def test_first_and_second_derivatives_by_differences(name, frozen):
    torch.manual_seed(0)
    producer = (
        PRODUCERS[name][0]
        if "rms" not in name
        else lambda h, w: (w.detach() if "frozen" in name else w) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
    )
    net = Produced(producer).double()
    lora.inject(net, {"fc1": 2}, recompute_inputs=True)
    if frozen:
        lora.freeze(net, {"fc1": 2})
    torch.nn.init.normal_(net.fc1.lora_B["W"], 0, 0.3)
    leaves = [net.embed.weight, *([] if "frozen" in name else [net.weight]), net.fc1.lora_A, net.fc1.lora_B["W"]]
    x = torch.randn(2, 16, dtype=torch.float64)

    def output(*_):
        return net(x)

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves, atol=1e-4)
    assert len(net.fc1._remaker.trusted) == 1


def test_a_gradient_penalty_and_a_batch_of_gradients():
    x = torch.randn(6, 8, requires_grad=True)
    found = []
    for net in both(Mlp):
        y = net(x)
        (d,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        d.square().sum().backward()
        eye = torch.eye(6 * 8).reshape(48, 6, 8)
        rows = torch.autograd.grad(net(x), net.fc2.lora_A, eye, is_grads_batched=True)[0]
        found.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None} | {"rows": rows})
    assert_same(found[1], found[0], 2e-6)


# -- whole models -----------------------------------------------------------------------------------------------------


def vit():
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2, use_cache=False))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    ))  # fmt: skip


@pytest.mark.parametrize("freeze_rest", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("make", "share"), [(vit, 0.8), (gpt2, 0.95), (llama, 0.9)])
def test_whole_models(make, share, autocast, freeze_rest):
    from lowrank_pretrain.core.targets import find_targets

    torch.manual_seed(0)
    net, found, kept = make().train(), [], []
    x = torch.randn(8, 3, 32, 32) if make is vit else torch.randint(0, 40, (8, 16))
    for again in (False, True):
        one = copy.deepcopy(net)
        plan = dict.fromkeys(find_targets(one, "all"), 2)
        lora.inject(one, plan, recompute_inputs=again)
        lora.freeze(one, plan, freeze_rest=freeze_rest)
        torch.manual_seed(1)
        with torch.no_grad():
            for _, p in lora.adapter_parameters(one):
                p.normal_(0, 0.1)

        def loss(x, one=one):
            torch.manual_seed(2)
            return one(x).square().mean() if make is vit else one(input_ids=x, labels=x).loss

        own = {p.untyped_storage().data_ptr() for p in one.parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss(x)
            kept.append(saved_bytes(loss, x, own))
            loss(x).backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], 1e-2 if autocast else 1e-5)
    assert kept[1] <= share * kept[0], kept


def test_nothing_is_kept_twice_and_an_input_without_a_recipe_is_kept():
    nets = both(Mlp)
    x, sizes = torch.randn(100, 8), []
    for net in nets:
        net(x)
        own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
        sizes.append(saved_bytes(net, x, own))
    assert sizes[0] - sizes[1] == 4 * 100 * (8 + 32)  # the norm's output and the gelu's
    kept, again = both(lambda: Produced(lambda h, w: F.relu(h)))
    assert_same(backward(again, torch.randn(4, 16)), backward(kept, torch.randn(4, 16)), math.inf)
    assert not again.fc1._remaker.trusted


# -- changes in place -------------------------------------------------------------------------------------------------


def test_what_the_input_is_made_from_may_not_change_before_backward():
    held = []

    def producer(h, w):
        held.append(h)
        return F.gelu(h)

    _, net = both(lambda: Produced(producer))
    y = net(torch.randn(4, 16))
    with torch.no_grad():
        held[0].mul_(2)
    with pytest.raises(RuntimeError, match="set it to false, or do not write into it"):
        torch.autograd.grad(y.sum(), net.fc1.lora_A)


def test_what_was_changed_before_the_layer_is_not_used_with_one_warning():
    def producer(h, w):
        x = F.gelu(h)
        with torch.no_grad():
            h.mul_(2)
        return x

    kept, again = both(lambda: Produced(producer))
    x = torch.randn(4, 16)
    with pytest.warns(UserWarning, match="recompute_inputs: a layer keeps its input, because what its input is made from"):
        y = again(x)
    (found,) = torch.autograd.grad(y.square().sum(), again.fc1.lora_A)
    (expected,) = torch.autograd.grad(kept(x).square().sum(), kept.fc1.lora_A)
    assert torch.equal(found, expected)
    again(x)  # says nothing more


@pytest.mark.parametrize("traceless", [False, True])
def test_an_input_that_was_changed_after_it_was_made_is_kept(traceless):
    def producer(h, w):
        x = F.gelu(h)
        with torch.no_grad():
            (x.data if traceless else x).mul_(2)
        return x

    kept, again = both(lambda: Produced(producer))
    x = torch.randn(4, 16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [backward(again, x) for _ in range(2)][1]
    assert_same(found, backward(kept, x), 0.0)
    assert [str(one.message).split(": ")[0] for one in said] == ["recompute_inputs"] * traceless


# -- what else may happen to a graph ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("region", ["all", "producer", "layer"])
def test_activation_checkpointing_makes_nothing_twice_and_the_same_gradients(region, reentrant):
    made = []

    class Counted(Mlp):
        def forward(self, x):
            def gelu(h):
                made.append(1)
                return F.gelu(h)

            def hidden(h):
                return gelu(self.fc1(self.norm(h)))

            def again(function, h):
                return checkpoint(function, h, use_reentrant=reentrant)

            x = self.embed(x)
            if region == "all":
                return x + again(lambda h: self.fc2(hidden(h)), x)
            if region == "producer":
                return x + self.fc2(again(hidden, x))
            return x + again(self.fc2, hidden(x))

    kept, net = both(Counted)
    x = torch.randn(6, 8)
    for _ in range(2):
        expected = backward(kept, x)
        before = len(made)
        assert_same(backward(net, x), expected, 2e-6)
        assert len(made) - before == (1 if region == "layer" else 2)


def test_hooks_that_move_or_change_what_is_kept():
    kept, net = both(Mlp)
    x = torch.randn(6, 8)
    expected = backward(kept, x)
    with save_on_cpu():
        assert_same(backward(net, x), expected, 0.0)
    assert not net.fc2._remaker.trusted
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.half().float(), lambda t: t),
        pytest.warns(UserWarning, match="recompute_inputs: a layer keeps its input, because its input is not"),
    ):
        backward(net, x)


def test_accumulation_a_retained_graph_and_a_second_use_of_the_layer():
    kept, net = both(Mlp)
    x = torch.randn(6, 8)
    for one in (kept, net):
        y = one(one(x))
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        one(x + 1).sum().backward()
    gradients = [{n: p.grad for n, p in one.named_parameters() if p.grad is not None} for one in (net, kept)]
    assert_same(*gradients, 2e-6)


def test_a_compiled_model_keeps_its_inputs_itself():
    kept, net = both(Mlp)
    x = torch.randn(6, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x).float().square().mean().backward()
    found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert_same(found, backward(kept, x), 2e-6)


def test_evaluation_and_frozen_adapters_look_for_no_recipe():
    _, net = both(Mlp)
    with torch.no_grad():
        net(torch.randn(2, 8))
    lora_fa = adapted(True, train_A=False)
    lora_fa(torch.randn(2, 8)).sum().backward()
    assert not any(layer._remaker.trusted for one in (net, lora_fa) for _, layer in lora.lora_layers(one))


def test_copies_pickles_and_ejected_layers():
    _, net = both(Mlp)
    other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    x = torch.randn(6, 8)
    assert_same(backward(other, x), backward(net, x), 0.0)
    assert isinstance(other.fc1._remaker, Remaker) and other.fc1._remaker is not net.fc1._remaker
    y = net(x)
    lora.eject(net)
    assert "_remaker" not in net.fc1.__dict__ and type(net.fc1) is nn.Linear
    torch.testing.assert_close(net(x), y)


def test_two_processes(ranks):
    kept, again = (ranks(2, remake_workers.gradients, recompute) for recompute in (False, True))
    for a, b in zip(again, kept, strict=True):
        assert_same(a, b, 2e-6)
    assert_same(again[0], again[1], 0.0)


# -- methods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["parallel", "joint"])
@pytest.mark.parametrize("rows", [4, 400])
def test_heads(mode, rows):
    from lowrank_pretrain.core.targets import find_targets
    from lowrank_pretrain.lte.heads.head_set import HeadSet
    from lowrank_pretrain.lte.settings import Settings
    from lowrank_pretrain.lte.workers import Workers

    found, kept = [], []
    x = torch.randn(4, rows // 4, 8)
    for again in (False, True):
        torch.manual_seed(0)
        net = Mlp()
        owner = HeadSet(Settings(heads=2, mode=mode, seed=0, recompute_inputs=again), Workers())
        targets = find_targets(net, ["fc1", "fc2"])
        owner.convert(targets, dict.fromkeys(targets, 4))
        owner.shared.batch = 4
        with torch.no_grad():
            for name, p in owner.parameters().items():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        own = {p.untyped_storage().data_ptr() for p in net.parameters()} | {x.untyped_storage().data_ptr()}
        net(x)
        kept.append(saved_bytes(net, x, own))
        gradients = backward(net, x)
        (d,) = torch.autograd.grad(net(x).square().sum(), net.embed.weight, create_graph=True)
        second = torch.autograd.grad(d.square().sum(), net.fc2.lora_A)[0]
        found.append(gradients | {"second": second})
        owner.detach()
        assert "_remaker" not in net.fc1.__dict__
    assert_same(found[1], found[0], 5e-6)
    assert kept[0] - kept[1] == 4 * rows * (8 + 32)


def test_a_fit_ends_the_same_and_a_resume_may_change_its_mind(tmp_path):
    states = []
    for index, again in enumerate((False, True)):
        module = toy()
        run = trainer(tmp_path / str(index), LoRA(rank=2, recompute_inputs=again), every=1, max_epochs=2)
        run.fit(module, loader())
        states.append(dict(module.state_dict()))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)
    resumed = toy()
    run = trainer(tmp_path / "resumed", LoRA(rank=2), max_epochs=2)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "1" / "step=4.ckpt")
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "allowed"),
    [
        (lambda: LoRA(recompute_inputs=1), "true or false"),
        (lambda: LTEStrategy(recompute_inputs="yes"), "true or false"),
        (lambda: LTEStrategy(update="full", recompute_inputs=True), "leave it out"),
        (lambda: LTEStrategy(update="galore", recompute_inputs=True), "leave it out"),
    ],
)
def test_wrong_values(make, allowed):
    with pytest.raises(ConfigError, match="^recompute_inputs=") as error:
        make()
    assert allowed in str(error.value)
