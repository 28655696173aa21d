from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.run.method import build
from tests.toy import toy

CONF = Path(__file__).parents[1] / "conf" / "method"


def load(name: str) -> dict:
    """A method file with what it inherits, as Hydra composes it."""
    config = OmegaConf.load(CONF / f"{name}.yaml")
    merged = {}
    for base in config.pop("defaults", []):
        if base != "_self_":
            merged |= load(base)
    return merged | OmegaConf.to_container(config)


def test_full_brings_nothing():
    method = build(load("full"))
    assert not method.callbacks and method.strategy is None and method.optimizer is None


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_method_file_builds(name):
    config = load(name)
    assert config["name"] == name
    if name == "galore_8bit":
        pytest.importorskip("bitsandbytes")
    method = build(OmegaConf.create(config))
    assert bool(method.callbacks or method.strategy or method.optimizer) is (name != "full")


def test_the_tolerances_are_the_papers():
    for name, weight, loss in (("prelora_exp1", 0.01, 0.05), ("prelora_exp2", 0.005, 0.025), ("prelora_exp3", 0.0025, 0.01)):
        (callback,) = build(load(name)).callbacks
        assert (callback.weight_tol, callback.loss_tol, callback.earliest, callback.warmup) == (weight, loss, 50, 10)
    (callback,) = build(load("prelora")).callbacks
    assert callback.__dict__.keys() == PreLoRA().__dict__.keys()
    ours, default = callback.state_dict(), PreLoRA().state_dict()
    assert ours == default and (callback.weight_tol, callback.ranks, callback.window_unit) == (0.01, [4, 8, 16, 32], "epoch")


def test_lists_become_plain():
    (callback,) = build(OmegaConf.create(load("prelora") | {"targets": ["q", "v"], "ranks": [2, 4]})).callbacks
    assert type(callback.ranks) is list and type(callback.targets) is list
    (callback,) = build(load("lora")).callbacks
    assert isinstance(callback, LoRA) and callback.rank == 8


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("prelora", {"rank": [4]}, r"method\.rank=\[4\]: is no key of this method; did you mean ranks\? allowed: .*windows"),
        ("full", {"ranks": [4]}, r"method\.ranks=\[4\]: is no key of this method; allowed: none"),
        ("prelora", {"warmup": -1}, r"method\.warmup=-1: must be an integer of 0 or more"),
        ("prelora", {"uses": ["nope"]}, r"method\.uses=\['nope'\]: must be a list out of prelora, lora"),
        ("prelora", {"uses": None}, r"method\.uses=None"),
        ("lora", {"rank": 0}, r"method\.rank=0: must be an integer of 1 or more"),
    ],
)
def test_mistakes_are_one_line_with_the_groups_name(name, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(load(name) | change)
    assert "\n" not in str(error.value)


def test_galore_makes_the_optimizer_of_a_module():
    method = build({"uses": ["galore"], "rank": 4, "targets": "mlp", "update_proj_gap": 7})
    optimizer = method.optimizer(toy(), Optim(lr=1e-3, weight_decay=0.1))
    projected = [group for group in optimizer.param_groups if group.get("rank")]
    assert [group["rank"] for group in projected] == [4] and projected[0]["update_proj_gap"] == 7
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(p.numel() for p in toy().parameters())
    before = torch.get_rng_state()
    for key, value in (("proj_type", "up"), ("refresh", "never"), ("update_proj_gap", 0), ("rank", 0)):
        with pytest.raises(ConfigError, match=rf"method\.{key}="):
            build({"uses": ["galore"], key: value})
    assert torch.equal(before, torch.get_rng_state())
