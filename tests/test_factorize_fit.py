"""``then="factorize"`` in a Lightning fit: the switch, a bit-exact resume, plain checkpoints, averages, and what is refused."""

import copy
import warnings
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lowrank_pretrain import GaLoreAdamW, LoRA, LTEStrategy, PhaseCallback, Plan, PreLoRA, galore_param_groups
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.export.weights import export
from lowrank_pretrain.factorize.model import factor_parameters, factored_layers
from lowrank_pretrain.models.vision import VisionClassifier
from tests import prelora_workers as workers
from tests.test_prelora_distributed import assert_equal as assert_ranks_equal
from tests.test_prelora_distributed import assert_same
from tests.test_resume import assert_equal, run
from tests.toy import AtEnd, Toy, loader, toy, trainer


def steps(**kwargs) -> PreLoRA:
    """Switches after step 6 and, as it measures for 8 steps, freezes after step 14; 24 steps in all."""
    return PreLoRA(**{"window": 2, "window_unit": "step", "windows": 2, "latest": 3, "warmup": 0, "loss_tol": 1e-6,
                      "then": "factorize", **kwargs})  # fmt: skip


def fit(path, callback, module, *others, ckpt=None, **kwargs):
    running = trainer(path, callback, *others, max_epochs=4, **kwargs)
    running.fit(module, loader(), ckpt_path=ckpt)
    return running


class SwitchAt(PhaseCallback):
    """A schedule of one's own."""

    def __init__(self, step, rank, **settings):
        super().__init__(then="factorize", **settings)
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.phase == "full" and trainer.global_step >= self.step:
            self.switch(trainer, pl_module, Plan(dict.fromkeys(find_targets(pl_module, "all"), self.rank)))
        if self.phase == "joint":
            self.freeze(trainer, pl_module)


@pytest.mark.parametrize("callback", [steps, lambda: SwitchAt(6, 4)])
def test_everything_shrinks_and_the_end_is_plain(tmp_path, callback):
    module, callback = toy(), callback()

    def look(running, module):
        assert [name for name, _ in factored_layers(module)]
        owned = {id(p) for group in running.optimizers[0].param_groups for p in group["params"]}
        assert owned == {id(p) for p in module.parameters()}
        assert set(running.optimizers[0].state) == set(module.parameters())
        return sum(p.numel() for p in module.parameters()), copy.deepcopy(module)

    weight, before = module.blocks[0].fc1.weight, {name: p.shape for name, p in module.named_parameters()}
    total = sum(p.numel() for p in module.parameters())
    end = AtEnd(look)
    fit(tmp_path, callback, module, end)
    assert (callback.phase, callback.switch_step, callback.freeze_step) == ("lowrank", 6, 14)
    smaller, factored = end.found
    assert smaller < 0.75 * total
    assert {name: p.shape for name, p in module.named_parameters()} == before
    assert module.blocks[0].fc1.weight is weight and all(p.requires_grad for p in module.parameters())
    x = torch.randn(4, 12)
    module.eval(), factored.eval()
    torch.testing.assert_close(module(x), factored(x))


@pytest.mark.parametrize("settings", [
    {}, {"adapter_lr": 3.0, "rewarm": 4, "adapter_weight_decay": 0.0}, {"energy": 0.9, "freeze_rest": True},
    {"flops": 0.5, "warmup": 5},
])  # fmt: skip
def test_resume_from_every_phase_is_bit_exact(tmp_path, settings):
    module, shape = toy(scheduler="sequential", lr_groups=2), {"scheduler": "sequential", "lr_groups": 2}
    whole = run(tmp_path / "whole", steps(**settings), module)
    assert whole["callback"]["phase"] == "lowrank"
    for at in (5, 6, 10, 17, 20):
        file = tmp_path / "whole" / f"step={at}.ckpt"
        again = toy(**shape)
        assert_equal(run(tmp_path / "again", steps(**settings), again, ckpt=file), whole, f"from {at}: ")
        assert again.losses == module.losses[at:]


@pytest.mark.parametrize("kwargs", [{"accumulate_grad_batches": 2, "max_steps": 24}, {"precision": "bf16-mixed"}])
def test_resume_with_loop_features_is_bit_exact(tmp_path, kwargs):
    def run(path, module, ckpt=None):
        callback = steps(window=1)
        running = trainer(path, callback, every=1, max_epochs=8, **{"max_steps": 20, **kwargs})
        running.fit(module, loader(), ckpt_path=ckpt)
        return {"model": dict(module.state_dict()), "optimizer": running.optimizers[0].state_dict()}, callback

    whole, callback = run(tmp_path / "whole", toy())
    assert callback.phase == "lowrank"
    for at in (7, 13):
        again, _ = run(tmp_path / "again", toy(), tmp_path / "whole" / f"step={at}.ckpt")
        assert_equal(again, whole)


def test_every_checkpoint_is_a_plain_model(tmp_path):
    module = toy()
    fit(tmp_path, steps(), module, every=1)
    names = list(module.state_dict())
    for at in (3, 8, 20, 24):
        file = tmp_path / f"step={at}.ckpt"
        loaded = torch.load(file, weights_only=True)
        assert list(loaded["state_dict"]) == names
        plain = Toy.load_from_checkpoint(file)
        test = trainer(tmp_path, limit_test_batches=2)
        assert test.test(plain, loader(), verbose=False) == trainer(tmp_path, steps(), limit_test_batches=2).test(
            toy(), loader(), ckpt_path=file, verbose=False
        )
    assert_equal(dict(Toy.load_from_checkpoint(file).state_dict()), dict(module.state_dict()))


def test_a_second_fit_goes_on_where_the_first_ended(tmp_path):
    module, callback = toy(), steps()
    first = fit(tmp_path, callback, module, every=18, max_steps=18)
    first.save_checkpoint(tmp_path / "late.ckpt")
    late, live = (torch.load(tmp_path / name, weights_only=True) for name in ("late.ckpt", "step=18.ckpt"))
    for key in ("state_dict", "optimizer_states"):
        assert_equal(late[key], live[key])
    assert_equal(late["lowrank_pretrain"]["exact"], live["lowrank_pretrain"]["exact"])
    end = AtEnd(lambda _, module: {name: p.shape for name, p in factor_parameters(module)})
    fit(tmp_path, callback, module, end, max_steps=2)
    assert callback.phase == "lowrank" and {n: t.shape for n, t in late["lowrank_pretrain"]["exact"].items()} == end.found
    with torch.no_grad():
        module.blocks[0].fc1.weight.mul_(2.0)  # changed between two fits: its best factors
    fit(tmp_path, callback, module, max_steps=1)


@pytest.mark.parametrize("settings", [{}, {"then": "lora", "ranks": (2, 4), "frozen_dtype": "int8"}])
def test_after_an_interrupted_fit_files_of_every_phase_are_tested_and_it_goes_on(tmp_path, settings):
    class Stop(pl_callback()):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 18:
                raise InterruptedError

    module, callback = toy(), steps(**settings)
    running = trainer(tmp_path, callback, Stop(), every=1, max_epochs=4)
    with pytest.raises(InterruptedError):
        running.fit(module, loader())
    for at in (3, 17):  # of the full phase, too
        file = tmp_path / f"step={at}.ckpt"
        wanted = trainer(tmp_path).test(Toy.load_from_checkpoint(file), loader(), verbose=False)
        assert running.test(module, loader(), ckpt_path=file, verbose=False)[0] == pytest.approx(wanted[0])
    running.save_checkpoint(tmp_path / "late.ckpt")
    fit(tmp_path, steps(**settings), toy(), ckpt=tmp_path / "late.ckpt")


def test_an_average_follows_and_resumes(tmp_path):
    def once(path, module, ckpt=None):
        ema = EMAWeightAveraging(decay=0.8)
        running = fit(path, steps(), module, ema, every=1, ckpt=ckpt)
        return running, dict(module.state_dict())

    _, whole = once(tmp_path / "whole", toy())
    for at in (10, 17):
        file = tmp_path / "whole" / f"step={at}.ckpt"
        _, again = once(tmp_path / "again", toy(), file)
        assert_equal(again, whole)
    saved = torch.load(tmp_path / "whole" / "step=15.ckpt", weights_only=True)
    average, trained = saved["state_dict"], saved["current_model_state"]
    norm = torch.linalg.vector_norm
    off = [norm(average[n] - trained[n]) / norm(trained[n]) for n in trained if "fc" in n]
    assert list(average) == list(trained) and max(off) < 0.3


def test_decay_is_of_the_product(tmp_path):
    class Still(Toy):
        """Whose gradients are zero, so that only decay moves it."""

        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.2)

    torch.manual_seed(7)
    module = Still()
    seen = {}

    class Note(pl_callback()):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen[trainer.global_step] = pl_module.blocks[0].fc1.weight.detach().clone()

    fit(tmp_path, steps(adapter_lr=3.0), module, Note())
    torch.testing.assert_close(seen[24], seen[15] * (1 - 1e-2 * 0.2) ** 9, rtol=1e-4, atol=1e-6)


def pl_callback():
    from lightning.pytorch import Callback

    return Callback


def test_bad_input_is_found_before_training(tmp_path):
    with pytest.raises(ConfigError, match="ranks are increasing fractions"):
        steps(ranks=(8, 16))
    with pytest.raises(ConfigError, match="ranks are increasing fractions"):
        steps(ranks=(0.5, 1.0))
    with pytest.raises(ConfigError, match="fraction above 0 and below 1"):
        steps(energy=1.0)
    with pytest.raises(ConfigError, match='is for then="factorize"'):
        PreLoRA(energy=0.9)
    with pytest.raises(ConfigError, match="give one of them"):
        steps(energy=0.9, flops=0.5)
    for settings, match in (({"alpha": 2.0}, "alpha"), ({"train_A": False}, "train_A")):
        with pytest.raises(ConfigError, match=match):
            fit(tmp_path, steps(**settings), toy())
    with pytest.raises(ConfigError, match="a fused layer is factored whole"):
        fit(tmp_path, steps(targets=["*.q", "*.v"]), toy())
    with pytest.raises(ConfigError, match="takes the plan for its heads"):
        fit(tmp_path, steps(), toy(), strategy=LTEStrategy(heads=2, merge_every=2))

    class Projected(Toy):
        def configure_optimizers(self):
            return GaLoreAdamW(galore_param_groups(self, rank=2), lr=1e-2)

    with pytest.raises(ConfigError, match="projects the gradients"):
        fit(tmp_path, steps(), Projected())
    tied = toy()
    tied.blocks[1].fc1.weight = tied.blocks[0].fc1.weight
    with pytest.raises(ConfigError, match="shares its weight"):
        fit(tmp_path, steps(targets="blocks.0.fc1"), tied)


def test_another_rank_or_method_on_resume_is_refused(tmp_path):
    fit(tmp_path, steps(), toy(), every=6)
    file = tmp_path / "step=18.ckpt"
    with pytest.raises(ConfigError, match="the checkpoint's run has"):
        fit(tmp_path, steps(ranks=(0.5,)), toy(), ckpt=file)
    with pytest.raises(ConfigError, match="then"):
        fit(tmp_path, steps(then="lora", ranks=(4, 8)), toy(), ckpt=file)


def test_exports_dense_and_factored(tmp_path):
    timm = pytest.importorskip("timm")
    module = VisionClassifier(
        "vit_tiny_patch16_224", num_classes=3, img_size=16, in_chans=1, model_kwargs={"patch_size": 8, "embed_dim": 16,
        "depth": 1, "num_heads": 2},
    )  # fmt: skip
    data = DataLoader([(torch.randn(1, 16, 16), i % 3) for i in range(32)], batch_size=8)
    running = trainer(tmp_path, steps(), every=20, max_epochs=5)
    running.fit(module, data)
    out = export(tmp_path / "step=20.ckpt", "factored", tmp_path / "out")
    dense = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    network, x = timm.create_model(f"local-dir:{out}", pretrained=False).eval(), torch.randn(2, 1, 16, 16)
    state = load_file(out / "factored.safetensors")
    for name in [key.removesuffix(".V.weight") for key in state if key.endswith(".V.weight")]:
        (rank, cols), (rows, _) = state[name + ".V.weight"].shape, state[name + ".U.weight"].shape
        pair = {"V": nn.Linear(cols, rank, bias=False), "U": nn.Linear(rank, rows, bias=name + ".U.bias" in state)}
        network.set_submodule(name, nn.Sequential(OrderedDict(pair)))
    network.load_state_dict(state)
    torch.testing.assert_close(network(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense(x), module.model.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="holds no factors"):
        running = trainer(tmp_path, every=2, max_steps=2)
        running.fit(VisionClassifier(**module.hparams), data)
        export(tmp_path / "step=2.ckpt", "factored", tmp_path / "none")


def test_a_compiled_model_is_measured_and_factored(tmp_path):
    plain, module = toy(), toy()
    fit(tmp_path, steps(), plain)
    module.compile(backend="eager")
    callback = steps()
    fit(tmp_path, callback, module)
    assert callback.phase == "lowrank" and len(callback.plan) == 11
    torch.testing.assert_close(module.losses, plain.losses, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_measured_once(tmp_path, reentrant):
    class Checkpointed(Toy):
        def forward(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x)

    plain = toy()
    fit(tmp_path, steps(), plain)
    torch.manual_seed(7)
    module = Checkpointed()
    fit(tmp_path, steps(), module)
    assert module.losses == plain.losses
    assert_equal(dict(module.state_dict()), dict(plain.state_dict()))


def test_measuring_breaks_no_graph(tmp_path):
    module = toy()
    for block in module.blocks:
        block.compile(backend="eager", fullgraph=True)
    fit(tmp_path, callback := steps(), module)
    assert callback.phase == "lowrank" and len(callback.plan) == 11


FACTORIZE = {"then": "factorize", "ranks": (0.25,), "warmup": 0, "latest": 3}


def test_two_processes_are_one_and_resume_exactly(ranks, tmp_path):
    how = {"ema": True, "method": FACTORIZE | {"adapter_lr": 2.0}}
    one, two = workers.fit(1, tmp_path, **how), ranks(2, workers.fit, 2, tmp_path, save_at=[5, 10, 17], **how)
    assert one["state"]["phase"] == "lowrank"
    assert_same(two)
    for result in two:
        assert result["state"]["plan"] == one["state"]["plan"] and result["state"]["freeze_step"] == 14
        assert result["sent"] == result["trained"] and result["trained"][-1] < 0.75 * result["trained"][0]
        # the moments are sums in float32, in another order
        assert max(abs(a - b) for a, b in zip(one["losses"][14:], result["losses"][14:], strict=True)) < 1
    for at in (5, 10, 17):
        file = str(tmp_path / f"step={at}.ckpt")  # a file of the joint phase gathers the moments: in the same steps, as here
        again = ranks(2, workers.fit, 2, tmp_path / "again", ckpt=file, save_at=[10, 17], **how)
        assert_same(again)
        for a, b in zip(two, again, strict=True):
            assert_ranks_equal(a, b)
            assert a["losses"][at:] == b["losses"]


def test_lte_and_adapters_go_on_from_a_factored_run(tmp_path):
    module = toy()
    fit(tmp_path, steps(), module)
    assert not any(True for _ in factor_parameters(module))
    fit(tmp_path, LoRA(rank=2), module)
    running = trainer(tmp_path, strategy=LTEStrategy(rank=2, heads=2, merge_every=2), max_steps=4)
    running.fit(module, loader(batch_size=8))
    assert type(module.blocks[0].fc1) is nn.Linear


def test_an_energy_that_pays_for_no_target_is_said_in_the_first_step_and_may_be_lowered(tmp_path):
    module = toy()
    with pytest.warns(UserWarning, match="energy=0.9999999: with the weights and inputs of the first step, .* keeps most, 0.9"):
        with pytest.raises(ConfigError, match="energy=0.9999999: factors would pay for none of 7 layers .* keeps most, 0.9"):
            fit(tmp_path, steps(energy=0.9999999), module, every=1)
    assert len(module.losses) == 14
    callback = steps(energy=0.9)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="energy=")
        fit(tmp_path, callback, toy(), ckpt=tmp_path / "step=13.ckpt")
    assert callback.phase == "lowrank"
    with pytest.raises(ConfigError, match="the checkpoint's run has"):
        fit(tmp_path, steps(), toy(), ckpt=tmp_path / "step=13.ckpt")


def test_ranks_that_never_pay_are_refused_before_training(tmp_path):
    for settings, match in (
        ({"energy": 0.9}, "targets=1: layers of at most 2 x 2, for which factors pay at no rank"),
        ({"flops": 0.9}, "targets=1: layers"),
        ({"flops": 0.01, "targets": "all"}, "flops=0.01: must be at least 0.0932, which factors of rank 1 take"),
    ):
        module = toy()
        module.small = nn.Linear(2, 2)
        with pytest.raises(ConfigError, match=match):
            fit(tmp_path, steps(**{"targets": "small", **settings}), module)
        assert not module.losses


class Broken(Toy):
    """Whose inputs are NaN from a step on."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x * float("nan") if self.global_step >= self.at else x, y), batch_idx)


def test_numbers_that_are_not_finite_are_named_with_the_layer(tmp_path):
    torch.manual_seed(7)
    module = Broken(0)
    with pytest.raises(ConfigError, match="targets='embed': has inputs that are NaN or infinite in the first step: mend"):
        fit(tmp_path, steps(), module)
    assert len(module.losses) == 1
    with pytest.raises(ConfigError, match="targets='embed': holds weights that are NaN or infinite: resume from"):
        fit(tmp_path, steps(), Broken(8))


def test_layers_that_no_step_of_the_joint_phase_calls_are_named(tmp_path):
    class Early(Toy):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(12, 12)

        def forward(self, x):
            return super().forward(self.extra(x) if self.training and self.global_step < 4 else x)

    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="no step since the switch called extra: it stays whole and trains on"):
        fit(tmp_path, steps(), Early())
    with pytest.raises(ConfigError, match="targets='extra': factors would pay for none of 1 layers: no step since the switch"):
        fit(tmp_path, steps(targets="extra"), Early())


class Aliased(Toy):
    """Whose blocks have a second name, and whose second block is used twice."""

    def __init__(self):
        super().__init__()
        self.blocks.append(self.blocks[1])
        self.backbone = self.blocks


def test_a_layer_with_several_names_is_factored_under_each(tmp_path):
    torch.manual_seed(7)
    module, callback = Aliased(), steps()
    fit(tmp_path, callback, module, every=1)
    assert {name.partition(".")[0] for name in callback.plan} == {"embed", "blocks"}
    for at in (10, 18, 24):
        file = tmp_path / f"step={at}.ckpt"
        state = torch.load(file, weights_only=True)["state_dict"]
        assert list(state) == list(module.state_dict())
        assert torch.equal(state["blocks.2.fc1.weight"], state["blocks.1.fc1.weight"])
        assert torch.equal(state["backbone.0.fc1.weight"], state["blocks.0.fc1.weight"])
        torch.manual_seed(7)
        again = Aliased()
        fit(tmp_path / "again", steps(), again, ckpt=file, every=1)
        assert_equal(dict(again.state_dict()), dict(module.state_dict()))
