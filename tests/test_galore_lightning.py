"""GaLoreAdamW in Lightning, through nothing but configure_optimizers; accumulation and layer-wise updates."""

import copy
import functools
import gc

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups

SETTINGS = {"rank": 4, "update_proj_gap": 3, "scale": 0.5}


class Regression(pl.LightningModule):
    def __init__(self, optimizers=1, **settings):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
        self.settings, self.count, self.losses, self.held = {**SETTINGS, **settings}, optimizers, [], []
        self.automatic_optimization = optimizers == 1

    def training_step(self, batch):
        loss = (self.model(batch[0]).float() - batch[1]).square().mean()
        self.losses.append(loss.item())
        self.held.append(sum(type(p.grad) is torch.Tensor for p in self.parameters()))
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        if self.count == 2:
            halves = self.model[:2], self.model[2:]
            return [GaLoreAdamW(galore_param_groups(half, **self.settings), lr=1e-2) for half in halves]
        optimizer = GaLoreAdamW(galore_param_groups(self, **self.settings), lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batch_size=4, rows=48):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 8, generator=generator)
    return DataLoader(TensorDataset(x, x.flip(1).sin()), batch_size)


def fit(module, batch_size=4, path=None, callbacks=(), **trainer):
    # fmt: off
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=trainer.pop("logger", False), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=list(callbacks), **{"max_epochs": 2, **trainer},
    )
    # fmt: on
    trainer.fit(module, loader(batch_size), ckpt_path=path, weights_only=True if path else None)
    return trainer


def distance(a, b):
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    return (sum((p - q).square().sum() for p, q in pairs) / sum(q.square().sum() for _, q in pairs)).sqrt().item()


MODES = [{}, {"stagger": False}, {"refresh": "track"}, {"residual": "fira"}, {"variant": "apollo", "scale": 1.0},
         {"residual": "muon"}, {"refresh": "svd", "rotate_moments": False}]  # fmt: skip


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_four_micro_batches_equal_one_batch(mode, layerwise):
    small, large = Regression(layerwise=layerwise, **mode), Regression(**mode)
    fit(small, 4, accumulate_grad_batches=4)
    fit(large, 16)
    assert distance(small, large) < (1e-3 if mode.get("residual") == "muon" else 2e-5)  # its products are in bfloat16
    assert distance(large, Regression()) > 0.02


@pytest.mark.parametrize("mode", [*MODES, {"moments": "8bit"}], ids=str)
def test_layerwise_equals_normal_step_for_step(mode):
    if "moments" in mode:
        pytest.importorskip("bitsandbytes")
    one, other = Regression(layerwise=True, **mode), Regression(**mode)
    fit(one)
    fit(other)
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-5, atol=0)
    assert distance(one, other) < 1e-5


def test_layerwise_frees_gradients():
    module = Regression(layerwise=True, update_proj_gap=100)
    fit(module, accumulate_grad_batches=4)
    biases = 3  # plain parameters accumulate as usual; matrices leave only their r×k sum
    assert module.held[:4] == [0, 6, 6, 6]  # the first window starts from no basis: it needs whole gradients
    assert module.held[4:8] == [0, biases, biases, biases]


def test_layerwise_applies_what_was_left_outside_the_step():
    modules = [Regression(layerwise=True), Regression()]
    for module in modules:
        optimizer = module.configure_optimizers()["optimizer"]
        for x, y in loader():
            (module.model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        module.kept = optimizer
    assert distance(*modules) < 1e-5
    x, y = next(iter(loader()))
    (modules[0].model(x) - y).square().mean().backward()
    modules[0].kept.zero_grad()  # drops the accumulated R too
    before = [p.detach().clone() for p in modules[0].parameters()]
    modules[0].kept.step()
    assert all(torch.equal(a, b) for a, b in zip(before, modules[0].parameters(), strict=True))


def test_a_second_optimizer_takes_the_hooks_over():
    module = Regression(layerwise=True)
    first, second = (module.configure_optimizers()["optimizer"] for _ in range(2))
    x, y = next(iter(loader()))
    second.step(lambda: (module.model(x) - y).square().mean().backward())
    assert not first.state and len(second.state) == 6
    del first
    gc.collect()


@pytest.mark.parametrize(
    "trainer", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}]
)
def test_clipping_acts_and_layerwise_refuses_it(trainer):
    clipped, free = Regression(), Regression()
    fit(clipped, **trainer)
    fit(free)
    assert distance(clipped, free) > 1e-4
    with pytest.raises(ConfigError, match="gradient_clip_val.*layerwise=false"):
        fit(Regression(layerwise=True), **trainer)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_precisions(precision, layerwise):
    module, exact = Regression(layerwise=layerwise), Regression()
    fit(module, precision=precision)
    fit(exact)
    assert distance(module.float(), exact) < 0.05
    assert module.losses[-1] < 0.9 * module.losses[0]


def test_layerwise_names_a_gradient_that_is_not_finite():
    module = Regression(layerwise=True)
    optimizer = module.configure_optimizers()["optimizer"]
    x, y = next(iter(loader()))

    def closure():
        (module.model(x) - y).square().mean().backward()

    optimizer.step(closure)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = copy.deepcopy(optimizer.state[module.model[2].weight])
    handle = module.model[2].weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(FloatingPointError, match="model.2.weight is not finite; its layer did not take this step"):
        optimizer.step(closure)
    assert torch.equal(module.model[2].weight, before["model.2.weight"])
    for key, value in optimizer.state[module.model[2].weight].items():
        assert torch.equal(value, state[key]), key
    handle.remove()
    optimizer.zero_grad()
    optimizer.step(closure)  # and it goes on
    assert optimizer.state[module.model[2].weight]["step"] == 2


def test_a_layerwise_copy_steps_its_own_parameters():
    module = Regression(layerwise=True)
    module.kept = module.configure_optimizers()["optimizer"]
    x, y = next(iter(loader()))
    module.kept.step(lambda: (module.model(x) - y).square().mean().backward())
    twin = copy.deepcopy(module)
    for each in (module, twin):
        for _ in range(3):
            each.kept.step(lambda each=each: (each.model(x) - y).square().mean().backward())
        assert all(p.grad is None for p in each.parameters())
    assert distance(module, twin) == 0
    assert {id(p) for p in twin.kept.state} == {id(p) for p in twin.parameters()}


@pytest.mark.parametrize("bad_step", [None, 3])
def test_16_mixed_respects_the_scalers_skipped_step(bad_step):
    """Lightning makes 16-mixed of a CPU into bf16-mixed; its plugin, given by hand, scales there too."""

    class Spoil(pl.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.fit_loop.total_batch_idx == bad_step:
                module.model[2].weight.grad[0, 0] = float("inf")

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    module, exact = Regression(), Regression()
    trainer = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], callbacks=[Spoil()])
    fit(exact)
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {24 if bad_step is None else 23} and scaler.get_scale() == (256 if bad_step is None else 128)
    assert all(state["exp_avg"].isfinite().all() for state in trainer.optimizers[0].state.values())
    assert distance(module, exact) < 0.05
    with pytest.raises(ConfigError, match="bf16-mixed"):
        fit(Regression(layerwise=True), plugins=[MixedPrecision("16-mixed", "cpu")])


def test_layerwise_refuses_a_loss_scale():
    module = Regression(layerwise=True)
    optimizer, scaler = module.configure_optimizers()["optimizer"], torch.amp.GradScaler("cpu")
    x, y = next(iter(loader()))
    scaler.scale((module.model(x) - y).square().mean()).backward()
    with pytest.raises(ConfigError, match="bf16-mixed"):
        scaler.step(optimizer)


@pytest.mark.parametrize("mode", [{}, {"refresh": "track"}, {"residual": "fira"}, {"residual": "muon"}, {"layerwise": True}],
                         ids=str)  # fmt: skip
def test_resume_through_the_trainer_is_bit_exact(mode, tmp_path):
    whole = Regression(**mode)
    trainer = fit(whole, max_epochs=3)
    half = Regression(**mode)
    trainer = fit(half, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = Regression(**mode)
    fit(rest, path=tmp_path / "half.ckpt", max_epochs=3)
    assert whole.losses[12:] == rest.losses
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters(), strict=True))


def test_learning_rate_monitor_and_schedule(tmp_path):
    module, monitor = Regression(), LearningRateMonitor("step")
    trainer = fit(module, callbacks=[monitor], logger=pl.loggers.CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=1)
    assert list(monitor.lrs) == ["lr-GaLoreAdamW/pg1", "lr-GaLoreAdamW/pg2"]
    scheduled = torch.optim.SGD([torch.zeros(1)], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(scheduled, 40)
    for _ in range(trainer.global_step):
        scheduled.step()
        schedule.step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(schedule.get_last_lr()[0])


def test_several_optimizers():
    module = Regression(optimizers=2, targets="all")
    fit(module)
    assert module.losses[-1] < 0.9 * module.losses[0]


# ---- layer-wise updates outside Lightning's automatic path ------------------------------------------------------------


def pair_of_loops(**settings):
    for layerwise in (True, False):
        module = Regression(layerwise=layerwise, **settings)
        yield module, module.configure_optimizers()["optimizer"]


@pytest.mark.parametrize("clip", [0.05, 1e6])
@pytest.mark.parametrize("mode", [{}, {"refresh": "track"}, {"residual": "fira"}, {"residual": "muon"}], ids=str)
def test_clipping_by_norm_sees_gradients_that_were_freed(mode, clip):
    modules, norms = [], []
    for module, optimizer in pair_of_loops(**mode):
        seen = []
        for x, y in loader():
            module.zero_grad()
            (module.model(x) - y).square().mean().backward()
            seen.append(nn.utils.clip_grad_norm_(module.parameters(), clip).item())  # as HF's Trainer, Fabric, Accelerate do
            optimizer.step()
        modules.append(module)
        norms.append(seen)
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    assert distance(*modules) < 1e-5


def test_what_clipping_cannot_do_to_freed_gradients_is_refused():
    x, y = next(iter(loader()))
    for clip in (
        lambda module: nn.utils.clip_grad_value_(module.parameters(), 0.1),
        lambda module: nn.utils.clip_grad_norm_(module.parameters(), 0.1, norm_type=1.0),
        lambda module: nn.utils.clip_grad_norm_(module.parameters(), 0.1, norm_type=float("inf")),
        lambda module: [p.grad.add_(1e-3 * torch.randn(p.shape)).clamp_(-1, 1) for p in module.parameters()],
    ):
        module, optimizer = next(iter(pair_of_loops(update_proj_gap=100)))
        for step in range(2):
            (module.model(x) - y).square().mean().backward()
            if step:
                with pytest.raises(ConfigError, match="layerwise=True.*weight.*layerwise=False"):
                    clip(module)
            optimizer.step()
            optimizer.zero_grad()


def test_the_norm_of_several_micro_batches_is_not_known():
    module, optimizer = next(iter(pair_of_loops(update_proj_gap=100)))
    x, y = next(iter(loader()))
    for step in range(2):
        for _ in range(2):
            (module.model(x) - y).square().mean().backward()
        if step:
            with pytest.raises(ConfigError, match="gradient accumulation"):
                nn.utils.clip_grad_norm_(module.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def test_clipping_inside_a_closure_is_refused():
    module, optimizer = next(iter(pair_of_loops()))
    x, y = next(iter(loader()))

    def closure():
        (module.model(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 0.1)

    optimizer.step(closure)  # the first closure's gradients are kept to its end
    with pytest.raises(ConfigError, match="inside the closure"):
        optimizer.step(closure)


@pytest.mark.parametrize("mode", [{}, {"refresh": "track"}, {"residual": "fira"}, {"stagger": False}], ids=str)
def test_a_closure_with_several_backward_passes_is_one_step(mode):
    modules = []
    for module, optimizer in pair_of_loops(**mode):
        batches = list(loader())
        for first, second in zip(batches[::2], batches[1::2], strict=True):

            def closure(module=module, pair=(first, second)):
                module.zero_grad()
                for x, y in pair:
                    (module.model(x) - y).square().mean().backward()

            optimizer.step(closure)
        modules.append(module)
        assert {int(state["step"]) for state in optimizer.state.values()} == {6}
    assert distance(*modules) < 1e-5
    module, optimizer = next(iter(pair_of_loops()))
    x, y = batches[0]
    for _ in range(2):
        optimizer.step(lambda: (module.model(x) - y).square().mean().backward())
    with pytest.raises(ConfigError, match="same number of backward passes"):
        optimizer.step(lambda: [(module.model(x) - y).square().mean().backward() for _ in range(2)])


@pytest.mark.parametrize("forget", ["optimizer", "module", "zeros"])
def test_a_batch_that_is_left_out_is_forgotten(forget):
    modules = []
    for module, optimizer in pair_of_loops(update_proj_gap=100):
        for number, (x, y) in enumerate(loader()):
            loss = (module.model(x) - y).square().mean()
            (loss * (1e3 if number == 4 else 1)).backward()
            if number != 4:  # a loss that is too large, say
                optimizer.step()
            if forget == "zeros":
                module.zero_grad(set_to_none=False)
            else:
                (optimizer if forget == "optimizer" else module).zero_grad()
        modules.append(module)
    assert distance(*modules) < 1e-5


def test_a_closure_that_is_a_partial_of_a_module_without_a_trainer():
    module, optimizer = next(iter(pair_of_loops()))
    x, y = next(iter(loader()))
    optimizer.step(functools.partial(lambda m: (m.model(x) - y).square().mean().backward(), module))
    assert len(optimizer.state) == 6


def test_layerwise_switched_off_in_the_middle():
    module, optimizer = next(iter(pair_of_loops()))
    x, y = next(iter(loader()))
    for on in (True, True, False, True):
        for group in optimizer.param_groups:
            group["layerwise"] = on
        optimizer.step(lambda: (module.model(x) - y).square().mean().backward())
        assert all((p.grad is None) == on for p in module.parameters())
        optimizer.zero_grad()
    assert {int(state["step"]) for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("nested", [False, True])
def test_another_rate_wins_over_the_file_for_the_rest_of_the_schedule(nested, tmp_path):
    class Rated(Regression):
        def __init__(self, lr):
            super().__init__()
            self.lr, self.rates = lr, []

        def on_before_optimizer_step(self, optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = GaLoreAdamW(galore_param_groups(self, **self.settings), lr=self.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
            if nested:
                warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=3)
                schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, schedule], [3])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    whole, half, rest = Rated(1e-2), Rated(1e-2), Rated(4e-2)
    fit(whole, max_epochs=3)
    fit(half, max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    fit(rest, path=tmp_path / "half.ckpt", max_epochs=2, callbacks=[LoopState()]).save_checkpoint(tmp_path / "rest.ckpt")
    last = Rated(4e-2)
    fit(last, path=tmp_path / "rest.ckpt", max_epochs=3, callbacks=[LoopState()])  # and it is not asked a second time
    assert rest.rates + last.rates == pytest.approx([4 * rate for rate in whole.rates[12:]], rel=1e-6)


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 6}, {"proj_type": "reverse_std"}], ids=str)
def test_a_change_of_rank_is_seen_while_the_backward_runs(change):
    modules = [Regression(layerwise=True, update_proj_gap=100), Regression(update_proj_gap=100)]
    for module in modules:
        optimizer = module.configure_optimizers()["optimizer"]
        for t, (x, y) in enumerate(loader()):
            if t == 2:
                optimizer.param_groups[0].update(change)
            loss = (module.model(x) - y).square().mean()
            for p in module.parameters():
                slot = optimizer.projected(p)  # as galore_ddp_hook asks for it
                assert t != 2 or slot is None or slot.needs_gradient
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert distance(*modules) < 1e-5


def test_layerwise_switched_off_between_backward_and_step_loses_nothing():
    modules = [Regression(layerwise=True, update_proj_gap=100), Regression(update_proj_gap=100)]
    for module in modules:
        optimizer = module.configure_optimizers()["optimizer"]
        for t, (x, y) in enumerate(loader()):
            for part in range(2):
                (module.model(x[part::2]) - y[part::2]).square().mean().backward()
                if t == 2 and part == 0:
                    for group in optimizer.param_groups:
                        group["layerwise"] = False
            optimizer.step()
            assert all(p.grad is None or type(p.grad) is torch.Tensor for p in module.parameters())
            optimizer.zero_grad(set_to_none=False)
    assert distance(*modules) < 1e-5


def test_a_state_loaded_between_backward_and_step_keeps_what_layerwise_has_accumulated():
    modules = [Regression(layerwise=True, update_proj_gap=100), Regression(update_proj_gap=100)]
    for module in modules:
        optimizer = module.configure_optimizers()["optimizer"]
        for t, (x, y) in enumerate(loader()):
            (module.model(x) - y).square().mean().backward()
            if t == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
            optimizer.zero_grad()
    assert distance(*modules) < 1e-5


@pytest.mark.parametrize("make", ["plain", "rank", "named"])
def test_a_finetuning_callback_resumes(make, tmp_path):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.model[0])

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.model[0], optimizer, lr=1e-3)

    class Tuned(Regression):
        def configure_optimizers(self):
            if make == "named":
                return GaLoreAdamW(galore_param_groups(self, **self.settings), lr=1e-2)
            params = [p for p in self.parameters() if p.requires_grad]
            rank = {"rank": 4} if make == "rank" else {}
            matrices = {"params": [p for p in params if p.ndim > 1], **rank}
            return GaLoreAdamW([matrices, {"params": [p for p in params if p.ndim == 1]}], lr=1e-2)

    fit(Tuned(), max_epochs=2, callbacks=[Unfreeze()]).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(Tuned(), path=tmp_path / "half.ckpt", max_epochs=3, callbacks=[Unfreeze()])
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 1e-2, 1e-3]
