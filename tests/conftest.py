"""Share one thread (the models are tiny), a bare environment, the composed configuration and a pocket-sized run."""

import functools
import logging
import os
import socket
import tempfile
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.loops.fit_loop import _FitLoop
from omegaconf import DictConfig

from lowrank_pretrain.data.images import fashion_mnist
from tests.ranks import Ranks

torch.set_num_threads(1)

# Variables that steer the libraries in use: a machine that happens to set one must not change what a test sees.
STEERING = (
    "ACCELERATE_", "COMET_", "DATASETS_", "HF_", "HUGGINGFACE_", "HYDRA_", "LOCAL_", "LOWRANK_", "MASTER_", "MLFLOW_",
    "NCCL_", "NETRC", "NODE_RANK", "PL_", "RANK", "SLURM_", "TORCHELASTIC_", "TORCH_COMPILE", "TRANSFORMERS_", "WANDB_",
    "WORLD_SIZE",
)  # fmt: skip
BARE = {
    "HF_HUB_OFFLINE": "1",  # a hub is never asked; tests that mean to ask say so
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_SILENT": "true",
}


def pytest_configure(config: pytest.Config) -> None:
    """Take away what the machine happens to have: variables, keys, caches, a GPU, installed data sets."""
    for name in [name for name in os.environ if name.startswith(STEERING)]:
        del os.environ[name]
    config.stash[HOME] = tempfile.TemporaryDirectory(prefix="lowrank-tests-")
    home = config.stash[HOME].name
    os.environ |= {**BARE, "HF_HOME": f"{home}/hf", "NETRC": f"{home}/netrc", "WANDB_CONFIG_DIR": f"{home}/wandb"}
    if "gpu" not in config.getoption("markexpr", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # `-m gpu` alone uses one
    fashion_mnist.DEBIAN = Path(home) / "usr" / "share" / "datasets" / "fashion-mnist"


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[HOME].cleanup()


HOME = pytest.StashKey[tempfile.TemporaryDirectory]()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A connection to anything but this machine fails, and says which test tried it."""
    connect = socket.socket.connect

    def local(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address[0]}: tests do without a network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """A fit on one device may leave a process group behind, for whose threads a forked process would wait for ever; a seed
    set by ``seed_everything`` would draw other adapters in this process than the ranks draw. A run of the command line puts a
    filter on Lightning's messages, which a fit in a script does not have."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.filters[:] = [kept for kept in handler.filters if not type(kept).__module__.startswith("lowrank_pretrain")]
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
    # what a fit or a benchmark may have set for the whole process changes how later tests round
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
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
    from lowrank_pretrain.run.train import train

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
