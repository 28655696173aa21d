"""A checkpoint's weights are read whatever its hyper-parameters are, and nothing in it is executed."""

import argparse
import collections
import dataclasses
import datetime
import enum
import functools
import os
import pathlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lowrank_pretrain.checkpoints.files import inspect, newest_whole
from lowrank_pretrain.checkpoints.safe_load import safe_load, unread
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.export.weights import export, main
from tests.test_after_fit import steps
from tests.toy import Toy, loader, trainer

RAN = []


@dataclasses.dataclass
class Settings:
    width: int = 1


class Colour(enum.Enum):
    RED = 1


class Evil:
    def __reduce__(self):
        return RAN.append, (os.getpid(),)


class Deep:
    def __reduce__(self):
        return eval, ("RAN.append(1)", {"RAN": RAN})


def function():
    RAN.append(1)


READ = {
    "path": pathlib.Path("/data"), "namespace": argparse.Namespace(a=1), "float": np.float64(2.5), "integer": np.int32(3),
    "array": np.arange(6).reshape(2, 3), "when": datetime.datetime(2025, 1, 2), "delta": datetime.timedelta(3),
    "dtype": torch.float16, "device": torch.device("cpu"), "set": {1, 2}, "complex": 1 + 2j, "size": torch.Size([2]),
    "ordered": collections.OrderedDict(a=1), "counter": collections.Counter("aab"), "bytes": b"ab", "range": range(3),
}  # fmt: skip
UNREAD = {
    "config": OmegaConf.create({"a": [1, {"b": 2}]}), "dataclass": Settings(3), "enum": Colour.RED, "function": function,
    "partial": functools.partial(function, 1), "default": collections.defaultdict(list, {1: [2]}), "class": Settings,
    "evil": Evil(), "deep": Deep(), "builtin": print, "nested": {"a": [Evil()]}, "objects": np.array([Evil()], dtype=object),
    "module": torch.nn.Linear(2, 2), "generator": np.random.default_rng(0),
}  # fmt: skip


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", [*READ, *UNREAD])
def test_any_hyper_parameter_leaves_the_weights_readable(tmp_path, name, mmap):
    value = (READ | UNREAD)[name]
    weights = {"w": torch.arange(4.0), "b": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}
    torch.save({"state_dict": weights, "hyper_parameters": {name: value, "plain": 3}}, tmp_path / "x.ckpt")
    RAN.clear()
    found = safe_load(tmp_path / "x.ckpt", mmap)
    assert not RAN
    assert torch.equal(found["state_dict"]["w"], weights["w"]) and torch.equal(found["state_dict"]["b"], weights["b"])
    held = found["hyper_parameters"]
    assert held["plain"] == 3
    if name in READ:
        assert unread(held) is None
        assert str(held[name]) == str(value)
    elif name != "objects":
        assert unread(held) is not None


class Rooted(Toy):
    def __init__(self, root=None, config=None, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


@pytest.mark.parametrize("value", [pathlib.Path("/data"), OmegaConf.create({"a": 1}), Settings(), functools.partial(function)])
def test_a_run_with_such_hyper_parameters_is_exported_inspected_and_found_again(tmp_path, value, capsys):
    fit = trainer(tmp_path, steps(), max_epochs=1)
    module = Rooted(root=value)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    assert main([f"ckpt={tmp_path / 'last.ckpt'}", f"out={tmp_path / 'out'}"]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], p) for name, p in module.state_dict().items())
    assert inspect(tmp_path / "last.ckpt")["global_step"] == 6
    assert newest_whole(tmp_path) == tmp_path / "last.ckpt"


def test_a_hyper_parameter_that_an_export_needs_is_named(tmp_path):
    from lowrank_pretrain.models.vision import VisionClassifier

    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 8}
    module = VisionClassifier("vit_tiny_patch16_224", 3, model_kwargs=tiny, img_size=16)
    hparams = {**module.hparams, "model_kwargs": Settings()}
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": hparams}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"its hyper-parameter model_kwargs is a .*Settings, which is not read"):
        export(tmp_path / "x.ckpt", None, tmp_path / "out")


def test_a_broken_file_is_still_a_broken_file(tmp_path):
    torch.save({"state_dict": {"w": torch.zeros(100)}, "hyper_parameters": {"a": Settings()}}, tmp_path / "x.ckpt")
    data = (tmp_path / "x.ckpt").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"PK\x03\x04", b"not a checkpoint", b"\x80\x02cos\ngetpid\n)R."):
        (tmp_path / "y.ckpt").write_bytes(broken)
        with pytest.raises(ConfigError, match="^ckpt="):
            export(tmp_path / "y.ckpt", None, tmp_path / "out")
