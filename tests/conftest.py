"""What the tests share: one thread (the models are tiny), the composed configuration, and a pocket-sized run."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

torch.set_num_threads(1)

# A run of three epochs of four steps on the embedded images, through all three phases in about a second.
TINY = [
    "data.batch_size=8",
    "data.img_size=28",
    "model.model_kwargs.patch_size=14",
    "model.model_kwargs.embed_dim=32",
    "model.model_kwargs.depth=2",
    "model.model_kwargs.num_heads=2",
    "+model.model_kwargs.proj_drop_rate=0.1",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "method=prelora",
    "method.ranks=[2,4]",
    "method.windows=2",
    "method.window=3",
    "method.window_unit=step",
    "method.latest=1",
    "method.warmup=1",
]


@pytest.fixture(scope="session")
def composed():
    """``composed("experiment=x", …)``: the configuration that the command line would make of these arguments."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
            return compose("train", overrides=list(overrides))

    return make


@pytest.fixture
def run(composed, tmp_path, monkeypatch):
    """``run("name", "key=value", …)``: a tiny run in tmp_path/name, in this process; returns (directory, summary)."""
    from lowrank_pretrain.train import train

    monkeypatch.chdir(tmp_path)

    def go(name: str, *overrides: str) -> tuple[Path, dict]:
        directory = tmp_path / name
        return directory, train(composed(*TINY, *overrides), directory)

    return go
