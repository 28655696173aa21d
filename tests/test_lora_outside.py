"""An adapted layer is a linear layer to everyone outside: callers, in-place operations, transforms, tracers and exporters."""

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_pretrain
from lowrank_pretrain.lora import model as lora
from tests.test_lora import conv1d, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:FutureWarning", "ignore::DeprecationWarning")


def pair(net: nn.Module, plan: dict[str, int], frozen: bool = False) -> tuple[nn.Module, nn.Module]:
    """The module with adapters that are not zero, and the plain module with the same weights merged."""
    lora.inject(net, plan)
    randomise(net, 0.3)
    plain = copy.deepcopy(net)
    lora.eject(plain)
    if frozen:
        lora.freeze(net, plan)
    return net, plain


def mlp(frozen: bool = False) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return pair(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(), {"0": 2, "2": 1}, frozen)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


# -- how it is called ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [("linear", "input"), ("conv1d", "x")])
def test_the_input_goes_by_its_name_and_nothing_else_is_taken(kind, name):
    net, plain = pair(nn.Sequential(nn.Linear(4, 8) if kind == "linear" else conv1d(8, 4)), {"0": 2})
    x = torch.randn(5, 4)
    torch.testing.assert_close(net[0](**{name: x}), plain[0](**{name: x}))
    for args, kwargs in (((), {}), ((x, x), {}), ((x,), {name: x}), ((), {"other": x})):
        with pytest.raises(TypeError):
            net[0](*args, **kwargs)


class Gain(nn.Linear):
    def forward(self, x, gain=1.0, *, shift=None):
        y = super().forward(x) * gain
        return y if shift is None else (y + shift, gain)


class Masked(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mask", (torch.arange(8)[:, None] + torch.arange(4)) % 2.0)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Normed(nn.Linear):
    """Weight standardization, and a count and a buffer that its forward writes."""

    calls = 0

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + len(x)
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


@pytest.mark.parametrize("kind", [Gain, Masked, Normed])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_class_that_computes_more_than_wx_follows_the_merged_weight(kind, frozen):
    net, plain = pair(nn.Sequential(kind(4, 8)).double(), {"0": 2}, frozen)
    x = torch.randn(5, 4, dtype=torch.double)
    close(net[0](x), plain[0](x))
    net[0](x).square().sum().backward()
    plain[0](x).square().sum().backward()
    layer, dW = net[0], plain[0].weight.grad
    close(layer.lora_B["W"].grad, dW @ layer.lora_A.T)
    close(layer.lora_A.grad, layer.lora_B["W"].T @ dW)
    if kind is Gain:
        close(net[0](x, 0.5), plain[0](x, 0.5))
        y, gain = net[0](x, gain=3.0, shift=1.0)
        close(y, plain[0](x, gain=3.0, shift=1.0)[0])
        assert gain == 3.0
    if kind is Normed:
        assert (
            layer.calls == plain[0].calls == 2 and layer.seen == plain[0].seen == 10 and "seen" in dict(net[0].named_buffers())
        )


def test_a_class_with_a_forward_of_its_own_may_run_in_two_threads():
    net, plain = pair(nn.Sequential(Masked(4, 8)), {"0": 2})
    x, found = torch.randn(5, 4), []
    work = [threading.Thread(target=lambda: found.extend(net[0](x) for _ in range(50))) for _ in range(2)]
    [thread.start() for thread in work]
    [thread.join() for thread in work]
    assert len(found) == 100 and all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0], plain[0](x))


def test_a_class_with_a_forward_of_its_own_keeps_training_the_rows_that_are_no_targets():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight, self.bias)

    net, plain = pair(nn.ModuleDict({"qkv": Own(4, 12)}), {"qkv.q": 2}, True)
    x = torch.randn(5, 4)
    net["qkv"](x).square().sum().backward()
    plain["qkv"](x).square().sum().backward()
    torch.testing.assert_close(net["qkv"].rest_weight["k"].grad, plain["qkv"].weight.grad[4:8])
    torch.testing.assert_close(net["qkv"].rest_bias["v"].grad, plain["qkv"].bias.grad[8:])


# -- what is done to its output and given to its input -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 5, 4), (2, 3, 5, 4), (0, 4), (2, 0, 4), (300, 4), (2, 150, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_in_place_operations_on_the_output_of_any_shape(kind, shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(4, 8, bias=bias) if kind == "linear" else conv1d(8, 4)
    if kind == "conv1d" and (len(shape) == 1 or 0 in shape):
        pytest.skip("Conv1D itself does not take it")
    net, plain = pair(nn.Sequential(layer).double(), {"0": 2})
    grads = []
    for module in (net, plain):
        x = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = module[0](x)
        assert y.shape == (*shape[:-1], 8)
        y += 1.0
        y[..., 0] = 0.0
        y.relu_()
        y.square().sum().backward()
        grads.append((y.detach(), x.grad, module[0].weight.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b)


@pytest.mark.parametrize("make", [
    lambda x: x.t().contiguous().t(), lambda x: x.expand(3, *x.shape), lambda x: x[:, None].expand(-1, 7, -1),
    lambda x: x.view(2, 3, 4).transpose(0, 1), lambda x: torch.cat([x, x], 1)[:, ::2], lambda x: x[::2],
])  # fmt: skip
def test_inputs_that_are_not_contiguous(make):
    net, plain = mlp()
    x = torch.randn(6, 4, dtype=torch.double)
    close(net(make(x)), plain(make(x)))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors(layout):
    net, plain = mlp()
    ragged = [torch.randn(n, 4, dtype=torch.double) for n in (3, 1, 5)]
    ys = [module(torch.nested.nested_tensor(ragged, layout=layout)) for module in (net, plain)]
    for a, b, x in zip(ys[0].unbind(), ys[1].unbind(), ragged, strict=True):
        close(a, b)
        close(a, net(x))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:.*nested.*", "ignore:.*norm_first.*")
def test_a_transformer_encoder_with_a_padding_mask_validates_as_before(activation, norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation=activation, norm_first=norm_first)
    net, plain = pair(nn.TransformerEncoder(layer, 2), {f"layers.{i}.linear{j}": 2 for i in (0, 1) for j in (1, 2)})
    x = torch.randn(3, 4, 8)
    mask = torch.tensor([[False, False, False, True], [False, False, True, True], [False] * 4])
    for grad in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with grad():
            outputs = [module.eval()(x, src_key_padding_mask=mask) for module in (net, plain)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


class Sub(torch.Tensor):
    """A tensor of a user's own kind."""


def test_a_tensor_of_another_class_keeps_its_class():
    net, plain = mlp()
    x = torch.randn(3, 4, dtype=torch.double)
    y = net(x.as_subclass(Sub))
    assert type(y) is Sub
    close(y.as_subclass(torch.Tensor), plain(x))


# -- derivatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("n", [3, 40])  # two-step form; merged form
@pytest.mark.parametrize("frozen", [False, True])
def test_first_and_second_derivatives_by_differences(kind, n, frozen):
    torch.manual_seed(0)
    layer = nn.Linear(2, 6) if kind == "linear" else conv1d(6, 2)
    name = "qkv" if kind == "linear" else "c_attn"
    net = nn.ModuleDict({name: layer}).double()
    lora.inject(net, {f"{name}.q": 1, f"{name}.v": 2})
    randomise(net, 0.3)
    if frozen:  # k goes on training, by views of W's rows
        lora.freeze(net, {f"{name}.q": 1, f"{name}.v": 2})
    # views of W are inputs of their own that hold W's values: nothing to take differences of
    names = [key for key, p in layer.named_parameters() if p.requires_grad and "rest_" not in key]

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,)).tanh()

    x = torch.randn(n, 2, dtype=torch.double, requires_grad=True)
    inputs = (x, *(layer.get_parameter(key).detach().clone().requires_grad_() for key in names))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def penalty(module: nn.Module, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Gradients of a gradient penalty."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).to(next(module.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (g,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        g.square().sum().backward()
    return {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}


def test_a_gradient_penalty_reaches_every_factor_and_the_layers_below():
    net, plain = mlp()
    ours, theirs = penalty(net), penalty(plain)
    close(ours["x"], theirs["x"])
    for i in "02":
        close(ours[f"{i}.weight"], theirs[f"{i}.weight"])
        close(ours[f"{i}.lora_B.W"], theirs[f"{i}.weight"] @ net[int(i)].lora_A.T)
        close(ours[f"{i}.lora_A"], net[int(i)].lora_B["W"].T @ theirs[f"{i}.weight"])


def test_a_gradient_penalty_under_autocast_is_that_of_the_plain_model_to_its_precision():
    net, plain = mlp()
    ours, theirs = penalty(net.float(), True), penalty(plain.float(), True)
    for name in ("x", "0.weight", "2.weight"):
        assert (ours[name] - theirs[name]).norm() < 0.1 * theirs[name].norm(), name


def test_a_second_derivative_that_would_need_what_lora_fa_does_not_keep_is_an_error_and_the_others_are_right():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)).double()
    lora.inject(net, {"1": 2}, train_A=False)
    randomise(net, 0.3)
    plain = copy.deepcopy(net)
    lora.eject(plain)
    lora.freeze(net, {"1": 2})
    close(penalty(net)["0.weight"], penalty(plain)["0.weight"])  # a penalty on x's gradient never goes there
    x = torch.randn(5, 4, dtype=torch.double)
    (g,) = torch.autograd.grad(net(x).square().sum(), net[1].lora_B["W"], create_graph=True)
    with pytest.raises(RuntimeError, match="needs x, which train_A=False does not keep"):
        g.square().sum().backward()


TRANSFORMS = {
    "vmap": lambda m, x: torch.func.vmap(m)(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x),
    "jacfwd": lambda m, x: torch.func.jacfwd(m)(x),
    "hessian": lambda m, x: torch.func.hessian(lambda z: m(z).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
    "per-sample gradients": lambda m, x: torch.func.vmap(torch.func.grad(lambda z: m(z).square().sum()))(x),
    "functional.hessian": lambda m, x: torch.autograd.functional.hessian(lambda z: m(z).square().sum(), x, vectorize=True),
    "functional.jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "dual numbers": lambda m, x: _dual(m, x),
}


def _dual(module, x):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(module(torch.autograd.forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_function(name):
    net, plain = mlp()
    x = torch.randn(3, 4, dtype=torch.double)
    close(TRANSFORMS[name](net, x), TRANSFORMS[name](plain, x))


def test_functional_call_and_grad_by_name():
    net, plain = mlp()
    x = torch.randn(3, 4, dtype=torch.double)

    def loss(values, module):
        return torch.func.functional_call(module, values, (x,)).square().sum()

    ours, theirs = (torch.func.grad(loss)(dict(m.named_parameters()), m) for m in (net, plain))
    close(ours["0.weight"], theirs["0.weight"])
    close(ours["0.lora_A"], net[0].lora_B["W"].T @ theirs["0.weight"])


# -- tracers and exporters -----------------------------------------------------------------------------------------------


def _dynamic(strict):
    def export(module, x):
        shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
        return torch.export.export(module, (x,), dynamic_shapes=shapes, strict=strict).module()

    return export


TRACERS = {
    "jit.trace": lambda m, x: torch.jit.trace(m, x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "export": _dynamic(False),
    "strict export": _dynamic(True),
    "compile": lambda m, x: torch.compile(m, backend="eager", fullgraph=True, dynamic=True),
}


@pytest.mark.parametrize("name", TRACERS)
@pytest.mark.parametrize("train", [True, False])
def test_tracers_take_the_adapters_along_for_any_number_of_rows(name, train):
    net, plain = mlp()
    net.train(train)
    x = torch.randn(4, 4, dtype=torch.double)
    traced = TRACERS[name](net, x)
    for n in (2, 4, 60):
        x = torch.randn(n, 4, dtype=torch.double)
        close(traced(x), plain(x))
    assert list(lora.lora_layers(net))  # tracing changed nothing


def test_scripting_names_the_cure_and_leaves_the_adapters_where_they_are():
    net, plain = mlp()
    with pytest.raises(RuntimeError, match=r"adapters cannot be scripted: .*lowrank_pretrain.merge\(copy.deepcopy"):
        torch.jit.script(net)
    x = torch.randn(4, 4, dtype=torch.double)
    assert list(lora.lora_layers(net))
    close(net(x), plain(x))
    close(torch.jit.script(lowrank_pretrain.merge(copy.deepcopy(net)))(x), plain(x))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("n", [2, 8, 300])
def test_onnx_by_the_exporter_that_traces(fused, n):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    net, plain = pair(nn.ModuleDict({"qkv" if fused else "fc": nn.Linear(4, 24)}), {"qkv.v": 2} if fused else {"fc": 2})
    layer, x = next(iter(net.values())).eval(), torch.randn(n, 4)
    file = io.BytesIO()
    torch.onnx.export(layer, x, file, dynamo=False, dynamic_axes={"x": {0: "n"}}, input_names=["x"])
    session = ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    x = torch.randn(n + 1, 4)
    torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), next(iter(plain.values()))(x))


def test_second_derivatives_leave_ordinary_training_on_its_own_path(monkeypatch):
    from lowrank_pretrain.lora import function as lora_function

    def never(*_):
        raise AssertionError("ordinary training must not come here")

    monkeypatch.setattr(lora_function, "_gradients", never)
    monkeypatch.setattr(lora_function, "effective_weight", never)
    net, _ = mlp()
    for x in (torch.randn(3, 4), torch.randn(2, 40, 4)):
        net(x.double()).square().sum().backward()
        with torch.no_grad():
            net(x.double())


# -- classes that notice their subclasses ----------------------------------------------------------------------------------

KINDS = {}


class Registered(nn.Linear):
    def __init_subclass__(cls, kind: str, **kwargs):
        super().__init_subclass__(**kwargs)
        KINDS[kind] = cls


class Plain(Registered, kind="plain"):
    pass


class Doubled(Registered, kind="doubled"):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("cls", [Plain, Doubled])
def test_a_class_that_registers_its_subclasses_hears_nothing_of_ours(cls):
    module, x = nn.Sequential(cls(8, 8)), torch.randn(3, 8)
    y = module(x)
    lora.inject(module, {"0": 2})
    torch.testing.assert_close(module(x), y)
    assert KINDS == {"plain": Plain, "doubled": Doubled}
    lora.eject(module)
    assert type(module[0]) is cls
