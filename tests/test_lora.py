import copy
import pickle

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets, is_conv1d, weight_rows
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.products import forms_merged_weight
from tests.reference.lora import ReferenceLoRA
from tests.toy import toy


def conv1d(n_out, n_in):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(n_out, n_in)


def fused(kind: str, dim: int = 12) -> nn.Module:
    """A module with one fused layer, float64."""
    layer = nn.Linear(dim, 3 * dim) if kind == "linear" else conv1d(3 * dim, dim)
    return nn.ModuleDict({"qkv" if kind == "linear" else "c_attn": layer}).double()


def randomise(module: nn.Module, std: float = 0.1) -> None:
    g = torch.Generator().manual_seed(3)
    for _, p in lora.adapter_parameters(module):
        p.data.normal_(std=std, generator=g)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("n", [2, 200])  # few rows: two-step form; many: the merged weight is formed
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("phase", ["joint", "lowrank", "partial", "fixed A"])
def test_lockstep_with_the_reference(kind, n, alpha, phase):
    torch.manual_seed(0)
    net = fused(kind)
    name, layer = next(iter(net.items()))
    plan = {f"{name}.q": 4, f"{name}.v": 2} if phase == "partial" else {f"{name}.q": 4, f"{name}.k": 0, f"{name}.v": 2}
    blocks = [(0, 12, 4, 1.0 if alpha is None else alpha / 4), (24, 12, 2, 1.0 if alpha is None else alpha / 2)]
    twin = ReferenceLoRA(weight_rows(layer).detach(), layer.bias.detach(), blocks)
    lora.inject(net, plan, alpha=alpha, train_A=phase != "fixed A")
    randomise(net)
    if phase != "joint":
        lora.freeze(net, plan)
    with torch.no_grad():
        for i, (part, at) in enumerate((("q", slice(0, 4)), ("v", slice(4, 6)))):
            twin.A[i].copy_(layer.lora_A[at])
            twin.B[i].copy_(layer.lora_B[part])
    assert forms_merged_weight(n, layer.weight) == (n == 200)
    ours = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    trained = {"joint": list(twin.parameters()), "fixed A": list(twin.B)}.get(phase, [*twin.A, *twin.B])
    theirs = torch.optim.AdamW(trained, lr=0.05)
    rest = torch.optim.AdamW([twin.weight, twin.bias], lr=0.05)
    for step in range(6):
        x = torch.randn(n, 12, dtype=torch.float64)
        xs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [layer(xs[0].view(2, n // 2, 12)).reshape(n, 36), twin(xs[1])]
        torch.testing.assert_close(ys[0], ys[1], rtol=1e-10, atol=1e-10)
        for y, optimizer in zip(ys, (ours, theirs), strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
        torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-9, atol=1e-12)
        ours.step()
        theirs.step()
        if phase == "partial":  # only the k rows go on training in full
            twin.weight.grad[:12], twin.weight.grad[24:] = 0, 0
            before = twin.weight.detach().clone(), twin.bias.detach().clone()
            rest.step()
            with torch.no_grad():
                for p, old in zip((twin.weight, twin.bias), before, strict=True):
                    p[:12], p[24:] = old[:12], old[24:]
            rest.zero_grad()
        assert step < 1 or not torch.equal(ys[0], torch.zeros_like(ys[0]))
    torch.testing.assert_close(weight_rows(layer), twin.weight, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.bias, twin.bias, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.lora_B["v"], twin.B[1], rtol=1e-9, atol=1e-11)


def test_a_fused_layer_with_one_block_frozen_at_rank_0_trains_the_others():
    torch.manual_seed(0)
    net, plain = nn.ModuleDict({"qkv": nn.Linear(8, 24)}), nn.ModuleDict({"qkv": nn.Linear(8, 24)})
    plain.load_state_dict(net.state_dict())
    lora.inject(net, {"qkv.q": 0})
    lora.freeze(net, {"qkv.q": 0})
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    assert set(trained) == {f"qkv.rest_{kind}.{part}" for kind in ("weight", "bias") for part in "kv"}
    x = torch.randn(5, 8)
    net["qkv"](x).square().sum().backward()
    plain["qkv"](x).square().sum().backward()
    torch.testing.assert_close(trained["qkv.rest_weight.v"].grad, plain["qkv"].weight.grad[16:])
    torch.testing.assert_close(trained["qkv.rest_bias.k"].grad, plain["qkv"].bias.grad[8:16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_injecting_changes_no_bit(dtype, n):
    net = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), conv1d(16, 40)).to(dtype).eval()
    x = torch.randn(n, 24, dtype=dtype)
    before = net(x)
    keys, parameters = set(net.state_dict()), {n: id(p) for n, p in net.named_parameters()}
    lora.inject(net, {"0": 8, "2": 2})
    assert torch.equal(net(x), before)
    assert keys == set(net.state_dict()) < set(dict(net.named_parameters()))  # adapters are no part of the plain model
    assert all(id(net.get_parameter(name)) == old for name, old in parameters.items())  # the same objects
    assert isinstance(net[0], nn.Linear) and is_conv1d(net[2])
    lora.eject(net)
    assert type(net[0]) is nn.Linear and set(net.state_dict()) == keys and torch.equal(net(x), before)


@pytest.mark.parametrize("n", [3, 400])
def test_merging_changes_no_output_and_again_nothing(n):
    torch.manual_seed(0)
    net = nn.ModuleDict({"qkv": nn.Linear(16, 48)})
    lora.inject(net, dict.fromkeys(find_targets(net), 4))
    randomise(net)
    x = torch.randn(n, 16)
    before = net["qkv"](x)
    plain = lora.plain_state(net)
    lora.merge(net)
    torch.testing.assert_close(net["qkv"](x), before, rtol=1e-5, atol=1e-6)
    assert torch.equal(plain["qkv.weight"], net["qkv"].weight) and set(plain) == {"qkv.weight", "qkv.bias"}
    once = net["qkv"].weight.clone()
    lora.merge(net)
    assert torch.equal(net["qkv"].weight, once)
    assert all(not factor.any() for factor in net["qkv"].lora_B.values())


def test_non_finite_adapters_are_refused():
    net = nn.Sequential(nn.Linear(4, 4))
    lora.inject(net, {"0": 2})
    net[0].lora_B["W"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        lora.merge(net)


def test_a_plain_state_dict_loads_into_an_injected_model_as_the_merged_one():
    torch.manual_seed(0)
    net, plain = nn.ModuleDict({"qkv": nn.Linear(8, 24)}), nn.ModuleDict({"qkv": nn.Linear(8, 24)})
    plan = {"qkv.q": 2, "qkv.v": 4}
    lora.inject(net, plan)
    randomise(net)
    lora.freeze(net, plan)  # k stays trainable: a view of W's rows
    net.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(5, 8)
    torch.testing.assert_close(net["qkv"](x), plain["qkv"](x))
    assert torch.equal(net["qkv"].rest_weight["k"], plain["qkv"].weight[8:16])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "to"])
def test_copies_and_moves_keep_the_rest_rows_views_of_w(how):
    torch.manual_seed(0)
    net = nn.ModuleDict({"qkv": nn.Linear(8, 24)})
    plan = {"qkv.q": 2, "qkv.v": 4}
    lora.inject(net, plan)
    randomise(net)
    lora.freeze(net, plan)
    x = torch.randn(5, 8)
    y = net["qkv"](x)
    if how == "to":
        other, x, y = net.double(), x.double(), net.double()["qkv"](x.double())
    else:
        other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        assert torch.equal(other["qkv"](x), y)
    with torch.no_grad():
        other["qkv"].rest_weight["k"].add_(1.0)
    moved = other["qkv"](x) - y
    assert moved[:, 8:16].abs().min() > 0 and not moved[:, :8].any() and not moved[:, 16:].any()


def test_a_users_subclass_keeps_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    net = nn.ModuleDict({"qkv": Doubled(6, 18)})
    x = torch.randn(4, 6)
    before = net["qkv"](x)
    lora.inject(net, {"qkv.k": 2})
    assert torch.equal(net["qkv"](x), before) and isinstance(net["qkv"], Doubled)
    randomise(net)
    expected = before.clone()
    expected[:, 6:12] += 2 * (x @ net["qkv"].lora_A.T @ net["qkv"].lora_B["k"].T)  # as it doubles what a merged W gives
    torch.testing.assert_close(net["qkv"](x), expected)


def saved_bytes(module: nn.Module, x: torch.Tensor, own: set[int]) -> int:
    """Bytes that autograd keeps for backward, parameters and the input aside."""
    kept: dict[int, int] = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("n", [4, 2000])
@pytest.mark.parametrize("train_A", [True, False])
def test_activation_memory_of_one_linear(autocast, n, train_A):
    """At most x (in the dtype of the product), the R-wide product and what a plain layer keeps: autocast's copy of W.

    LoRA-FA does without x.
    """
    net = nn.Sequential(nn.Linear(64, 96))
    plan = {"0": 8}
    lora.inject(net, plan, train_A=train_A)
    lora.freeze(net, plan)
    x = torch.randn(n, 64, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    size = 2 if autocast else 4
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept = saved_bytes(net, x, own)
    copy_of_w = 64 * 96 * 2 if autocast else 0
    assert kept <= n * (64 + 8) * size + copy_of_w
    if not train_A:
        assert kept == n * 8 * size + copy_of_w


def test_autocast_matches_float32_and_gives_float32_gradients():
    torch.manual_seed(0)
    for n in (8, 2000):
        net = nn.Sequential(nn.Linear(64, 96))
        lora.inject(net, {"0": 8})
        randomise(net)
        x = torch.randn(n, 64)
        net(x).square().mean().backward()
        exact = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        for name, p in net.named_parameters():
            assert p.grad.dtype == torch.float32
            assert (p.grad - exact[name]).norm() / exact[name].norm() < 0.02, name


def test_low_precision_weights_do_not_round_the_small_update_away():
    net = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    lora.inject(net, {"0": 1})
    with torch.no_grad():
        net[0].lora_A.fill_(1.0)
        net[0].lora_B["W"].fill_(2.0**-10)  # far below bfloat16's step at 1
    x = torch.zeros(4096, 64, dtype=torch.bfloat16)
    x[:, 0], x[:, 1] = 1.0, -1.0  # W x = 0 exactly, B A x = 0 too; then tilt x so that only BA shows
    net[0].weight.data[:, 0], net[0].weight.data[:, 1] = 1.0, 1.0
    x[:, 1] = 0.0
    net[0].weight.data[:, 0] = 0.0
    assert torch.equal(net(x), torch.full_like(net(x), 2.0**-10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_inside_of_autocast_rounds_no_more(dtype):
    net = nn.Sequential(nn.Linear(64, 48, dtype=dtype))
    lora.inject(net, {"0": 4})
    randomise(net)
    outside = net[0].merged_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net[0].merged_weight(), outside)


def test_adapters_are_drawn_privately_and_by_name():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    nets = [nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}) for _ in range(2)]
    torch.set_rng_state(before)
    for net in nets:
        lora.inject(net, {"a": 2, "b": 2}, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator was not touched
    assert torch.equal(nets[0]["a"].lora_A, nets[1]["a"].lora_A)
    assert not torch.equal(nets[0]["a"].lora_A, nets[0]["b"].lora_A)
    other = nn.ModuleDict({"a": nn.Linear(8, 8)})
    lora.inject(other, {"a": 2}, seed=2)
    assert not torch.equal(nets[0]["a"].lora_A, other["a"].lora_A)
    assert nets[0]["a"].lora_A.abs().max() <= 8**-0.5  # kaiming-uniform(√5): ±1/√D


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.device("meta")], ids=str)
def test_the_defaults_of_the_process_change_no_draw(default):
    nets = [nn.Sequential(nn.Linear(8, 6)) for _ in range(2)]
    lora.inject(nets[0], {"0": 2}, seed=1)
    if isinstance(default, torch.device):
        torch.set_default_device(default)
    else:
        torch.set_default_dtype(default)
    try:
        lora.inject(nets[1], {"0": 2}, seed=1)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(nets[0][0].lora_A, nets[1][0].lora_A)


def test_transformer_encoder_layers_fast_path_is_switched_off_and_on_again():
    torch.manual_seed(0)
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = layer(x)
        lora.inject(layer, dict.fromkeys(find_targets(layer), 4))
        torch.testing.assert_close(layer(x), before)
        randomise(layer, 0.3)
        evaluated = layer(x)
    trained = layer.train()(x)
    torch.testing.assert_close(evaluated, trained)
    assert not torch.allclose(evaluated, before, atol=1e-3)
    lora.eject(layer.eval())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), evaluated, rtol=1e-4, atol=1e-5)
    assert layer.layers[0].activation_relu_or_gelu == 1


def test_a_tied_output_head_is_untied_with_a_warning():
    from transformers import GPT2Config, GPT2LMHeadModel

    net = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, bos_token_id=0, eos_token_id=0)).eval()
    ids = torch.arange(8)[None]
    before = net(ids).logits
    said = "lm_head is a target and no longer shares its weight .* 512 parameters more.* untied .tie_word_embeddings=False"
    with pytest.warns(UserWarning, match=said):
        inherited = lora.inject(net, {"lm_head": 4})
    assert net.lm_head.weight is not net.transformer.wte.weight and net.config.tie_word_embeddings is False
    assert inherited[0].old is net.transformer.wte.weight
    assert torch.equal(net(ids).logits, before)


def test_exact_state_round_trip_and_its_refusals():
    a, b = toy(), toy()
    plan = {"blocks.0.qkv.q": 2, "blocks.0.qkv.k": 4, "blocks.1.fc1": 8}
    for net in (a, b):
        lora.inject(net, plan)
    randomise(a)
    lora.load_exact(b, lora.clone_state(lora.exact_state(a)))
    x = torch.randn(3, 12)
    assert torch.equal(a.eval()(x), b.eval()(x))
    other = toy()
    lora.inject(other, plan | {"blocks.1.fc1": 4})
    with pytest.raises(ConfigError, match="has shape"):
        lora.load_exact(other, lora.exact_state(a))
    with pytest.raises(ConfigError, match="differ"):
        lora.load_exact(other, {})
    with pytest.raises(RuntimeError, match="eject first"):
        lora.inject(a, plan)


def test_backward_stops_where_nothing_below_trains():
    net = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    plan = {"0": 0, "1": 0, "2": 2, "3": 2}
    lora.inject(net, plan)
    lora.freeze(net, plan, freeze_rest=True)
    x = torch.randn(3, 8)
    hidden = net[1](net[0](x))
    assert not hidden.requires_grad and net[2](hidden).requires_grad


def test_compiles_without_a_graph_break():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(64, 8)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    lora.inject(net, {"0": 2, "2": 2})
    randomise(net)
    net.zero_grad()
    y = compiled(x)
    torch.testing.assert_close(y, net(x))  # no stale graph
    y.sum().backward()
    grads = [p.grad.clone() for _, p in lora.adapter_parameters(net)]
    net.zero_grad()
    net(x).sum().backward()
    for ours, (_, p) in zip(grads, lora.adapter_parameters(net), strict=True):
        torch.testing.assert_close(ours, p.grad)
