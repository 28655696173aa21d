"""Every method with every feature of a trainer that the other files do not try: the cells of docs/support-matrix.md.

The fits are those of test_composition: 16 steps of a toy model under a method's own file, through all of its phases.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, strategies
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from peft import PeftModel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.export.weights import export
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.run import method
from lowrank_pretrain.run.trainer import build_trainer
from tests import lte_galore_workers as workers
from tests.test_composition import CELLS, equal
from tests.test_export import QUIET, inputs, logits, make, stock
from tests.toy import toy

FLOAT32 = {"dtype": torch.float32}
MERGED = ("diloco", "muloco")  # whole weights
METHODS = (*CELLS, "prelora_factorize", *MERGED)
WITH_LTE = tuple(name for name in CELLS if "lte" in name) + ("mhlora",)
PHASED = ("lora", "prelora", "prelora_galore", "prelora_factorize")  # a callback, and no strategy


def half():
    """Lightning makes 16-mixed of a CPU into bf16-mixed; its plugin, given by hand, scales there too."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))]}


FEATURES = {
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": half,
    "bf16-true": lambda: {"precision": "bf16-true"},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "clipping": lambda: {"gradient_clip_val": 0.05},
}


@pytest.fixture(scope="module")
def plain():
    """The same fits without the feature."""
    return {name: workers.cell(1, name, net=FLOAT32) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_acts_and_a_resume_under_it_is_exact(tmp_path, plain, feature, name):
    how = FEATURES[feature]
    whole = workers.cell(1, name, folder=tmp_path, save_at=(8,), trainer=how(), net=FLOAT32)
    assert whole["step"] == 16 and whole["phases"] in ([], ["lowrank"])
    assert all(value.isfinite().all() for value in whole["weights"].values())
    assert whole["losses"] != plain[name]["losses"]
    again = workers.cell(1, name, ckpt=str(tmp_path / "step=8.ckpt"), folder=tmp_path / "x", trainer=how(), net=FLOAT32)
    equal(whole["weights"], again["weights"])
    assert whole["losses"][len(whole["losses"]) // 2 :] == again["losses"]


class Checkpointed(workers.Configured):
    def training_step(self, batch, batch_idx):
        index, x, y = batch
        loss = torch.nn.functional.cross_entropy(self.out(checkpoint(self.net, x, use_reentrant=False)), y)
        self.losses.append(loss.item())
        return loss


class Compiled(workers.Configured):
    graphs = 0

    def __init__(self, built, **net):
        super().__init__(built, **net)
        torch._dynamo.reset()
        self.net.compile(backend=self.backend)

    @classmethod
    def backend(cls, graph, inputs):
        cls.graphs += 1
        return graph.forward


@pytest.mark.parametrize("name", METHODS)
def test_checkpointed_activations_change_nothing(monkeypatch, plain, name):
    monkeypatch.setattr(workers, "Configured", Checkpointed)
    found = workers.cell(1, name, net=FLOAT32)
    assert found["losses"] == pytest.approx(plain[name]["losses"], rel=1e-5)  # kernels may round by where memory lies
    for key, value in plain[name]["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_is_the_eager_one(monkeypatch, plain, name):
    monkeypatch.setattr(workers, "Configured", Compiled)
    monkeypatch.setattr(Compiled, "graphs", 0)
    found = workers.cell(1, name, net=FLOAT32)
    assert Compiled.graphs
    for key, value in plain[name]["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_an_average_of_the_weights_resumes_or_is_refused(tmp_path, name):
    def fit(**more):
        return workers.cell(1, name, trainer={"callbacks": [EMAWeightAveraging(decay=0.8)]}, **more)

    if name in (*WITH_LTE, *MERGED):
        with pytest.raises(ConfigError, match="pairs weights by position") as error:
            fit()
        assert "\n" not in str(error.value)
        return
    whole = fit(folder=tmp_path, save_at=(8, 16))
    file = torch.load(tmp_path / "step=16.ckpt", weights_only=True)
    assert any(not torch.equal(value, file["current_model_state"][key]) for key, value in file["state_dict"].items())
    again = fit(folder=tmp_path / "x", ckpt=str(tmp_path / "step=8.ckpt"))
    equal(whole["weights"], again["weights"])


# -- where the weights go -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("kind", "format"), [("vit", "timm"), ("gpt2", "hf")])
def test_what_a_run_exports_is_the_trained_model(tmp_path, offline, kind, format, name):
    built = method.build(workers.config(name))
    module, x = make(kind), inputs(kind)
    before = logits(module, x)
    module.optim = Optim(lr=0.02, schedule="constant", build=built.optimizer)
    rows = [(row, i) for i, row in enumerate(x)] if kind == "vit" else [{"input_ids": row} for row in x]
    run = Trainer(
        accelerator="cpu", devices=1, max_steps=12, callbacks=built.callbacks, strategy=built.strategy or "auto", **QUIET
    )
    run.fit(module.train(), DataLoader([rows[i % 3] for i in range(48)], batch_size=4))
    run.save_checkpoint(tmp_path / "last.ckpt")
    expected = logits(module.eval(), x)
    assert not torch.allclose(before, expected, atol=1e-3)
    torch.testing.assert_close(
        logits(stock(kind, export(tmp_path / "last.ckpt", format, tmp_path / "out")), x), expected, rtol=0, atol=2e-5
    )
    if name in ("lora", "prelora"):
        adapters = export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")
        peft = PeftModel.from_pretrained(stock(kind, adapters / "base"), adapters).eval()
        torch.testing.assert_close(logits(peft, x), expected, rtol=0, atol=2e-5)
    else:
        with pytest.raises(ConfigError, match="holds no adapters; leave format= out for its merged weights"):
            export(tmp_path / "last.ckpt", "peft", tmp_path / "peft")


# -- strategies that cut the weights up ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PHASED)
@pytest.mark.parametrize("kind", [strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy])
def test_who_changes_the_model_refuses_sharded_weights(kind, name):
    (callback,) = method.build(workers.config(name)).callbacks
    run = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[])
    with pytest.raises(ConfigError, match="changes the model in mid-run, which sharded parameters cannot follow: use ddp"):
        callback.setup(run, toy(), "fit")


@pytest.mark.parametrize("name", (*WITH_LTE, *MERGED))
@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_a_method_with_a_strategy_refuses_another(tmp_path, kind, name):
    strategy = method.build(workers.config(name)).strategy
    with pytest.raises(ConfigError, match="trainer.strategy='.*': must be auto: the method brings its own strategy"):
        build_trainer({"strategy": kind}, tmp_path, [], [], strategy)
