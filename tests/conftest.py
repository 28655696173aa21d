"""What the tests share: one thread (the models are tiny), the composed configuration, and a pocket-sized run."""

import functools
import logging
import os
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.loops.fit_loop import _FitLoop
from omegaconf import DictConfig

from lowrank_pretrain.data import fashion_mnist
from tests.ranks import Ranks

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """A fit on one device may leave a process group behind, for whose threads a forked process would wait for ever; a seed
    set by ``seed_everything`` would draw other adapters in this process than the ranks draw."""
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# Three epochs of four steps.
SHORT = [
    "data.batch_size=8",
    "trainer.max_epochs=3",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=1",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
]
# A Vision Transformer of 24,000 parameters, with dropout, on the embedded images.
VIT = [
    "model.model_kwargs.patch_size=14",
    "model.model_kwargs.embed_dim=32",
    "model.model_kwargs.depth=2",
    "model.model_kwargs.num_heads=2",
    "+model.model_kwargs.proj_drop_rate=0.1",
]
# All three phases: 3 steps full, 3 joint, the rest low-rank.
PHASES = [
    "method=prelora",
    "method.ranks=[2,4]",
    "method.windows=2",
    "method.window=3",
    "method.window_unit=step",
    "method.latest=1",
    "method.warmup=1",
]
TINY = [*SHORT, *VIT, *PHASES]


@pytest.fixture(scope="session")
def composed():
    """``composed("experiment=x", …)``: the configuration that the command line would make of these arguments."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
            return compose("train", overrides=list(overrides))

    return make


@pytest.fixture
def run(composed, tmp_path, monkeypatch):
    """``run("name", "key=value", …)``: a tiny run in tmp_path/name, in this process; returns (directory, summary).

    ``base`` replaces the tiny run's own overrides.
    """
    from lowrank_pretrain.train import train

    monkeypatch.chdir(tmp_path)

    def go(name: str, *overrides: str, base: list[str] = TINY) -> tuple[Path, dict]:
        directory = tmp_path / name
        return directory, train(composed(*base, *overrides), directory)

    return go


@pytest.fixture(scope="session")
def ranks():
    """``ranks(2, function, …)``: a module's function run by two processes as ranks 0 and 1; a list of what they return."""
    pool = Ranks()
    yield pool
    pool.close()


class Started(Exception):
    """Training would have begun."""


@pytest.fixture
def shut(monkeypatch, tmp_path):
    """The door: training ends with ``Started`` where its first step would begin. Runs in tmp_path, quietly."""

    def door(self):
        raise Started

    monkeypatch.setattr(_FitLoop, "run", door)
    monkeypatch.setattr(fashion_mnist, "read_sample", functools.cache(fashion_mnist.read_sample))
    monkeypatch.chdir(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
