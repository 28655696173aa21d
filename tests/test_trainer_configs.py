"""The trainer group fits the machine: one GPU, N devices, SLURM; source-scale experiments choose their precision."""

import os
import warnings

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from lowrank_pretrain.models.channels_last import ChannelsLast
from lowrank_pretrain.run.build import plain
from lowrank_pretrain.run.trainer import build_trainer, check_values, with_chosen_precision

SOURCE_SCALE = ("prelora_vitl", "lte_vits32", "lte_vit_scales", "lte_mixer", "lte_gpt2", "galore_vit", "lora_pathmnist")
POCKET = ("prelora_pocket", "prelora_gpt2_pocket", "lte_pocket", "lte_gpt2_pocket", "galore_pocket")


def chosen(config):
    config, said = with_chosen_precision(plain(config))
    check_values(config["trainer"])
    return config["trainer"]["precision"], said


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))


@pytest.mark.parametrize("experiment", SOURCE_SCALE)
def test_a_source_scale_experiment_is_float32_here_and_says_so(composed, experiment):
    precision, said = chosen(composed(f"experiment={experiment}"))
    assert precision == "32-true" and said.startswith("precision: 32-true") and "\n" not in said


@pytest.mark.parametrize("experiment", SOURCE_SCALE)
@pytest.mark.parametrize("trainer", ["default", "ddp", "gpu"])
def test_a_source_scale_experiment_is_bf16_mixed_on_a_gpu_and_says_so(composed, gpu, experiment, trainer):
    precision, said = chosen(composed(f"experiment={experiment}", f"trainer={trainer}"))
    assert precision == "bf16-mixed" and said.startswith("precision: bf16-mixed, because the run has a GPU")


def test_a_precision_that_is_given_is_kept_and_nothing_is_said(composed, gpu):
    assert chosen(composed("experiment=prelora_vitl", "trainer.precision=32-true")) == ("32-true", None)
    assert chosen(composed("experiment=prelora_vitl", "trainer.accelerator=cpu"))[0] == "32-true"
    assert chosen(composed("experiment=galore_llama1b")) == ("bf16-true", None)  # as published
    for experiment in POCKET:
        assert chosen(composed(f"experiment={experiment}")) == ("32-true", None)


def test_the_choice_is_announced_when_a_run_starts(run, capsys):
    run("run", "trainer.precision=auto")
    assert "precision: 32-true, because the run has no GPU" in capsys.readouterr().out


def test_trainer_gpu_composes_and_its_callback_is_built(composed, tmp_path):
    values = plain(composed("trainer=gpu"))["trainer"]
    assert (values["accelerator"], values["precision"], values["devices"]) == ("gpu", "bf16-mixed", 1)
    trainer = build_trainer({**values, "accelerator": "cpu"}, tmp_path, [], [])
    assert any(isinstance(callback, ChannelsLast) for callback in trainer.callbacks)


@pytest.mark.parametrize(("cores", "warns"), [({0}, True), ({0, 1}, False)])
def test_more_processes_than_cores_are_told(cores, warns, composed, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    values = {**plain(composed("trainer=ddp_spawn"))["trainer"], "accelerator": "cpu"}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        build_trainer(values, tmp_path, [], [])
    said = [str(one.message) for one in found if "trainer.devices" in str(one.message)]
    assert said == ["trainer.devices=2: the run has 1 core(s), which its processes share: use at most 1"] * warns


def test_trainer_slurm_takes_its_size_from_the_job(composed, monkeypatch):
    values = plain(composed("trainer=slurm"))["trainer"]
    assert (values["devices"], values["num_nodes"]) == (1, 1)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    values = plain(composed("trainer=slurm", "method=lte"))["trainer"]
    assert (values["devices"], values["num_nodes"], values["strategy"]) == (8, 2, "auto")
    check_values(values)


@pytest.mark.parametrize(("name", "changes"), [("resnet10t", True), ("vit_tiny_patch16_224", False)])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_only_a_convolutional_network_on_a_gpu_is_laid_out_anew(monkeypatch, name, changes, device):
    module = pl.LightningModule()
    module.net = timm.create_model(name, num_classes=2)
    monkeypatch.setattr(pl.LightningModule, "device", torch.device(device))
    x, before = torch.randn(1, 3, 224, 224), dict(module.named_parameters())
    y = module.eval().net(x)
    ChannelsLast().on_fit_start(None, module)
    weights = [part.weight for part in module.modules() if isinstance(part, torch.nn.Conv2d) and part.kernel_size[0] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights if w.shape[1] > 1) == (
        changes and device == "cuda"
    )
    assert all(before[name] is parameter for name, parameter in module.named_parameters())
    assert torch.allclose(module.net(x), y, atol=1e-4)
