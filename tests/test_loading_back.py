"""State dicts that come back into layers with adapters or factors: a round trip is the identity, and all else stays."""

import copy
import io
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder
from torch import nn

from lowrank_pretrain import PreLoRA
from lowrank_pretrain.factorize.layer import give_factors
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.shown import MOST
from tests.test_factorize import cut_of, matrix
from tests.test_lora import conv1d, fused, randomise
from tests.toy import Toy, loader, toy, trainer

KINDS = ["linear", "conv1d", "rest", "rest conv1d", "bfloat16", "int8", "int8 original", "factorize", "factorize conv1d"]


def changed(kind: str) -> nn.Module:
    """A module with one layer that has random adapters or factors; W is frozen."""
    torch.manual_seed(0)
    layout = "conv1d" if "conv1d" in kind else "linear"
    if "factorize" in kind:
        module = nn.Sequential(conv1d(20, 12) if layout == "conv1d" else nn.Linear(12, 20))
        give_factors(module[0], cut_of(matrix(20, 12), 3))
        return module
    module = fused(layout, 16).float()
    name = next(iter(module))
    plan = {f"{name}.q": 2, f"{name}.v": 1} | ({} if "rest" in kind else {f"{name}.k": 2})
    lora.inject(module, plan, alpha=3.0)
    randomise(module)
    frozen = next((word for word in kind.split() if word in ("bfloat16", "int8")), None)
    lora.freeze(module, plan, frozen_dtype=frozen, keep_original="original" in kind)
    return module


def layer_of(module: nn.Module) -> nn.Module:
    return next(iter(module.children()))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    stored = getattr(layer_of(module), "_stored", None)
    extra = {} if stored is None else stored.tensors()
    return {name: value.detach().clone() for name, value in [*module.named_parameters(), *extra.items()]}


def train(module: nn.Module) -> None:
    """Move everything that trains, as an optimizer does."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.1)


def is_same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def clones(state: dict) -> dict:
    return {name: value.clone() for name, value in state.items()}


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def others(module: nn.Module) -> dict:
    """The values of an average of the model: another one's."""
    other = copy.deepcopy(module)
    train(other)
    return clones(other.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, clones, through_a_file])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_is_the_identity_bit_for_bit(kind, how):
    module = changed(kind)
    before, state = values(module), how(module.state_dict())
    module.load_state_dict(state)
    assert is_same(values(module), before)
    train(module)
    module.state_dict()  # a checkpoint is written
    train(module)
    module.load_state_dict(state)  # back to the best
    assert is_same(values(module), before)
    assert is_same(module.state_dict(), state)


@pytest.mark.parametrize("kind", KINDS)
def test_other_values_may_have_been_loaded_in_between(kind):
    module = changed(kind)
    for _ in range(3):
        train(module)
        before, state = values(module), clones(module.state_dict())
        average = others(module)
        module.load_state_dict(average)  # to validate with it
        for name, value in module.state_dict().items():  # a checkpoint of it
            torch.testing.assert_close(value, average[name], rtol=0.05, atol=0.05)
        module.load_state_dict(state)
        assert is_same(values(module), before)


def test_in_the_joint_phase_w_is_exact_unless_it_has_trained_since():
    module, plan = toy(), {"blocks.0.fc1": 4}
    lora.inject(module, plan)
    randomise(module)
    layer, before, state = module.blocks[0].fc1, values(module), clones(module.state_dict())
    module.load_state_dict(others(module))
    module.load_state_dict(state)
    assert is_same(values(module), before)
    train(module)
    module.load_state_dict(state)
    for name, value in values(module).items():
        tolerance = 1e-6 if name == "blocks.0.fc1.weight" else 0.0
        torch.testing.assert_close(value, before[name], rtol=0, atol=tolerance)
    assert layer._memory.displaced is not None
    train(module)
    module.state_dict()
    assert layer._memory.displaced is None  # training has gone on: the copy of W is given back


def test_little_is_remembered_and_copies_remember_nothing():
    module = nn.Sequential(nn.Linear(256, 256))
    lora.inject(module, {"0": 4})
    first = clones(module.state_dict())
    for _ in range(3 * MOST):
        train(module)
        module.state_dict()
        module.state_dict()  # the same once more
    memory = module[0]._memory
    held = sum(t.numel() for entry in memory._entries for t in entry.factors.values())
    assert 2 <= len(memory._entries) <= MOST and held <= module[0].weight.numel() / 4 and memory.displaced is None
    module.load_state_dict(first)  # it is forgotten: a plain model
    assert not module[0].lora_B["W"].any() and torch.equal(module[0].weight, first["0.weight"])
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin[0]._memory is None or not twin[0]._memory._entries
    lora.eject(module)
    assert not {"_memory", "_own", "_shown", "_remembers"} & module[0].__dict__.keys()


def test_factors_that_are_loaded_with_assign_are_no_alias_of_the_memory():
    module = changed("linear")
    before, state = values(module), clones(module.state_dict())
    for _ in range(2):
        module.load_state_dict(clones(state), assign=True)
        assert is_same(values(module), before)
        train(module)


def test_a_weight_that_a_list_holds_too_is_the_merged_one():
    module = nn.Module()
    module.fc = nn.Linear(8, 8)
    module.held = nn.ParameterList([module.fc.weight])
    lora.inject(module, {"fc": 2})
    randomise(module)
    x, state = torch.randn(3, 8), clones(module.state_dict())
    y = module.fc(x)
    module.load_state_dict(state)
    torch.testing.assert_close(module.fc(x), y)


# -- partial state dicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_is_not_in_the_dict_stays_as_it_is(kind):
    module = changed(kind)
    name = next(iter(dict(module.named_children())))
    before, bias = values(module), torch.full_like(layer_of(module).bias, 0.5)
    missing, unexpected = module.load_state_dict({f"{name}.bias": bias}, strict=False)
    assert (missing, unexpected) == ([f"{name}.weight"], [])  # by the plain names
    after = values(module)
    assert torch.equal(after.pop(f"{name}.bias"), bias)
    after = {key: value for key, value in after.items() if "rest_bias" not in key}
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert module.load_state_dict({}, strict=False).missing_keys == [f"{name}.weight", f"{name}.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"\w+.weight\""):
        module.load_state_dict({f"{name}.bias": bias})


@pytest.mark.parametrize("kind", ["linear", "factorize"])
def test_a_weight_of_another_shape_changes_nothing(kind):
    module = changed(kind)
    before, state = values(module), module.state_dict()
    name = next(iter(state))
    with pytest.raises(RuntimeError, match="shape"):
        module.load_state_dict({**state, name: torch.zeros(3, 3)})
    assert is_same(values(module), before)


@pytest.mark.parametrize("kind", ["linear", "int8", "factorize"])
def test_a_state_dict_that_was_scaled_in_place_loads(kind):
    module = changed(kind)
    for _ in range(2):
        state = module.state_dict()
        for value in state.values():
            value.mul_(0.5)
        wanted = clones(state)
        module.load_state_dict(state)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=0.01, atol=0.01 if kind == "int8" else 1e-6)
    state = module.state_dict()
    next(iter(state.values())).mul_(0.5)
    with pytest.raises(RuntimeError, match="the write was lost"):
        module.state_dict()


# -- functional_call -----------------------------------------------------------------------------------------------------


class OfItsOwn(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", [*KINDS, "own forward"])
def test_functional_call_with_a_state_dict_computes_with_that_weight_alone(kind):
    module = nn.Sequential(OfItsOwn(16, 8)) if kind == "own forward" else changed(kind)
    if kind == "own forward":
        lora.inject(module, {"0": 2})
        randomise(module)
    layer, state = layer_of(module), clones(layer_of(module).state_dict())
    x = torch.randn(5, 12 if "factorize" in kind else 16)
    before, y = values(module), layer(x)
    for made in (lambda v: v, lambda v: nn.Parameter(v), lambda v: (v.requires_grad_(), v)[1]):
        given = {name: made(2 * value) for name, value in state.items()}
        doubled = torch.func.functional_call(layer, given, (x,))
        wide = given["weight"] if "conv1d" in kind else given["weight"].t()
        wanted = (x @ wide + given["bias"]) * (2 if kind == "own forward" else 1)
        torch.testing.assert_close(doubled, wanted, rtol=1e-4, atol=1e-4)
    ours, theirs = (torch.autograd.grad(y.sum(), given["weight"]) for y in (doubled, wanted))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(layer(x), y) and is_same(values(module), before)  # it is over
    if "factorize" in kind:
        assert layer.weight.grad_fn is not None
        with pytest.raises(KeyError, match="weight"):
            layer.weight = nn.Parameter(torch.zeros(20, 12))
        with pytest.raises(AttributeError, match="weight"):
            layer.weight = torch.zeros(20, 12)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "factorize"])
def test_functional_call_with_named_parameters_is_as_before(kind):
    module = changed(kind)
    x, own = torch.randn(5, 12 if kind == "factorize" else 16), dict(layer_of(module).named_parameters())
    layer = layer_of(module)

    def loss(given):
        return torch.func.functional_call(layer, given, (x,)).square().sum()

    assert torch.equal(loss(own), layer(x).square().sum())
    found = torch.func.grad(loss)({name: p.detach() for name, p in own.items()})
    layer(x).square().sum().backward()
    for name, p in own.items():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-4)
    some = {name: p for name, p in own.items() if p.requires_grad}
    assert torch.equal(loss(some), layer(x).square().sum())


@pytest.mark.parametrize("how", ["copy", "pickle", "assigned", "moved"])
def test_a_weight_that_becomes_the_layers_own_has_its_adapters(how):
    module = nn.Sequential(nn.Linear(6, 5))
    lora.inject(module, {"0": 2})
    randomise(module)
    x = torch.randn(3, 6)
    y = module(x)
    if how == "copy":
        module = copy.deepcopy(module)
    elif how == "pickle":
        module = pickle.loads(pickle.dumps(module))
    elif how == "assigned":
        module[0].weight = nn.Parameter(module[0].weight.detach().clone())
    else:
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        module = module.double().float()
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.testing.assert_close(module(x), y)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    torch.testing.assert_close(torch.func.functional_call(module, state, (x,)), y)


# -- fits ----------------------------------------------------------------------------------------------------------------


def phases(**kwargs):
    """Switch after step 4, freeze after step 10; with six steps in an epoch."""
    settings = {"targets": "all", "ranks": (2, 4), "window_unit": "step", "window": 2, "windows": 2, "latest": 2, "warmup": 3}
    return PreLoRA(**{**settings, **kwargs})


class Swap(Callback):
    """Validates with other weights, as hand-written averages do."""

    def on_validation_start(self, trainer, pl_module):
        self.held = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.load_state_dict({name: value * 0.9 for name, value in self.held.items()}, strict=True)

    def on_validation_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.held)


def test_swapping_weights_around_validation_does_not_change_the_training(tmp_path):
    found = []
    for callbacks in ([], [Swap()]):
        module = toy()
        fit = trainer(tmp_path, *callbacks, phases(), max_epochs=4, limit_val_batches=1, num_sanity_val_steps=0)
        fit.fit(module, loader(), loader())
        found.append(module.state_dict())
    assert is_same(*found)


class Tuned(Toy):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.lr = 1e-2


class FineTunes(LearningRateFinder):
    """Lightning's example: searches at the start of some epochs."""

    def __init__(self):
        super().__init__(num_training_steps=3, min_lr=1e-4, max_lr=1e-1, update_attr=False)
        self.changed = {}

    def on_fit_start(self, *args):
        pass

    def on_train_epoch_start(self, trainer, pl_module):
        before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.lr_find(trainer, pl_module)
        after = dict(pl_module.named_parameters())
        self.changed[trainer.current_epoch] = [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("then", ["lora", "factorize"])
def test_a_search_for_a_rate_in_mid_fit_leaves_every_parameter_as_it_was(tmp_path, then):
    torch.manual_seed(7)
    module, search = Tuned(), FineTunes()
    pre = phases(then=then, ranks=(0.1,) if then == "factorize" else (2, 4))
    trainer(tmp_path, search, pre, max_epochs=3).fit(module, loader())
    assert pre.phase == "lowrank"
    assert search.changed == {0: [], 1: [], 2: []}  # full, joint, lowrank
