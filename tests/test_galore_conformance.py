"""GaLoreAdamW under the battery that torch gives its own optimizers, plain groups next to ``torch.optim.AdamW``.

With the fused kernel, no decay and an epsilon too small to matter, a plain group must have AdamW's very bits. ``PROJECTED`` is
the same optimizer with a rank: it goes through every part of the battery that has a meaning for it.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import AdamW, lr_scheduler

from lowrank_pretrain import ConfigError, GaLoreAdamW

EPS = 1e-30  # the published epsilon stands before the bias correction, torch's after it
PLAIN, PROJECTED = "plain", "projected"


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return (model(batch(step)) - batch(step)[:, :4]).square().mean()


def make(model: nn.Module, kind: str = PLAIN, lr: float = 1e-2, **kwargs) -> GaLoreAdamW:
    if kind == PLAIN:
        return GaLoreAdamW(model.parameters(), lr=lr, eps=EPS, **kwargs)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "rank": 2, "update_proj_gap": 3, "scale": 1.0}, {"params": rest}]
    return GaLoreAdamW(groups, lr=lr, eps=EPS, **kwargs)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6, start: int = 0, after=lambda: None) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        after()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


kinds = pytest.mark.parametrize("kind", [PLAIN, PROJECTED])


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)])
@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_has_the_bits_of_adamw(betas, lr):
    ours, theirs = net(), net()
    train(ours, make(ours, lr=lr, betas=betas), steps=20)
    train(theirs, AdamW(theirs.parameters(), lr=lr, betas=betas, eps=EPS, weight_decay=0.0, fused=True), steps=20)
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_has_the_bits_of_adamw_in_other_number_formats(dtype):
    weights = [torch.randn(5, 7).to(dtype).requires_grad_() for _ in range(2)]
    weights[1].data.copy_(weights[0])
    ours = GaLoreAdamW([weights[0]], lr=1e-2, eps=1e-8 if dtype is torch.bfloat16 else EPS, moments="grad")
    theirs = AdamW([weights[1]], lr=1e-2, eps=1e-8 if dtype is torch.bfloat16 else EPS, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        grad = torch.randn(5, 7, generator=generator).to(dtype)
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    if dtype is torch.bfloat16:  # epsilon stands elsewhere: the bits agree as long as it is below the mean square's last one
        assert torch.equal(weights[0], weights[1])
    else:
        torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)


def test_decay_is_that_of_the_published_code_and_near_adamws():
    ours, theirs = net(), net()
    train(ours, make(ours, weight_decay=0.1), steps=10)
    train(theirs, AdamW(theirs.parameters(), lr=1e-2, eps=EPS, weight_decay=0.1), steps=10)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=10 * 1e-2 * 1e-2 * 0.1 * 2, rtol=0)  # a product of rate, decay and step apart


# -- layouts ------------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "vector": lambda: torch.randn(5),
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "every second column": lambda: torch.randn(4, 12)[:, ::2],
    "three dimensions": lambda: torch.randn(2, 3, 4),
}
GRADS = {
    "as the weight": lambda g, w: torch.empty_like(w).copy_(g),
    "contiguous": lambda g, w: g.contiguous(),
    "transposed": lambda g, w: g.transpose(0, -1).contiguous().transpose(0, -1) if g.ndim > 1 else g,
    "expanded": lambda g, w: torch.ones((), dtype=g.dtype).expand(g.shape),
}


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_weight_and_gradient(layout, grad):
    torch.manual_seed(0)
    start = LAYOUTS[layout]()
    weights = [start.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    pair = [GaLoreAdamW([weights[0]], lr=1e-2, eps=EPS), AdamW([weights[1]], lr=1e-2, eps=EPS, weight_decay=0.0)]
    for step in range(5):
        draw = torch.randn(start.shape, generator=torch.Generator().manual_seed(step))
        for weight, optimizer in zip(weights, pair, strict=True):
            weight.grad = GRADS[grad](draw, weight)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grad", GRADS)
def test_a_projected_matrix_does_not_care_how_its_gradient_lies(grad):
    weights = [torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    for weight, lay in zip(weights, (GRADS[grad], lambda g, w: g.contiguous()), strict=True):
        rank = 1 if grad == "expanded" else 2  # a second direction of such a gradient would be rounding
        optimizer = GaLoreAdamW([{"params": [weight], "rank": rank, "update_proj_gap": 2}], lr=1e-2)
        for step in range(5):
            draw = torch.randn(6, 9, generator=torch.Generator().manual_seed(step))
            weight.grad = lay(torch.ones(6, 9) if grad == "expanded" else draw, weight)
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


# -- groups -------------------------------------------------------------------------------------------------------------


def test_parameters_come_in_every_form_that_torch_takes():
    model = net()
    for given in (
        list(model.parameters()), model.parameters(), list(model.named_parameters()), [{"params": model.parameters()}],
        [{"params": list(model[0].parameters()), "lr": 1e-3}, {"params": model[3].parameters()}],
    ):  # fmt: skip
        optimizer = GaLoreAdamW(given, lr=1e-2)
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        before = model[3].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(model[3].weight, before)


@kinds
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_generator_of_parameters_is_read_once(kind, late, named):
    layer, first = nn.Linear(4, 6), nn.Parameter(torch.zeros(3))
    given = ((("weight", p) if named else p) for p in [layer.weight])
    group = {"params": given, **({"rank": 2} if kind == PROJECTED else {})}
    if late:
        optimizer = GaLoreAdamW([("first", first)] if named else [first])
        optimizer.add_param_group(group)
    else:
        optimizer = GaLoreAdamW([group])
    assert optimizer.param_groups[-1]["params"][0] is layer.weight
    assert optimizer.param_groups[-1].get("param_names") == (["weight"] if named else None)


def test_an_empty_group_may_join_named_ones():
    optimizers = [GaLoreAdamW([{"params": [("weight", nn.Parameter(torch.zeros(4, 6)))], "rank": 2}]) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.add_param_group({"params": []})
        optimizer.add_param_group({"params": iter([nn.Parameter(torch.zeros(3))])})
    optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_numpys_numbers_become_plain_ones_in_the_file():
    numpy = pytest.importorskip("numpy")
    whole, half = numpy.int64(2), numpy.float64(0.5)
    settings = {"rank": whole, "update_proj_gap": whole, "seed": whole, "scale": half, "lr": half, "weight_decay": half}
    optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 6))], **settings}], lr=half, update_proj_gap=whole)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("step", [float("nan"), float("inf"), -1, 2.5, "3", torch.tensor(-3.0), torch.zeros(2), None], ids=str)
def test_a_step_that_is_no_count_is_refused(step):
    model = net()
    optimizer = make(model, PROJECTED)
    train(model, optimizer, steps=1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = step
    with pytest.raises(ConfigError, match="its step is .* whole number"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize(
    "given, error",
    [([], ValueError), (torch.randn(3), TypeError), ([1.0], TypeError), ([{"lr": 1e-3}], (KeyError, ValueError))],
)
def test_what_torch_refuses_is_refused(given, error):
    for cls in (GaLoreAdamW, AdamW):
        with pytest.raises((error, ConfigError) if isinstance(error, type) else (*error, ConfigError)):
            cls(given, lr=1e-2)


def test_a_parameter_in_two_groups_is_refused():
    p = nn.Parameter(torch.randn(3))
    optimizer = GaLoreAdamW([p], lr=1e-2)
    with pytest.raises((ValueError, ConfigError)):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_what_is_no_leaf_is_refused():
    with pytest.raises((ValueError, ConfigError)):
        GaLoreAdamW([torch.randn(3, requires_grad=True) * 2], lr=1e-2)


@kinds
def test_groups_keep_their_own_rates_and_a_late_one_joins(kind):
    ours, theirs = net(), net()
    pair = []
    for model, cls in ((ours, GaLoreAdamW), (theirs, AdamW)):
        kwargs = {"eps": EPS, "weight_decay": 0.0}
        optimizer = cls([{"params": model[0].parameters(), "lr": 1e-3}], lr=1e-2, **kwargs)
        train(model, optimizer, steps=2)
        optimizer.add_param_group({"params": list(model[3].parameters()), "betas": (0.5, 0.9)})
        train(model, optimizer, steps=3)
        pair.append(optimizer)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@kinds
def test_a_parameter_without_a_gradient_stays_and_has_no_state(kind):
    model = net()
    optimizer = make(model, kind)
    still = model[3].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        model[2](model[1](model[0](batch(step)))).square().mean().backward()
        optimizer.step()
    assert torch.equal(model[3].weight, still) and model[3].weight not in optimizer.state


@kinds
def test_zero_grad_keeps_or_drops_the_tensors(kind):
    model = net()
    optimizer = make(model, kind)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@kinds
def test_the_rate_may_be_a_tensor(kind):
    number, tensor = net(), net()
    train(number, make(number, kind, lr=0.02))
    train(tensor, make(tensor, kind, lr=torch.tensor(0.02)))
    for p, q in zip(number.parameters(), tensor.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# -- closures and hooks -------------------------------------------------------------------------------------------------


@kinds
def test_a_closure_runs_once_with_gradients_and_gives_the_loss(kind):
    model, calls = net(), []
    optimizer = make(model, kind)

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() > 0


@kinds
def test_hooks_of_every_kind_are_called(kind):
    model, seen = net(), []
    optimizer = make(model, kind)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("state"))
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append("stated"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(model, optimizer, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "state", "stated", "load", "loaded"]


@kinds
def test_what_a_hook_edits_is_what_is_loaded(kind):
    model = net()
    optimizer = make(model, kind)
    train(model, optimizer, steps=2)
    saved, other = optimizer.state_dict(), make(net(), kind)

    def halve(_, state):
        state = copy.deepcopy(state)
        for kept in state["state"].values():
            kept["exp_avg"] = kept["exp_avg"] * 0.5
        return state

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(saved)
    for p, q in zip(parameters_of(optimizer), parameters_of(other), strict=True):
        torch.testing.assert_close(other.state[q]["exp_avg"], optimizer.state[p]["exp_avg"] * 0.5)


# -- state --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("way", ["state dict", "file", "deep copy", "pickle"])
def test_state_survives_every_way_of_copying(kind, way):
    model = net()
    optimizer = make(model, kind)
    train(model, optimizer, steps=4)
    if way in ("deep copy", "pickle"):
        both = copy.deepcopy((model, optimizer)) if way == "deep copy" else pickle.loads(pickle.dumps((model, optimizer)))
        other, again = both
    else:
        other = copy.deepcopy(model)
        again, saved = make(other, kind), optimizer.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        again.load_state_dict(saved)
    train(model, optimizer, steps=4, start=4)
    train(other, again, steps=4, start=4)
    assert_same(model, other)


def test_adamws_own_file_loads_and_goes_on():
    ours, theirs = net(), net()
    adamw = AdamW(theirs.parameters(), lr=1e-2, eps=EPS, weight_decay=0.0, fused=True)
    train(theirs, adamw, steps=4)
    ours.load_state_dict(theirs.state_dict())
    optimizer = make(ours)
    optimizer.load_state_dict(adamw.state_dict())
    train(ours, optimizer, steps=4, start=4)
    train(theirs, adamw, steps=4, start=4)
    assert_same(ours, theirs)


def test_a_loaded_state_is_a_copy():
    model = net()
    optimizer = make(model)
    train(model, optimizer, steps=1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = make(net())
    other.load_state_dict(saved)
    train(net(), other, steps=2)
    assert torch.equal(saved["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


@kinds
@pytest.mark.parametrize("change", ["fewer groups", "fewer parameters"])
def test_a_state_of_another_grouping_is_refused(kind, change):
    optimizer = make(net(), kind)
    saved = optimizer.state_dict()
    if change == "fewer groups":
        saved["param_groups"] = saved["param_groups"][1:]
    else:
        saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][1:]
    with pytest.raises((ValueError, ConfigError)):
        optimizer.load_state_dict(saved)


# -- schedulers ---------------------------------------------------------------------------------------------------------

SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=4),
    "one cycle, betas too": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=12),
    "cyclic, betas too": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, step_size_up=3, cycle_momentum=True),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_steer_it_as_they_steer_adamw(name):
    ours, theirs = net(), net()
    for model, optimizer in (
        (ours, make(ours)), (theirs, AdamW(theirs.parameters(), lr=1e-2, eps=EPS, weight_decay=0.0, fused=True)),
    ):  # fmt: skip
        schedule = SCHEDULES[name](optimizer)
        train(model, optimizer, steps=8, after=schedule.step)
    assert_same(ours, theirs)


# -- what it is given, and where ----------------------------------------------------------------------------------------


@kinds
def test_a_model_made_on_meta_trains_once_it_has_memory(kind):
    with torch.device("meta"):
        model = net()
    optimizer = make(model, kind)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    optimizer = make(model, kind)
    twin = net()
    train(model, optimizer)
    train(twin, make(twin, kind))
    assert_same(model, twin)


@pytest.mark.parametrize("grad", ["sparse", "complex"])
def test_gradients_that_it_cannot_take_are_named(grad):
    if grad == "sparse":
        layer = nn.Embedding(5, 3, sparse=True)
        optimizer = GaLoreAdamW(layer.named_parameters(), lr=1e-2)
        layer(torch.tensor([1, 2])).sum().backward()
    else:
        p = nn.Parameter(torch.randn(3, dtype=torch.cfloat))
        p.grad = torch.randn(3, dtype=torch.cfloat)
        optimizer = None
    with pytest.raises((ConfigError, RuntimeError), match="sparse|complex"):
        (optimizer or GaLoreAdamW([("w", p)], lr=1e-2)).step()


@kinds
@pytest.mark.parametrize("surrounding", ["no_grad", "autocast", "float64 by default", "meta by default", "deterministic"])
def test_surroundings_have_no_effect(kind, surrounding):
    bare, inside = net(), net()
    train(bare, make(bare, kind))
    optimizer = make(inside, kind)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(inside, step).backward()
        if surrounding == "no_grad":
            with torch.no_grad():
                optimizer.step()
        elif surrounding == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                optimizer.step()
        elif surrounding == "meta by default":
            with torch.device("meta"):
                optimizer.step()
        elif surrounding == "deterministic":
            torch.use_deterministic_algorithms(True)
            try:
                optimizer.step()
            finally:
                torch.use_deterministic_algorithms(False)
        else:
            torch.set_default_dtype(torch.float64)
            try:
                optimizer.step()
            finally:
                torch.set_default_dtype(torch.float32)
    assert_same(bare, inside)


@kinds
def test_a_grad_scaler_skips_and_goes_on_as_with_adamw(kind):
    model = net()
    optimizer, scaler = make(model, kind), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(loss_of(model, 0)).backward()
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 1)).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before[0])


@kinds
def test_clipping_of_its_gradients_is_clipping(kind):
    model, small = net(), net()
    for clipped in (model, small):
        optimizer = make(clipped, kind)
        for step in range(4):
            optimizer.zero_grad()
            (loss_of(clipped, step) * (1000 if clipped is model else 1)).backward()
            nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
            optimizer.step()
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "key", ["foreach", "fused", "maximize", "amsgrad", "capturable", "differentiable", "decoupled_weight_decay"]
)
def test_arguments_of_adamw_that_it_has_not_are_refused_by_name(key):
    with pytest.raises((TypeError, ConfigError), match=key):
        GaLoreAdamW([nn.Parameter(torch.randn(2))], lr=1e-2, **{key: True})


@pytest.mark.parametrize(
    "key, value",
    [("lr", -1.0), ("lr", float("nan")), ("betas", (1.0, 0.9)), ("betas", (0.9, 1.5)), ("eps", -1.0), ("weight_decay", -1.0)],
)
def test_values_that_adamw_refuses_are_refused(key, value):
    with pytest.raises((ValueError, ConfigError), match=key):
        GaLoreAdamW([nn.Parameter(torch.randn(2))], **{key: value})
