"""GaLoreAdamW where torch's AdamW works: layouts, surroundings, groups changed in the middle of a fit, numbers at the edges."""

import contextlib
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
from lowrank_pretrain.galore.adam import steps_taken

MODES = [
    {}, {"refresh": "track"}, {"proj_type": "full"}, {"residual": "fira"}, {"residual": "muon"}, {"variant": "apollo"},
    {"refresh": "svd", "rotate_moments": False}, {"moments": "grad"},
]  # fmt: skip


def draw(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def train(p, grads, cls=GaLoreAdamW, around=None, eps=1e-30, **group):
    optimizer = cls([{"params": [p], **group}], lr=1e-2, eps=eps, weight_decay=0.0)
    for grad in grads:
        p.grad = grad
        if around is None:
            optimizer.step()
        else:
            with around():
                optimizer.step()
    return p.detach(), optimizer


# ---- layouts ----------------------------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (0,), (3, 0), (5, 8), (1, 6), (6, 1), (4, 3, 2), (4, 3, 5, 5), (2, 3, 2, 3, 2)]


def transposed(t):
    return t.mT.contiguous().mT if t.ndim > 1 else t


def strided(t):
    wide = torch.zeros((*t.shape, 2), dtype=t.dtype) if t.ndim else torch.zeros(2, dtype=t.dtype)
    wide[..., 0] = t
    return wide[..., 0]


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t


def reversed_dims(t):
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim))) if t.ndim else t


def negated(t):
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype == torch.float32 else t


LAYOUTS = [torch.Tensor.contiguous, transposed, strided, channels_last, reversed_dims]


@pytest.mark.parametrize("weight", LAYOUTS)
@pytest.mark.parametrize("gradient", [*LAYOUTS, negated])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_plain_group_is_torchs_adamw_in_any_layout(weight, gradient, dtype):
    for shape in SHAPES:
        grads = [draw(shape, 1 + t, dtype) for t in range(4)]
        group = {"moments": "grad"} if dtype == torch.bfloat16 else {}
        start = draw(shape, 0, dtype)
        ours, optimizer = train(nn.Parameter(weight(start.clone())), [gradient(g.clone()) for g in grads], **group)
        theirs, _ = train(nn.Parameter(start.clone()), grads, torch.optim.AdamW)
        torch.testing.assert_close(ours, theirs, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6, msg=str(shape))
        assert optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"].shape == shape


@pytest.mark.parametrize("mode", [*MODES, None], ids=str)
def test_expanded_gradients_and_gaps_are_as_their_copies(mode):
    settings = {} if mode is None else {"rank": 1, "update_proj_gap": 2, **mode}  # the gradients' own rank
    values = [draw((6, 1), t) for t in range(3)]
    results = []
    for lay in (lambda g: g.expand(6, 8), lambda g: g.expand(6, 8).clone()):
        results.append(train(nn.Parameter(draw((6, 8), 9)), [lay(g) for g in values], eps=1e-3, **settings)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    everywhere, _ = train(nn.Parameter(torch.zeros(64)), [torch.ones(()).expand(64)])
    torch.testing.assert_close(everywhere, torch.full((64,), -1e-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_300_steps_have_the_bits_of_torchs_fused_kernel(dtype):
    weights = []
    for cls, extra in ((torch.optim.AdamW, {"fused": True}), (GaLoreAdamW, {"moments": "grad"})):
        params = [nn.Parameter(draw(shape, 0, dtype)) for shape in ((33, 17), (5,), ())]
        optimizer = cls(params, lr=1e-2, eps=0.0, weight_decay=0.0, **extra)
        for t in range(300):
            for i, p in enumerate(params):
                p.grad = draw(p.shape, 10 * t + i, dtype)
            optimizer.step()
        weights.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_moments_follow_a_model_that_changes_dtype_or_layout():
    for change in (torch.Tensor.double, torch.Tensor.bfloat16, transposed, strided):
        for group in ({}, {"rank": 3}, {"moments": "grad"}, {"rank": 3, "moments": "grad"}, {"rank": 3, "proj_type": "full"}):
            p = nn.Parameter(draw((6, 8), 0))
            _, optimizer = train(p, [draw((6, 8), 1)], **group)
            p.grad = None
            p.data = change(p.data)
            p.grad = draw((6, 8), 2).to(p.device, p.dtype)
            optimizer.step()
            assert p.isfinite().all() and optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("group", [{}, {"rank": 3}, {"moments": "8bit"}], ids=str)
def test_a_parameter_that_was_resized_is_refused_until_its_state_is_dropped(group):
    if "moments" in group:
        pytest.importorskip("bitsandbytes")
    p = nn.Parameter(draw((80, 64), 0))  # an embedding table whose vocabulary grows in place
    _, optimizer = train(p, [draw((80, 64), 1)], **group)
    p.grad = None
    p.data = draw((90, 64), 2)
    p.grad = draw((90, 64), 3)
    with pytest.raises(ConfigError, match=r"\(90, 64\)"):
        optimizer.step()
    optimizer.state.pop(p)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    p.data = draw((70, 64), 2)  # under the gradient too
    optimizer.state.pop(p)
    with pytest.raises((ConfigError, RuntimeError)):
        optimizer.step()


# ---- what goes on around ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, None, {"moments": "8bit"}], ids=str)
@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        torch.enable_grad,
        lambda: torch.device("meta"),
        torch.inference_mode,
    ],
    ids=["autocast", "grad", "default device", "inference"],
)
def test_a_step_does_not_notice_what_is_around_it(mode, around):
    if mode == {"moments": "8bit"}:
        pytest.importorskip("bitsandbytes")
    settings = {} if mode is None else {"rank": 3, "update_proj_gap": 2, **mode}
    shape = (72, 64)
    grads = [draw(shape, 1 + t) for t in range(4)]
    apart, _ = train(nn.Parameter(draw(shape, 0)), grads, **settings)
    inside, _ = train(nn.Parameter(draw(shape, 0)), grads, around=around, **settings)
    assert torch.equal(apart, inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mode", [*MODES, None], ids=str)
def test_the_default_dtype_changes_nothing(dtype, mode):
    settings = {} if mode is None else {"rank": 3, "update_proj_gap": 64, **mode}
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            p = nn.Parameter(draw((8, 6), 0, torch.float32))
            results.append(train(p, [draw((8, 6), t, torch.float32) for t in range(3)], **settings)[0])
            optimizer = GaLoreAdamW([{"params": [p], **settings}])
            for _ in range(300 if mode in ({}, None) else 2):
                optimizer.step()
            assert optimizer.state[p]["step"] == (300 if mode in ({}, None) else 2)  # bfloat16 would stop at 256
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*results)


def test_deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        for mode in MODES:
            train(nn.Parameter(draw((8, 6), 0)), [draw((8, 6), t) for t in range(3)], rank=3, update_proj_gap=2, **mode)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_threads_step_as_one_after_the_other():
    def work(seed, out):
        torch.set_num_threads(1)  # a thread of its own starts with OpenMP's default, and sums in another order
        params = [nn.Parameter(torch.zeros(96, 128)) for _ in range(2)]
        optimizer = GaLoreAdamW([{"params": params, "rank": 32}], lr=1e-2)
        for step in range(25):
            for i, p in enumerate(params):
                p.grad = draw(p.shape, 100 * seed + 2 * step + i)
            optimizer.step()
        out[seed] = torch.stack([p.detach() for p in params])

    apart, together = {}, {}
    for seed in (1, 2, 3):
        work(seed, apart)
    threads = [threading.Thread(target=work, args=(seed, together)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(apart[seed], together[seed]) for seed in apart)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_compiled_step_is_the_eager_one(layerwise):
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        optimizer = GaLoreAdamW(galore_param_groups(model, 4, update_proj_gap=2, layerwise=layerwise), lr=1e-2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for t in range(4):
            model(draw((8, 16), t)).square().mean().backward()
            step()
            optimizer.zero_grad()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def test_a_compiled_model_in_the_closure_stays_compiled():
    torch._dynamo.reset()
    seen = []
    model = nn.Linear(6, 6)
    compiled = torch.compile(model, backend=lambda graph, _: seen.append(graph) or graph.forward)
    optimizer = GaLoreAdamW([{"params": [model.weight], "rank": 2}, {"params": [model.bias]}])
    optimizer.step(lambda: compiled(torch.ones(2, 6)).sum().backward())
    assert seen and optimizer.state[model.weight]["step"] == 1


# ---- groups that change -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"proj_type": "full"}, {"refresh": "svd", "rotate_moments": False},
                                      {"residual": "fira"}, {"refresh": "track"}, {"moments": "8bit"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("change", [{"rank": 6}, {"rank": 2}, {"proj_type": "left"}, {"proj_type": "right"}], ids=str)
def test_a_new_rank_or_side_is_taken_at_the_next_step(settings, change):
    if "moments" in settings:
        pytest.importorskip("bitsandbytes")
    p = nn.Parameter(draw((90, 72), 0))
    _, optimizer = train(p, [draw((90, 72), t) for t in range(3)], **{"rank": 4, "update_proj_gap": 50, **settings})
    group, state = optimizer.param_groups[0], optimizer.state[p]
    low = optimizer.projected(p).read_moments(p)[0]
    momentum = state["proj"] @ low @ (state["proj_right"].T if "proj_right" in state else torch.eye(low.shape[1]))
    momentum = momentum if optimizer.projected(p).left else momentum.T
    group.update(change)
    p.grad = momentum.clone()  # so that the new basis holds what the old one did, as far as its rank goes
    optimizer.step()
    side = {"left": 90, "right": 72, "std": 72, "full": 90}[group["proj_type"]]
    assert state["proj"].shape == (side, group["rank"]) and state["step"] == 4
    assert ("proj_right" in state) == (group["proj_type"] == "full")
    low = optimizer.projected(p).read_moments(p)[0]
    if group["rank"] >= 4:  # 0.9 of the momentum was carried over, and a tenth of itself has come
        torch.testing.assert_close(low.norm(), momentum.norm(), rtol=0.1 if settings.get("moments") else 1e-3, atol=0)
    p.grad = draw((90, 72), 9)
    optimizer.step()
    again = GaLoreAdamW([{"params": [p], **{k: v for k, v in group.items() if k != "params"}}])
    again.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "before, after, key",
    [
        ({"rank": 4}, {"rank": None}, "rank"),
        ({"rank": 4}, {"variant": "apollo"}, "variant"),
        ({"rank": 4, "variant": "apollo"}, {"rank": 2}, "rank"),
        ({"rank": 4}, {"rank": 0}, "rank"),
        ({"rank": 4}, {"refresh": "trak"}, "refresh"),
        ({"rank": 4}, {"update_proj_gap": 0}, "update_proj_gap"),
        ({"rank": 4}, {"scale": float("nan")}, "scale"),
        ({}, {"lr": float("nan")}, "lr"),
        ({}, {"lr": torch.tensor(float("inf"))}, "lr"),
        ({}, {"betas": (1.0, 0.9)}, "betas"),
        ({}, {"update_gap": 3}, None),
    ],
    ids=str,
)
def test_a_change_that_cannot_be_followed_is_named_at_the_next_step(before, after, key):
    p = nn.Parameter(draw((9, 7), 0))
    _, optimizer = train(p, [draw((9, 7), 1)], **before)
    kept = p.detach().clone()
    optimizer.param_groups[0].update(after)
    if key is None:
        return  # what a user keeps in a group while it trains is the user's
    with pytest.raises(ConfigError, match=f"^{key}="):
        optimizer.step()
    assert torch.equal(p, kept)


def test_changes_that_a_step_reads_by_itself():
    for change in ({"update_proj_gap": 1}, {"scale": 0.0, "weight_decay": 0.0}, {"betas": (0.5, 0.5)}, {"moments": "grad"},
                   {"refresh": "track"}, {"lr": torch.tensor(1e-3)}, {"stagger": False}, {"rank": np.int64(3)}):  # fmt: skip
        p = nn.Parameter(draw((9, 7), 0))
        _, optimizer = train(p, [draw((9, 7), t) for t in range(2)], rank=3)
        optimizer.param_groups[0].update(change)
        before, basis = p.detach().clone(), optimizer.state[p]["proj"].clone()
        p.grad = draw((9, 7), 5)
        optimizer.step()
        assert torch.equal(before, p) == (change.get("scale") == 0.0)
        assert torch.equal(basis, optimizer.state[p]["proj"]) == (
            "refresh" not in change and change.get("update_proj_gap") != 1
        )


def test_parameters_replaced_in_a_groups_list_are_stepped():
    for rank in ({}, {"rank": 3}):
        old, new = nn.Parameter(draw((9, 7), 0)), nn.Parameter(draw((9, 7), 1))
        _, optimizer = train(old, [draw((9, 7), 2)], **rank)
        optimizer.param_groups[0]["params"][0] = new
        kept, before = old.detach().clone(), new.detach().clone()
        new.grad = draw((9, 7), 3)
        optimizer.step()
        assert torch.equal(old, kept) and not torch.equal(new, before)


def test_groups_that_come_late():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = GaLoreAdamW(galore_param_groups(model[1:], 4), lr=1e-3)
    optimizer.add_param_group({"params": list(model[0].parameters())})  # as Lightning's BaseFinetuning does: without names
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3)), "lr": 1e-4})
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 6
    again = GaLoreAdamW(galore_param_groups(model[1:], 4), lr=1e-3)
    again.add_param_group({"params": list(model[0].parameters())})
    with pytest.raises(ConfigError, match="optimizer state"):
        again.load_state_dict(optimizer.state_dict())  # the last group is missing
    again.add_param_group({"params": nn.Parameter(torch.zeros(3)), "lr": 1e-4})
    again.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": 2, "refresh": "no"}, {"update_proj_gp": 3}, {"rank": 1}], ids=str)
def test_a_refused_group_leaves_nothing_behind(wrong):
    p, late = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
    optimizer = GaLoreAdamW([p])
    with pytest.raises(ConfigError):
        optimizer.add_param_group({"params": [late], **wrong})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.add_param_group({"params": [late]})
    optimizer.load_state_dict(optimizer.state_dict())


WRONG_KEYS = [
    ("update_proj_gp", 5), ("projection_type", "std"), ("rotate_moment", False), ("scal", 1), ("maximize", True),
    ("amsgrad", True), ("momentum", 0.9), ("", 1),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG_KEYS)
def test_unknown_keys_of_a_group_are_named(key, value):
    model = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=f"^{key}="):
        galore_param_groups(model, 2, **{key: value}) and GaLoreAdamW(galore_param_groups(model, 2, **{key: value}))
    with pytest.raises(ConfigError, match=f"^{key}="):
        GaLoreAdamW([{"params": list(model.parameters()), key: value}])


def test_keys_that_others_read_may_stand_in_a_group():
    for key, value in (("name", "head"), ("lr_scale", 0.1), ("initial_lr", 1e-3), ("fused", True), ("maximize", False)):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4))], key: value}])


# ---- which matrices ---------------------------------------------------------------------------------------------------


def prune(layer):
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


def names(groups):
    return [name for name, _ in groups[0]["params"]]


def test_presets_leave_out_what_cannot_be_projected():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning) as caught:
        groups = galore_param_groups(model, 4)
    assert names(groups) == ["1.weight"] and len(caught) == 1
    assert "frozen" in str(caught[0].message) and "parametrized" in str(caught[0].message)
    for name, cause in (("0", "frozen"), ("2", "parametrized")):
        with pytest.raises(ConfigError, match=cause):
            galore_param_groups(model, 4, [name])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_true_cause_is_named():
    tied = nn.Module()
    tied.e, tied.l, tied.m = nn.Embedding(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
    tied.l.weight, tied.get_output_embeddings = tied.e.weight, lambda: tied.l
    with pytest.raises(ConfigError, match="shares its weight with e"):
        galore_param_groups(tied, 4, "head")
    for spoil in (
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ):
        model = nn.Sequential(spoil(nn.Conv1d(8, 8, 3)), nn.Linear(8, 8), spoil(nn.Linear(8, 8)))
        assert names(galore_param_groups(model, 4, ["1"])) == ["1.weight"]  # another layer's norm is nothing to it
        with pytest.raises(ConfigError, match="targets='0': .*made anew"):
            galore_param_groups(model, 4, ["0"])
    assert names(galore_param_groups(nn.ModuleDict({"head": nn.Linear(8, 8)}), 4, ["head"])) == ["head.weight"]
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="lazy"):
        galore_param_groups(lazy, 4)
    with pytest.raises(ConfigError, match="targets='0': is frozen"):
        galore_param_groups(nn.Sequential(nn.Conv2d(4, 4, 3).requires_grad_(False), nn.Linear(4, 4)), 2, ["0"])


def test_exclusions_and_convolutions():
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    assert names(galore_param_groups(model, 4, ["conv", "!b"])) == ["conv.weight"]
    assert names(galore_param_groups(model, 4, ["conv", "a"])) == ["conv.weight", "a.weight"]
    assert names(galore_param_groups(model, 4, ["all", "!b"])) == ["a.weight"]
    assert names(galore_param_groups(model, 4, ["!a"])) == ["b.weight"]
    assert names(galore_param_groups(model, 4, ["*", "!conv"])) == ["a.weight", "b.weight"]


def test_stacks_of_matrices_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(4, 8, 16))
            self.position = nn.Parameter(torch.zeros(1, 9, 8))
            self.gate, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3)

    with pytest.warns(UserWarning, match=r"up \(4, 8, 16\)") as caught:
        groups = galore_param_groups(Experts(), 4)
    assert len(caught) == 1 and "position" not in str(caught[0].message) and "conv" not in str(caught[0].message)
    with pytest.warns(UserWarning, match="a matrix 4x128"):
        GaLoreAdamW([{"params": [groups[1]["params"][0]], "rank": 6}])


# ---- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, None, {"moments": "8bit"}], ids=str)
@pytest.mark.parametrize("size", [1e19, 1e25, 1e36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_spike_whose_square_overflows_is_limited(mode, size, dtype):
    if mode == {"moments": "8bit"}:
        pytest.importorskip("bitsandbytes")
    settings = {} if mode is None else {"rank": 8, "update_proj_gap": 2, **mode}
    p = nn.Parameter(torch.zeros(72, 64, dtype=dtype))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grads = [draw((72, 64), t) * (size if t == 1 else 1) for t in range(5)]
        _, optimizer = train(p, [g.to(dtype) for g in grads], **settings)
    assert p.isfinite().all()
    for value in optimizer.state[p].values():
        assert value.isfinite().all()
    assert sum("square overflows" in str(w.message) for w in caught) <= 1
    if size > 1e20 and dtype == torch.float32:
        before = p.detach().clone()
        p.grad = draw((72, 64), 7)
        optimizer.step()
        assert (p.detach() - before).abs().max() > 1e-5  # it trains on


def test_a_sum_that_overflows_is_no_infinity():
    for group in ({}, {"rank": 4}):
        p = nn.Parameter(torch.zeros(64, 64))
        with pytest.warns(UserWarning, match="square overflows"):
            train(p, [torch.full((64, 64), 1e36)] * 3, **group)
        assert p.isfinite().all() and (group or (p < 0).all())
        with pytest.raises(FloatingPointError, match="not finite"):
            train(p, [torch.full((64, 64), float("inf"))], **group)


@pytest.mark.parametrize("kind", ["left", "full"])
def test_a_basis_of_gradients_whose_square_underflows(kind):
    grad = draw((30, 3), 0) @ draw((3, 40), 1)
    bases = []
    for size in (1.0, 1e-25):
        _, optimizer = train(nn.Parameter(torch.zeros(30, 40)), [size * grad] * 2, rank=3, proj_type=kind, update_proj_gap=1)
        bases.append(next(iter(optimizer.state.values()))["proj"])
    torch.testing.assert_close(*(b @ b.T for b in bases), rtol=1e-3, atol=1e-4)


def test_refreshes_go_on_after_2_to_the_24_steps():
    p = nn.Parameter(torch.zeros(8, 8))
    _, optimizer = train(p, [draw((8, 8), 0)], rank=2, update_proj_gap=10)
    for made in (torch.tensor(2.0**24, dtype=torch.float64), torch.tensor(2.0**24), 2**24):  # older files have float32
        optimizer.state[p]["step"], refreshes = made, 0
        for t in range(20):
            before = optimizer.state[p]["proj"].clone()
            p.grad = draw((8, 8), t)
            optimizer.step()
            refreshes += not torch.equal(before, optimizer.state[p]["proj"])
        assert refreshes == 2 and optimizer.state[p]["step"] == 2**24 + 20


@pytest.mark.parametrize("rank", [None, 48])
def test_8bit_entries_without_a_gradient_do_not_move(rank):
    pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.zeros(96, 96))
    group = {"moments": "8bit"} | ({"rank": rank, "proj_type": "left"} if rank else {})
    grads = [draw((96, 96), t) for t in range(20)]
    for t, grad in enumerate(grads):
        grad[:, 1::2] = 0
        grad[:, ::8] *= 1e-8  # small beside their block: they may move, but as their gradient says
        grads[t] = grad + 1e-8 * (torch.arange(96) % 8 == 0)
    train(p, grads, **group)
    assert p[:, ::2].abs().max() > 5e-3 and p[:, 1::2].abs().max() == 0


def test_8bit_goes_and_comes():
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(96, 96))
    optimizer = GaLoreAdamW(list(model.named_parameters()), lr=1e-3, moments="8bit")

    def step():
        optimizer.zero_grad()
        model(draw((4, 96), 0)).square().mean().backward()
        optimizer.step()

    step()
    optimizer.adopt({"0": 8}, model)  # 768 elements are too few for codes
    for moments in ("8bit", "8bit", "float32", "8bit", "grad"):
        for group in optimizer.param_groups:
            group["moments"] = moments
        step()
    assert set(optimizer.state[model[0].weight]) == {"proj", "exp_avg", "exp_avg_sq", "step"}


def test_the_random_projection_is_drawn_on_the_cpu():
    p = nn.Parameter(torch.zeros(8, 6, device="meta"))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2, "variant": "apollo"}])
    assert optimizer.projected(p)._generator("apollo", 0).device.type == "cpu"


def test_thousands_of_groups_take_one_look_each(monkeypatch):
    from lowrank_pretrain.galore import adam

    looks = []
    monkeypatch.setattr(adam, "split_by", lambda items, key: looks.append(len(items)) or [items])
    params = [nn.Parameter(torch.zeros(2)) for _ in range(50)]
    optimizer = GaLoreAdamW([{"params": [p], "lr": 1e-3 * (1 + i)} for i, p in enumerate(params)])
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    assert looks == [1] * 50
    torch.testing.assert_close(params[4].detach(), torch.full((2,), -5e-3), rtol=1e-2, atol=0)


def test_a_model_with_a_rank_is_as_its_groups():
    """As a HF Trainer hands it over: optimizer_cls_and_kwargs=(GaLoreAdamW, {"model": model, "rank": 4, ...})."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    kwargs = {"model": model, "rank": 4, "targets": ["0"], "lr": 1e-3, "weight_decay": 0.1, "refresh": "track"}
    optimizer = GaLoreAdamW(kwargs.pop("model"), **kwargs)
    assert [(g.get("rank"), g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (4, 0.1, 1),
        (None, 0.0, 3),
    ]
    for params in (
        model.parameters(),
        [{"params": list(model.parameters()), "weight_decay": 0.1}],
        list(model.named_parameters()),
    ):
        with pytest.raises(ConfigError, match="rank=4: needs the model"):
            GaLoreAdamW(params, rank=4)
    with pytest.raises(ConfigError, match="targets='mlp': needs the model"):
        GaLoreAdamW(model.parameters(), targets="mlp")
    with pytest.raises(ConfigError, match="rank=None: is needed"):
        GaLoreAdamW(model)
    with pytest.warns(UserWarning, match="scale=2.0 has no effect yet"):
        GaLoreAdamW(model.parameters(), scale=2.0)


# ---- shapes without numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["meta", "fake cpu", "fake cuda"])
@pytest.mark.parametrize("mode", [*MODES, None, {"layerwise": True}], ids=str)
def test_it_steps_on_tensors_that_have_only_shapes(where, mode):
    """Memory is estimated that way, and a process that has done so must train real weights afterwards."""
    settings = {} if mode is None else {"rank": 3, "update_proj_gap": 2, **mode}
    device = where.removeprefix("fake ")
    with FakeTensorMode() if where != "meta" else contextlib.nullcontext():
        p = nn.Parameter(torch.zeros(16, 12, device=device))
        optimizer = GaLoreAdamW([{"params": [p], **settings}])
        for _ in range(3):
            p.grad = torch.zeros(16, 12, device=device)
            optimizer.step()
        state = optimizer.state[p]
        assert steps_taken(state) == 3 and state["exp_avg"].device.type == device
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        key: tuple(value.shape) for key, value in train(nn.Parameter(draw((16, 12), 0)), [draw((16, 12), 1)], **settings)[1]
        .state.popitem()[1].items()
    }  # fmt: skip


def test_8bit_says_that_it_needs_numbers():
    pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.zeros(64, 64, device="meta"))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ConfigError, match="^moments='8bit': needs numbers"):
        GaLoreAdamW([p], moments="8bit").step()


# ---- gradients of another dtype than the weight's ---------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch keeps gradients in the weight's dtype")
@pytest.mark.parametrize("mode", [{"moments": "grad"}, {"refresh": "svd", "rotate_moments": False}, {}, None], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float64], ids=str)
def test_moments_of_wider_gradients_survive_a_resume(mode, grad_dtype):
    settings = {"moments": "grad"} if mode is None else {"rank": 3, "update_proj_gap": 2, **mode}
    start, weights = draw((8, 6), 0, torch.bfloat16), []
    for resumed in (False, True):
        p = nn.Parameter(start.clone())
        p.grad_dtype = grad_dtype
        optimizer = GaLoreAdamW([{"params": [p], **settings}], lr=1e-2)
        for t in range(6):
            if resumed and t == 3:
                saved, optimizer = optimizer.state_dict(), GaLoreAdamW([{"params": [p], **settings}], lr=1e-2)
                optimizer.load_state_dict(saved)
            p.grad = draw((8, 6), t, grad_dtype)
            optimizer.step()
        weights.append((p.detach(), optimizer.state[p]["exp_avg"]))
    assert weights[0][1].dtype == weights[1][1].dtype == grad_dtype
    assert torch.equal(weights[0][0], weights[1][0]) and torch.equal(weights[0][1], weights[1][1])
