"""Odd shapes, ranks, gradients and moments to stop at: the optimizer against the slow twin, and against itself."""

import io

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW
from tests.reference.galore import Twin
from tests.reference.galore_modes import ModeTwin

SHAPES = [(1, 7), (7, 1), (1, 1), (2, 3), (13, 4), (4, 13), (16, 17), (6, 3, 2, 2), (8, 2, 3)]
MODES = [
    {}, {"rotate": False}, {"refresh": "track"}, {"residual": "fira"}, {"refresh": "track", "residual": "fira"},
    {"residual": "muon"}, {"variant": "apollo"},
]  # fmt: skip
SETTINGS = [{"gap": 1, "weight_decay": 0.0}, {"gap": 3, "weight_decay": 0.1, "betas": (0.0, 0.9)}]


def draw(shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(start, rank, kind, *, gap, weight_decay, betas=(0.9, 0.999), rotate=True, name="parameter 0 of group 0", **mode):
    p, w = nn.Parameter(start.clone()), start.clone().flatten(1)
    group = {"params": [p], "rank": rank, "proj_type": kind, "update_proj_gap": gap, "scale": 0.7, "rotate_moments": rotate}
    shared = {"betas": betas, "weight_decay": weight_decay, "seed": 1}
    optimizer = GaLoreAdamW([{**group, **mode}], lr=1e-2, stagger=False, **shared)
    twin_of_mode = ModeTwin if mode.get("residual") == "muon" else Twin
    twin = twin_of_mode(w, rank, name, 1e-2, scale=0.7, gap=gap, proj_type=kind, rotate=rotate, **shared, **mode)
    return optimizer, twin, p, w


@pytest.mark.parametrize("kind", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_odd_shapes_equal_the_twin(kind, mode):
    """With gradients that are missing, tiny or of rank 1 now and then, and another learning rate at each step."""
    if kind == "full" and (mode.get("residual") or mode.get("variant")):
        pytest.skip("refused")
    for shape in SHAPES:
        smaller = min(draw(shape, 0).flatten(1).shape)
        for rank in sorted({1, max(1, smaller // 2), smaller}):
            for setting in SETTINGS:
                start = draw(shape, 0)
                optimizer, twin, p, w = pair(start, rank, kind, **setting, **mode)
                for step in range(8):
                    optimizer.param_groups[0]["lr"] = twin.lr = 1e-2 * (1 + step % 3)
                    grad = draw(shape, 1 + step) + 0.5 * start
                    if step == 2:
                        p.grad = None
                        optimizer.step()
                        continue
                    if step == 5:
                        grad = 1e-9 * grad
                    if step == 6 and rank < smaller:
                        grad = (grad.flatten(1)[:, :1] @ grad.flatten(1)[:1]).view(shape)
                    p.grad = grad.clone()
                    optimizer.step()
                    twin.step(grad.flatten(1))
                assert (p.detach().flatten(1) - w).norm() < 1e-7 * w.norm(), (shape, rank, setting)


def test_a_residual_that_rounding_made_does_not_hold_back_the_next_one():
    # a gradient of the basis' own rank has none; Fira's limiter would let the next one grow by 1 % a step from 1e-7
    results = []
    for first in (1.0, 0.0):
        p = nn.Parameter(torch.zeros(12, 20))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "residual": "fira", "stagger": False}], lr=1e-2)
        low_rank = draw((12, 4), 0, torch.float32) @ draw((4, 20), 1, torch.float32)
        for step in range(4):
            p.grad = low_rank + (first if step == 0 else 1.0) * 0.1 * draw((12, 20), 2 + step, torch.float32)
            optimizer.step()
        results.append(optimizer.state[p]["residual_norm"])
    assert 0.3 < results[1] / results[0] < 3


@pytest.mark.parametrize("mode", [{}, {"refresh": "track"}, {"residual": "fira"}, {"residual": "muon"}], ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "full"])
def test_a_basis_waits_for_the_first_gradient_that_is_not_zero(kind, mode):
    # weights in front of a layer that starts at zero; with a warm-up from lr 0 it stays there for more than one step
    if kind == "full" and mode.get("residual"):
        pytest.skip("refused")
    shape = (14, 18)
    optimizer, twin, p, w = pair(draw(shape, 0), 4, kind, gap=50, weight_decay=0.1, **mode)
    for step in range(6):
        grad = draw(shape, 1 + step) * (step > 1)
        p.grad = grad.clone()
        optimizer.step()
        twin.step(grad)
        if step == 1:
            resumed = io.BytesIO()
            torch.save(optimizer.state_dict(), resumed)
            resumed.seek(0)
            optimizer.load_state_dict(torch.load(resumed, weights_only=True))
    assert (p.detach() - w).norm() < 1e-7 * w.norm()
    grad, basis = optimizer.projected(p).matrix(draw(shape, 3)), optimizer.state[p]["proj"]
    if not mode:
        assert (basis.T @ grad).norm() > 0.7 * grad.norm()  # not the coordinate axes that zeros gave


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", [{}, {"refresh": "track", "residual": "fira"}, {"moments": "8bit"}, {"proj_type": "full"},
                                  {"refresh": "track", "residual": "muon", "rule": "muon"}],
                         ids=str)  # fmt: skip
def test_resume_is_bit_exact_at_every_step(mode, dtype):
    if mode.get("moments") == "8bit":
        pytest.importorskip("bitsandbytes")
    shapes = [(72, 64), (64, 72), (16, 3, 2, 2), (6,)]

    def make():
        params = [nn.Parameter(draw(shape, i, dtype)) for i, shape in enumerate(shapes)]
        groups = [{"params": params[:2], "rank": 64 if "moments" in mode else 5, "update_proj_gap": 3, **mode},
                  {"params": params[2:3], "rank": 4, "update_proj_gap": 2, **mode}, {"params": params[3:]}]  # fmt: skip
        return params, GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1)

    def step(params, optimizer, t):
        for i, p in enumerate(params):
            p.grad = None if (t + i) % 5 == 4 else draw(p.shape, 100 * t + i, dtype)
        optimizer.step()

    params, optimizer = make()
    files = []
    for t in range(8):
        files.append(io.BytesIO())
        torch.save((optimizer.state_dict(), [p.detach() for p in params]), files[-1])
        step(params, optimizer, t)
    for begin, file in enumerate(files):
        file.seek(0)
        state, weights = torch.load(file, weights_only=True)
        again, other = make()
        for p, w in zip(again, weights, strict=True):
            p.data.copy_(w)
        other.load_state_dict(state)
        for t in range(begin, 8):
            step(again, other, t)
        assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True)), begin


@pytest.mark.parametrize("size", [1e-20, 1e15])
@pytest.mark.parametrize("mode", [{}, {"refresh": "track"}, {"residual": "fira"}, {"residual": "muon"},
                                  {"variant": "apollo"}], ids=str)  # fmt: skip
def test_gradients_of_any_size(mode, size):
    p = nn.Parameter(draw((70, 64), 0, torch.float32))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 6, "update_proj_gap": 2, **mode}], eps=1e-30)
    for t in range(6):
        p.grad = size * draw(p.shape, t, torch.float32)
        optimizer.step()
        assert p.isfinite().all()
    if "variant" not in mode:
        basis = optimizer.state[p]["proj"]
        assert (basis.T @ basis - torch.eye(6)).abs().max() < 1e-4


NEW_MODES = [{"second_moment": "factored", "nesterov": True}, {"rule": "muon"}, {"nesterov": True}, {"residual": "fira"}]


@pytest.mark.parametrize("mode", [*NEW_MODES, {"variant": "apollo"}], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (12, 8)])
def test_a_spike_whose_square_overflows_leaves_every_shape_finite(mode, shape):
    # the norm of a single number is that number, and does not show that its square overflows
    p = nn.Parameter(draw(shape, 0, torch.float32))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 1, "update_proj_gap": 2, **mode}])
    with pytest.warns(UserWarning, match="whose square overflows"):
        for t, size in enumerate((1.0, 1e30, 1.0, 0.0, 1e-30)):
            p.grad = size * draw(shape, 1 + t, torch.float32)
            optimizer.step()
            assert p.isfinite().all(), size


@pytest.mark.parametrize("mode", [*NEW_MODES, {"residual": "fira", "rule": "muon"}, {"variant": "apollo"},
                                  {"residual": "muon", "rule": "muon"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("moments", ["float32", "grad"])
def test_float16_weights_stay_finite(mode, moments):
    p = nn.Parameter(draw((12, 8), 0, torch.float16))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 3, "update_proj_gap": 2, "moments": moments, **mode}])
    for t, size in enumerate((1.0, 0.0, 1e-6, 1e3, 1.0, 1.0)):  # fmt: skip  # zeros, squares below and above float16's range
        p.grad = size * draw((12, 8), 1 + t, torch.float16)
        optimizer.step()
        assert p.isfinite().all(), size


def test_a_factored_moment_decays_next_to_moments_in_half_precision():
    # rounded to bfloat16, a decay of .001 a step would be none
    p = nn.Parameter(draw((12, 8), 0, torch.bfloat16))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 3, "moments": "grad", "second_moment": "factored"}])
    rows = []
    for t in range(300):
        p.grad = (1.0 if t < 20 else 1e-3) * draw((12, 8), t, torch.bfloat16)
        optimizer.step()
        rows.append(optimizer.state[p]["exp_avg_sq_row"].sum().item())
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert rows[-1] < 0.8 * rows[19]
    other = GaLoreAdamW([{"params": [p], "rank": 3, "moments": "grad", "second_moment": "factored"}])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[p]["exp_avg_sq_row"], optimizer.state[p]["exp_avg_sq_row"])


def test_layouts_of_weight_and_gradient_do_not_matter():
    results = []
    for turned in (False, True):
        lay = (lambda t: t.t().contiguous().t()) if turned else (lambda t: t)
        p = nn.Parameter(lay(draw((20, 12), 0)))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gap": 2}])
        for t in range(6):
            p.grad = lay(draw((20, 12), t)) if t else torch.ones(1, 12, dtype=torch.float64).expand(20, 12)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


LAYOUTS = {  # N-D weights that are not contiguous; most have a matrix view, as other frameworks' weights do after a conversion
    "turned 1x1": lambda: draw((24, 16), 0, torch.float32).t()[:, :, None, None],
    "permuted 1x1": lambda: draw((1, 1, 24, 16), 0, torch.float32).permute(3, 2, 0, 1),
    "turned, length 1": lambda: draw((24, 16), 0, torch.float32).t().unsqueeze(-1),
    "permuted 3x3": lambda: draw((3, 3, 6, 16), 0, torch.float32).permute(3, 2, 0, 1),
    "cut": lambda: draw((16, 32, 3), 0, torch.float32)[:, :24],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", [{}, {"proj_type": "right", "residual": "fira"}, {"variant": "apollo"},
                                  {"proj_type": "full"}], ids=str)  # fmt: skip
def test_weights_of_any_layout_equal_contiguous_ones(layout, mode):
    results = []
    for weight in (LAYOUTS[layout](), LAYOUTS[layout]().contiguous()):
        p = nn.Parameter(weight)
        optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "seed": 1, **mode}], lr=1e-2)
        for t in range(3):
            p.grad = draw(p.shape, 1 + t, torch.float32)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("mode", [{"betas": (0.9, 0.0)}, {"betas": (0.9, 0.0), "second_moment": "factored"},
                                  {"betas": (0.0, 0.99), "rule": "muon"}], ids=str)  # fmt: skip
def test_resume_is_bit_exact_where_a_moment_is_zero_again(mode):
    def made():
        p = nn.Parameter(draw((16, 24), 0, torch.float32))
        return p, GaLoreAdamW([{"params": [p], "rank": 4}], lr=1e-2, **mode)

    def steps(p, optimizer, sizes, seed=1):
        for t, size in enumerate(sizes):
            p.grad = size * draw((16, 24), seed + t, torch.float32)
            optimizer.step()

    p, optimizer = made()
    steps(p, optimizer, (1, 1, 0))
    q, other = made()
    q.data.copy_(p.data)
    other.load_state_dict(optimizer.state_dict())
    for each in ((p, optimizer), (q, other)):
        steps(*each, (1, 1), seed=9)
    assert torch.equal(p, q)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-24), (torch.float16, 1e-3)], ids=str)
def test_gradients_whose_squares_underflow_keep_their_basis(dtype, size):
    p = nn.Parameter(draw((16, 24), 0, dtype))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "moments": "grad", "stagger": False}], lr=1e-2)
    for t in range(3):
        p.grad = (size * draw((16, 24), t + 1)).to(dtype)
        optimizer.step()
        if t == 0:
            first = optimizer.state[p]["proj"].clone()
    assert not optimizer.state[p]["exp_avg_sq"].any()
    assert torch.equal(optimizer.state[p]["proj"], first)


@pytest.mark.parametrize("mode", [{"proj_type": "full"}, {"moments": "grad"}, {"moments": "grad", "proj_type": "full"},
                                  {"moments": "grad", "refresh": "svd", "rotate_moments": False},
                                  {"moments": "grad", "rule": "muon"}], ids=str)  # fmt: skip
def test_a_float16_gradient_whose_projection_overflows_leaves_the_weights_finite(mode):
    p = nn.Parameter(draw((128, 128), 0, torch.float16))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 8, "update_proj_gap": 2, **mode}], lr=1e-3)
    for t in range(5):
        one_token = draw((128, 1), 1).clamp(-2, 2) @ draw((1, 128), 2).clamp(-2, 2)
        p.grad = (one_token * (1e4 if t < 2 else 1e-2) + 1e-3 * draw((128, 128), t)).to(torch.float16)
        optimizer.step()
        assert p.isfinite().all(), t
        assert all(value.isfinite().all() for value in optimizer.state[p].values()), t


@pytest.mark.skipif(not hasattr(nn.Parameter(torch.zeros(1)), "grad_dtype"), reason="torch has no grad_dtype yet")
@pytest.mark.parametrize("mode", [{}, {"rule": "muon"}, {"residual": "fira"}], ids=str)
def test_gradients_of_two_dtypes_in_a_group(mode):
    results = []
    for together in (True, False):
        a, b = (nn.Parameter(draw(shape, 0, torch.bfloat16)) for shape in ((12, 20), (20, 12)))
        b.grad_dtype = torch.float32
        params = [[a, b]] if together else [[a], [b]]
        settings = {"rank": 4, "moments": "grad", "stagger": False, "seed": 1, **mode}
        named = [{"params": [("ab"[p is b], p) for p in some], **settings} for some in params]
        optimizer = GaLoreAdamW(named, lr=1e-2)
        for t in range(2):
            a.grad, b.grad = draw(a.shape, 1 + t, torch.bfloat16), draw(b.shape, 2 + t, torch.float32)
            optimizer.step()
        results.append((a.detach(), b.detach()))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("size", [1e-200, 1e-310, 1e200])
def test_muons_rule_takes_float64_gradients_whose_squares_leave_the_range(size):
    weights = []
    for by in (1.0, size):
        p = nn.Parameter(draw((12, 20), 0))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 4, "rule": "muon"}], lr=1e-2)
        optimizer.state[p] |= {"step": torch.tensor(1.0), "exp_avg": by * draw((4, 20), 1), "proj": torch.eye(12, 4).double()}
        p.grad = torch.zeros(12, 20, dtype=torch.float64)
        optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-6)


def test_the_muon_residual_is_formed_in_float32_next_to_moments_in_bfloat16(monkeypatch):
    from lowrank_pretrain.galore import residual

    seen, real = [], residual.orthogonalise_whole
    monkeypatch.setattr(residual, "orthogonalise_whole", lambda u: (seen.append(u.dtype), real(u))[1])
    p = nn.Parameter(draw((16, 24), 0, torch.bfloat16))
    mode = {"rule": "muon", "residual": "muon", "moments": "grad"}
    optimizer = GaLoreAdamW([{"params": [p], "rank": 4, **mode}], lr=1e-2)
    p.grad = draw((16, 24), 1, torch.bfloat16)
    optimizer.step()
    assert seen == [torch.float32]


@pytest.mark.parametrize("decay", [float("nan"), None, -1.0])
@pytest.mark.parametrize("group", [0, 1])
def test_a_weight_decay_that_a_schedule_has_made_unusable_is_refused(decay, group):
    params = [nn.Parameter(draw(shape, 0)) for shape in ((8, 12), (5,))]
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 4}, {"params": params[1:]}], lr=1e-2)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[group]["weight_decay"] = decay
    before = params[group].detach().clone()
    with pytest.raises(ConfigError, match="^weight_decay="):
        optimizer.step()
    assert torch.equal(params[group], before)
