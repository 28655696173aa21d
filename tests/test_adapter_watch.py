"""Optimizers that keep books of their own: they train the adapters, or the run ends with their name."""

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD, AdamW, Optimizer

from lowrank_pretrain import LoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.phases.adapter_watch import PATIENCE, check_optimizers
from tests.test_after_fit import steps
from tests.toy import adapters, loader, toy, trainer


class Wrapper(Optimizer):
    """Lookahead's and SAM's way: an inner optimizer whose groups are also its own."""

    def __init__(self, params, shared=True, **kwargs):
        self.inner = AdamW(params, lr=1e-2)
        super().__init__(self.inner.param_groups if shared else [dict(g) for g in self.inner.param_groups], {"lr": 1e-2})
        if shared:
            self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


class Slow(Wrapper):
    """Slow weights by position."""

    def __init__(self, params):
        super().__init__(params)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Flat(SGD):
    """One flat copy of all parameters."""

    def __init__(self, params):
        super().__init__(params, lr=1e-2)
        self.master = torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]])


class OwnList(SGD):
    """Steps the parameters that it was made with."""

    def __init__(self, params):
        super().__init__(params, lr=1e-2)
        self.mine = list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        for p in self.mine:
            if p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"])
        return loss


class Gathering(SGD):
    """Takes a step at every fifth call only."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 5 == 0:
            return super().step(closure)
        with torch.enable_grad():
            return closure()


class ZeroRedundancyOptimizer(AdamW):
    pass


def run(tmp_path, make, callback=None, **kwargs):
    module = toy()
    module.configure_optimizers = lambda: make(module)
    fit = trainer(tmp_path, callback or steps(), **{"max_epochs": 2, **kwargs})
    fit.fit(module, loader())
    return module


@pytest.mark.parametrize("make", [
    lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1), lambda m: ZeroRedundancyOptimizer(m.parameters()),
    lambda m: Wrapper(m.parameters(), shared=False), lambda m: Slow(m.parameters()), lambda m: Flat(m.parameters()),
])  # fmt: skip
@pytest.mark.parametrize("callback", [steps, lambda: LoRA(2)])
def test_what_surely_cannot_follow_is_refused_before_the_first_step(tmp_path, make, callback):
    optimizer = make(toy())
    with pytest.raises(ConfigError, match=f"^optimizer='{type(optimizer).__name__}': ") as error:
        run(tmp_path, make, callback())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("callback", [steps, lambda: LoRA(2)])
def test_an_optimizer_that_steps_a_list_of_its_own_ends_the_run_with_its_name(tmp_path, callback):
    with pytest.raises(ConfigError, match="^optimizer='OwnList': does not train the adapters of .* and 10 more: .*books"):
        run(tmp_path, lambda m: OwnList(m.parameters()), callback())


class Warm(SGD):
    """A learning rate of 0 at first."""

    def step(self, closure=None):
        loss = super().step(closure)
        self.calls = getattr(self, "calls", 0) + 1
        self.param_groups[0]["lr"] = 1e-2 if self.calls > 9 else 0.0
        return loss


@pytest.mark.parametrize("make", [
    lambda m: Wrapper(m.parameters()), lambda m: Gathering(m.parameters(), lr=1e-2), lambda m: Warm(m.parameters(), lr=0.0),
    lambda m: AdamW(m.parameters(), lr=1e-9), lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    lambda m: torch.optim.Rprop(m.parameters()), lambda m: SGD(m.parameters(), lr=torch.tensor(1e-2)),
])  # fmt: skip
def test_no_false_alarm(tmp_path, make):
    module = run(tmp_path, make, max_epochs=4)
    assert all(factor.any() for factor in adapters(module).values())


def test_no_false_alarm_where_a_scaler_skips_steps(tmp_path):
    class Scaler(torch.amp.GradScaler):
        calls = 0

        def step(self, optimizer, *args, **kwargs):
            self.calls += 1
            return None if 2 <= self.calls <= 10 else optimizer.step(*args, **kwargs)

    plugin = MixedPrecision("16-mixed", "cpu", Scaler("cpu", init_scale=1.0, enabled=True))
    run(tmp_path, lambda m: AdamW(m.parameters(), lr=1e-2), plugins=[plugin], max_epochs=3)


def test_what_never_has_a_gradient_is_watched_for_some_steps_only():
    from lowrank_pretrain.lora import model as lora
    from lowrank_pretrain.phases.adapter_watch import AdapterWatch

    module = toy()
    lora.inject(module, {"embed": 2})
    watch, optimizer = AdapterWatch(module), SGD(module.parameters(), lr=0.1)
    for _ in range(PATIENCE):
        watch.before_step(optimizer)
        assert not watch.over
    watch.before_step(optimizer)
    assert watch.over


def test_lookalikes_are_no_books():
    p = [torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = AdamW(p)
    optimizer.norms, optimizer.last, optimizer.noted = torch.zeros(2), [torch.zeros(())], [p[0], p[1]]
    check_optimizers([optimizer])
    check_optimizers([SGD(p[:1], lr=1.0)])


# -- flags that are turned on again --------------------------------------------------------------------------------------


class Unfreezing(Callback):
    """``freeze()`` and ``unfreeze()`` around a validation, as many scripts have it; here at an epoch's end."""

    def __init__(self):
        self.gradients = {}

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.freeze()
        pl_module.unfreeze()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients[trainer.global_step] = {name for name, p in pl_module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("callback", [
    steps, lambda: steps(freeze_rest=True), lambda: steps(train_A=False), lambda: LoRA(2, freeze_rest=True),
    lambda: steps(then="factorize", ranks=(0.25,), freeze_rest=True, warmup=8),
])  # fmt: skip
def test_what_was_frozen_stays_frozen_after_unfreeze(tmp_path, callback):
    found = []
    for around in (Unfreezing(), None):
        module, after = toy(), Unfreezing()
        after.on_train_epoch_end = lambda *_: None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, callback(), *([around] if around else []), after, max_epochs=4).fit(module, loader())
        told = [str(w.message) for w in caught if "requires_grad=True again" in str(w.message)]
        assert len(told) == (around is not None), told
        found.append((after.gradients, module.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1].values(), found[1][1].values(), strict=True))


@pytest.mark.parametrize("when", [lambda epoch: epoch > 1, lambda epoch: epoch != 1])
@pytest.mark.parametrize("window", [1, 3])  # at the first freeze the head trains, at the second its user has frozen it
def test_what_its_user_froze_its_user_may_unfreeze(tmp_path, when, window):
    class Later(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            pl_module.head.requires_grad_(when(trainer.current_epoch))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.trained = pl_module.head.weight.grad is not None

    module, later = toy(), Later()
    module.head.requires_grad_(when(0))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*again")
        trainer(tmp_path, steps(targets=["!head", "blocks.*"], window=window), later, max_epochs=3).fit(module, loader())
    assert later.trained


def test_unfreezing_whole_numbers_is_explained(tmp_path):
    with pytest.warns(UserWarning, match="frozen_dtype=int8 stores W in a type that cannot train"), pytest.raises(RuntimeError):
        trainer(tmp_path, steps(frozen_dtype="int8"), Unfreezing(), max_epochs=4).fit(toy(), loader())


# -- groups that have names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["name", "tag"])
def test_named_groups_with_a_rate_of_their_own_for_adapters_resume_under_a_monitor(tmp_path, key):
    def make(module):
        body, rest = list(module.blocks.parameters()), [*module.embed.parameters(), *module.head.parameters()]
        return AdamW([{"params": body, key: "body"}, {"params": rest, key: "rest"}], lr=1e-2)

    states = []
    for ckpt in (None, tmp_path / "step=5.ckpt"):
        module = toy()
        module.configure_optimizers = lambda module=module: make(module)
        monitor, logger = LearningRateMonitor(), CSVLogger(tmp_path, name=str(ckpt is None), version="")
        fit = trainer(tmp_path, steps(adapter_lr=2.0), monitor, logger=logger, max_epochs=2, every=5, log_every_n_steps=1)
        fit.fit(module, loader(), ckpt_path=ckpt)
        names = [group[key] for group in fit.optimizers[0].param_groups]
        assert names == ["body", "rest", "body/adapters", "rest/adapters"]
        assert [group["lr"] for group in fit.optimizers[0].param_groups] == [1e-2, 1e-2, 2e-2, 2e-2]
        states.append(copy.deepcopy(module.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
