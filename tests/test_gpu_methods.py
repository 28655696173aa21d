"""Every method on a CUDA device next to the same on a CPU. `python -m pytest -m gpu`."""

import copy

import pytest
import torch
from torch import nn

from lowrank_pretrain import LTEStrategy, PreLoRA
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.lora import frozen
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lte.wire import BLOCK, WIRES, Codec
from tests.test_pretend_gpu import MODES
from tests.toy import adapters, loader, toy, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"


def regression(device):
    """A net with an odd shape, a convolution and a bias, and its batch; the same numbers on every device."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 2, 2), nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 28), nn.Linear(28, 5))
    x, y = torch.randn(64, 3, 4, 4), torch.randn(64, 5)
    return net.to(device), x.to(device), y.to(device)


def train(mode, device, steps=40, resume_at=None):
    """Return the final loss and the parameters; at ``resume_at`` a fresh optimizer takes over the state."""
    net, x, y = regression(device)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim < 2]
    layerwise = {"layerwise": True} if "layerwise" in mode else {}

    def optimizer():
        group = {"params": matrices, "rank": 4, "update_proj_gap": 8, "scale": 1.0, **mode}
        decay = mode.get("weight_decay", 0.01)
        return GaLoreAdamW([group, {"params": rest, **layerwise}], lr=1e-2, weight_decay=decay)

    now = optimizer()
    for step in range(steps):
        if step == resume_at:
            state = copy.deepcopy(now.state_dict())
            now = optimizer()
            now.load_state_dict(state)

        def closure(now=now):
            now.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        now.step(closure)
    return (net(x) - y).square().mean().item(), list(net.parameters())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_mode_of_the_optimizer_learns_as_on_a_cpu_and_resumes(mode):
    begun = regression("cpu")
    first = (begun[0](begun[1]) - begun[2]).square().mean().item()
    loss, weights = train(mode, DEVICE)
    assert loss < 0.95 * first and loss < 1.1 * train(mode, "cpu")[0]  # random bases are others there
    again = train(mode, DEVICE, resume_at=19)[1]
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def steps(**kwargs):
    """Switches after step 8, and freezes after step 14 (or 16, with factors); 24 steps in all."""
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


KINDS_OF_PHASE = [
    *({"frozen_dtype": kind} for kind in frozen.KINDS), {"frozen_dtype": "bfloat16", "keep_original": True},
    {"recompute_inputs": True}, {"freeze_rest": True, "recompute_inputs": True}, {"train_A": False},
    {"then": "factorize", "ranks": (0.5,), "warmup": 0},
]  # fmt: skip


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("settings", KINDS_OF_PHASE, ids=str)
def test_every_kind_of_low_rank_phase_trains_and_resumes(tmp_path, settings, precision):
    def run(path, ckpt=None):
        targets = ["qkv", "fc1", "fc2"]  # the embedding has 12 inputs, and float8's kernel wants multiples of 16
        module, callback = toy(dim=32, scheduler="sequential"), steps(targets=targets, **settings)
        options = {"max_epochs": 4, "accelerator": DEVICE, "devices": 1, "precision": precision}
        trainer(path, callback, every=1, **options).fit(module, loader(), ckpt_path=ckpt)
        return module, callback

    whole, callback = run(tmp_path / "whole")
    assert callback.phase == "lowrank" and all(torch.isfinite(p).all() for p in whole.parameters())
    if "then" not in settings:
        assert adapters(whole)
    for at in (7, 12, 20):
        again, _ = run(tmp_path / "again", tmp_path / "whole" / f"step={at}.ckpt")
        for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name, s=at: f"{n} from {s}: {m}")


@pytest.mark.parametrize("kind", frozen.KINDS)
@pytest.mark.parametrize("n", [32, 4096])
def test_a_frozen_layer_on_the_device_is_near_float64(kind, n):
    torch.manual_seed(0)
    net = nn.ModuleDict({"fc": nn.Linear(256, 512)}).to(DEVICE)
    lora.inject(net, {"fc": 8})
    for _, p in lora.adapter_parameters(net):
        p.data.normal_(std=0.05)
    exact = copy.deepcopy(net).double()
    refused = frozen.refuses(kind, torch.device(DEVICE))
    if refused:
        pytest.skip(refused)
    lora.freeze(net, {"fc": 8}, frozen_dtype=kind)
    x = torch.randn(n, 256, device=DEVICE, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = net["fc"](x)
    y.float().square().mean().backward()
    exact["fc"](x64).square().mean().backward()
    limit = 0.06 if kind == "float8" else 0.03
    assert (x.grad.double() - x64.grad).norm() / x64.grad.norm() < limit
    wanted = {name: p.grad for name, p in lora.adapter_parameters(exact)}
    for name, p in lora.adapter_parameters(net):
        assert (p.grad.double() - wanted[name]).norm() / wanted[name].norm() < limit, name


@pytest.mark.parametrize("wire", WIRES)
def test_a_message_has_the_same_bits_as_on_a_cpu(wire):
    x = torch.randn(7 * BLOCK, generator=torch.Generator().manual_seed(0))
    codec = Codec(wire)
    here, there = codec.decode(codec.encode(x)), codec.decode(codec.encode(x.to(DEVICE))).cpu()
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [
    {"update": "full", "outer_lr": 0.7, "outer_momentum": 0.9}, {"update": "galore"},
    {"update": "lora", "rank": 2, "heads": 2, "outer_lr": 0.7, "outer_momentum": 0.5},
], ids=str)  # fmt: skip
def test_every_update_of_lte_resumes_between_merges(tmp_path, settings):
    import lightning.pytorch as pl

    from tests.lte_galore_workers import GaLoreNet
    from tests.lte_workers import Net, Samples, Save
    from tests.lte_workers import loader as batches

    def fit(folder, ckpt=None):
        module = (GaLoreNet if settings["update"] == "galore" else Net)(dtype=torch.float32)
        run = pl.Trainer(
            accelerator=DEVICE, devices=1, max_epochs=-1, max_steps=12, strategy=LTEStrategy(merge_every=4, **settings),
            callbacks=[Save(folder, [6])], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        run.fit(module, batches(Samples(dtype=torch.float32), 8), ckpt_path=ckpt)
        return module

    whole, again = fit(tmp_path), fit(tmp_path / "again", tmp_path / "step=6.ckpt")
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in whole.state_dict().items())
