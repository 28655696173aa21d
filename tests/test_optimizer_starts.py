"""Optimizers that want state or attributes for each parameter from the beginning, and such that choose their own rate."""

import pytest
import torch
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from lowrank_pretrain import LoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.phases.adapter_watch import check_optimizers
from tests.test_adapter_watch import run
from tests.test_after_fit import steps
from tests.toy import adapters, loader, toy, trainer


class Built(SGD):
    """Makes its state in ``__init__``: by default the momentum, a count and a copy of each parameter."""

    def __init__(self, params, make=None):
        super().__init__(params, lr=1e-2)
        make = make or (lambda p: {"m": torch.zeros_like(p), "calls": 0, "at": p.detach().double()})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].update(make(p))

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["calls"] += 1
                    p.sub_(state["m"].mul_(0.9).add_(p.grad), alpha=group["lr"])
                    state["at"].copy_(p)
        return loss


class Multiplied(SGD):
    """Reads an attribute of each parameter."""

    def __init__(self, params, value=0.5):
        super().__init__(params, lr=1e-2)
        for group in self.param_groups:
            for p in group["params"]:
                p.lr_mult = value

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * float(p.lr_mult))
        return loss


class Own(SGD):
    """Chooses its own learning rate, as transformers' Adafactor does."""

    def __init__(self, params):
        super().__init__(params, lr=1e-2)
        for group in self.param_groups:
            group["lr"] = None

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(p.grad, alpha=1e-2)
        return loss


@pytest.mark.parametrize("settings", [{}, {"optimizer_state": "reset"}])
@pytest.mark.parametrize("make", [
    lambda m: Built(m.parameters()), lambda m: Adagrad(m.parameters(), lr=1e-2, initial_accumulator_value=0.1),
    lambda m: Multiplied(m.parameters()), lambda m: Multiplied(m.parameters(), torch.tensor(0.5)),
    lambda m: Own(m.parameters()),
])  # fmt: skip
def test_what_they_want_is_made_for_adapters_too(tmp_path, make, settings):
    module = run(tmp_path, make, steps(**settings), max_epochs=3)
    assert all(factor.any() for factor in adapters(module).values())


def test_the_state_of_an_adapter_begins_as_that_of_every_other_parameter():
    from lowrank_pretrain.phases import optimizer_starts

    base, new = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.full((3, 2), 2.0))
    optimizer = Built([base, torch.nn.Parameter(torch.zeros(2))])
    optimizer_starts.note_start(optimizer)
    optimizer_starts.begin(optimizer, optimizer.param_groups[0], new, base)
    state = optimizer.state[new]
    assert state["calls"] == 0 and not state["m"].any() and state["m"].shape == (3, 2)
    assert state["at"].dtype == torch.float64 and torch.equal(state["at"].float(), new.detach())


def test_a_run_with_state_made_at_the_start_resumes_exactly(tmp_path):
    states = []
    for ckpt in (None, tmp_path / "step=8.ckpt"):
        module = toy()
        module.configure_optimizers = lambda module=module: Built(module.parameters())
        trainer(tmp_path, steps(), max_epochs=2, every=4).fit(module, loader(), ckpt_path=ckpt)
        states.append({name: value.clone() for name, value in module.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@pytest.mark.parametrize("make, match", [
    (lambda m: Built(m.parameters(), lambda p: {"probe": torch.randn_like(p)}), "'Built': made probe for each parameter when"),
    (lambda m: Built(m.parameters(), lambda p: {"left": torch.eye(len(p))}), "'Built': made left for each parameter when"),
    (lambda m: Multiplied(m.parameters(), torch.ones(3)), "'Multiplied': reads lr_mult of each parameter, a tensor"),
])  # fmt: skip
@pytest.mark.parametrize("callback", [steps, lambda: LoRA(2)])
def test_what_cannot_be_made_alike_is_refused_at_the_start(tmp_path, make, match, callback):
    with pytest.raises(ConfigError, match=f"^optimizer={match}") as error:
        run(tmp_path, make, callback())
    assert "\n" not in str(error.value)


def test_state_of_an_earlier_fit_or_of_a_file_is_no_reason_to_refuse():
    class Lion(Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1e-2})

    p = torch.nn.Parameter(torch.ones(2, 2))
    for kind, state in ((Lion, {"m": torch.randn(2, 2)}), (AdamW, {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 2)})):
        optimizer = kind([p])
        optimizer.state[p] = state
        check_optimizers([optimizer])
    p.mask = torch.ones(2, 2)  # which the optimizer does not read
    check_optimizers([AdamW([p])])


@pytest.mark.parametrize("settings", [{"adapter_lr": 2.0}, {"rewarm": 5}])
def test_a_rate_for_adapters_is_refused_where_the_optimizer_chooses_its_own(tmp_path, settings):
    with pytest.raises(ConfigError, match=f"^{next(iter(settings))}=.*: Own has lr=None") as error:
        run(tmp_path, lambda m: Own(m.parameters()), steps(**settings))
    assert "\n" not in str(error.value)
    run(tmp_path, lambda m: Own(m.parameters()), steps(adapter_weight_decay=0.1))


class Lazy(SGD):
    """Master copies by position, made in the first step."""

    master = None

    def step(self, closure=None):
        self.master = self.master or [p.detach().double() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


def test_copies_by_position_made_in_the_first_step_are_refused_in_the_second(tmp_path):
    module = toy()
    module.configure_optimizers = lambda: Lazy(module.parameters(), lr=1e-2)
    fit = trainer(tmp_path, steps(), max_epochs=2)
    with pytest.raises(ConfigError, match="^optimizer='Lazy': keeps copies of its parameters by position .master.") as error:
        fit.fit(module, loader())
    assert fit.global_step < 2 and "\n" not in str(error.value)
