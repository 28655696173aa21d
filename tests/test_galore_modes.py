"""Factored second moment, Nesterov and Muon's rule in GaLore's subspace: the maths by themselves, and the optimizer's modes."""

import math

import pytest
import torch

from lowrank_pretrain.galore import factored, orthogonal
from lowrank_pretrain.galore.subspace import orthonormal, rotate
from tests.reference.galore_modes import newton_schulz


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


def test_the_scale_is_adamws():
    d, k, r = 64, 200, 16
    o = torch.linalg.qr(draw(d, r))[0] @ torch.linalg.qr(draw(k, r, seed=1))[0].T  # r singular values of 1
    rms = (o * orthogonal.like_adamw(d, k, r)).square().mean().sqrt().item()
    assert math.isclose(rms, 0.2, rel_tol=1e-6)
    assert math.isclose(orthogonal.like_adamw(d, k, d), 0.2 * math.sqrt(max(d, k)))
    if hasattr(torch.optim, "Muon"):
        from torch.optim._muon import _adjust_lr

        assert math.isclose(_adjust_lr(1.0, "match_rms_adamw", torch.Size((d, k))), orthogonal.like_adamw(d, k, min(d, k)))
