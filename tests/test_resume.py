"""Resume equals no interruption, bit for bit; every checkpoint is a plain model."""

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.checkpoints.format import check_format
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lora import model as lora
from tests.toy import AtEnd, Toy, loader, toy, trainer

VARIANTS = {
    "default": {},
    "freeze_rest": {"freeze_rest": True},
    "partial": {"targets": ["q", "v", "fc1"]},
    "rank 0": {"ranks": (0, 4)},
    "reset": {"optimizer_state": "reset"},
    "rewarm": {"rewarm": 4},
    "fixed A": {"train_A": False, "alpha": 3.0},
    "grad_norm": {"rank_signal": "grad_norm"},
    "own rate": {"adapter_lr": 2.0, "adapter_weight_decay": 0.0, "rewarm": 5},
    "inputs made again": {"recompute_inputs": True},
    "stored in bfloat16": {"frozen_dtype": "bfloat16", "freeze_rest": True, "ranks": (0, 4)},
    "stored in int8": {"frozen_dtype": "int8", "keep_original": True},
    "stored in float8": {"frozen_dtype": "float8", "targets": "blocks.*"},
}


def steps(**kwargs) -> PreLoRA:
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


def assert_equal(a, b, where=""):
    """Nested containers of tensors and numbers, to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def run(path, callback, module, ckpt=None, **kwargs):
    fit = trainer(path, callback, every=1, max_epochs=4, **kwargs)
    fit.fit(module, loader(), ckpt_path=ckpt)
    return {
        "model": dict(module.state_dict()),
        "grad": {n: p.requires_grad for n, p in module.named_parameters()},
        "optimizer": fit.optimizers[0].state_dict(),
        "callback": callback.state_dict(),
        "lr": [config.scheduler.state_dict() for config in fit.lr_scheduler_configs],
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scheduler", [None, "sequential"])
def test_resume_from_every_phase_is_bit_exact(tmp_path, variant, scheduler):
    settings, shape = VARIANTS[variant], {"scheduler": scheduler, "lr_groups": 2}
    module = toy(**shape)
    whole = run(tmp_path / "whole", steps(**settings), module)
    for at, phase in ((5, "full"), (8, "joint"), (11, "joint"), (14, "lowrank"), (19, "lowrank")):  # 8, 14: the transitions
        file = tmp_path / "whole" / f"step={at}.ckpt"
        assert torch.load(file, weights_only=True)["callbacks"]["PreLoRA"]["phase"] == phase
        again = toy(**shape)
        assert_equal(run(tmp_path / "again", steps(**settings), again, ckpt=file), whole, f"from {at}: ")
        assert again.losses == module.losses[at:]


@pytest.mark.parametrize("kwargs", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}])
def test_resume_with_loop_features_is_bit_exact(tmp_path, kwargs):
    callback = {"window": 1, "latest": 3, "warmup": 2}
    whole = run(tmp_path / "whole", steps(**callback), toy(), **kwargs)
    assert whole["callback"]["phase"] == "lowrank"
    for at in (2, 4, 6):
        file = tmp_path / "whole" / f"step={at}.ckpt"
        assert_equal(run(tmp_path / "again", steps(**callback), toy(), ckpt=file, **kwargs), whole, f"from {at}: ")


@pytest.mark.parametrize("at", [4, 9, 14])
def test_the_gradient_scaler_goes_on_where_it_was(tmp_path, at):
    """On the CPU Lightning makes 16-mixed of it only where its plugin is given by hand; the state is the same on a GPU."""

    def half() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5))

    plugins = half(), half()
    whole = run(tmp_path / "whole", steps(), toy(), plugins=[plugins[0]])
    file = tmp_path / "whole" / f"step={at}.ckpt"
    assert torch.load(file, weights_only=True)["MixedPrecision"]["_growth_tracker"] == at % 5
    assert_equal(run(tmp_path / "again", steps(), toy(), ckpt=file, plugins=[plugins[1]]), whole)
    assert plugins[0].scaler.state_dict() == plugins[1].scaler.state_dict()


def test_resume_of_windows_in_epochs_from_an_epochs_last_step(tmp_path):
    """The window ends with the epoch: a file written at that very step must hold the decision."""
    settings = {"window_unit": "epoch", "window": 1, "latest": 2, "warmup": 1}
    whole = run(tmp_path / "whole", steps(**settings), toy())
    assert (whole["callback"]["switch_step"], whole["callback"]["freeze_step"]) == (12, 18)
    for at in (6, 12, 18):
        file = tmp_path / "whole" / f"step={at}.ckpt"
        assert_equal(run(tmp_path / "again", steps(**settings), toy(), ckpt=file), whole, f"from {at}: ")


def test_a_head_that_came_untied_resumes(tmp_path):
    """In the plain model head and embedding are one tensor, and the one loaded last would be both."""

    class Tied(Toy):
        def __init__(self):
            torch.manual_seed(7)
            super().__init__(dim=12)
            self.head = torch.nn.Linear(12, 12, bias=False)
            self.embed = torch.nn.Embedding(12, 12)
            self.embed.weight = self.head.weight
            for block in self.blocks:
                block.drop.p = 0.0

        def forward(self, x):
            x = self.embed(x.argmax(-1))
            for block in self.blocks:
                x = block(x)
            return self.head(x)[:, :3]

    settings = {"targets": ["head", "fc1"], "ranks": (2, 4)}
    whole = run(tmp_path / "whole", steps(**settings), Tied())
    assert not torch.equal(whole["model"]["embed.weight"], whole["model"]["head.weight"])
    for at in (5, 8, 11, 19):
        again = run(tmp_path / "again", steps(**settings), Tied(), ckpt=tmp_path / "whole" / f"step={at}.ckpt")
        assert_equal(again, whole, f"from {at}: ")


def test_lora_resumes(tmp_path):
    whole = run(tmp_path / "whole", LoRA(rank=4), toy())
    again = run(tmp_path / "again", LoRA(rank=4), toy(), ckpt=tmp_path / "whole" / "step=7.ckpt")
    assert_equal(again, whole)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_is_a_plain_model_that_loads_without_this_package(tmp_path, weights_only):
    module, callback = toy(), steps()
    saver = ModelCheckpoint(tmp_path, filename="x", save_weights_only=weights_only, every_n_train_steps=20)
    trainer(tmp_path, callback, saver, max_epochs=4, max_steps=20).fit(module, loader())
    file = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert set(file["state_dict"]) == set(toy().state_dict())
    assert ("lowrank_pretrain" in file) is not weights_only
    x = torch.randn(5, 12)
    expected = module.eval()(x)
    fresh = toy().eval()
    fresh.load_state_dict(file["state_dict"], strict=True)
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-6)
    loaded = Toy.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    # a Trainer without our callback tests with it
    trainer(tmp_path, limit_test_batches=1).test(toy(), loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False)


def test_saving_by_hand_after_fit_is_plain_too(tmp_path):
    module = toy()
    fit = trainer(tmp_path, steps(), max_epochs=4)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "hand.ckpt")
    file = torch.load(tmp_path / "hand.ckpt", weights_only=True)
    assert set(file["state_dict"]) == set(toy().state_dict())
    assert file["lowrank_pretrain"]["phase"] == "lowrank" and file["lowrank_pretrain"]["format"] == 1


@pytest.mark.parametrize("best_step", [6, 20])  # before the switch, and after the freeze
@pytest.mark.parametrize("live", [True, False])
def test_test_with_the_best_file_from_either_side_of_the_switch(tmp_path, best_step, live):
    module, callback = toy(), steps()
    saver = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss", save_top_k=1)

    class Best(ModelCheckpoint):
        """Keeps the file of one given step as the best."""

        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == best_step:
                trainer.save_checkpoint(tmp_path / "best.ckpt")
                self.best_model_path = str(tmp_path / "best.ckpt")

        def on_train_epoch_end(self, *args): ...

        def on_validation_end(self, *args): ...

    saver = Best(tmp_path)
    outputs = {}

    class Spy(pl_callback()):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == best_step:
                pl_module.eval()
                with torch.no_grad():
                    outputs["then"] = torch.nn.functional.cross_entropy(pl_module(X), Y).item()
                pl_module.train()

    data = loader(batch_size=48)
    X, Y = next(iter(data))
    fit = trainer(tmp_path, callback, Spy(), saver, max_epochs=4)
    fit.fit(module, loader())
    phase, plan = callback.phase, callback.plan
    if live:
        result = fit.test(module, data, ckpt_path="best", verbose=False)
    else:
        result = trainer(tmp_path, steps()).test(toy(), data, ckpt_path=tmp_path / "best.ckpt", verbose=False)
    assert result[0]["test/loss"] == pytest.approx(outputs["then"], rel=1e-5)
    assert (callback.phase, callback.plan) == (phase, plan)  # looking changed nothing of the run


def pl_callback():
    from lightning.pytorch import Callback

    return Callback


def test_a_second_fit_goes_on_where_the_first_ended(tmp_path):
    """Two fits of 3 and 2 epochs through one trainer, against a resume from the file between them."""
    module, callback = toy(), steps()
    end = AtEnd(lambda fit, module: lora.clone_state(lora.exact_state(module)))
    fit = trainer(tmp_path, callback, end, max_epochs=3)
    fit.fit(module, loader())
    assert type(module.embed) is torch.nn.Linear  # behind a fit the module is plain
    exact = end.found
    fit.fit_loop.max_epochs = 5
    configure = module.configure_optimizers
    seen = {}

    def spy():
        seen["keys"] = set(module.state_dict())
        seen["grad"] = all(p.requires_grad for p in module.parameters())
        return configure()

    class First(pl_callback()):
        def on_train_start(self, trainer, pl_module):
            seen["exact"] = lora.clone_state(lora.exact_state(pl_module))

    module.configure_optimizers = spy
    fit.callbacks.append(First())
    fit.fit(module, loader())
    assert seen["keys"] == set(toy().state_dict()) and seen["grad"]  # configure_optimizers saw the bare model
    assert_equal(seen["exact"], exact)
    assert callback.phase == "lowrank" and len(module.losses) == 30


def test_a_new_run_on_a_trained_module_starts_in_full_with_merged_weights(tmp_path):
    module = toy()
    trainer(tmp_path, steps(), max_epochs=4).fit(module, loader())
    x = torch.randn(4, 12)
    trained = module.eval()(x)
    module.train()
    seen = {}

    class First(pl_callback()):
        def on_train_start(self, trainer, pl_module):
            seen["y"] = pl_module.eval()(x)
            seen["plain"] = not list(lora.lora_layers(pl_module)) and all(p.requires_grad for p in pl_module.parameters())
            pl_module.train()

    second = steps()
    trainer(tmp_path, second, First(), max_epochs=4).fit(module, loader())
    torch.testing.assert_close(seen["y"], trained, rtol=1e-5, atol=1e-6)
    assert seen["plain"] and second.switch_step == 8


def test_one_callback_on_two_models_starts_anew(tmp_path):
    callback = steps()
    for _ in range(2):
        module = toy()
        trainer(tmp_path, callback, max_epochs=4).fit(module, loader())
        assert (callback.switch_step, callback.freeze_step) == (8, 14) and len(module.losses) == 24


def test_a_trained_module_pickles_and_copies(tmp_path):
    module = toy()
    trainer(tmp_path, steps(), max_epochs=4).fit(module, loader())
    module.trainer = None
    x = torch.randn(4, 12)
    y = module.eval()(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), y)
        checkpoint = {"state_dict": other.state_dict(), "callbacks": {}}
        other.on_save_checkpoint(checkpoint)
        assert set(checkpoint["state_dict"]) == set(toy().state_dict())


def test_the_users_own_on_save_checkpoint_still_runs(tmp_path):
    class Noting(Toy):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

    module = Noting()
    trainer(tmp_path, steps(), every=20, max_epochs=4).fit(module, loader())
    file = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    assert file["mine"] == 3 and set(file["state_dict"]) == set(toy().state_dict())


def test_a_checkpoint_of_a_newer_format_is_refused(tmp_path):
    trainer(tmp_path, steps(), every=20, max_epochs=4).fit(toy(), loader())
    file = torch.load(tmp_path / "step=20.ckpt", weights_only=True)
    file["lowrank_pretrain"]["format"] = 99
    torch.save(file, tmp_path / "new.ckpt")
    with pytest.raises(ValueError, match="has format 99"):
        trainer(tmp_path, steps(), max_epochs=5).fit(toy(), loader(), ckpt_path=tmp_path / "new.ckpt")


def test_a_newer_format_of_another_entry_is_named():
    with pytest.raises(ConfigError, match="has format 7 in its entry lte_state"):
        check_format({"format": 7}, "last.ckpt", name="lte_state")


def test_another_alpha_on_resume_is_refused(tmp_path):
    """The scale is no parameter: resuming with another one would silently be another model."""
    trainer(tmp_path, steps(), every=20, max_epochs=4).fit(toy(), loader())
    with pytest.raises(ValueError, match="alpha=2.0: the checkpoint's adapters were trained with None"):
        trainer(tmp_path, steps(alpha=2.0), max_epochs=5).fit(toy(), loader(), ckpt_path=tmp_path / "step=20.ckpt")


def test_a_full_run_may_be_branched_off_with_prelora(tmp_path):
    """As the paper's Exp1-3, which all leave one base run at epoch 50."""
    trainer(tmp_path, every=6, max_epochs=2).fit(toy(), loader())
    module, callback = toy(), steps()
    trainer(tmp_path, callback, max_epochs=5).fit(module, loader(), ckpt_path=tmp_path / "step=6.ckpt")
    assert (callback.switch_step, callback.freeze_step) == (14, 20)


def test_weights_that_should_move_do_move_after_a_resume(tmp_path):
    """Lightning #21901: a finetuning callback that froze again on resume trained nothing, silently."""
    trainer(tmp_path, steps(), every=1, max_epochs=4).fit(toy(), loader())
    module, before = toy(), {}

    class First(pl_callback()):
        def on_train_start(self, trainer, pl_module):
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad})

    end = AtEnd(lambda fit, module: {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    trainer(tmp_path / "x", steps(), First(), end, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "step=20.ckpt")
    assert before and all(not torch.equal(before[n], p) for n, p in end.found.items())


class TrainableOnly(Toy):
    """Names only the parameters that train."""

    def named_parameters(self, *args, **kwargs):
        return ((name, p) for name, p in super().named_parameters(*args, **kwargs) if p.requires_grad)


@pytest.mark.parametrize("settings", [
    {}, {"frozen_dtype": "int8"}, {"then": "factorize", "ranks": (0.25,), "warmup": 4, "freeze_rest": True},
])  # fmt: skip
def test_a_module_that_hides_what_is_frozen_resumes_from_each_phase(tmp_path, settings):
    results = []
    for ckpt in (None, 4, 10, 20):
        torch.manual_seed(7)
        module = TrainableOnly()
        file = None if ckpt is None else tmp_path / "0" / f"step={ckpt}.ckpt"
        trainer(tmp_path / str(ckpt or 0), steps(**settings), every=1, max_epochs=4).fit(module, loader(), ckpt_path=file)
        results.append(dict(module.state_dict()))
    for result in results[1:]:
        assert_equal(results[0], result)


class Backbone(Toy):
    """What ``BackboneFinetuning`` wants: one part of it trains from a later epoch on."""

    def __init__(self):
        super().__init__()
        self.backbone = self.blocks[0]

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_callbacks_that_restore_groups_come_before_it(tmp_path):
    def fit(ckpt, *callbacks):
        torch.manual_seed(7)
        trainer(tmp_path, *callbacks, every=1, max_epochs=4).fit(module := Backbone(), loader(), ckpt_path=ckpt)
        return dict(module.state_dict())

    warning = "PreLoRA: list BackboneFinetuning before PreLoRA in callbacks, else a resume after the switch fails"
    settings = {"targets": ["blocks.1.*"]}
    with pytest.warns(UserWarning, match=warning):
        fit(None, steps(**settings), BackboneFinetuning(9))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*BackboneFinetuning before")
        whole = fit(None, BackboneFinetuning(9), steps(**settings))
        for step in (4, 10, 20):
            assert_equal(whole, fit(tmp_path / f"step={step}.ckpt", BackboneFinetuning(9), steps(**settings)))
    for step in (10, 20):
        with pytest.raises(ConfigError, match="^callbacks='BackboneFinetuning': restores .*: list it before PreLoRA"):
            fit(tmp_path / f"step={step}.ckpt", steps(**settings), BackboneFinetuning(9))
    with pytest.warns(UserWarning, match="LoRA: list BackboneFinetuning after LoRA in callbacks, else a resume fails"):
        fit(None, BackboneFinetuning(9), LoRA(2, **settings))
