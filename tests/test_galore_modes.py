"""Factored second moment, Nesterov and Muon's rule in GaLore's subspace: the maths by themselves, and the optimizer's modes."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.dtypes import multiplies_bfloat16
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.memory import optimizer_bytes
from lowrank_pretrain.galore import GaLoreAdamW, factored, orthogonal, residual
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.modes import mode_direction
from lowrank_pretrain.galore.subspace import captured, orthonormal, rotate
from tests import lte_galore_workers
from tests.reference.galore_modes import HalfTwin, ModeTwin, newton_schulz, rounded_newton_schulz
from tests.test_baselines import TEXT
from tests.test_galore_lightning import Regression, distance, fit
from tests.test_train import rows, sends, weights


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- the maths by themselves ----------------------------------------------------------------------------------------------


def test_the_factored_moment_has_the_full_ones_means():
    squares = [draw(5, 9, seed=i) for i in range(7)]
    full, row, col = torch.zeros(5, 9).double(), torch.zeros(5).double(), torch.zeros(9).double()
    for low in squares:
        full = 0.9 * full + 0.1 * low**2
        factored.average_squares(row, col, low, 0.9)
    torch.testing.assert_close(row, full.mean(1))
    torch.testing.assert_close(col, full.mean(0))
    v = factored.root(row, col) ** 2
    torch.testing.assert_close(v.mean(1), row)
    torch.testing.assert_close(v.mean(0), col)
    assert all(torch.equal(a, b) for a, b in zip(factored.factor(full), (full.mean(1), full.mean(0)), strict=True))


def test_a_rank_one_moment_is_kept_exactly():
    low = torch.outer(draw(4).abs(), draw(6, seed=1).abs())
    row, col = factored.factor(low**2)
    torch.testing.assert_close(factored.root(row, col), low)


def test_the_row_turns_as_the_full_moment_does():
    c = draw(4, 4)
    v = draw(4, 6, seed=1) ** 2
    _, turned = rotate(v, v, c)
    torch.testing.assert_close(factored.turn(v.mean(1), c), turned.mean(1))


def test_a_step_that_does_not_count_leaves_the_means_alone():
    row, col = draw(4).abs(), draw(6, seed=1).abs()
    before = row.clone(), col.clone()
    factored.average_squares(row, col, torch.zeros(4, 6).double(), 0.9, keep=torch.zeros(()).double())
    assert torch.equal(row, before[0]) and torch.equal(col, before[1])
    factored.average_squares(row, col, draw(4, 6), 0.9, keep=torch.ones(()).double())
    assert not torch.equal(row, before[0])


def test_nothing_has_a_root_of_zero():
    assert torch.equal(factored.root(torch.zeros(3), torch.zeros(5)), torch.zeros(3, 5))


def test_nesterov_is_one_step_ahead():
    low, m = draw(3, 5), torch.zeros(3, 5).double()
    m.lerp_(low, 1 - 0.9)
    torch.testing.assert_close(factored.nesterov(m, low, 0.9), (1 - 0.9**2) * low)  # its weights' sum after one step


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (1, 7)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_gram_form_is_muons_iteration(shape, dtype, near):
    u = draw(*shape).to(dtype) * 1e-3
    ours = orthogonal.orthogonalise(u)
    torch.testing.assert_close(ours, newton_schulz(u), rtol=0, atol=near)
    values = torch.linalg.svdvals(ours)
    assert 0.3 < values.min() and values.max() < 1.3


def test_the_subspaces_orthogonal_factor_is_the_whole_matrixs():
    p, u = orthonormal(draw(20, 6)), draw(6, 30, seed=1)
    torch.testing.assert_close(p @ orthogonal.orthogonalise(u), newton_schulz(p @ u), rtol=0, atol=1e-12)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonal.orthogonalise(torch.zeros(3, 5)), torch.zeros(3, 5))
    assert not orthogonal.orthogonalise_whole(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_whole_matrixs_orthogonal_factor_is_muons(shape, dtype):
    u = draw(*shape).to(dtype) * 1e-3
    ours = orthogonal.orthogonalise_whole(u)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, newton_schulz(u), rtol=0, atol=1e-12)
    else:
        torch.testing.assert_close(ours.float(), rounded_newton_schulz(u.float()), rtol=0, atol=0.02)


def test_a_column_outside_of_the_subspace_does_not_outweigh_the_others():
    p, g, n = orthonormal(draw(16, 4)), draw(16, 24, seed=1), draw(4, 24, seed=2)
    g[:, 0] -= p @ (p.T @ g[:, 0])  # R's column is rounding
    weight = torch.zeros(16, 24, dtype=torch.float64)
    residual.muon(weight, g, p, p.T @ g, -n, 1.0, None)
    assert weight[:, 1:].square().mean().sqrt() > 0.15  # AdamW's: 0.2


def test_products_without_instructions_for_bfloat16_are_the_same(monkeypatch):
    u = draw(8, 20).float()
    ours = orthogonal.orthogonalise_whole(u)
    monkeypatch.setattr(orthogonal, "multiplies_bfloat16", lambda device: not multiplies_bfloat16(device))
    torch.testing.assert_close(orthogonal.orthogonalise_whole(u), ours, rtol=0, atol=0.02)


def test_the_scale_is_adamws():
    d, k, r = 64, 200, 16
    o = torch.linalg.qr(draw(d, r))[0] @ torch.linalg.qr(draw(k, r, seed=1))[0].T  # r singular values of 1
    rms = (o * orthogonal.like_adamw(d, k, r)).square().mean().sqrt().item()
    assert math.isclose(rms, 0.2, rel_tol=1e-6)
    assert math.isclose(orthogonal.like_adamw(d, k, d), 0.2 * math.sqrt(max(d, k)))
    if hasattr(torch.optim, "Muon"):
        from torch.optim._muon import _adjust_lr

        assert math.isclose(_adjust_lr(1.0, "match_rms_adamw", torch.Size((d, k))), orthogonal.like_adamw(d, k, min(d, k)))


# ---- the optimizer's modes against their twins ------------------------------------------------------------------------------

FACTORED = {"second_moment": "factored", "nesterov": True}
MUON = {"rule": "muon", "nesterov": True}
WHOLE = {**MUON, "residual": "muon"}
MODES = {
    "factored": {"second_moment": "factored"}, "nesterov": {"nesterov": True}, "factored nesterov": FACTORED,
    "muon": {"rule": "muon"}, "muon nesterov": MUON, "factored fira": {**FACTORED, "residual": "fira"},
    "muon fira": {**MUON, "residual": "fira"}, "factored gap": {**FACTORED, "refresh": "subspace"},
    "muon gap": {**MUON, "refresh": "subspace"}, "factored both": {**FACTORED, "proj_type": "full"},
    "muon both": {**MUON, "proj_type": "full"}, "factored longer": {**FACTORED, "proj_type": "reverse_std"},
    "muon longer": {**MUON, "proj_type": "reverse_std"}, "factored every third": {**FACTORED, "track_every": 3},
    "factored whole": {**FACTORED, "residual": "muon"}, "muon whole": {**MUON, "residual": "muon"},
    "adam whole": {"residual": "muon"}, "muon whole, no nesterov": {"rule": "muon", "residual": "muon"},
}  # fmt: skip


def twin_of(weight, rank, settings, kind=ModeTwin, **more):
    names = {"update_proj_gap": "gap", "rotate_moments": "rotate"}
    return kind(weight, rank, "w", 1e-2, **{names.get(key, key): value for key, value in settings.items()}, **more)


def optimizer_of(p, rank, settings, **more):
    return GaLoreAdamW([{"params": [("w", p)], "rank": rank, **settings}], lr=1e-2, seed=0, **more)


def lockstep(shape, rank, settings, steps, near=1e-5, dtype=torch.float64):
    settings = {"refresh": "track", "update_proj_gap": 100, "scale": 1.0, **settings}
    p = nn.Parameter(draw(*shape, dtype=dtype))
    matrix = p.detach().clone().reshape(shape[0], -1)
    twin, ours = twin_of(matrix, rank, settings, weight_decay=0.1), optimizer_of(p, rank, settings, weight_decay=0.1)
    drift = draw(*shape, seed=7, dtype=dtype)
    for step in range(steps):
        grad = draw(*shape, seed=step + 10, dtype=dtype) + drift * math.cos(step / 30)
        p.grad = grad.clone()
        ours.step()
        twin.step(grad.reshape(shape[0], -1))
    error = (p.detach().reshape_as(matrix) - matrix).norm() / matrix.norm()
    assert error < near, error
    return ours, p


@pytest.mark.parametrize("name", MODES)
def test_every_mode_equals_its_twin_over_300_steps(name):
    lockstep((12, 20), 4, MODES[name], 300)


@pytest.mark.parametrize("mode", [FACTORED, MUON, WHOLE], ids=["factored", "muon", "whole"])
@pytest.mark.parametrize(("shape", "rank"), [((20, 12), 4), ((12, 12), 5), ((8, 3, 2, 2), 4), ((10, 14), 10)])
def test_modes_equal_their_twins_in_every_shape(mode, shape, rank):
    lockstep(shape, rank, mode, 300)


def half_lockstep(shape, rank, settings, together=False, steps=300):
    """Distances of P m and of W from the twin that rounds to bfloat16 where the optimizer does, step by step.

    Unless ``together``, the twin takes each step from the optimizer's state. By itself a tracked basis in float32 would show
    how it amplifies rounding: an entry of the sketch next to the middle of two bfloat16 numbers goes either way.
    """
    settings = {"refresh": "track", "update_proj_gap": 100, "scale": 1.0, **settings}
    p = nn.Parameter(draw(*shape).to(torch.bfloat16))
    matrix = p.detach().float().reshape(shape[0], -1)
    twin = twin_of(matrix, rank, settings, weight_decay=0.1, kind=HalfTwin)
    ours = optimizer_of(p, rank, settings, weight_decay=0.1)
    drift, apart = draw(*matrix.shape, seed=7, dtype=torch.float32), []
    for step in range(steps):
        grad = draw(*matrix.shape, seed=step + 10, dtype=torch.float32) + drift * math.cos(step / 30)
        p.grad = grad.reshape(shape).to(torch.bfloat16)
        twin.step(p.grad.float().reshape_as(matrix))
        ours.step()
        state, now = ours.state[p], p.detach().float().reshape_as(matrix)
        assert all(value.dtype == torch.float32 for key, value in state.items() if key != "step")
        wholes = [
            basis @ m if other is None else basis @ m @ other.T
            for basis, m, other in ((twin.p, twin.m, twin.q), (state["proj"], state["exp_avg"], state.get("proj_right")))
        ]
        apart.append([((b - a).norm() / a.norm()).item() for a, b in ((matrix, now), wholes)])
        if not together:
            matrix.copy_(now)
            twin.follow(state)
    return torch.tensor(apart).unbind(1)


@pytest.mark.parametrize(
    ("name", "shape", "rank"),
    [
        *((name, (12, 20), 4) for name in MODES),
        *((name, *of) for name in ("factored nesterov", "muon nesterov")
          for of in (((20, 12), 4), ((12, 12), 5), ((8, 3, 2, 2), 4), ((10, 14), 10))),
    ],
)  # fmt: skip
def test_every_mode_in_half_precision_equals_the_twin_that_rounds_alike(name, shape, rank):
    of_weight, of_momentum = half_lockstep(shape, rank, MODES[name])
    rounding = torch.finfo(torch.bfloat16).eps
    equal = 0.95 if "whole" in name else 0.98  # Newton-Schulz hands one rounding that goes the other way to every entry
    assert of_weight.max() < rounding and (of_weight < 1e-5).float().mean() > equal
    assert of_momentum.max() < rounding and (of_momentum < 1e-5).float().mean() > 0.98


@pytest.mark.parametrize("name", ["factored gap", "muon gap"])
def test_modes_in_half_precision_stay_with_their_twins_for_300_steps(name):
    of_weight, of_momentum = half_lockstep((12, 20), 4, MODES[name], together=True)
    assert of_weight[-1] < 1e-5 and of_momentum[-1] < 1e-5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_full_rank_muon_is_torchs(monkeypatch):
    import torch.optim._muon as theirs

    def in_full(grad, coefficients, steps, eps):  # torch rounds this to bfloat16
        return newton_schulz(grad, steps)

    monkeypatch.setattr(theirs, "_zeropower_via_newtonschulz", in_full)
    for shape in ((12, 20), (20, 12)):
        p, q = (nn.Parameter(draw(*shape)) for _ in range(2))
        ours = optimizer_of(p, 12, {**MUON, "scale": 1.0, "refresh": "track"}, betas=(0.95, 0.999))
        other = torch.optim.Muon([q], lr=1e-2, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        for step in range(30):
            for one in (p, q):
                one.grad = draw(*shape, seed=step + 5)
            ours.step(), other.step()
        assert (p - q).norm() < 1e-6 * (p - draw(*shape)).norm()
    monkeypatch.undo()
    u = draw(12, 20, dtype=torch.float32)  # and their rounding is that of bfloat16
    theirs_rounded = theirs._zeropower_via_newtonschulz(u, orthogonal.QUINTIC, 5, 1e-7).float()
    assert (theirs_rounded - orthogonal.orthogonalise(u)).norm() < 0.03 * theirs_rounded.norm()


# ---- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FACTORED, MUON, WHOLE], ids=["factored", "muon", "whole"])
def test_the_state_is_a_fifth_of_adamws(mode):
    """At a quarter of a LLaMA's width, as counted from live tensors."""
    shapes = [(256, 256)] * 4 + [(688, 256)] * 2 + [(256, 688)]
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = GaLoreAdamW([{"params": matrices, "rank": 64, "refresh": "track", **mode}], lr=1e-3)
    for p in matrices:
        p.grad = torch.randn_like(p)
    optimizer.step()
    adamw = sum(8 * p.numel() for p in matrices)
    held = optimizer_bytes([optimizer]) - 8 * len(matrices)  # step counters
    assert held <= 0.21 * adamw
    assert optimizer.formula_bytes() == held


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("mode", [FACTORED, MUON, {"nesterov": True}], ids=["factored", "muon", "nesterov"])
def test_modes_resume_bit_for_bit(mode, moments, tmp_path):
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    settings = {**mode, "moments": moments, "refresh": "track"}

    def make(start):
        p = nn.Parameter(start.clone())
        return p, optimizer_of(p, 32, settings)

    def go(p, optimizer, steps):
        for step in steps:
            p.grad = draw(64, 160, seed=step + 1, dtype=torch.float32)
            optimizer.step()

    p, whole = make(draw(64, 160, dtype=torch.float32))
    go(p, whole, range(4))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    q, resumed = make(p.detach())
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied, r = copy.deepcopy((whole, p))
    go(p, whole, range(4, 8)), go(q, resumed, range(4, 8)), go(r, copied, range(4, 8))
    assert torch.equal(p, q) and torch.equal(p, r)
    assert whole.state[p]["exp_avg"].dtype == (torch.uint8 if moments == "8bit" else torch.float32)
    assert whole.formula_bytes() == optimizer_bytes([whole]) - 8


def test_a_checkpoint_of_another_mode_is_one_line():
    p = nn.Parameter(draw(8, 12, dtype=torch.float32))
    made = {}
    for name, mode in {"full": {}, "factored": {"second_moment": "factored"}, "muon": {"rule": "muon"}}.items():
        made[name] = optimizer_of(p, 4, mode)
        p.grad = torch.ones_like(p)
        made[name].step()
    for here, there, key in (("full", "factored", "second_moment"), ("factored", "full", "second_moment"),
                             ("muon", "full", "rule"), ("full", "muon", "rule"),
                             ("muon", "factored", "rule"), ("factored", "muon", "rule")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{key}=.*the checkpoint was written with .*use that, or start afresh") as error:
            made[here].load_state_dict(made[there].state_dict())
        assert "\n" not in str(error.value)
    damaged = made["factored"].state_dict()
    damaged["state"][0] = {**damaged["state"][0], "exp_avg_sq_row": torch.zeros(3)}
    with pytest.raises(ConfigError, match="its exp_avg_sq_row is"):
        made["factored"].load_state_dict(damaged)


def test_nesterov_may_change_at_a_resume_and_a_file_without_modes_loads():
    p = nn.Parameter(draw(8, 12, dtype=torch.float32))
    old = optimizer_of(p, 4, {})
    p.grad = torch.ones_like(p)
    old.step()
    saved = old.state_dict()
    for group in (*saved["param_groups"], *saved["asked"]):
        for key in ("second_moment", "nesterov", "rule"):
            del group[key]
    new = optimizer_of(p, 4, {"nesterov": True})
    new.load_state_dict(saved)
    assert new.param_groups[0]["nesterov"] is True
    new.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"second_moment": "factored", "rule": "muon"}, "second_moment='factored': rule=muon keeps no second moment"),
        ({"nesterov": True, "betas": (0.0, 0.999)}, "nesterov=True: needs momentum"),
        ({"rule": "muon", "variant": "apollo"}, "rule='muon': orthogonalises the momentum in a basis"),
        ({"second_moment": "half"}, "second_moment='half': must be one of full, factored"),
        ({"rule": "lion"}, "rule='lion': must be one of adam, muon"),
        ({"nesterov": 1}, "nesterov=1: must be true or false"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    for make in (
        lambda: GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}], **settings),
        lambda: GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2, **settings}]),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_vector_has_no_orthogonal_factor():
    with pytest.raises(ConfigError, match="Norms and biases belong in a group without `rank`"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4))], "rank": 2}], rule="muon")
    with pytest.warns(UserWarning, match="rule='muon' has no effect yet: no parameter group has a rank"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4))], "rule": "muon"}])


def test_a_mode_that_changes_in_the_middle_is_refused_and_nesterov_is_not():
    p = nn.Parameter(draw(8, 12, dtype=torch.float32))
    optimizer = optimizer_of(p, 4, {"second_moment": "factored"})
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["nesterov"] = True
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.0, 0.999)
    with pytest.raises(ConfigError, match="nesterov=True: needs momentum"):
        optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    optimizer.param_groups[0]["second_moment"] = "full"
    with pytest.raises(ConfigError, match="second_moment='full': was another when w made its state"):
        optimizer.step()


@pytest.mark.parametrize("mode", [FACTORED, MUON, WHOLE], ids=["factored", "muon", "whole"])
def test_another_rank_in_the_middle_takes_the_moments_along(mode):
    p = nn.Parameter(draw(16, 24))
    optimizer = optimizer_of(p, 4, {**mode, "refresh": "track"})
    for rank, step in ((4, 0), (4, 1), (6, 2), (6, 3)):
        optimizer.param_groups[0]["rank"] = rank
        p.grad = draw(16, 24, seed=step)
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].shape == (6, 24) and p.isfinite().all()


# ---- together with everything else -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [FACTORED, MUON, WHOLE], ids=["factored", "muon", "whole"])
def test_an_adopted_matrix_goes_over_into_the_mode(mode):
    model = nn.Sequential(nn.Linear(12, 20, bias=False))
    p = model[0].weight
    optimizer = GaLoreAdamW([{"params": [p], "refresh": "track", **mode}], lr=1e-2)

    def step(seed):
        p.grad = draw(20, 12, seed=seed, dtype=torch.float32)
        optimizer.step()

    step(0), step(1)
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.adopt({"0": 4}, model)
    step(2)
    state = optimizer.state[p]
    assert "exp_avg_sq" not in state and state["step"] == 3
    basis = state["proj"]
    entered = basis.T @ before["exp_avg"].T
    low = basis.T @ p.grad.T
    torch.testing.assert_close(state["exp_avg"], 0.9 * entered + 0.1 * low, rtol=0, atol=1e-5)
    if mode is FACTORED:
        row = ((basis**2).T @ before["exp_avg_sq"].T).mean(1)
        torch.testing.assert_close(state["exp_avg_sq_row"], 0.999 * row + 0.001 * (low**2).mean(1), rtol=1e-4, atol=1e-8)
    saved = copy.deepcopy(optimizer.state_dict())
    step(3)
    after = p.detach().clone()
    again = GaLoreAdamW([{"params": [p], "refresh": "track", **mode}], lr=1e-2)
    again.load_state_dict(saved)
    assert again.projected(p).rank == 4 and after.isfinite().all()


@pytest.mark.parametrize("mode", [FACTORED, MUON], ids=["factored", "muon"])
@pytest.mark.parametrize("layerwise", [False, True])
def test_modes_accumulate(mode, layerwise):
    """Four micro-batches of a quarter are one batch, layer by layer or not."""
    settings = {**mode, "refresh": "subspace", "update_proj_gap": 3}
    found = []
    for batch_size in (8, 2):
        module = Regression(**settings, layerwise=layerwise)
        fit(module, batch_size, accumulate_grad_batches=8 // batch_size)
        found.append(module)
    assert distance(*found) < 2e-4


@pytest.mark.parametrize("mode", [FACTORED, MUON], ids=["factored", "muon"])
def test_modes_keep_the_form_of_lte(mode):
    """W = C·W_base + P·D between two merges, as LTE's update=galore keeps it, against the optimizer by itself."""
    ours, theirs = (nn.Parameter(draw(6, 10)) for _ in range(2))
    settings = {**mode, "update_proj_gap": 10, "stagger": False}
    optimizers = [optimizer_of(p, 2, settings, weight_decay=0.5) for p in (ours, theirs)]
    optimizers[0].local[ours] = LocalUpdate(ours)
    for step in range(10):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = draw(6, 10, seed=step + 1)
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [FACTORED, MUON], ids=["factored", "muon"])
def test_two_workers_of_lte_merge_in_the_modes(ranks, mode):
    found = ranks(2, lte_galore_workers.run, 2, settings=mode)
    for name, weight in found[0]["weights"].items():
        assert torch.equal(weight, found[1]["weights"][name]) and weight.isfinite().all()


@pytest.mark.parametrize("mode", [FACTORED, MUON], ids=["factored", "muon"])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(mode):
    """As on a device, where the answer comes a step later: everything is masked by a flag."""
    low, m = draw(4, 6), draw(4, 6, seed=1)
    second = [draw(4, seed=2).abs(), draw(6, seed=3).abs()] if mode is FACTORED else []
    group = {"betas": (0.9, 0.999), "eps": 1e-6, "correct_bias": True, "nesterov": True, "rule": mode.get("rule", "adam"),
             "residual": None}  # fmt: skip
    for flag in (0.0, 1.0):
        kept = [m.clone(), *(t.clone() for t in second)]
        bad = low.clone()
        bad[0, 0] = float("nan") if flag else bad[0, 0]
        n = mode_direction(bad, kept[0], kept[1:], 3, group, (8, 6), torch.tensor(flag))
        plain = [m.clone(), *(t.clone() for t in second)]
        expected = mode_direction(low, plain[0], plain[1:], 3, group, (8, 6))
        if flag:
            assert not n.any() and all(torch.equal(a, b) for a, b in zip(kept, [m, *second], strict=True))
        else:
            torch.testing.assert_close(n, expected)
            torch.testing.assert_close(kept, plain)


@pytest.mark.parametrize("mode", [FACTORED, MUON, WHOLE], ids=["factored", "muon", "whole"])
def test_zero_gradients_move_nothing_and_make_no_basis(mode):
    p = nn.Parameter(draw(8, 12, dtype=torch.float32))
    optimizer = optimizer_of(p, 4, {**mode, "refresh": "track"})
    start = p.detach().clone()
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p, start)
    p.grad = draw(8, 12, seed=3, dtype=torch.float32)
    optimizer.step()
    kept = optimizer.state[p]["proj"]
    assert captured(p.grad, kept) > 0.5 and not torch.equal(p, start)


def untimed(row):
    return {key: value for key, value in row.items() if key != "galore/refresh_ms"}


@pytest.mark.parametrize("name", ["galore_factored", "galore_muon"])
@pytest.mark.parametrize("more", [(), ("method.residual=fira",), ("method.residual=muon",)], ids=["", "fira", "muon"])
def test_the_methods_run_and_resume(run, name, more):
    base = [*TEXT, f"method={name}", "method.rank=8", "optim.rest_lr=1e-2", *more]
    whole, _ = run("whole", base=base)
    with pytest.raises(Interrupted):
        run("cut", sends(6), base=base)
    cut, _ = run("cut", "ckpt_path=last", base=base)
    assert weights(cut) == weights(whole)
    assert [untimed(row) for row in rows(cut)] == [untimed(row) for row in rows(whole)]
