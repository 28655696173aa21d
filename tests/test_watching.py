"""What is seen of targets after their first forward pass: hooks on gradients, validation, later steps, writes between steps."""

import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pretrain import LoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.phases.gradient_hooks import HookWatch, has_users_hook
from lowrank_pretrain.phases.rehearsal import Rehearsal
from tests.test_rehearsal import Net, Two, data, fit, hooks, pre, said

MASK = (torch.arange(32 * 16).view(32, 16) % 3 > 0).float()
THEN = [{}, {"then": "factorize", "ranks": (0.25,)}]


def lora(**kwargs):
    return LoRA(rank=2, **kwargs)


# -- hooks on gradients -------------------------------------------------------------------------------------------------


def in_place(p):
    p.grad.mul_(MASK)


KINDS = {
    "returned": lambda p: p.register_hook(lambda g: g * MASK),
    "bound": lambda p: p.register_hook(MASK.mul),
    "partial": lambda p: p.register_hook(partial(torch.mul, MASK)),
    "after accumulating": lambda p: p.register_post_accumulate_grad_hook(in_place),
    "second": lambda p: (p.register_hook(lambda g: None), p.register_hook(lambda g: g * MASK)),
}


class Sparse(Net):
    def __init__(self, register=KINDS["returned"]):
        super().__init__()
        with torch.no_grad():
            self.fc1.weight.mul_(MASK)
        register(self.fc1.weight)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_whose_gradient_a_hook_changes_keeps_its_zeros(tmp_path, kind):
    for settings in THEN:
        module = Sparse(KINDS[kind])
        with pytest.warns(UserWarning, match="fc1 has a hook that changes its gradient"):
            fit(tmp_path, module, phases := pre(**settings))
        assert set(phases.plan) == {"fc2"} and not (module.fc1.weight * (1 - MASK)).any()
    with pytest.raises(ConfigError, match="targets='fc1': has a hook that changes its gradient .*leave it out"):
        fit(tmp_path, Sparse(KINDS[kind]), pre(targets=["fc1", "fc2"]))


def test_with_lora_a_hook_is_never_called_and_always_counts(tmp_path):
    module = Sparse()
    with pytest.warns(UserWarning, match="fc1 has a hook on its gradient"):
        fit(tmp_path, module, phases := lora())
    assert set(phases.plan) == {"fc2"} and not (module.fc1.weight * (1 - MASK)).any()
    with pytest.raises(ConfigError, match="targets='fc1': has a hook on its gradient, .*: remove the hook, or leave it out"):
        fit(tmp_path, Sparse(), lora(targets="fc1"))


def test_a_hook_that_only_looks_is_no_obstacle_and_stays_as_it_is(tmp_path):
    seen = []

    def register(p):
        p.register_hook(lambda g: seen.append(g.norm()))
        p.register_hook(lambda g: torch.nan_to_num(g))

    module = Sparse(register)
    before = list(module.fc1.weight._backward_hooks.values())
    fit(tmp_path, module, phases := pre(warmup=9))
    assert set(phases.plan) == {"fc1", "fc2"} and len(seen) == 8  # W trains through the joint phase
    assert list(module.fc1.weight._backward_hooks.values()) == before and len(seen) == 8


def test_a_hook_that_comes_after_the_first_step_is_seen_before_the_switch(tmp_path):
    class Late(Net):
        def on_train_batch_end(self, *_):
            if self.global_step == 3:
                self.fc1.weight.register_hook(lambda g: g * MASK)

    with pytest.warns(UserWarning, match="fc1 has a hook on its gradient"):
        fit(tmp_path, Late(), phases := pre())
    assert set(phases.plan) == {"fc2"}


def test_hooks_of_frameworks_and_of_this_package_do_not_count():
    for name in ("torch.nn.parallel.distributed", "lightning.pytorch.x", "wandb.integration", "lowrank_pretrain.galore"):
        weight = nn.Parameter(torch.ones(4, 4))
        weight.register_hook(hook := lambda g: g * 0)
        assert has_users_hook(weight) and not has_users_hook(weight, [hook])
        hook.__module__ = name
        assert not has_users_hook(weight), name


def test_a_hook_that_is_removed_while_it_is_watched_does_not_come_back():
    layer = nn.Linear(4, 4)
    handle = layer.weight.register_hook(lambda g: g * 0)
    watch = HookWatch({"a": layer})
    watch.begin()
    watch.begin()
    handle.remove()
    watch.end()
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.weight.grad.any() and not watch.changed


# -- gradients that the step asks for -----------------------------------------------------------------------------------


class GradNorm(Net):
    def training_step(self, batch, batch_idx):
        first, second = super().training_step(batch, batch_idx), self(batch[0]).square().mean()
        sizes = [torch.autograd.grad(loss, self.fc2.weight, retain_graph=True)[0].norm() for loss in (first, second)]
        return first + (sizes[0] / (sizes[1] + 1e-6)).clamp(0, 1) * second


class Maml(Net):
    def training_step(self, batch, batch_idx):
        def loss(values):
            return F.cross_entropy(torch.func.functional_call(self, values, (batch[0],)), batch[1])

        values = dict(self.named_parameters())
        grads = torch.autograd.grad(loss(values), [*values.values()], create_graph=True)
        return loss({name: p - 0.1 * grad for (name, p), grad in zip(values.items(), grads, strict=True)})


def test_a_weight_whose_gradient_the_step_asks_for_trains_in_full(tmp_path):
    for settings in THEN:
        with pytest.warns(UserWarning, match="fc2 the step asks torch.autograd.grad for its gradient"):
            fit(tmp_path, GradNorm(), phases := pre(**settings))
        assert set(phases.plan) == {"fc1"}
    module = Maml()
    with pytest.raises(ConfigError, match="leaves no target: fc1 the step asks torch.autograd.grad"):
        fit(tmp_path, module, pre())
    with pytest.raises(ConfigError, match="targets='fc2': the step asks torch.autograd.grad for its gradient.*leave it out"):
        fit(tmp_path, GradNorm(), lora())
    fit(tmp_path, GradNorm(), phases := lora(targets="fc1"))
    assert phases.phase == "lowrank"


def test_a_penalty_on_the_gradient_of_an_input_is_none_of_a_weight(tmp_path):
    class Penalty(Net):
        def training_step(self, batch, batch_idx):
            x = batch[0].clone().requires_grad_()
            return super().training_step(batch, batch_idx) + torch.autograd.grad(self(x).sum(), x, create_graph=True)[0].norm()

    fit(tmp_path, Penalty(), phases := pre())
    assert set(phases.plan) == {"fc1", "fc2"}


# -- validation ---------------------------------------------------------------------------------------------------------


class Validated(Net):
    """Validation calls F.linear with the weight of ``fc2``."""

    def validation_step(self, batch, batch_idx):
        self.val = self.head(batch[0] + F.linear(F.relu(self.fc1(batch[0])), self.fc2.weight, self.fc2.bias)).sum()


class Caching(nn.Linear):
    """Keeps, in eval mode, what it multiplies with."""

    def train(self, mode=True):
        super().train(mode)
        self.__dict__["kept"] = None if mode else self.weight.detach().clone()
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.training else self.kept, self.bias)


class Cached(Net):
    def __init__(self):
        super().__init__()
        self.fc2 = Caching(32, 16)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Called(Cached):
    """Validation does nothing that an adapter could not follow."""

    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(32, 16)

    def validation_step(self, batch, batch_idx):
        size = self.fc2.weight.norm() + (self.fc2.weight @ self.fc2.weight.t()).trace() + self.fc1.weight.abs().mean()
        super().validation_step(batch, batch_idx)
        assert size > 0 and "validation_step" not in vars(self)
        pickle.dumps(self.fc2)


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize(
    ("cls", "why"), [(Validated, "fc2 its weight is also used outside of its layer"), (Cached, "fc2 has a forward of its own")]
)
def test_what_only_validation_shows_is_left_out_before_the_switch(tmp_path, cls, why, sanity):
    for callback in (pre(latest=3), *([lora()] if sanity else ())):
        module = cls()
        module.val_dataloader = data
        with pytest.warns(UserWarning, match=why) as caught:
            fit(tmp_path, module, callback, max_epochs=3, num_sanity_val_steps=sanity, limit_val_batches=2)
        assert set(callback.plan) == {"fc1"} and len(said(caught)) == 1 and hooks(module) == 0
        assert "validation_step" not in vars(module)


@pytest.mark.parametrize("cls", [Validated, Cached])
@pytest.mark.parametrize("callback", [pre, lora], ids=["prelora", "lora"])
def test_a_first_validation_after_the_switch_warns(tmp_path, cls, callback):
    module = cls()
    module.val_dataloader = data
    with pytest.warns(UserWarning, match="validation does not see the adapters of fc2: fc2 ") as caught:
        fit(tmp_path, module, phases := callback(), num_sanity_val_steps=0, limit_val_batches=2)
    assert set(phases.plan) == {"fc1", "fc2"} and len(said(caught)) == 1 and "validation_step" not in vars(module)


def test_what_validation_may_do(tmp_path):
    for sanity in (2, 0):
        module = Called()
        module.val_dataloader = data
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(tmp_path, module, phases := pre(), num_sanity_val_steps=sanity, limit_val_batches=2)
        assert set(phases.plan) == {"fc1", "fc2"} and phases.phase == "lowrank" and not said(caught)


def test_no_layer_counts_as_called_because_validation_called_it():
    module = Two()
    watching = Rehearsal(module, find_targets(module))
    with watching.validation(), torch.no_grad():
        module(torch.randn(2, 8))
    assert not watching.called and not watching.other and hooks(module) == 0


# -- later steps --------------------------------------------------------------------------------------------------------


class LateUse(Net):
    """From step 2 on, a loss uses the weight of ``fc2`` itself."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        h = F.relu(self.fc1(batch[0]))
        return loss if self.global_step < 2 else loss + F.linear(h, self.fc2.weight).square().mean()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("unit", ["step", "epoch"])
def test_a_use_that_begins_after_the_first_step_is_seen_before_the_switch(tmp_path, accumulate, unit):
    module, windows = LateUse(), {"window_unit": "epoch", "window": 1} if unit == "epoch" else {}
    with pytest.warns(UserWarning, match="fc2 its weight is also used outside of its layer") as caught:
        fit(tmp_path, module, phases := pre(**windows), max_epochs=3 * accumulate, accumulate_grad_batches=accumulate)
    assert set(phases.plan) == {"fc1"} and hooks(module) == 0
    assert sum("fc2" in line for line in said(caught)) == 1


@pytest.mark.parametrize("when", ["every third step", "at an epoch's end"])
def test_a_weight_that_is_written_into_now_and_then_trains_in_full(tmp_path, when):
    class Kept(Net):
        def on_train_batch_end(self, *_):
            if when == "every third step" and self.global_step % 3 == 0:
                self.keep()

        def on_train_epoch_end(self):
            if when == "at an epoch's end":
                self.keep()

        @torch.no_grad()
        def keep(self):
            self.fc1.weight.data.div_(self.fc1.weight.norm(dim=1, keepdim=True))

    module = Kept()
    with pytest.warns(UserWarning, match="fc1 is written into between optimizer steps") as caught:
        fit(tmp_path, module, phases := pre(window=3), max_epochs=4)
    assert set(phases.plan) == {"fc2"} and len(said(caught)) == 1


def test_weights_that_are_loaded_once_are_no_reason(tmp_path):
    class Loads(Net):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.load_state_dict({name: t * 0.9 for name, t in self.state_dict().items()})

    fit(tmp_path, Loads(), phases := pre(latest=3), max_epochs=3)
    assert set(phases.plan) == {"fc1", "fc2"} and phases.phase == "lowrank"
