"""Loading optimizer state: torch's hooks, names before order, every tensor compared, and whose settings win."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(named=False, steps=2, shapes=((24, 16), (16,)), **settings):
    params = [nn.Parameter(draw(shape, i)) for i, shape in enumerate(shapes)]
    one = [("w", params[0])] if named else params[:1]
    rest = [(f"b{i}", p) for i, p in enumerate(params[1:])] if named else params[1:]
    group = {"rank": 4} if settings.get("rank", 4) else {}
    optimizer = GaLoreAdamW([{"params": one, **group}, *([{"params": rest}] if rest else [])],
                            **{"lr": 1e-2, **{k: v for k, v in settings.items() if k != "rank"}})  # fmt: skip
    for t in range(steps):
        for i, p in enumerate(params):
            p.grad = draw(p.shape, 10 + 10 * t + i)
        optimizer.step()
    return optimizer


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Pair(nn.Module):
    def __init__(self, order=("q", "k")):
        super().__init__()
        for name in order:
            self.add_module(name, nn.Linear(12, 12))

    def forward(self, x):
        return torch.tanh(self.q(x)) * self.k(x)


def of(model, targets="all", steps=1, **settings):
    optimizer = GaLoreAdamW(galore_param_groups(model, 4, targets, **settings), lr=1e-2)
    for t in range(steps):
        optimizer.zero_grad()
        model(draw((4, 12), t)).sum().backward()
        optimizer.step()
    return optimizer


# ---- hooks and names --------------------------------------------------------------------------------------------------


def test_what_a_pre_hook_makes_of_the_state_is_what_is_loaded():
    old = trained()
    for edit, left in (
        (lambda _, state: {**state, "state": {}}, {}),
        (lambda _, state: {**state, "state": {0: state["state"][0]}}, {0}),
        (lambda _, state: state["param_groups"][0].update(lr=0.5), {0, 1}),
    ):
        new, done = trained(steps=0), []
        new.register_load_state_dict_pre_hook(edit)
        new.register_load_state_dict_post_hook(lambda optimizer, done=done: done.append(len(optimizer.state)))
        new.load_state_dict(copy.deepcopy(old.state_dict()))
        assert set(new.state_dict()["state"]) == set(left) and done == [len(left)]
    assert new.param_groups[0]["lr"] == 0.5
    bad = trained(steps=0)
    bad.register_load_state_dict_pre_hook(lambda _, state: state["state"][0].update(exp_avg=torch.zeros(1)))
    with pytest.raises(ConfigError, match="exp_avg"):
        bad.load_state_dict(copy.deepcopy(old.state_dict()))


def test_state_dict_hooks_see_adopted_ranks():
    optimizer = of(Pair(), steps=1)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1


def test_parameters_are_matched_by_name():
    old_model, new_model = Pair(("q", "k")), Pair(("k", "q"))
    old = of(old_model)
    new = of(new_model, steps=0)
    new.load_state_dict(through_a_file(old.state_dict()))
    for name in ("q", "k"):
        a, b = (getattr(model, name).weight for model in (old_model, new_model))
        assert torch.equal(old.state[a]["proj"], new.state[b]["proj"])
    wrapped = nn.ModuleDict({"module": new_model})  # as under DistributedDataParallel
    again = GaLoreAdamW([{"params": [(n, p) for n, p in wrapped.named_parameters() if "weight" in n], "rank": 4},
                         {"params": [(n, p) for n, p in wrapped.named_parameters() if "bias" in n]}])  # fmt: skip
    again.load_state_dict(through_a_file(old.state_dict()))
    assert torch.equal(again.state[new_model.q.weight]["proj"], old.state[old_model.q.weight]["proj"])


def test_names_that_differ_are_refused():
    with pytest.raises(ConfigError, match="rank=.*weight"):
        of(Pair(), ["k"], steps=0).load_state_dict(of(Pair(), ["q"]).state_dict())
    saved = of(Pair()).state_dict()
    for group in saved["param_groups"]:
        group["param_names"] = [name.replace("k.", "v.") for name in group["param_names"]]
    with pytest.raises(ConfigError, match="k.weight.*not in the file"):
        of(Pair(), steps=0).load_state_dict(saved)
    less = GaLoreAdamW([{"params": [("q.weight", nn.Parameter(torch.zeros(12, 12)))], "rank": 4}])
    with pytest.raises(ConfigError, match="k.weight.*not in this optimizer"):
        less.load_state_dict(of(Pair()).state_dict())


# ---- tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"proj_type": "full"}, {"residual": "fira"}, {"moments": "8bit"}], ids=str)
def test_every_tensors_shape_is_compared(settings):
    shapes = ((96, 1100), (4096,)) if settings.get("moments") else ((24, 16), (16,))
    if settings.get("moments"):
        pytest.importorskip("bitsandbytes")
    saved = trained(shapes=shapes, **settings).state_dict()
    wrong = [(i, key) for i, state in saved["state"].items() for key in state]
    assert len(wrong) > 6
    for i, key in wrong:
        bad = copy.deepcopy(saved)
        bad["state"][i][key] = torch.zeros(2, 3, dtype=bad["state"][i][key].dtype)
        new = trained(steps=0, shapes=shapes, **settings)
        with pytest.raises(ConfigError, match=key.removesuffix("_scale")):
            new.load_state_dict(bad)
        assert not new.state  # nothing is changed
        if key != "step":
            del bad["state"][i][key]
            if key not in ("residual_norm",) and not key.endswith("_scale"):
                with pytest.raises(ConfigError, match=f"has no {key}"):
                    new.load_state_dict(bad)


def test_a_moment_of_a_wrong_kind_is_refused():
    for value in (torch.zeros(4, 24, dtype=torch.uint8), torch.zeros(4, 24, dtype=torch.complex64), [0.0], None):
        saved = trained().state_dict()
        saved["state"][0]["exp_avg"] = value
        with pytest.raises(ConfigError, match="exp_avg"):
            trained(steps=0).load_state_dict(saved)


def test_dtypes_and_layouts_are_made_the_modes():
    old = trained()
    saved = copy.deepcopy(old.state_dict())
    for state in saved["state"].values():
        for key, value in state.items():
            state[key] = value.double() if value.ndim < 2 else value.double().t().contiguous().t()
        state["step"] = 2
    new = trained(steps=0)
    new.load_state_dict(saved)
    for p, q in zip(old.state, new.state, strict=True):
        q.data.copy_(p.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert new.state[q][key].dtype == torch.float32
        p.grad = q.grad = draw(p.shape, 99)
    old.step()
    new.step()
    for p, q in zip(old.state, new.state, strict=True):
        torch.testing.assert_close(p, q)


def test_moments_may_change_their_kind_between_two_runs():
    pytest.importorskip("bitsandbytes")
    shapes = ((96, 1100), (4096,))
    for before in ("float32", "8bit", "grad"):
        saved = trained(shapes=shapes, moments=before).state_dict()
        for after in ("float32", "8bit", "grad"):
            new = trained(steps=0, shapes=shapes, moments=after)
            new.load_state_dict(saved)
            assert {g["moments"] for g in new.param_groups} == {after}
            for p in list(new.state):
                p.grad = draw(p.shape, 5)
            new.step()
            assert {s["exp_avg"].dtype for p, s in new.state.items() if p.ndim == 1} == {
                torch.uint8 if after == "8bit" else torch.float32
            }


def test_two_optimizers_do_not_share_what_they_loaded():
    saved = trained().state_dict()
    one, two = trained(steps=0), trained(steps=0)
    one.load_state_dict(saved)
    two.load_state_dict(saved)
    for p in one.state:
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(list(two.state.values()))
    one.step()
    for state, kept in zip(two.state.values(), before, strict=True):
        assert all(torch.equal(state[key], kept[key]) for key in state)


# ---- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["refresh", "rotate_moments", "stagger", "layerwise", "moments", "residual", "variant", "seed",
                                 "scale", "update_proj_gap", "proj_type", "correct_bias", "eps", "betas", "lr"])  # fmt: skip
def test_keys_that_a_file_lacks_are_filled(key):
    old = trained()
    saved = copy.deepcopy(old.state_dict())
    for group in saved["param_groups"]:
        del group[key]
    del saved["asked"]
    new = trained(steps=0)
    new.load_state_dict(saved)
    for p, q in zip(old.state, new.state, strict=True):
        q.data.copy_(p.detach())
        p.grad = q.grad = draw(p.shape, 99)
    old.step()
    new.step()
    assert all(torch.equal(p, q) for p, q in zip(old.state, new.state, strict=True))


def test_keys_that_are_unknown_are_named_and_left_out():
    saved = trained().state_dict()
    saved["param_groups"][0]["second_momentum"] = 1
    new = trained(steps=0)
    with pytest.warns(UserWarning, match="second_momentum"):
        new.load_state_dict(saved)
    assert "second_momentum" not in new.param_groups[0]


def test_an_older_pickle_has_its_keys_filled():
    optimizer = trained()
    state = optimizer.__getstate__()
    for group in state["param_groups"]:
        del group["residual"]
    del state["_asked"]
    again = GaLoreAdamW.__new__(GaLoreAdamW)
    again.__setstate__(state)
    again.step()
    assert {group["residual"] for group in again.param_groups} == {None}


# ---- who wins ---------------------------------------------------------------------------------------------------------

CHANGES = {
    "update_proj_gap": 7, "scale": 2.0, "refresh": "track", "residual": "fira", "layerwise": True, "betas": (0.8, 0.95),
    "weight_decay": 0.3, "stagger": False, "rotate_moments": False, "eps": 1e-3, "correct_bias": False, "moments": "grad",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
@pytest.mark.parametrize("told", [True, False])
def test_what_the_code_asks_for_wins_over_the_file(key, told):
    old = trained()
    saved = through_a_file(old.state_dict())
    if not told:  # a file of an older version, or one that went through torch.distributed.checkpoint
        del saved["asked"]
    new = trained(steps=0, **{key: CHANGES[key]})
    new.load_state_dict(saved)
    wanted = CHANGES[key] if told or key not in ("betas", "weight_decay") else old.param_groups[0][key]
    assert {group[key] for group in new.param_groups} == {wanted}
    default = trained(steps=0)
    default.load_state_dict(through_a_file(trained(**{key: CHANGES[key]}).state_dict()))  # and back again
    assert {group[key] for group in default.param_groups} == {trained(steps=0).param_groups[0][key]}


def test_what_was_changed_in_the_middle_of_a_run_comes_back_with_it():
    old = trained()
    for group in old.param_groups:
        group.update(lr=1e-4, betas=(0.5, 0.9), update_proj_gap=3)  # a schedule, or a user in a loop
    new = trained(steps=0)
    new.load_state_dict(through_a_file(old.state_dict()))
    assert all(group["lr"] == 1e-4 and group["betas"] == (0.5, 0.9) for group in new.param_groups)
    assert all(group["update_proj_gap"] == 3 for group in new.param_groups)


def test_another_rate_is_as_far_along_its_schedule():
    old = trained()
    schedule = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 / (1 + step))
    schedule.step()
    new = trained(steps=0, lr=4e-2)
    torch.optim.lr_scheduler.LambdaLR(new, lambda step: 1.0)
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["lr"] == pytest.approx(2e-2) and new.param_groups[0]["initial_lr"] == pytest.approx(4e-2)
    same = trained(steps=0)
    same.load_state_dict(old.state_dict())
    assert same.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_layerwise_may_be_switched_off_and_on():
    for before, after in ((True, False), (False, True)):
        new = of(Pair(), steps=0, layerwise=after)
        new.load_state_dict(of(Pair(), layerwise=before).state_dict())
        model = new.param_groups[0]["params"]
        new.step(lambda model=model: sum((p * 2.0).sum() for p in model).backward())
        assert all((p.grad is None) == after for p in model)


def test_another_seed_is_said_and_not_taken():
    new = trained(steps=0, seed=5)
    with pytest.warns(UserWarning, match="seed=5.*0"):
        new.load_state_dict(trained(seed=0).state_dict())
    assert new.param_groups[0]["seed"] == 0


def test_what_cannot_change_is_refused_with_both_values():
    for key, value in (("variant", "apollo"), ("proj_type", "right")):
        with pytest.raises(ConfigError, match=f"^{key}={value!r}.*{'galore' if key == 'variant' else 'std'}"):
            trained(steps=0, **{key: value}).load_state_dict(trained().state_dict())


@pytest.mark.parametrize(("key", "value"), [("second_moment", "factored"), ("rule", "muon"), ("proj_type", "left")])
def test_a_mode_may_change_before_anything_is_projected_and_not_after_an_adoption(key, value):
    def made(**settings):
        model = Pair()
        return model, GaLoreAdamW(list(model.named_parameters()), lr=1e-2, **settings)

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it has no effect yet
        model, old = made()
        new = made(**{key: value})[1]
        for adopted in (False, True):
            if adopted:
                old.adopt({"q": 3}, model)
            model(draw((4, 12), 0)).sum().backward()
            old.step()
            if not adopted:
                new.load_state_dict(through_a_file(old.state_dict()))
                assert new.param_groups[0][key] == value
                continue
            with pytest.raises(ConfigError, match=f"^{key}={value!r}"):
                new.load_state_dict(through_a_file(old.state_dict()))


# ---- adoption ---------------------------------------------------------------------------------------------------------


def test_adopted_ranks_are_those_of_the_file():
    model = Pair()
    optimizer = GaLoreAdamW(list(model.named_parameters()), lr=1e-2)

    def step():
        optimizer.zero_grad()
        model(draw((4, 12), 0)).sum().backward()
        optimizer.step()

    step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.adopt({"q": 3}, model)
    step()
    after = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(before)  # a file from before the adoption takes it back
    assert optimizer.projected(model.q.weight) is None
    step()
    assert set(optimizer.state[model.q.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    for again in (optimizer, GaLoreAdamW(list(model.named_parameters()), lr=1e-2)):
        again.load_state_dict(through_a_file(after))
        assert again.projected(model.q.weight).rank == 3 and again.projected(model.k.weight) is None
        assert again.param_groups[0]["scale"] == 1.0  # the adoption's, not the constructor's


def test_a_rate_that_a_schedule_took_below_zero_loads():
    w = nn.Parameter(torch.ones(8, 6))
    old, new = (GaLoreAdamW([{"params": [w], "rank": 2}], lr=1e-2) for _ in range(2))
    schedule = torch.optim.lr_scheduler.LambdaLR(old, lambda step: 1 - step)
    for _ in range(3):
        w.grad = torch.ones_like(w)
        old.step()
        schedule.step()
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["lr"] == old.param_groups[0]["lr"] < 0


# ---- whose settings: groups that other code replaces, and settings that a run changes ----------------------------------


def test_settings_belong_to_a_group_and_not_to_its_position():
    a, b = (nn.Parameter(draw(shape, 0)) for shape in ((8, 12), (5,)))

    def made(rate):
        return GaLoreAdamW([{"params": [a], "rank": 4}, {"params": [b], "lr": rate}], lr=1e-3)

    saved = made(3e-3).state_dict()
    new = made(9.0)
    del new.param_groups[1]
    new.add_param_group({"params": [b], "lr": 3e-3})
    new.load_state_dict(saved)
    assert new.param_groups[1]["lr"] == 3e-3
    for copied in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        copied.param_groups[1]["lr"] = 7.0  # a schedule
        assert [asked["lr"] for asked in copied.state_dict()["asked"]] == [1e-3, 3e-3]
    del new.param_groups[0]
    assert len(new.state_dict()["asked"]) == 1


def test_a_group_that_was_put_in_by_hand_counts_as_it_is():
    a, b = (nn.Parameter(draw(shape, 0)) for shape in ((8, 12), (5,)))
    old = GaLoreAdamW([{"params": [a], "rank": 4}], lr=1e-2)
    old.add_param_group({"params": [b], "lr": 1e-3})
    saved = through_a_file(old.state_dict())
    new = GaLoreAdamW([{"params": [a], "rank": 4}], lr=1e-2)
    new.param_groups = [{**group, "params": [p]} for group, p in zip(saved["param_groups"], (a, b), strict=True)]
    new.param_groups[0] |= {"lr": 5e-3, "initial_lr": 1e-2}  # in the middle of a schedule
    saved["param_groups"][0] |= {"lr": 5e-3, "initial_lr": 1e-2}
    new.load_state_dict(saved)
    assert [group["lr"] for group in new.param_groups] == [5e-3, 1e-3]
    assert new.rate_shares == [1.0, 1.0]


@pytest.mark.parametrize("change", [{"rank": 3}, {"rank": 6}, {"proj_type": "reverse_std"}, {"proj_type": "full"}], ids=str)
@pytest.mark.parametrize("mode", [{}, {"second_moment": "factored"}, {"rule": "muon"}], ids=str)
def test_a_change_of_rank_or_side_outlives_a_save_and_a_copy_before_the_next_step(change, mode):
    def steps(optimizer):
        for t in range(3):
            for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                p.grad = draw(p.shape, 50 + 10 * t + i)
            optimizer.step()
        return optimizer.param_groups[0]["params"][0]

    old = trained(**mode)
    old.param_groups[0].update(change)
    copied, pickled, loaded = copy.deepcopy(old), pickle.loads(pickle.dumps(old)), trained(steps=0, **mode)
    loaded.load_state_dict(through_a_file(old.state_dict()))
    for new, there in zip(loaded.param_groups, old.param_groups, strict=True):
        for p, weight in zip(new["params"], there["params"], strict=True):
            p.data.copy_(weight)
    expected = steps(old)
    for other in (copied, pickled, loaded):
        assert torch.equal(steps(other), expected)


def test_a_square_matrix_that_was_given_its_full_rank_later_may_be_saved_before_its_step():
    p = nn.Parameter(draw((8, 8), 0))
    optimizer = GaLoreAdamW([{"params": [p]}], lr=1e-2)
    p.grad = draw((8, 8), 1)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = 8
    GaLoreAdamW([{"params": [p], "rank": 8}], lr=1e-2).load_state_dict(through_a_file(optimizer.state_dict()))


def test_moments_without_a_basis_are_not_taken_into_apollo():
    p = nn.Parameter(draw((8, 12), 0))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it has no effect yet
        optimizer = GaLoreAdamW([{"params": [p], "variant": "apollo"}], lr=1e-2)
    p.grad = draw((8, 12), 1)
    optimizer.step()
    optimizer.param_groups[0]["rank"] = 4
    with pytest.raises(ConfigError, match="^rank=4: variant=apollo has no subspace"):
        optimizer.step()


@pytest.mark.parametrize("change", [{"rank": 3}, {"proj_type": "reverse_std"}], ids=str)
def test_a_schedule_of_ranks_is_resumed_by_the_same_code_and_another_rank_in_the_code_is_refused(change):
    old = trained()
    old.param_groups[0].update(change)
    old.step()
    saved = through_a_file(old.state_dict())
    new = trained(steps=0)
    new.load_state_dict(saved)
    assert {key: new.param_groups[0][key] for key in change} == change
    other = GaLoreAdamW([{"params": [nn.Parameter(draw((24, 16), 0))], "rank": 5}, {"params": [nn.Parameter(draw((16,), 0))]}])
    with pytest.raises(ConfigError, match="^rank=5: the checkpoint was written with"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("now", [{}, {"rank": 3}, *({"rank": 4, key: value} for key, value in {
    "proj_type": "right", "rule": "muon", "second_moment": "factored", "variant": "apollo"}.items())], ids=str)  # fmt: skip
@pytest.mark.parametrize("told", [True, False])
def test_a_group_without_state_is_as_the_code_wants_it(now, told):
    def made(**settings):
        return GaLoreAdamW([{"params": [nn.Parameter(draw((8, 12), 0))], **settings}], lr=1e-2)

    saved = made(rank=4).state_dict()
    if not told:
        del saved["asked"]
    new = made(**now)
    new.load_state_dict(saved)
    assert {key: new.param_groups[0][key] for key in now} == now
    assert new.param_groups[0].get("rank") == now.get("rank")


def test_an_empty_group_among_named_ones_stays_as_it_is():
    a, b = (nn.Parameter(draw(shape, 0)) for shape in ((8, 12), (5,)))
    named = [{"params": [("a", a)], "rank": 4, "lr": 1e-3}, {"params": [("b", b)], "lr": 2e-3}]
    saved = GaLoreAdamW(named).state_dict()
    named = [{"params": [("a", a)], "rank": 4, "lr": 1e-3}, {"params": [("b", b)], "lr": 2e-3}]
    new = GaLoreAdamW([{"params": [], "param_names": [], "lr": 7e-3}, *named])
    new.load_state_dict(saved)
    assert [(group.get("rank"), group["lr"]) for group in new.param_groups] == [(None, 7e-3), (4, 1e-3), (None, 2e-3)]


def test_an_adopted_rank_is_read_from_the_state_where_the_group_has_lost_it():
    model = Pair()
    optimizer = GaLoreAdamW(list(model.named_parameters()), lr=1e-2)
    model(draw((4, 12), 0)).sum().backward()
    optimizer.adopt({"q": 3}, model)
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["ranks"], saved["asked"]  # as a flattened distributed checkpoint has it
    new = GaLoreAdamW(list(model.named_parameters()), lr=1e-2)
    new.load_state_dict(saved)
    assert new.projected(model.q.weight).rank == 3
    assert new.param_groups[0]["scale"] == 1.0


def test_a_residual_with_two_sides_is_refused_before_an_adoption():
    model = Pair()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it has no effect yet
        optimizer = GaLoreAdamW(list(model.named_parameters()), lr=1e-2, proj_type="full", residual="fira")
    with pytest.raises(ConfigError, match="^proj_type='full': a residual"):
        optimizer.check_adopt(["q"], model)


@pytest.mark.skipif(not hasattr(nn.Parameter(torch.zeros(1)), "grad_dtype"), reason="torch has no grad_dtype yet")
@pytest.mark.parametrize("moments", ["grad", "float32"])
def test_gradients_of_any_dtype_keep_the_dtypes_of_the_file(moments):
    def made():
        params = [nn.Parameter(draw(shape, 0)) for shape in ((12, 20), (7,))]
        for p in params:
            p.grad_dtype = None
        return params, GaLoreAdamW([{"params": params[:1], "rank": 4}, {"params": params[1:]}], lr=1e-2, moments=moments)

    params, old = made()
    for p in params:
        p.grad = draw(p.shape, 1).double()
    old.step()
    others, new = made()
    new.load_state_dict(through_a_file(old.state_dict()))
    for p, other in zip(params, others, strict=True):
        assert {key: t.dtype for key, t in new.state[other].items()} == {key: t.dtype for key, t in old.state[p].items()}
