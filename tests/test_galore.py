"""The optimizer against the published code and against the slow twins; its subspaces; its groups; what it refuses."""

import copy
import io
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.memory import optimizer_bytes
from lowrank_pretrain.galore import GaLoreAdamW, adam, clock, galore_param_groups, subspace
from tests.reference.galore import Twin

PUBLISHED = {"refresh": "svd", "rotate_moments": False, "stagger": False}
SHAPES = [(12, 20), (20, 12), (16, 16), (12, 20), (14, 10)]  # left, right, square, full rank, two-sided


class Quadratic:
    """Matrices pulled to targets through fixed mixing, with noise: gradients of many ranks and no end in sight."""

    def __init__(self, shapes, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.randn(s, generator=g, dtype=dtype)) for s in shapes]
        self.mix = [torch.randn(s[0], s[0], generator=g, dtype=dtype) / s[0] ** 0.5 + torch.eye(s[0]) for s in shapes]
        self.goal = [torch.randn(s, generator=g, dtype=dtype) for s in shapes]
        self.noise = torch.Generator().manual_seed(seed + 1)

    def grads(self):
        for p, a, goal in zip(self.params, self.mix, self.goal, strict=True):
            noise = torch.randn(p.shape, generator=self.noise, dtype=p.dtype)
            p.grad = (a.T @ (a @ (p.detach() - goal)).flatten(1)).view(p.shape) * (1 + 0.1 * noise)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_published_mode_equals_galore_torch():
    galore_torch = pytest.importorskip("galore_torch")
    kinds = [("std", 4), ("std", 4), ("std", 5), ("std", 12), ("full", 3), ("left", 4), ("right", 4), ("reverse_std", 4)]
    shapes = [*SHAPES, (20, 12), (12, 20), (12, 20)]
    results = []
    for cls, extra in ((galore_torch.GaLoreAdamW, {}), (GaLoreAdamW, PUBLISHED)):
        problem = Quadratic(shapes)
        plain = nn.Parameter(torch.linspace(-1, 1, 7))
        groups = [
            {"params": [p], "rank": r, "update_proj_gap": 100, "scale": 0.5, "proj_type": kind, **extra}
            for p, (kind, r) in zip(problem.params, kinds, strict=True)
        ]
        optimizer = cls([*groups, {"params": [plain]}], lr=1e-2, weight_decay=0.05, no_deprecation_warning=True)
        for _ in range(300):
            problem.grads()
            plain.grad = plain.detach() ** 3 + 0.5
            optimizer.step()
        results.append([p.detach() for p in (*problem.params, plain)])
    for published, ours in zip(*results, strict=True):
        assert relative(ours, published) < 1e-5


def test_reverse_std_on_a_square_projection():
    # the published code picks the wrong side when the rank makes the projected gradient square, and raises
    problem = Quadratic([(6, 20)])
    group = {"params": problem.params, "rank": 6, "update_proj_gap": 5, "scale": 1.0, "proj_type": "reverse_std"}
    optimizer = GaLoreAdamW([{**group, **PUBLISHED}], lr=1e-2)
    before = [(p.detach() - g).norm() for p, g in zip(problem.params, problem.goal, strict=True)]
    for _ in range(50):
        problem.grads()
        optimizer.step()
    assert optimizer.state[problem.params[0]]["exp_avg"].shape == (6, 6)
    assert (problem.params[0].detach() - problem.goal[0]).norm() < before[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stagger": True},
        {"rotate": False},
        {"refresh": "track"},
        {"residual": "fira"},
        {"refresh": "track", "residual": "fira"},
        {"variant": "apollo", "scale": 1.0},
    ],
    ids=str,
)
def test_fast_paths_equal_their_twins(settings):
    shapes, ranks = [(12, 20), (20, 12), (16, 16), (10, 24)], [4, 5, 6, 10]
    kinds = ["std"] * 4
    if not settings.get("residual") and not settings.get("variant"):
        shapes, ranks, kinds = [*shapes, (14, 11), (12, 20)], [*ranks, 3, 4], [*kinds, "full", "reverse_std"]
    if settings.get("variant"):
        ranks[2] = 1  # APOLLO-Mini
    fast, slow = Quadratic(shapes, torch.float64), Quadratic(shapes, torch.float64)
    settings = {"gap": 7, "scale": 0.5, "refresh": "subspace", "rotate": True, **settings}
    stagger = settings.pop("stagger", False)
    theirs = {"update_proj_gap": "gap", "rotate_moments": "rotate"}
    ours = {new: settings[old] for new, old in theirs.items()} | {k: v for k, v in settings.items() if k not in theirs.values()}
    groups = [
        {"params": [p], "rank": r, "proj_type": kind, "stagger": stagger, **ours}
        for p, r, kind in zip(fast.params, ranks, kinds, strict=True)
    ]
    optimizer = GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1, seed=3)
    with torch.no_grad():
        weights = [p.detach() for p in slow.params]
    twins = [
        Twin(w, r, f"parameter 0 of group {i}", 1e-2, proj_type=kind, weight_decay=0.1, seed=3,
             offset=i * 7 // len(ranks) if stagger else 0, **settings)
        for i, (w, r, kind) in enumerate(zip(weights, ranks, kinds, strict=True))
    ]  # fmt: skip
    for _ in range(25):
        fast.grads()
        optimizer.step()
        slow.grads()
        for twin, p in zip(twins, slow.params, strict=True):
            twin.step(p.grad)
    for p, w in zip(fast.params, weights, strict=True):
        assert relative(p.detach(), w) < 1e-8


def test_full_rank_projection_is_the_identity():
    # the seed's identity: PPᵀG QQᵀ = G at full rank
    g = torch.randn(9, 14, dtype=torch.float64)
    p, q = subspace.svd_basis(g, 9, "full")
    torch.testing.assert_close(p @ p.T @ g @ q @ q.T, g)
    cold = subspace.range_finder(g, 9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(cold @ cold.T @ g, g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_basis_survives_low_rank_tiny_and_zero_gradients(dtype):
    p = torch.linalg.qr(torch.randn(40, 16))[0]
    low_rank = torch.randn(40, 3) @ torch.randn(3, 60)
    for g in (low_rank, 1e-18 * low_rank, torch.zeros(40, 60)):
        new = subspace.power_step(g.to(dtype), p)
        assert (new.T @ new - torch.eye(16)).abs().max() < 1e-5
    assert torch.allclose(subspace.power_step(torch.zeros(40, 60), p), p, atol=1e-5)
    assert subspace.captured(low_rank, subspace.power_step(low_rank, p)) > 0.999


def test_cholesky_qr_equals_householders():
    p = torch.linalg.qr(torch.randn(60, 24))[0]
    for rank in (60, 5):  # at rank 5 only the ridge gives y full column rank
        g = torch.randn(60, rank) @ torch.diag(torch.arange(1.0, rank + 1) ** -3) @ torch.randn(rank, 90)
        y = subspace.unit(g @ (g.T @ p)).add_(p, alpha=subspace.RIDGE)
        q, good = subspace.cholesky_qr(y)
        assert good
        assert (q.T @ q - torch.eye(24)).abs().max() < 1e-5
        assert (y - q @ (q.T @ y)).norm() < 1e-6
        assert ((subspace.orthonormal(y) * q).sum(0)[:3] > 0.99).all()  # the same signs
    for hopeless in (torch.zeros(60, 24), torch.full((60, 24), float("nan")), p[:, :1].expand(60, 24)):
        assert not subspace.cholesky_qr(hopeless)[1]


def test_product32_of_halves():
    a, b = torch.randn(30, 2100, dtype=torch.bfloat16), torch.randn(2100, 7)
    exact = a.double() @ b.double()
    assert relative(subspace.product32(a, b).double(), exact) < 1e-6


def test_rotation_keeps_momentum_in_the_common_subspace():
    p = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0]
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    m, v = torch.randn(6, 9, dtype=torch.float64), torch.rand(6, 9, dtype=torch.float64)
    new_m, new_v = subspace.rotate(m, v, subspace.change_of_basis(p @ turn, p))
    torch.testing.assert_close((p @ turn) @ new_m, p @ m)  # the same matrix, written in the new basis
    torch.testing.assert_close(new_v.sum(), v.sum())
    assert subspace.overlap(subspace.change_of_basis(p @ turn, p)).item() == pytest.approx(1)


def test_signs_are_fixed_without_rotation():
    p = torch.linalg.qr(torch.randn(20, 6))[0]
    g = p @ torch.diag(torch.arange(6.0, 0, -1)) @ torch.linalg.qr(torch.randn(30, 6))[0].T
    torch.testing.assert_close(subspace.power_step(g, p), p, atol=1e-4, rtol=0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, stride=4)
        self.qkv = nn.Linear(8, 24)
        self.fc1 = nn.Linear(8, 32)
        self.fc2 = nn.Linear(32, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        return self.norm(x + self.fc2(self.fc1(x).relu()) + self.qkv(x)[..., :8]).square().mean()


def test_groups():
    model = Net()
    groups = galore_param_groups(model, 4, weight_decay=0.1, scale=0.5, lr=3e-3)
    names = [[name for name, _ in group["params"]] for group in groups]
    assert names[0] == ["qkv.weight", "fc1.weight", "fc2.weight"] and names[1] == ["patch_embed.weight"]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1, 0.0] and groups[0]["scale"] == 0.5
    assert groups[0]["lr"] == 3e-3 and "lr" not in groups[1] and "lr" not in groups[2]
    optimizer = GaLoreAdamW(groups, lr=1e-3)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_is_projected_as_a_matrix(layout):
    torch.manual_seed(0)
    model, x = Net().to(memory_format=layout), torch.randn(4, 3, 8, 8)
    groups = galore_param_groups(model, 4, ["patch_embed", "fc*"], update_proj_gap=3)
    optimizer = GaLoreAdamW(groups, lr=1e-2)
    flat = nn.Parameter(model.patch_embed.weight.detach().reshape(8, 48).clone())
    matrix = GaLoreAdamW([("patch_embed.weight", flat)], lr=1e-2)
    matrix.param_groups[0].update({"rank": 4, "update_proj_gap": 3, "stagger": False})
    for group in optimizer.param_groups:
        group["stagger"] = False
    for _ in range(8):
        optimizer.zero_grad()
        model(x).backward()
        flat.grad = model.patch_embed.weight.grad.reshape(8, 48)
        optimizer.step()
        matrix.step()
    assert optimizer.state[model.patch_embed.weight]["proj"].shape == (8, 4)
    torch.testing.assert_close(model.patch_embed.weight.detach().reshape(8, 48), flat.detach(), rtol=1e-5, atol=1e-6)


def test_state_is_small_plain_and_stored_once():
    problem = Quadratic([(48, 96), (96, 48)])
    optimizer = GaLoreAdamW([{"params": problem.params, "rank": 8}])
    problem.grads()
    optimizer.step()
    state = optimizer.state[problem.params[0]]
    assert set(state) == {"proj", "exp_avg", "exp_avg_sq", "step"}
    assert all(isinstance(t, torch.Tensor) for t in state.values())
    steps = sum(s["step"].element_size() for s in optimizer.state.values())
    assert optimizer_bytes([optimizer]) - steps == optimizer.formula_bytes() == 2 * 4 * (48 * 8 + 2 * 96 * 8)
    published = GaLoreAdamW([{"params": problem.params, "rank": 8, **PUBLISHED}])
    published.step()  # the published code keeps a view of the whole factor alive
    assert optimizer_bytes([published]) - steps == published.formula_bytes()


def test_a_view_counts_with_all_it_keeps_alive():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer = GaLoreAdamW([p])
    optimizer.state[p]["exp_avg"] = torch.zeros(100, 100)[:2, :2]
    assert optimizer_bytes([optimizer]) == 40_000


@pytest.mark.parametrize("moments", ["auto", "grad", "8bit"])
def test_bfloat16_parameters(moments):
    if moments == "8bit":
        pytest.importorskip("bitsandbytes")
    problem = Quadratic([(64, 96), (80, 72)])
    exact = Quadratic([(64, 96), (80, 72)])
    problem.params = [nn.Parameter(p.detach().bfloat16()) for p in problem.params]
    settings = {"rank": 64, "update_proj_gap": 10, "scale": 1.0, "stagger": False}
    optimizer = GaLoreAdamW([{"params": problem.params, "moments": moments, **settings}], lr=1e-2)
    reference = GaLoreAdamW([{"params": exact.params, **settings}], lr=1e-2)
    start = [p.detach().clone() for p in exact.params]
    for _ in range(40):
        exact.grads()
        reference.step()
        for p, q in zip(problem.params, exact.params, strict=True):
            p.grad = q.grad.bfloat16()
        optimizer.step()
    state = optimizer.state[problem.params[0]]
    dtype = {"auto": torch.float32, "grad": torch.bfloat16, "8bit": torch.uint8}[moments]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    restored = GaLoreAdamW([{"params": problem.params, "moments": moments, **settings}], lr=1e-2)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.state[problem.params[0]]["exp_avg"].dtype == dtype  # torch alone would cast it to bfloat16
    for p, q, s in zip(problem.params, exact.params, start, strict=True):
        assert relative(p.detach().float() - s, q.detach() - s) < 0.1


@pytest.mark.parametrize("settings", [{}, {"refresh": "track"}, {"residual": "fira"}, {"variant": "apollo"}, PUBLISHED,
                                      {"moments": "8bit"}, {"proj_type": "full"}], ids=str)  # fmt: skip
def test_resume_is_bit_exact_through_a_weights_only_file(settings):
    if settings.get("moments") == "8bit":
        pytest.importorskip("bitsandbytes")
    shapes = [(72, 64), (64, 96), (7, 5)]

    def make():
        problem = Quadratic(shapes)
        groups = [{"params": problem.params[:2], "rank": 64 if "moments" in settings else 6, "update_proj_gap": 4, **settings}]
        return problem, GaLoreAdamW([*groups, {"params": problem.params[2:]}], lr=1e-2, weight_decay=0.01)

    problem, optimizer = make()
    for i in range(12):
        if i == 6:
            buffer = io.BytesIO()
            torch.save({"optimizer": optimizer.state_dict(), "weights": [p.detach() for p in problem.params]}, buffer)
            copied, noise = copy.deepcopy(optimizer), problem.noise.get_state()
        problem.grads()
        optimizer.step()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed, again = make()
    again.load_state_dict(saved["optimizer"])
    for p, w in zip(resumed.params, saved["weights"], strict=True):
        p.data.copy_(w)
    resumed.noise.set_state(noise)
    deep = Quadratic(shapes)
    deep.params, deep.noise = [p for g in copied.param_groups for p in g["params"]], torch.Generator()
    deep.noise.set_state(noise)
    for _ in range(6):
        for each, opt in ((resumed, again), (deep, copied)):
            each.grads()
            opt.step()
    for p, q, r in zip(problem.params, resumed.params, deep.params, strict=True):
        assert torch.equal(p, q) and torch.equal(p, r)


def test_state_moves_with_what_lightning_moves_it_with():
    problem = Quadratic([(12, 20), (20, 12)])
    plain = nn.Parameter(torch.ones(3))
    for settings in ({}, {"proj_type": "full"}, {"residual": "fira"}, {"variant": "apollo"}):
        optimizer = GaLoreAdamW([{"params": problem.params, "rank": 4, **settings}, {"params": [plain]}])
        problem.grads()
        plain.grad = torch.ones(3)
        optimizer.step()
        moved = {key for state in optimizer.state.values() for key in state} - {"step"}
        _optimizer_to_device(optimizer, torch.device("meta"))
        for state in optimizer.state.values():
            assert state["step"].device.type == "cpu"
            assert {key for key, value in state.items() if value.is_meta} == moved & state.keys()
    # a state on the CPU follows parameters that are elsewhere
    saved = optimizer.state_dict()
    elsewhere = [nn.Parameter(p.to("meta")) for p in (*problem.params, plain)]
    again = GaLoreAdamW([{"params": elsewhere[:2], "rank": 4, **settings}, {"params": elsewhere[2:]}])
    again.load_state_dict(saved)
    assert all(t.is_meta == (key != "step") for s in again.state.values() for key, t in s.items())


def test_a_convolution_may_change_its_layout_between_steps():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model, x = Net(), torch.randn(4, 3, 8, 8)
        optimizer = GaLoreAdamW(galore_param_groups(model, 4, ["patch_embed"], update_proj_gap=3), lr=1e-2)
        for step in range(4):
            if step == 2:
                model.to(memory_format=layout)
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        results.append(model.patch_embed.weight.detach())
    assert results[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_parameters_that_were_flattened_after_construction():
    # DeepSpeed puts flat partitions in the place of a group's parameters
    problem = Quadratic([(12, 20)])
    optimizer = GaLoreAdamW([{"params": problem.params, "rank": 4}])
    problem.grads()
    optimizer.step()
    flat = nn.Parameter(problem.params[0].detach().flatten())
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ConfigError, match="FSDP2"):
        optimizer.step()


def test_adopt_keeps_the_step_size_and_refuses_a_second_time():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    optimizer = GaLoreAdamW(model.named_parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        model(x).backward()
        before = model.fc1.weight.detach().clone()
        optimizer.step()
    usual = (model.fc1.weight.detach() - before).norm()
    m = optimizer.state[model.fc1.weight]["exp_avg"].clone()
    optimizer.adopt({"qkv.q": 2, "qkv.k": 3, "qkv.v": 0, "fc1": 8, "fc2": 0}, model)
    optimizer.zero_grad()
    model(x).backward()
    before = model.fc1.weight.detach().clone()
    optimizer.step()
    state = optimizer.state[model.fc1.weight]
    assert state["proj"].shape == (8, 8) and state["exp_avg"].shape == (8, 32) and state["step"] == 21
    assert optimizer.state[model.qkv.weight]["proj"].shape == (8, 3)  # the largest rank of its parts
    assert "proj" not in optimizer.state[model.fc2.weight]
    carried = 0.9 * m + 0.1 * model.fc1.weight.grad  # at full rank nothing is lost: P m is Adam's own momentum
    torch.testing.assert_close((state["proj"] @ state["exp_avg"]).T, carried, rtol=1e-4, atol=1e-7)
    assert 0.5 < (model.fc1.weight.detach() - before).norm() / usual < 2
    with pytest.raises(ConfigError, match="not projected already"):
        optimizer.adopt({"fc1": 2}, model)
    with pytest.raises(ConfigError, match="no target"):
        optimizer.adopt({"fc9": 2}, model)
    fresh = GaLoreAdamW(Net().named_parameters(), lr=1e-3)
    fresh.load_state_dict(optimizer.state_dict())
    assert [g["ranks"] for g in fresh.state_dict()["param_groups"]] == [[0, 0, 3, 0, 8, 0, 0, 0, 0, 0]]


def test_a_gradient_that_is_not_finite_names_its_parameter_and_harms_nothing():
    fira = {"refresh": "track", "residual": "fira"}
    for bad, settings in ((float("nan"), {}), (float("inf"), PUBLISHED), (float("nan"), fira)):
        model, x = Net(), torch.randn(4, 3, 8, 8)
        optimizer = GaLoreAdamW(galore_param_groups(model, 4, update_proj_gap=1, **settings), lr=1e-2, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        kept = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        model.fc2.weight.grad[1, 2] = bad
        with pytest.raises(FloatingPointError, match="fc2.weight"):
            optimizer.step()
        for a, b in zip(_tensors((optimizer.state_dict(), model.state_dict())), _tensors(kept), strict=True):
            assert torch.equal(a, b)


OUTSIDE = [{"residual": "fira"}, {"residual": "muon"}, {"variant": "apollo"}]  # what these add to W is masked separately


@pytest.mark.parametrize(
    "settings", [{}, {"refresh": "track"}, {"proj_type": "full"}, {"moments": "grad"}, PUBLISHED, *OUTSIDE], ids=str
)
def test_a_step_masked_on_the_device_changes_nothing(settings, monkeypatch):
    # on CUDA the flag stays on the device; here it is handed in
    model, x = Net(), torch.randn(4, 3, 8, 8)
    optimizer = GaLoreAdamW(galore_param_groups(model, 4, update_proj_gap=1, **settings), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    kept = copy.deepcopy((optimizer.state_dict()["state"], model.state_dict()))
    optimizer.zero_grad()
    model(x).backward()
    model.fc2.weight.grad[0, 0] = float("nan")
    if settings.get("refresh") == "svd":
        model.fc2.weight.grad[0, 0] = 1e6  # LAPACK's own complaint comes first on the CPU
    monkeypatch.setattr(optimizer._guard, "check", lambda *_, **__: torch.tensor(1.0))
    optimizer.step()
    for state, before in zip(optimizer.state_dict()["state"].values(), kept[0].values(), strict=True):
        for key in state.keys() - {"step"}:
            assert torch.equal(state[key], before[key]), key
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[1][key]), key


@pytest.mark.parametrize("settings", [{}, {"refresh": "track"}, *OUTSIDE], ids=str)
def test_a_mask_that_lets_pass_changes_nothing_either(settings, monkeypatch):
    results = []
    for mask in (None, torch.tensor(0.0)):
        torch.manual_seed(0)
        model, x = Net().double(), torch.randn(4, 3, 8, 8).double()
        optimizer = GaLoreAdamW(galore_param_groups(model, 4, update_proj_gap=2, **settings), lr=1e-2, weight_decay=0.1)
        if mask is not None:
            monkeypatch.setattr(optimizer._guard, "check", lambda *_, mask=mask, **__: mask)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert relative(*results) < 1e-5


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [t for item in items for t in _tensors(item)]


def test_fp16_scaler_skips_a_step():
    model, x = Net(), torch.randn(4, 3, 8, 8)
    optimizer = GaLoreAdamW(galore_param_groups(model, 4), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(x)).backward()
    model.fc1.weight.grad[0, 0] = float("inf")
    before = model.fc1.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0 and torch.equal(before, model.fc1.weight) and not optimizer.state[model.fc1.weight]


BAD = {
    "rank": [0, -1, 2.0, True],
    "update_proj_gap": [0, 1.5],
    "proj_type": ["both"],
    "refresh": ["eigh"],
    "moments": ["4bit"],
    "residual": ["fire"],
    "variant": ["apolo"],
    "scale": ["big", float("nan"), -0.1, True],
    "rotate_moments": ["no"],
    "stagger": [1],
    "layerwise": ["false"],
    "correct_bias": ["no"],
    "seed": ["x", 1.5],
    "betas": [(0.9, 2.0), 0.9],
    "lr": [-1.0, "fast"],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD.items() for value in values])
def test_wrong_values_are_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2, key: value}])


@pytest.mark.parametrize("key, value", [("lr", -1.0), ("betas", (1.0, 0.9)), ("eps", -1e-3), ("weight_decay", -0.1)])
def test_wrong_constructor_values_are_named(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        GaLoreAdamW([nn.Parameter(torch.zeros(4, 4))], **{key: value})


def test_combinations_that_make_no_sense():
    group = {"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}
    for extra in ({"proj_type": "full", "residual": "fira"}, {"variant": "apollo", "refresh": "track"}):
        with pytest.raises(ConfigError):
            GaLoreAdamW([{**group, **extra}])


def test_unfit_parameters_are_named():
    model = Net()
    with pytest.raises(ConfigError, match="norm.bias.*FSDP2"):
        GaLoreAdamW([{"params": [("norm.bias", model.norm.bias)], "rank": 2}])
    with pytest.raises(ConfigError, match=r"shape \(0, 5\)"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(0, 5))], "rank": 2}])
    with pytest.raises(ConfigError, match="complex"):
        GaLoreAdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = GaLoreAdamW(list(table.named_parameters()))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="weight.*sparse"):
        optimizer.step()
    with pytest.raises(ConfigError, match="whole"):
        galore_param_groups(model, 2, ["qkv.q"])
    with pytest.raises(ConfigError, match="matches no target"):
        galore_param_groups(model, 2, ["nothing"])
    with pytest.raises(ConfigError, match="frozen"):
        model.fc1.requires_grad_(False)
        galore_param_groups(model, 2, ["fc1"])


def test_rank_above_the_matrix():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = GaLoreAdamW(galore_param_groups(Net(), 9, "all"))
    assert len(caught) == 1 and all(n in str(caught[0].message) for n in ("qkv.weight", "fc1.weight", "fc2.weight"))
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.randn(p.shape)
    optimizer.step()
    assert optimizer.state[p]["proj"].shape == (8, 8)
    with pytest.raises(ConfigError, match="at most 8"):
        galore_param_groups(Net(), 9, ["fc1"])


def test_checkpoint_of_another_rank_shape_or_model():
    def trained(rank, shape=(12, 20), **extra):
        problem = Quadratic([shape])
        optimizer = GaLoreAdamW([{"params": problem.params, "rank": rank, **extra}])
        problem.grads()
        optimizer.step()
        return optimizer

    saved = trained(4).state_dict()
    with pytest.raises(ConfigError, match="^rank="):
        trained(5).load_state_dict(saved)
    with pytest.raises(ConfigError, match="proj"):
        trained(4, (14, 20)).load_state_dict(saved)
    with pytest.raises(ConfigError, match="exp_avg"):
        trained(4, (12, 22)).load_state_dict(saved)
    with pytest.raises(ConfigError, match="^proj_type="):
        trained(4, proj_type="right").load_state_dict(saved)
    foreign = torch.optim.AdamW(trained(4).param_groups[0]["params"])
    with pytest.raises(ConfigError, match="another optimizer"):
        trained(4).load_state_dict(foreign.state_dict())
    with pytest.raises(ConfigError, match="groups"):
        GaLoreAdamW([{"params": [torch.zeros(2)]}, {"params": [torch.zeros(2)]}]).load_state_dict(saved)


def test_large_bfloat16_tables_are_stepped_in_slices(monkeypatch):
    monkeypatch.setattr("lowrank_pretrain.galore.adam.BYTES_DEVICE", 4 * 30)
    torch.manual_seed(0)
    values, grad = torch.randn(17, 10).bfloat16(), torch.randn(17, 10).bfloat16()
    results = []
    for pieces in (values.clone(), values.float()):
        p = nn.Parameter(pieces)
        optimizer = GaLoreAdamW([p], lr=0.1)
        for _ in range(3):
            p.grad = grad.to(p.dtype)
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
        results.append(p.detach().float())
    assert relative(*results) < 0.01
    assert len(list(adam.row_slices(values))) == 6


def test_metrics():
    problem = Quadratic([(12, 20), (20, 12)])
    optimizer = GaLoreAdamW([{"params": problem.params, "rank": 4, "update_proj_gap": 2, "stagger": False}])
    assert optimizer.metrics() == {}
    for _ in range(3):
        problem.grads()
        optimizer.step()
    assert set(optimizer.metrics()) == {"galore/refresh_ms", "galore/overlap"}
    assert 0 < optimizer.metrics()["galore/overlap"] <= 1.001


def test_the_refresh_clock_never_waits_for_a_device(monkeypatch):
    class Event:
        passed = 0.0  # how far the device has come

        def __init__(self, enable_timing=False):
            self.at = None

        def record(self):
            Event.queued += 1.0
            self.at = Event.queued

        def query(self):
            return self.at <= Event.passed

        def elapsed_time(self, end):
            assert self.query() and end.query(), "read before the device has passed it"
            return end.at - self.at

    Event.queued = 0.0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    on_device, refreshes = SimpleNamespace(is_cuda=True), clock.RefreshTimer()
    for step, shares in ((1, (0.5, 1.0)), (2, (0.125,))):
        for share in shares:
            refreshes.stop(on_device, refreshes.start(on_device), step, torch.tensor(share))
        assert refreshes.metrics() == {}  # step 1 is sent for, and step 2 has to wait for its answer
    Event.passed = 4.0
    assert refreshes.metrics() == {"galore/refresh_ms": 2.0, "galore/overlap": 0.75}
    Event.passed = 5.0
    assert refreshes.metrics() == {"galore/refresh_ms": 2.0, "galore/overlap": 0.75}
    Event.passed = 6.0
    assert refreshes.metrics() == {"galore/refresh_ms": 1.0, "galore/overlap": 0.125}


def test_private_generators_leave_the_global_one_alone():
    problem = Quadratic([(12, 20)])
    for extra in ({}, {"variant": "apollo"}):
        optimizer = GaLoreAdamW([{"params": problem.params, "rank": 4, **extra}])
        problem.grads()
        before = torch.random.get_rng_state()
        optimizer.step()
        assert torch.equal(before, torch.random.get_rng_state())


def test_a_bare_layer_is_a_model():
    layer = nn.Linear(8, 6)
    groups = galore_param_groups(layer, rank=2)
    assert [(group.get("rank"), [name for name, _ in group["params"]]) for group in groups] == [
        (2, ["weight"]),
        (None, ["bias"]),
    ]
    layer(torch.ones(4, 8)).sum().backward()
    GaLoreAdamW(groups).step()
