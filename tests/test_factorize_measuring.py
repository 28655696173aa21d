"""Measuring the second moments of inputs before weights are factored: rows, eval mode, transforms, nested tensors, tracers."""

import pytest
import torch

from lowrank_pretrain.factorize import moments
from tests.reference import factorize as reference
from tests.test_factorize import Net, factored_net, inputs


def test_measuring_changes_no_bit_and_finds_the_second_moment():
    torch.manual_seed(0)
    plain = Net()
    net, _ = factored_net(0)
    x = inputs(2000, 32, 0.8)
    assert torch.equal(net(x), plain(x))
    C = moments.moment_of("qkv", net.qkv)
    torch.testing.assert_close(C, reference.second_moment(x[::2]).float(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        net(x * 100)  # what does not train is not measured
    assert torch.equal(C, moments.moment_of("qkv", net.qkv))
    assert list(net.state_dict()) == list(plain.state_dict())


def test_eval_mode_is_measured_too_and_rows_that_are_none_or_not_finite_count_for_nothing():
    net, _ = factored_net(0)
    net.eval()  # as a pretrained model may train
    net(inputs(64, 32))
    C = moments.moment_of("qkv", net.qkv)
    torch.testing.assert_close(C, reference.second_moment(inputs(64, 32)).float(), rtol=1e-4, atol=1e-5)
    assert net(torch.empty(0, 32)).shape == (0, 32)  # of an expert that no token chose
    net(torch.full((4, 32), torch.nan))  # of a step that is skipped
    torch.testing.assert_close(moments.moment_of("qkv", net.qkv), C)


@pytest.mark.parametrize("transform", [
    lambda net, x: torch.func.vmap(net)(x),
    lambda net, x: torch.func.vmap(net, in_dims=1)(x.t()),
    lambda net, x: torch.func.vmap(torch.func.jacrev(net))(x),
    lambda net, x: torch.func.jvp(net, (x,), (torch.ones_like(x),)),
    lambda net, x: torch.func.grad(lambda x: torch.func.vmap(net)(x).sum())(x),
    lambda net, x: torch.autograd.functional.jvp(net, (x,), (torch.ones_like(x),)),
])  # fmt: skip
def test_inputs_inside_of_transforms_are_measured(transform):
    x, (plain, _), (net, _) = inputs(64, 32), factored_net(0), factored_net(0)
    plain(x)
    transform(net, x)
    torch.testing.assert_close(moments.moment_of("fc2", net.fc2), moments.moment_of("fc2", plain.fc2))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_measured_and_multiplied(layout):
    (net, taker), (plain, _), x = factored_net(0), factored_net(0), inputs(64, 32)
    nested = torch.nested.nested_tensor([x[:24], x[24:]], layout=layout)
    net.fc1(nested), plain.fc1(x)
    torch.testing.assert_close(moments.moment_of("fc1", net.fc1), moments.moment_of("fc1", plain.fc1))
    with pytest.warns(UserWarning, match="stays whole"):
        taker.release()
    torch.testing.assert_close(torch.cat(net.fc1(nested).unbind()), net.fc1(x))


def test_tracers_record_no_measuring_and_scripting_names_the_cure():
    (net, taker), x = factored_net(1), inputs(8, 32)
    C = moments.moment_of("fc1", net.fc1)
    for change in (lambda: None, taker.release):
        change()
        made = [torch.jit.trace(net, x), torch.fx.symbolic_trace(net)]
        made.append(torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module())
        assert type(net.fc1) is not type(Net().fc1) and (taker.kept or torch.equal(moments.moment_of("fc1", net.fc1), C))
        for traced in made:
            torch.testing.assert_close(traced(inputs(64, 32)), net(inputs(64, 32)))
        with pytest.raises(RuntimeError, match="script a plain copy"):
            torch.jit.script(net)
