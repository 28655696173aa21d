"""Habits of users that PreLoRA must live with: own savers, going back, loaders that change, epochs that are cut short."""

import lightning.pytorch as pl
import pytest
import torch

from lowrank_pretrain import PreLoRA
from tests.toy import Toy, loader, toy, trainer


def quick(**settings) -> PreLoRA:
    """Switch after two steps or epochs, freeze one later."""
    return PreLoRA(**{"ranks": (2, 4), "window": 1, "windows": 2, "latest": 2, "warmup": 1, "window_unit": "step", **settings})


class Saver(pl.Callback):
    def __init__(self, where) -> None:
        self.where = where

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.where / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_saver_that_stands_before_it_writes_files_that_resume(tmp_path, step):
    whole = toy()
    trainer(tmp_path, Saver(tmp_path), quick(), max_epochs=1).fit(whole, loader())
    resumed, again = toy(), quick()
    trainer(tmp_path, again, max_epochs=1).fit(resumed, loader(), ckpt_path=tmp_path / f"{step}.ckpt", weights_only=False)
    assert (again.switch_step, again.freeze_step) == (2, 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_lightnings_and_our_own_callbacks_keep_their_order(tmp_path):
    class Own(pl.Callback):
        def on_train_batch_end(self, *_): ...

    own, bar, when = Own(), pl.callbacks.Timer(), quick()
    fit = trainer(tmp_path, bar, own, when, max_steps=3)
    fit.fit(toy(), loader())
    assert fit.callbacks.index(bar) < fit.callbacks.index(when) < fit.callbacks.index(own)


def test_the_same_trainer_goes_back_to_an_earlier_file(tmp_path):
    module, when = toy(), quick(window_unit="epoch")
    fit = trainer(tmp_path, when, every=3, max_epochs=3)
    fit.fit(module, loader())
    fit.fit(module, loader(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=False)
    assert fit.global_step == 18 and when.phase == "lowrank"


def test_loaders_that_grow_have_no_known_length(tmp_path):
    class Growing(Toy):
        def train_dataloader(self):
            return loader(16 if self.trainer.current_epoch == 0 else 48)

    when = quick(window=3, windows=4, latest=4)
    trainer(tmp_path, when, max_epochs=4, reload_dataloaders_every_n_epochs=1).fit(Growing())
    assert when.phase == "lowrank"


def test_an_epoch_that_is_cut_short_counts(tmp_path):
    class Short(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    when = quick(window_unit="epoch")
    trainer(tmp_path, when, max_epochs=5).fit(Short(), loader())
    assert when.phase == "lowrank" and when.switch_step == 7  # the first step of the third epoch


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_whose_targets_have_all_gone_stays_full(tmp_path, resumed):
    class Frozen(Toy):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.blocks.requires_grad_(False)
                self.embed.requires_grad_(False)

    when = quick(window_unit="epoch", latest=3, windows=3, weight_tol=1e-6, loss_tol=1e-6)
    with pytest.warns(UserWarning, match="since the fit began.*None is left: the run stays in phase full"):
        trainer(tmp_path, when, every=20, max_epochs=5).fit(Frozen(), loader())
    assert when.phase == "full" and when.plan is None
    if resumed:
        again = quick(window_unit="epoch", latest=3, windows=3)
        trainer(tmp_path, again, max_epochs=6).fit(Frozen(), loader(), ckpt_path=tmp_path / "step=20.ckpt", weights_only=False)
        assert again.phase == "full"


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer of the same groups, which holds the state."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict)
        self.param_groups = self.inner.param_groups


@pytest.mark.parametrize("then", ["lora", "factorize"])
@pytest.mark.parametrize("reset", ["keep", "reset"])
def test_an_optimizer_that_another_one_wraps_loses_what_freezes_and_resumes(tmp_path, then, reset):
    class Net(Toy):
        def configure_optimizers(self):
            return Wrapping(torch.optim.AdamW(self.parameters(), lr=1e-2))

    settings = {"then": then, "optimizer_state": reset} | ({"ranks": (0.25,), "warmup": 8} if then == "factorize" else {})
    whole, when = Net(), quick(**settings)
    torch.manual_seed(0)
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    trainer(tmp_path, when, every=6, max_epochs=3).fit(whole, loader())
    assert when.phase == "lowrank"
    for step in (6, 12):
        resumed, again = Net(), quick(**settings)
        resumed.load_state_dict(start)
        trainer(tmp_path, again, max_epochs=3).fit(
            resumed, loader(), ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=False
        )
        for name, value in whole.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), (step, name)


class Both(torch.optim.Optimizer):
    """Steps two optimizers, and shows their groups as its own."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = list(inner)
        super().__init__([p for each in inner for group in each.param_groups for p in group["params"]], {})
        self.param_groups = [group for each in inner for group in each.param_groups]

    def step(self, closure=None):
        losses = [each.step(closure if i == 0 else None) for i, each in enumerate(self.inner)]
        return losses[0]

    def state_dict(self):
        return {"state": {}, "param_groups": [], "inner": [each.state_dict() for each in self.inner]}


class Built(torch.optim.SGD):
    """Makes the state of each parameter when it is built."""

    def __init__(self, params, **settings) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["m"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.state[p]["m"].mul_(0.9).add_(p.grad), alpha=group["lr"])
        return loss


@pytest.mark.parametrize("kind", ["container", "wrapped state that is made when built"])
def test_optimizers_inside_another_follow_a_change_of_the_model(tmp_path, kind):
    class Net(Toy):
        def configure_optimizers(self):
            if kind != "container":
                return Wrapping(Built(self.parameters(), lr=1e-2))
            blocks = [p for name, p in self.named_parameters() if name.startswith("blocks")]
            rest = [p for name, p in self.named_parameters() if not name.startswith("blocks")]
            return Both(torch.optim.AdamW(blocks, lr=1e-2), torch.optim.SGD(rest, lr=1e-2, momentum=0.9))

    when = quick()
    trainer(tmp_path, when, every=1, max_epochs=1).fit(Net(), loader())  # a file after every step
    assert when.phase == "lowrank"
