"""Two rates for every optimizer, and the optimizers of others: what they compute, what they keep, and that they resume."""

import copy
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lowrank_pretrain.baselines import muon as muon_file
from lowrank_pretrain.baselines.galore_torch import GaLoreTorch, galore_torch_optimizer
from lowrank_pretrain.baselines.muon import Muon
from lowrank_pretrain.baselines.pair import MATRICES
from lowrank_pretrain.baselines.sinkgd import SinkGD, sinkhorn
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.memory import optimizer_bytes
from lowrank_pretrain.models.optim import Optim, settings_win
from lowrank_pretrain.run.method import build
from tests.conftest import SHORT, VIT
from tests.reference.sinkgd import Twin
from tests.test_method import load
from tests.test_train import rows, sends, weights
from tests.toy import toy

BASELINES = ("muon", "sinkgd", "adamw8bit", "galore_torch")
NEEDS = {"adamw8bit": "bitsandbytes", "galore_torch": "galore_torch"}
PICTURES = [*SHORT, *VIT]
TEXT = [*SHORT, "experiment=galore_pocket", "data.seq_len=16", "model.config.hidden_size=32",
        "model.config.num_hidden_layers=1", "model.config.intermediate_size=48", "model.config.num_attention_heads=2",
        "model.config.num_key_value_heads=2"]  # fmt: skip


def make(name, module, **optim):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return build(OmegaConf.create(load(name))).optimizer(module, Optim(**optim))


def names_by_rate(optimizer, module):
    names = {id(p): name for name, p in module.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["lr"], set()).update(names[id(p)] for p in group["params"])
    return found


# ---- two rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "galore", "galore_8bit", "fira", "apollo", *BASELINES])
def test_every_method_has_the_same_two_rates(name):
    module = toy()
    if name.endswith(("8bit", "torch")):
        pytest.importorskip(NEEDS.get(name, "bitsandbytes"))
    if name == "full":
        optimizer = torch.optim.AdamW(Optim(lr=1e-3, rest_lr=2e-2).groups(module), lr=1e-3)
    else:
        optimizer = make(name, module, lr=1e-3, rest_lr=2e-2)
    by_rate = names_by_rate(optimizer, module)
    matrices = {
        n for n, p in module.named_parameters() if n.endswith(("embed.weight", "qkv.weight", "fc1.weight", "fc2.weight"))
    }
    assert by_rate == {1e-3: matrices, 2e-2: {n for n, _ in module.named_parameters()} - matrices}
    assert any(n.endswith("head.weight") for n in by_rate[2e-2])


def test_without_a_second_rate_the_groups_are_as_ever():
    groups = Optim(lr=1e-3).groups(toy())
    assert [group["name"] for group in groups] == ["decay", "no_decay"] and all("lr" not in group for group in groups)


def test_decay_takes_the_same_parameters_with_either_number_of_rates():
    module = toy()
    for rest_lr in (None, 1e-2):
        groups = Optim(lr=1e-3, rest_lr=rest_lr, weight_decay=0.1).groups(module)
        decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        assert decayed == {id(p) for p in module.parameters() if p.ndim >= 2}


def test_a_rest_rate_that_cannot_be_is_one_line():
    for value in (0, -1, float("nan"), True, "x"):
        with pytest.raises(ConfigError, match="rest_lr=.*: must be a number above 0, or null for the same as lr"):
            Optim(rest_lr=value)
    with pytest.raises(ConfigError, match="rest_lr=0.1: needs matrices that lr moves") as error:
        Optim(rest_lr=0.1).groups(nn.Sequential(nn.LayerNorm(4)))
    assert "\n" not in str(error.value)


def test_a_run_with_two_rates_resumes(run, capfd):
    whole, _ = run("whole", "method=full", "optim.rest_lr=1e-2", base=PICTURES)
    with pytest.raises(Interrupted):
        run("cut", "method=full", "optim.rest_lr=1e-2", sends(4), base=PICTURES)
    cut, _ = run("cut", "method=full", "optim.rest_lr=1e-2", "ckpt_path=last", base=PICTURES)
    assert weights(cut) == weights(whole) and rows(cut) == rows(whole)
    with pytest.raises(Interrupted):
        run("other", "method=full", "optim.rest_lr=1e-2", sends(4), base=PICTURES)
    capfd.readouterr()
    run("other", "method=full", "optim.rest_lr=2e-2", "ckpt_path=last", base=PICTURES)
    assert "rest_lr is now 0.02 (it was 0.01 in the checkpoint)" in capfd.readouterr().out


# ---- what they compute ------------------------------------------------------------------------------------------------------


def pair_of(cls, weight, bias, lr, **settings):
    groups = [{"params": [weight], MATRICES: True, "weight_decay": 0.1}, {"params": [bias], "lr": 3e-3, "weight_decay": 0.2}]
    return cls(groups, lr, **settings)


def random_steps(optimizer, weight, bias, steps=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in (weight, bias):
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((12, 20), (12,))]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_muon_is_torchs_muon_beside_torchs_adamw(tensors):
    other = copy.deepcopy(tensors)
    ours = pair_of(Muon, *tensors, 1e-2, momentum=0.9)
    random_steps(ours, *tensors)
    theirs = torch.optim.Muon([other[0]], lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([other[1]], lr=3e-3, weight_decay=0.2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for p in other:
            p.grad = torch.randn(p.shape, generator=generator)
        theirs.step(), adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors, other, strict=True))


def test_muon_of_timm_takes_the_same_steps_but_for_rounding(tensors, monkeypatch):
    pytest.importorskip("timm", minversion="1.0.20")
    other = copy.deepcopy(tensors)
    start = tensors[0].detach().clone()
    random_steps(pair_of(Muon, *tensors, 1e-2), *tensors)
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    theirs = pair_of(Muon, *other, 1e-2)
    random_steps(theirs, *other)
    assert type(theirs._of_matrices).__module__.startswith("timm.")
    assert torch.equal(tensors[1], other[1])
    assert (tensors[0] - other[0]).norm() < 0.02 * (tensors[0] - start).norm()


def test_a_torch_and_a_timm_without_muon_are_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    import timm.optim

    monkeypatch.delattr(timm.optim, "Muon", raising=False)
    with pytest.raises(ConfigError, match="method='muon': needs torch 2.9 or newer, or a timm that has Muon"):
        muon_file.muon_optimizer()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (1, 5)])
def test_sinkgd_equals_its_twin(shape):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    twin = Twin(weight.detach().clone(), 1e-2, weight_decay=0.1)
    bias = nn.Parameter(torch.zeros(3))
    optimizer = pair_of(SinkGD, weight, bias, 1e-2)
    for step in range(20):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (step - 10)
        grad[:, 0] *= step % 3 != 0
        weight.grad = grad.clone()
        optimizer.step()
        twin.step(grad)
        torch.testing.assert_close(weight.detach(), twin.w, rtol=1e-9, atol=1e-12)


def test_sinkhorn_makes_rows_and_columns_of_one_size():
    x = sinkhorn(torch.randn(30, 50, generator=torch.Generator().manual_seed(0)).exp() * 1e-30, 50)
    torch.testing.assert_close(x.norm(dim=1), torch.full((30,), 50**0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(x.norm(dim=0), torch.full((50,), 30**0.5), rtol=1e-4, atol=0)
    assert torch.equal(sinkhorn(torch.zeros(3, 4), 5), torch.zeros(3, 4))
    for size in (1e-45, 1e-30, 1.0, 1e30):  # rows and columns of zeros, as of neurons that are never active
        grad = size * torch.ones(40, 70)
        grad[3], grad[:, 5] = 0.0, 0.0
        x = sinkhorn(grad, 5)
        assert x.isfinite().all() and not x[3].any() and not x[:, 5].any() and x[0, 0] > 0
        assert torch.equal(sinkhorn(torch.zeros(40, 70), 5), torch.zeros(40, 70))
    assert sinkhorn(torch.ones(3, 4, dtype=torch.bfloat16), 5).dtype == torch.float32


def test_what_they_keep_of_a_matrix():
    module = nn.Sequential(nn.Linear(128, 128, bias=False))
    sizes = {}
    for name in ("muon", "sinkgd", "adamw8bit"):
        optimizer = make(name, module, lr=1e-3)
        module[0].weight.grad = torch.randn(128, 128)
        optimizer.step()
        sizes[name] = optimizer_bytes([optimizer]) / (8 * 128 * 128)  # 1: AdamW's
    assert sizes["muon"] == 0.5 and sizes["sinkgd"] == 0 and 0.25 < sizes["adamw8bit"] < 0.29


@pytest.mark.parametrize("proj_type", ["std", "left", "full"])
def test_galore_torch_is_the_package_itself(proj_type):
    package = pytest.importorskip("galore_torch")
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 20, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"rank": 4, "update_proj_gap": 3, "scale": 0.5, "proj_type": proj_type}
    pair = GaLoreTorch([{"params": [ours], MATRICES: True, "weight_decay": 0.1}], 1e-2, **settings)
    other = package.GaLoreAdamW([{"params": [theirs], **settings}], lr=1e-2, weight_decay=0.1, no_deprecation_warning=True)
    for _ in range(8):
        ours.grad = torch.randn(12, 20, generator=generator)
        theirs.grad = ours.grad.clone()
        with torch.autocast("cpu", torch.bfloat16):  # as manual optimization steps
            pair.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)  # its bases have another memory layout here
    assert all(isinstance(value, (int, torch.Tensor)) for value in pair.state[ours].values())


def test_galore_torch_that_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(
        ConfigError, match="method='galore_torch': needs galore-torch: pip install galore-torch, or take"
    ) as error:
        galore_torch_optimizer()
    assert "\n" not in str(error.value)


# ---- in Lightning, and what they refuse --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("base", [PICTURES, TEXT], ids=["pictures", "text"])
def test_they_resume_bit_for_bit(run, name, base):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    settings = [f"method={name}", "optim.lr=1e-3", "optim.rest_lr=5e-3"]
    if name == "adamw8bit" and base is PICTURES:
        settings += ["model.model_kwargs.embed_dim=64"]  # large enough for codes
    whole, summary = run("whole", *settings, base=base)
    assert summary["phases"][0]["phase"] == "full"
    with pytest.raises(Interrupted):
        run("cut", *settings, sends(6), base=base)
    cut, _ = run("cut", *settings, "ckpt_path=last", base=base)
    assert weights(cut) == weights(whole) and rows(cut) == rows(whole)


@pytest.mark.parametrize("name", ["full", *BASELINES])
def test_a_file_of_another_method_is_one_line_and_changes_nothing(name):
    def made(of):
        module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        optim = Optim(rest_lr=1e-3)
        optimizer = make(of, module, rest_lr=1e-3) if of != "full" else torch.optim.AdamW(optim.groups(module))
        settings_win(optimizer)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    ours = made(name)
    before = copy.deepcopy(ours.state_dict())
    for other in {"full", *BASELINES} - {name}:
        with pytest.raises(ConfigError, match="ckpt_path='optimizer state': is another optimizer's") as error:
            ours.load_state_dict(made(other).state_dict())
        assert "\n" not in str(error.value)
    ours.load_state_dict(before)
    ours.step()


@pytest.mark.parametrize("name", BASELINES)
def test_settings_of_the_run_win_over_those_of_the_file(name, capsys):
    module = nn.Sequential(nn.Linear(80, 64))
    old, new = make(name, module, lr=1e-3, weight_decay=0.1), make(name, module, lr=2e-3, weight_decay=0.2)
    for optimizer in (old, new):
        settings_win(optimizer)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    old.step()
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["initial_lr"] == 2e-3 and new.param_groups[0]["weight_decay"] == 0.2
    assert "lr is now 0.002 (it was 0.001 in the checkpoint)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["muon", "sinkgd", "galore_torch"])
def test_their_state_is_plain_and_survives_copies(name, tmp_path):
    module = toy()
    optimizer = make(name, module, lr=1e-2)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(module)
    loaded = make(name, twin, lr=1e-2)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied, other = copy.deepcopy((optimizer, module))
    for some, its in ((optimizer, module), (loaded, twin), (copied, other)):
        for p in its.parameters():
            p.grad = torch.full_like(p, 0.5)
        some.step()
    for a, b, c in zip(module.parameters(), twin.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_a_closure_and_a_frozen_matrix():
    module = toy()
    module.blocks[0].fc1.weight.requires_grad = False
    with pytest.warns(UserWarning, match="fc1 is frozen"):
        optimizer = make("muon", module, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in module.parameters() if p.requires_grad)
        loss.backward()
        return loss

    before = optimizer.step(closure)
    assert optimizer.step(closure) < before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("muon", {"momentum": 1.0}, r"method\.momentum=1\.0: must be a number of 0 or more, below 1"),
        ("muon", {"momentum": 0.0}, r"method\.nesterov=True: needs a momentum above 0"),
        ("muon", {"ns_steps": 0}, r"method\.ns_steps=0: must be an integer of 1 to 99"),
        ("muon", {"rank": 3}, r"method\.rank=3: is no key of this method; .*allowed: momentum, nesterov, ns_steps, targets"),
        ("muon", {"nesterov": 1}, r"method\.nesterov=1: must be true or false"),
        ("sinkgd", {"iterations": 0}, r"method\.iterations=0: must be an integer of 1 or more"),
        ("sinkgd", {"scale": 0}, r"method\.scale=0: must be a number above 0"),
        ("galore_torch", {"proj_type": "top"}, r"method\.proj_type='top': must be one of std, reverse_std, right, left, full"),
        ("adamw8bit", {"targets": "mlp"}, r"method\.targets='mlp': is no key of this method; allowed: none"),
    ],
)
def test_mistakes_are_one_line(name, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(load(name) | change)
    assert "\n" not in str(error.value)


def test_targets_that_match_nothing_are_named_by_the_optimizer():
    method = build(load("muon") | {"targets": "nothing*"})
    with pytest.raises(ConfigError, match="targets"):
        method.optimizer(toy(), Optim())
