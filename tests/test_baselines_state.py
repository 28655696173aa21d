"""The state of the optimizers to compare with: what a load keeps, what it refuses, and that copies of it go on alike."""

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lowrank_pretrain.baselines.galore_torch import GaLoreTorch
from lowrank_pretrain.baselines.muon import Muon
from lowrank_pretrain.baselines.pair import MATRICES
from lowrank_pretrain.baselines.sinkgd import SinkGD
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.models.optim import Optim, settings_win
from tests.test_baselines import make

PAIRS = ("muon", "sinkgd", "galore_torch")
CLASSES = {"muon": Muon, "sinkgd": SinkGD, "galore_torch": GaLoreTorch}
SETTINGS = {"muon": {}, "sinkgd": {}, "galore_torch": {"rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}}


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def pair(name, params=None, **changed):
    """Return an optimizer of a matrix and a bias, and both."""
    if name == "galore_torch":
        pytest.importorskip("galore_torch")
    params = params or tensors((8, 12), (6,))
    groups = [{"params": params[:1], MATRICES: True}, {"params": params[1:]}]
    return CLASSES[name](groups, lr=1e-2, **{**SETTINGS[name], **changed}), params


def step(optimizer, params, seed=1):
    for p, grad in zip(params, tensors(*(p.shape for p in params), seed=seed), strict=True):
        p.grad = grad.detach()
    optimizer.step()


def eight_bit(params):
    optimizer = make("adamw8bit", nn.ParameterList(params), lr=1e-2)
    step(optimizer, params)
    return optimizer


# ---- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("won", [False, True], ids=["a script", "a run"])
@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("muon", {"momentum": 0.5, "nesterov": False, "ns_steps": 2}),
        ("sinkgd", {"iterations": 1, "scale": 1.0}),
        ("galore_torch", {"update_proj_gap": 5, "scale": 1.0}),
    ],
)
def test_changed_settings_of_a_method_are_the_runs_and_a_line_says_so(name, changed, won, capsys):
    old, params = pair(name)
    step(old, params)
    new, others = pair(name, copy.deepcopy(params), **changed)
    new.param_groups[0]["weight_decay"] = 0.3
    new.param_groups[1]["betas"] = (0.8, 0.9)
    if won:
        settings_win(new)
    wanted = copy.deepcopy(new.param_groups)
    if not won:  # a schedule may change these: they are the file's
        wanted[0]["weight_decay"], wanted[1]["betas"] = old.param_groups[0]["weight_decay"], old.param_groups[1]["betas"]
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    said = capsys.readouterr().out.splitlines()
    for group, then in zip(new.param_groups, wanted, strict=True):
        assert {**group, "params": None} == {**then, "params": None}
    for key, value in changed.items():
        assert f"{key} is now {value} (it was {old.param_groups[0][key]} in the checkpoint)" in said
    assert sorted(line.split(" is now ")[0] for line in said) == sorted([*changed, *(("betas", "weight_decay") if won else ())])
    step(new, others, seed=2)
    twin, same = pair(name, copy.deepcopy(params))
    twin.load_state_dict(copy.deepcopy(old.state_dict()))
    assert not capsys.readouterr().out
    step(twin, same, seed=2)
    step(old, params, seed=2)
    assert torch.equal(params[0], same[0]) and not torch.equal(params[0], others[0])


def test_a_file_without_a_setting_of_the_rest_takes_it_from_the_code():
    old, params = pair("sinkgd")
    step(old, params)
    saved = copy.deepcopy(old.state_dict())
    del saved["param_groups"][1]["betas"]
    new, others = pair("sinkgd", copy.deepcopy(params))
    new.load_state_dict(saved)
    for optimizer, its in ((old, params), (new, others)):
        step(optimizer, its, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("changed", [{"rank": 2}, {"proj_type": "right"}])
def test_a_changed_rank_or_side_of_galore_torch_is_refused_if_there_is_state(changed):
    (key, value), *_ = changed.items()
    old, params = pair("galore_torch")
    new, _ = pair("galore_torch", copy.deepcopy(params), **changed)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0][key] == value  # nothing has its shape yet
    step(old, params)
    before = copy.deepcopy(new.state_dict())
    message = f"^{key}={value!r}: the checkpoint was written with {SETTINGS['galore_torch'][key]!r}: use that, or start [^\n]*$"
    with pytest.raises(ConfigError, match=message):
        new.load_state_dict(old.state_dict())
    assert new.state_dict() == before


# ---- files that cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place", "key"),
    [
        ("muon", 0, "momentum_buffer"), ("muon", 1, "exp_avg_sq"), ("sinkgd", 1, "exp_avg_sq"), ("galore_torch", 0, "proj"),
        ("galore_torch", 0, "exp_avg_sq"), ("galore_torch", 1, "exp_avg"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["another shape", "missing"])
def test_a_state_of_another_shape_is_one_line(name, place, key, how):
    optimizer, params = pair(name)
    step(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][place]
    state["step"] = state.get("step", 1)  # an empty state begins anew
    if how == "missing":
        del state[key]
    else:
        state[key] = torch.zeros(3)
    shape = r"\(8, 12\)" if place == 0 else r"\(6,\)"
    with pytest.raises(ConfigError, match=rf"another model's \([^\n]*; for a parameter {shape}\): continue [^\n]*$"):
        pair(name)[0].load_state_dict(saved)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "right", "left", "full"])
@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (3, 9)])
def test_galore_torch_takes_its_own_state_of_any_side(proj_type, shape):
    params = tensors(shape, (6,))
    optimizer, _ = pair("galore_torch", params, proj_type=proj_type)
    with contextlib.suppress(RuntimeError):  # reverse_std of the package fails for some shapes, after it has made its state
        step(optimizer, params)
    assert "proj" in optimizer.state[params[0]]
    pair("galore_torch", params, proj_type=proj_type)[0].load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("key", ["state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"])
@pytest.mark.parametrize("how", ["another shape", "missing"])
def test_a_damaged_8_bit_state_is_one_line(key, how):
    params = tensors((80, 64))
    saved = copy.deepcopy(eight_bit(params).state_dict())
    state = saved["state"][0]
    state = state.get("__bnb_optimizer_quant_state__", state)
    if how == "missing":
        del state[key]
    else:
        state[key] = state[key].new_zeros(1)
    with pytest.raises(ConfigError, match=r"another model's \([^\n]*; for a parameter \(80, 64\)\)[^\n]*$"):
        eight_bit(params).load_state_dict(saved)


@pytest.mark.parametrize(("there", "here"), [((80, 64), (160, 64)), ((80, 64), (64, 80)), ((6,), (9,))])
def test_an_8_bit_state_of_another_model_is_one_line(there, here):
    saved = eight_bit(tensors(there)).state_dict()
    with pytest.raises(ConfigError, match=r"is another optimizer's or another model's"):
        eight_bit(tensors(here)).load_state_dict(saved)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("shape", [(6,), (), (4, 3, 2, 2)])
def test_a_parameter_that_is_no_matrix_is_refused_when_its_group_joins(name, shape):
    optimizer, params = pair(name)
    with pytest.raises(ConfigError, match=r"^matrices=True: needs a group of matrices, but one parameter is [^\n]*$"):
        optimizer.add_param_group({"params": tensors((4, 6), shape), MATRICES: True})
    assert len(optimizer.param_groups) == 2
    step(optimizer, params)


@pytest.mark.parametrize("begun", [False, True])
def test_a_step_of_galore_torch_that_fails_leaves_plain_tensors(begun):
    params = tensors((8, 12), (8, 12), (6,))
    optimizer = pair("galore_torch", [params[0], params[2]])[0]
    optimizer.add_param_group({"params": [params[1]], MATRICES: True})
    twin, others = copy.deepcopy((optimizer, params))
    if begun:
        step(optimizer, params), step(twin, others)
    params[0].grad, params[1].grad = torch.ones(8, 12), torch.ones(8, 12).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    states = [optimizer.state[p] for p in params[:2]]
    assert all(isinstance(value, (int, torch.Tensor)) for state in states for value in state.values())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, other in zip(params, others, strict=True):
            other.copy_(p)
    for some, its in ((optimizer, params), (twin, others)):
        step(some, its, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


# ---- hooks, copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_a_hook_may_convert_a_file_before_it_is_checked(name):
    old, params = pair(name)
    step(old, params)
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        group["of_matrices"] = group.pop(MATRICES)
    new, others = pair(name, copy.deepcopy(params))
    seen = []

    def convert(_, state_dict):
        found = copy.deepcopy(state_dict)
        for group in found["param_groups"]:
            group[MATRICES] = group.pop("of_matrices")
        return found

    new.register_load_state_dict_pre_hook(convert)
    new.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.param_groups[0]["lr"]))
    new.load_state_dict(saved)
    with pytest.raises(KeyError):  # the hook runs once, and a failed load leaves no hook of ours
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert seen == [1e-2]
    assert len(new._optimizer_load_state_dict_pre_hooks) == len(new._optimizer_load_state_dict_post_hooks) == 1
    for optimizer, its in ((old, params), (new, others)):
        step(optimizer, its, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("name", [*PAIRS, "adamw8bit"])
def test_hooks_on_the_steps_of_all_optimizers_run_once_a_step(name):
    if name == "adamw8bit":
        params = tensors((80, 64), (6,))
        optimizer = eight_bit(params)
    else:
        optimizer, params = pair(name)
    seen = []
    hooks = [
        register_optimizer_step_pre_hook(lambda optimizer, *_: seen.append(("before", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, *_: seen.append(("after", optimizer))),
    ]
    try:
        step(optimizer, params)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [("before", optimizer), ("after", optimizer)]


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_adamw8bit_survives_copies_with_a_scheduler(how, tmp_path):
    params = tensors((80, 64), (6,))
    optimizer = make("adamw8bit", nn.ParameterList(params), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
    step(optimizer, params)
    scheduler.step()
    if how == "pickle":
        copied, others = pickle.loads(pickle.dumps((optimizer, params)))
    elif how == "deepcopy":
        copied, others = copy.deepcopy((optimizer, params))
    else:
        torch.save((optimizer, params), tmp_path / "both.pt")
        copied, others = torch.load(tmp_path / "both.pt", weights_only=False)
    assert type(copied) is type(optimizer) and copied.param_groups[0]["params"][0] is others[0]
    late = tensors((70, 64), (70, 64))
    for some, its, more in ((optimizer, params, late[0]), (copied, others, late[1])):
        with torch.no_grad():
            more.fill_(0.5)
        some.add_param_group({"params": [more]})
        for seed in range(2, 5):
            step(some, [*its, more], seed=seed)
    assert all(torch.equal(a, b) for a, b in zip([*params, late[0]], [*others, late[1]], strict=True))
    copied.load_state_dict(optimizer.state_dict())


def test_the_settings_of_adamw8bit_win_after_a_copy_too(capsys):
    params = tensors((80, 64))
    old, new = eight_bit(params), copy.deepcopy(make("adamw8bit", nn.ParameterList(params), **vars(Optim(weight_decay=0.3))))
    settings_win(new)
    new.load_state_dict(old.state_dict())
    assert "weight_decay is now 0.3 (it was 0.05 in the checkpoint)" in capsys.readouterr().out
