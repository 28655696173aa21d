"""LTE and optimizers that wrap another one, which holds the state (Lookahead, SAM, a user's own)."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.wrapped import state_holder, with_wrapped
from tests import lte_habits_workers as workers
from tests.lte_habits_workers import Wraps
from tests.lte_workers import Net, fit, weights

FULL = {"update": "full", "rank": 16, "heads": 4}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Twice(Wraps):
    """Wraps a wrapper."""

    def __init__(self, params):
        super().__init__(params, inner=Wraps)


class Slow(Wraps):
    """Keeps something of its own as well."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()
        return loss


class Sharpness(Slow):
    """The same, and needs a closure."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        return super().step(closure)


class Parts(Optimizer):
    """Steps two optimizers, each of which holds a part of the parameters."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, {"lr": 1e-2})
        self.first, self.second = AdamW(params[:2]), SGD(params[2:], lr=1e-2)

    def step(self, closure=None):
        loss = closure()
        self.first.step()
        self.second.step()
        return loss


class Uses(Net):
    """The toy, with an optimizer made of all its parameters."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


class Looks(pl.Callback):
    """Notes the model and the optimizer before the first step, and how many steps one head's state has counted."""

    def __init__(self):
        self.before, self.steps = [], []

    def on_train_start(self, trainer, module):
        self.before.append((weights(module), sum(map(len, (o.state for o in with_wrapped(trainer.optimizers[0]))))))

    def on_train_batch_end(self, trainer, module, *_):
        optimizer = trainer.optimizers[0]
        held = [o.state[module.net[0].lora_A] for o in with_wrapped(optimizer) if module.net[0].lora_A in o.state]
        self.steps.append([int(state["step"]) for state in held])


@pytest.mark.parametrize("make", [Wraps, Twice])
@pytest.mark.parametrize("how", [{}, {"reset": True}, {"mode": "sequential"}, {"outer_momentum": 0.5, **FULL}], ids=str)
def test_a_run_with_a_wrapped_optimizer_is_that_of_the_optimizer_and_resumes_exactly(tmp_path, make, how):
    options = {"steps": 10, "exact": True, "folder": tmp_path, "save_at": (6,), **how}
    bare, _, _ = fit(module=Uses(lambda params: AdamW(params, lr=1e-2)), steps=10, exact=True, **how)
    on, _, _ = fit(module=Uses(make), **options)
    same(weights(bare), weights(on))
    resumed, _, _ = fit(module=Uses(make), ckpt=tmp_path / "step=6.ckpt", steps=10, exact=True, **how)
    same(weights(on), weights(resumed))


@pytest.mark.parametrize("how", [{"sync_rest": "merge"}, {"outer_momentum": 0.5, **FULL}], ids=str)
def test_so_does_one_of_two_workers(ranks, tmp_path, how):
    for on, resumed in ranks(2, workers.resumed_with_a_wrapper, 2, tmp_path, **how):
        same(on, resumed)


def test_a_resetting_merge_deletes_the_state_inside():
    looks = Looks()
    fit(module=Uses(Wraps), steps=6, merge_every=2, reset=True, trainer={"callbacks": [looks]})
    assert looks.steps == [[1], []] * 3


@pytest.mark.parametrize("how", [{}, FULL], ids=str)
def test_the_check_at_the_start_leaves_the_optimizer_inside_alone(how):
    module, looks = Uses(Wraps), Looks()
    module.net[0].weight.grad = torch.ones_like(module.net[0].weight)  # as after an earlier fit
    before = weights(module)
    looks.on_train_batch_end = lambda *_: None
    fit(module=module, steps=1, trainer={"callbacks": [looks]}, **how)
    (seen, kept) = looks.before[0]
    assert kept == 0
    assert all(torch.equal(seen[name], before[name]) for name in before)


@pytest.mark.parametrize("how", [{}, FULL], ids=str)
@pytest.mark.parametrize(
    ("make", "line"),
    [
        (Slow, "optimizer='Slow': keeps the state of one parameter in several optimizers (Slow, AdamW)"),
        (Sharpness, "optimizer='Sharpness': keeps the state of one parameter in several optimizers (Sharpness, AdamW)"),
        (Parts, "optimizer='Parts': steps a SGD "),
    ],
)
def test_state_in_several_places_is_refused_before_the_first_step(make, line, how):
    module = Uses(make)
    with pytest.raises(ConfigError) as error:
        fit(module=module, **how)
    assert str(error.value).startswith(line) and "\n" not in str(error.value) and not module.losses


class Unbiased(Net):
    """Matrices alone."""

    def __init__(self):
        super().__init__()
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                layer.bias = None

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1)


def test_lbfgs_is_refused_before_the_first_step():
    module = Unbiased()
    with pytest.raises(ConfigError, match="^optimizer='LBFGS': keeps directions over all parameters"):
        fit(module=module)
    assert not module.losses


def test_the_holder_is_the_innermost_or_who_holds_something():
    p = nn.Parameter(torch.ones(3))
    outer = Twice([p])
    assert type(state_holder(outer)) is AdamW and len(with_wrapped(outer)) == 3
    outer.state[p]["slow"] = p.detach().clone()
    assert state_holder(outer) is outer
    p.grad = torch.ones(3)
    outer.step()
    with pytest.raises(ConfigError, match="in several optimizers"):
        state_holder(outer)
