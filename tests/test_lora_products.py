"""The products of a layer with adapters: gradients in every layout and precision, and nothing that goes stale."""

import pytest
import torch
from torch import nn

from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.layer import LoRALinear
from tests.test_lora import fused, randomise

# ---- gradients ------------------------------------------------------------------------------------------------------------

SHAPES = {  # part of a fused layer -> rank; k's rows have no adapter in the last, and train in full
    "whole": {"": 4},
    "fused": {".q": 4, ".k": 2, ".v": 3},
    "two of three": {".q": 4, ".v": 2},
}


def adapted(kind, shape, alpha, phase, dtype):
    """A module with one layer of 12 to 36, in a phase; its layer."""
    torch.manual_seed(0)
    net = fused(kind, 12)
    (name,) = dict(net.named_children())
    plan = {name + part: rank for part, rank in SHAPES[shape].items()}
    if shape == "whole":  # a name that is not that of a fused layer
        net = nn.ModuleDict({"fc": net[name]})
        plan = {"fc": 4}
    lora.inject(net, plan, alpha=alpha, train_A=phase != "LoRA-FA")
    randomise(net)
    if phase != "joint":
        lora.freeze(net, plan)
    net.to(dtype)
    return net, next(m for m in net.modules() if isinstance(m, LoRALinear))


def by_autograd(layer, x, dy):
    """y and all gradients of the paper's formula h = W x + scale B A x + b in float64, by parameter name."""
    leaf = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}
    x = x.detach().double().requires_grad_()
    weight = leaf["weight"].t() if layer._transposed else leaf["weight"]
    columns = list((x @ weight.t() + leaf["bias"]).unbind(-1))
    for p in layer._parts:
        low = p.scale * (x @ leaf["lora_A"][p.a : p.a + p.rank].t() @ leaf[f"lora_B.{p.name}"].t())
        for i in range(p.rows):
            columns[p.start + i] = columns[p.start + i] + low[..., i]
    y = torch.stack(columns, -1)
    y.backward(dy.double())
    grads = {name: p.grad for name, p in leaf.items() if not name.startswith("rest_")}
    return y.detach(), x.grad, grads


def assert_close(found, right, tolerance, name=""):
    assert (found.double() - right).norm() <= tolerance * right.norm(), (
        name,
        ((found.double() - right).norm() / right.norm()).item(),
    )


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("phase", ["joint", "frozen", "LoRA-FA"])
@pytest.mark.parametrize("n", [2, 200])  # the two-step form, and the formed weight
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [(torch.float64, False, 1e-12), (torch.float32, False, 2e-6), (torch.float32, True, 2e-2), (torch.bfloat16, False, 2e-2)],
    ids=["float64", "float32", "autocast", "bf16-true"],
)
def test_gradients_are_those_of_the_formula(kind, shape, phase, n, dtype, autocast, tolerance):
    for alpha in (None, 7.0):
        net, layer = adapted(kind, shape, alpha, phase, dtype)
        x = torch.randn(2, n // 2, 12, dtype=torch.float64).to(dtype).requires_grad_()
        dy = torch.randn(2, n // 2, 36, dtype=torch.float64)
        dy = dy.to(torch.bfloat16 if autocast else dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
        y.backward(dy)
        right_y, right_dx, right = by_autograd(layer, x, dy)
        assert_close(y, right_y, tolerance, "y")
        assert_close(x.grad, right_dx, tolerance, "x")
        for name, p in layer.named_parameters():
            if p.requires_grad and not name.startswith("rest_"):
                assert p.grad.dtype == p.dtype and p.grad.is_contiguous(), name
                assert_close(p.grad, right[name], tolerance, name)


# ---- nothing goes stale -----------------------------------------------------------------------------------------------------


def _step(net, layer):
    layer.weight.requires_grad_(True).grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.5).step()
    layer.weight.requires_grad_(False).grad = None


def _load(net, layer):
    net.load_state_dict({name: tensor + 0.5 for name, tensor in net.state_dict().items()}, strict=False)


def _swap_average(net, layer):
    for p in net.parameters():  # as implementations of weight averages swap: through .data
        p.data.copy_(p.data * 0.5)


def _write_a_view(net, layer):
    layer.weight.data[3, 5] += 4.0  # one number, which no sampled check would see


def _write_by_numpy(net, layer):
    layer.weight.detach().numpy()[:, 2] = 1.0


def _point_elsewhere(net, layer):
    layer.weight.data = layer.weight.data.clone().neg_()


def _move(net, layer):
    net.double().float()
    layer.weight.data.add_(0.5)


def _merge(net, layer):
    lora.merge(net)
    layer.lora_B["W"].data.fill_(0.25)


@pytest.mark.parametrize("n", [2, 200])
@pytest.mark.parametrize(
    "write", [_step, _load, _swap_average, _write_a_view, _write_by_numpy, _point_elsewhere, _move, _merge]
)
def test_under_autocast_every_write_into_a_frozen_weight_shows_in_the_next_step(write, n):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16, bias=False))
    lora.inject(net, {"0": 4})
    lora.freeze(net, {"0": 4})
    randomise(net)
    layer, x = net[0], torch.randn(n, 24, requires_grad=True)

    def once():
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        y.float().sum().backward()
        return y.detach().float(), x.grad

    def expected():
        merged = layer.merged_weight()
        return x.detach() @ merged.t(), merged.sum(0).expand(n, -1)

    before = once()
    write(net, layer)
    for was, now, right in zip(before, once(), expected(), strict=True):
        assert not torch.equal(was, now)
        assert (now - right).norm() / right.norm() < 0.02


@pytest.mark.parametrize("n", [2, 200])
def test_under_autocast_backward_is_that_of_the_weight_its_forward_saw(n):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16, bias=False))
    lora.inject(net, {"0": 4})
    lora.freeze(net, {"0": 4})
    x = torch.randn(n, 24, requires_grad=True)
    seen = net[0].weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    net[0].weight.data.zero_()
    y.float().sum().backward()
    assert (x.grad - seen.sum(0)).norm() / x.grad.norm() < 0.02
