"""ReLoRA's rhythm around LTE's merges: the jagged learning rate, and the pruning of the adapters' moments."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.lte import LTEStrategy
from lowrank_pretrain.lte.heads.prune import prune_moments, reset_moments
from lowrank_pretrain.lte.restarts import JaggedRestarts, jagged_factor
from tests.test_resume import assert_equal
from tests.test_transition import lr_trace
from tests.toy import loader, toy, trainer

SCHEDULERS = [None, "lambda", "cosine", "onecycle", "sequential", "step"]


def slow_factors(steps: int, every: int, warmup: int, start: int) -> list[float]:
    """As one would count by hand: a counter that a restart sets to zero."""
    factors, since = [], None
    for step in range(steps):
        if step > start and (step - start) % every == 0:
            since = 0
        factors.append(1.0 if since is None or since >= warmup else (since + 1) / (warmup + 1))
        since = None if since is None else since + 1
    return factors


@pytest.mark.parametrize(("every", "warmup", "start"), [(10, 4, 0), (7, 6, 3), (5, 0, 0), (1, 0, 0), (12, 3, 20)])
def test_factor_equals_counting_by_hand(every, warmup, start):
    assert [jagged_factor(t, every, warmup, start) for t in range(60)] == slow_factors(60, every, warmup, start)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rate_falls_behind_each_merge_and_no_schedule_notices(tmp_path, scheduler):
    plain, _, _ = lr_trace(tmp_path, None, lr_groups=2, scheduler=scheduler)
    jagged, _, fit = lr_trace(tmp_path, JaggedRestarts(8, warmup=3), lr_groups=2, scheduler=scheduler)
    factors = slow_factors(30, 8, 3, 0)
    assert min(factors) == 0.25 and len(plain) == 30
    for t, (a, b) in enumerate(zip(plain, jagged, strict=True)):
        assert b == pytest.approx([rate * factors[t] for rate in a], rel=1e-12), t
    hooks = fit.optimizers[0]._optimizer_step_pre_hooks
    assert not hooks, "the callback leaves nothing behind"


def test_accumulated_batches_count_as_one_step(tmp_path):
    seen = []

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))

    fit = trainer(tmp_path, JaggedRestarts(4, warmup=2), Spy(), accumulate_grad_batches=2)
    fit.fit(toy(), loader())
    assert seen == pytest.approx([0.01 * f for f in slow_factors(18, 4, 2, 0)])


@pytest.mark.parametrize("at", [7, 8, 9])
def test_resume_equals_no_interruption(tmp_path, at):
    def run(path, ckpt=None):
        module = toy(scheduler="cosine")
        fit = trainer(path, JaggedRestarts(4, warmup=3), every=1, max_epochs=3)
        fit.fit(module, loader(), ckpt_path=ckpt)
        states = [config.scheduler.state_dict() for config in fit.lr_scheduler_configs]
        return {"model": dict(module.state_dict()), "optimizer": fit.optimizers[0].state_dict(), "schedule": states}

    whole = run(tmp_path / "a")
    assert_equal(whole, run(tmp_path / "b", ckpt=tmp_path / "a" / f"step={at}.ckpt"))
    saved = torch.load(tmp_path / "a" / f"step={at}.ckpt", weights_only=True)
    assert saved["callbacks"]["JaggedRestarts"] == {"every": 4, "warmup": 3, "start": 0}


def test_a_checkpoint_of_another_rhythm_is_refused(tmp_path):
    trainer(tmp_path, JaggedRestarts(4, warmup=3), every=1, max_epochs=1).fit(toy(), loader())
    fit = trainer(tmp_path, JaggedRestarts(5, warmup=3), max_epochs=2)
    with pytest.raises(ConfigError, match="every=5: the checkpoint was trained with 4"):
        fit.fit(toy(), loader(), ckpt_path=tmp_path / "step=6.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0: must be an integer of 1 or more"),
        ({"every": 2.5}, "every=2.5: must be an integer"),
        ({"every": 10, "warmup": 10}, "warmup=10: must be fewer than the 10 optimizer steps"),
        ({"warmup": -1}, "warmup=-1"),
        ({"start": True}, "start=True"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message):
        JaggedRestarts(**arguments)


def test_it_follows_the_strategys_merges_and_refuses_another_rhythm(tmp_path):
    def fit(callback, merge_every=None):
        made = trainer(tmp_path, callback, max_epochs=1)
        if merge_every:
            made.strategy.__class__ = type("Merging", (SingleDeviceStrategy, Merges), {"merge_every": merge_every})
        made.fit(toy(), loader())
        return callback

    assert fit(JaggedRestarts(warmup=1), merge_every=5).state_dict()["every"] == 5
    with pytest.raises(ConfigError, match="every=None: must be a number of optimizer steps: SingleDeviceStrategy"):
        fit(JaggedRestarts(warmup=1))
    with pytest.raises(ConfigError, match="every=4: must be the strategy's merge_every, 5"):
        fit(JaggedRestarts(4, warmup=1), merge_every=5)
    with pytest.raises(ConfigError, match="warmup=5: must be fewer than the 5"):
        fit(JaggedRestarts(warmup=5), merge_every=5)


def relora(path, ckpt=None, epochs=3, prune: float | None = 0.9, warmup: int = 3):
    """(module, its optimizer's state in the last checkpoint, rates used, zero moments of the heads behind each merge)."""
    module, rates, zeros = toy(scheduler="cosine"), [], []

    class Spy(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.optimizers[0].register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step % 5 == 0:
                state = trainer.optimizers[0].state
                heads = [p for name, p in pl_module.named_parameters() if "lora_" in name]
                moments = [state[p]["exp_avg"] for p in heads if p in state]
                zeros.append(sum(int((m == 0).sum()) for m in moments) / max(sum(m.numel() for m in moments), 1))

    strategy = LTEStrategy(rank=2, heads=1, merge_every=5, reset=True, prune=prune)
    fit = trainer(path, JaggedRestarts(warmup=warmup), Spy(), every=1, max_epochs=epochs, strategy=strategy)
    fit.fit(module, loader(), ckpt_path=ckpt)
    return module, torch.load(path / f"step={6 * epochs}.ckpt", weights_only=True)["optimizer_states"], rates, zeros


def test_relora_is_one_head_that_resets_with_pruned_moments_and_a_ramp_behind_each_merge(tmp_path):
    _, _, rates, zeros = relora(tmp_path / "a")
    cosine = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(cosine, 30)
    for t, factor in enumerate(slow_factors(18, 5, 3, 0)):
        assert rates[t] == pytest.approx(schedule.get_last_lr()[0] * factor, rel=1e-9), t
        cosine.step()
        schedule.step()
    assert len(zeros) == 3 and all(0.85 < share < 0.95 for share in zeros)
    _, _, _, zeros = relora(tmp_path / "b", prune=None)
    assert zeros == [0.0] * 3  # no state at all


@pytest.mark.parametrize("at", [4, 5, 7])
def test_relora_resumes_bit_for_bit(tmp_path, at):
    whole, states, _, _ = relora(tmp_path / "a")
    again, states_again, _, _ = relora(tmp_path / "b", ckpt=tmp_path / "a" / f"step={at}.ckpt")
    assert_equal(dict(whole.state_dict()), dict(again.state_dict()))
    assert_equal(states, states_again)


# -- pruning ------------------------------------------------------------------------------------------------------------


def stepped(optimizer_class=torch.optim.AdamW, **kwargs):
    g = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.randn(4, 3, 5, generator=g)), nn.Parameter(torch.randn(6, 7, generator=g))]
    rest = nn.Parameter(torch.randn(3, 3, generator=g))
    optimizer = optimizer_class([{"params": parameters}, {"params": [rest]}], lr=1e-2, **kwargs)
    for _ in range(3):
        for p in (*parameters, rest):
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return optimizer, parameters, rest


def slow_prune(moment: torch.Tensor, fraction: float) -> torch.Tensor:
    """Sort one head's magnitudes and zero the first of them."""
    heads = [moment] if moment.ndim == 2 else list(moment)
    pruned = []
    for head in heads:
        flat = head.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: abs(flat[i]))
        for i in order[: round(fraction * len(flat))]:
            flat[i] = 0.0
        pruned.append(torch.tensor(flat).view(head.shape))
    return pruned[0] if moment.ndim == 2 else torch.stack(pruned)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 1.0])
def test_pruning_zeroes_each_heads_smallest_moments_and_nothing_else(fraction):
    optimizer, parameters, rest = stepped(amsgrad=True)
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    kept = [slow_prune(optimizer.state[p]["exp_avg"], fraction) != 0 for p in parameters]  # momentum decides for all moments
    wanted = [{key: optimizer.state[p][key] * mask for key in keys} for p, mask in zip(parameters, kept, strict=True)]
    untouched = {key: value.clone() for key, value in optimizer.state[rest].items()}
    values = [p.detach().clone() for p in parameters]
    share = prune_moments(optimizer, parameters, fraction)
    assert share == pytest.approx(fraction, abs=0.03)
    for p, want, value in zip(parameters, wanted, values, strict=True):
        for key in keys:
            assert torch.equal(optimizer.state[p][key], want[key]), key
        assert torch.equal(p, value) and int(optimizer.state[p]["step"]) == 3
    assert_equal(optimizer.state[rest], untouched)


def test_heads_prune_alike_together_and_apart():
    optimizer, (together, _), _ = stepped()
    apart = [nn.Parameter(head.detach().clone()[None]) for head in together]
    other = torch.optim.AdamW(apart, lr=1e-2)
    for i, p in enumerate(apart):
        other.state[p] = {k: v[i : i + 1].clone() if v.ndim else v.clone() for k, v in optimizer.state[together].items()}
    prune_moments(optimizer, [together], 0.7)
    prune_moments(other, apart, 0.7)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[together][key], torch.cat([other.state[p][key] for p in apart]))


def test_what_keeps_its_momentum_keeps_its_mean_square():
    """Else the next step would be up to a thousand times too long there, as in the authors' code."""
    optimizer, parameters, _ = stepped()
    prune_moments(optimizer, parameters, 0.9)
    for p in parameters:
        state = optimizer.state[p]
        assert (state["exp_avg"] != 0).any() and ((state["exp_avg"] == 0) | (state["exp_avg_sq"] > 0)).all()
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert max((p - was).abs().max() for p, was in zip(parameters, before, strict=True)) < 5 * 1e-2  # lr


def test_equal_magnitudes_do_not_overshoot_and_strided_moments_are_pruned_in_place():
    p = nn.Parameter(torch.zeros(4, 5))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    moment = torch.ones(5, 4).t()
    optimizer.state[p] = {"momentum_buffer": moment}
    assert prune_moments(optimizer, [p], 0.5) == 0.5
    assert int((moment == 0).sum()) == 10


def test_reset_deletes_the_state_with_its_step():
    optimizer, parameters, rest = stepped()
    assert reset_moments(optimizer, parameters) == 2
    assert list(optimizer.state) == [rest] and reset_moments(optimizer, parameters) == 0
    assert prune_moments(optimizer, parameters, 0.9) == 0.0  # no state yet: nothing to prune


def test_what_cannot_be_pruned_is_said():
    optimizer, parameters, _ = stepped()
    with pytest.raises(ConfigError, match="prune=1.5: must be a share from 0 to 1"):
        prune_moments(optimizer, parameters, 1.5)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) is in no group"):
        prune_moments(optimizer, [nn.Parameter(torch.zeros(2, 2))], 0.5)
    optimizer.state[parameters[1]]["exp_avg"] = torch.zeros(6, 7, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="stored as torch.uint8"):
        prune_moments(optimizer, parameters, 0.5)


def test_ramps_follow_the_merges_of_each_fit(tmp_path):
    """A second fit with one trainer goes on with Lightning's steps, and begins the merges' clock anew."""

    class Look(pl.Callback):
        def __init__(self):
            self.merges, self.rates = [], []

        def on_train_start(self, fit, pl_module):
            fit.optimizers[0].register_step_pre_hook(lambda o, *_: self.rates.append(o.param_groups[0]["lr"]))

        def on_train_batch_end(self, fit, *_):
            self.merges.append(fit.strategy.local.merges)

    look, module = Look(), toy()
    strategy = LTEStrategy(rank=2, heads=2, merge_every=4, reset=True, targets=["*.fc1"])
    fit = trainer(tmp_path, JaggedRestarts(warmup=2), look, strategy=strategy, max_epochs=-1, max_steps=6)
    fit.fit(module, loader())
    fit.fit_loop.epoch_loop.max_steps = 15
    fit.fit(module, loader())
    assert look.merges == [0, 0, 0, 1, 1, 1] + [0, 0, 0, 1, 1, 1, 1, 2, 2]
    factors = slow_factors(6, 4, 2, 0) + slow_factors(9, 4, 2, 0)
    assert look.rates == pytest.approx([0.01 * f for f in factors])
