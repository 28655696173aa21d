"""The examples join by the protocol alone: they switch, and resume to the bit."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lowrank_pretrain import GaLoreAdamW, PreLoRA
from tests.toy import Toy, loader, toy, trainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fits(tmp_path, callback, model):
    """A run, and one resumed from each of its checkpoints; all must end alike."""
    module, first = model(), callback()
    trainer(tmp_path, first, every=3, max_epochs=3).fit(module, loader())
    whole = {name: value.clone() for name, value in module.state_dict().items()}
    for step in (3, 9, 15):
        module, again = model(), callback()
        trainer(tmp_path / "again", again, max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.plan == first.plan and again.phase == first.phase == "lowrank"
        for name, value in module.state_dict().items():
            assert torch.equal(value, whole[name]), (step, name)
    return whole, first


def test_a_schedule_of_ones_own(tmp_path):
    SwitchAt = load("fixed_step_schedule").SwitchAt
    whole, callback = fits(tmp_path, lambda: SwitchAt(6, joint=4, rank=2, targets="mlp"), toy)
    assert (callback.switch_step, callback.freeze_step) == (6, 10)
    assert len(callback.plan) == 4 and set(callback.plan.values()) == {2}
    assert not any("lora_" in name for name in whole), "after a fit the module is plain"


def test_the_same_schedule_switches_an_optimizer(tmp_path):
    SwitchAt = load("fixed_step_schedule").SwitchAt

    class Projecting(Toy):
        def configure_optimizers(self):
            return GaLoreAdamW(self.parameters(), lr=1e-2)

    def model():
        torch.manual_seed(7)
        return Projecting()

    whole, _ = fits(tmp_path, lambda: SwitchAt(6, joint=4, rank=2, targets="mlp", then="galore"), model)
    assert not any("lora" in name for name in whole)


@pytest.mark.parametrize("when", ["prelora", "schedule"])
def test_an_adopt_of_ones_own(tmp_path, when):
    RowSparseAdamW = load("own_adopt").RowSparseAdamW

    class Sparse(Toy):
        def configure_optimizers(self):
            return RowSparseAdamW(self.parameters(), lr=1e-2)

    def model():
        torch.manual_seed(7)
        return Sparse()

    def callback():
        if when == "schedule":
            return load("fixed_step_schedule").SwitchAt(6, joint=4, rank=2)
        return PreLoRA(ranks=(2, 4), window=3, window_unit="step", windows=2, latest=2, warmup=1, loss_tol=0.5, weight_tol=0.5)

    whole, first = fits(tmp_path, callback, model)
    early = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["state_dict"]
    moved = (early["blocks.0.fc1.weight"] != whole["blocks.0.fc1.weight"]).any(1).sum()
    assert moved == first.plan["blocks.0.fc1"]
