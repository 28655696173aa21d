"""LTE on other people's models and habits: who writes into weights, which layers are called, what is averaged, who looks."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowrank_pretrain import ConfigError
from lowrank_pretrain.baselines.muon import Muon
from lowrank_pretrain.baselines.sinkgd import SinkGD
from lowrank_pretrain.lora.products import Part, RestPart
from lowrank_pretrain.lte.heads.function import Layout, heads_linear
from tests import lte_habits_workers as workers
from tests.lte_galore_workers import GaLoreNet
from tests.lte_workers import WIDTH, Net, fit, weights


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class Wide(Net):
    """Has a matrix whose heads may be large."""

    def __init__(self):
        super().__init__(dtype=torch.float32)
        self.net = nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, 64), nn.Linear(64, 2 * WIDTH))


class Unused(Net):
    """Calls a layer and drops what it gives."""

    def __init__(self):
        super().__init__()
        self.pooler = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x):
        self.pooler(x)
        return super().forward(x)


@pytest.mark.parametrize("reset", [False, True])
def test_heads_that_no_gradient_reaches_are_named_after_the_first_merge(reset):
    with pytest.warns(
        UserWarning, match="no gradient in the 4 steps before the first merge reached the heads of pooler: "
    ) as said:
        fit(module=Unused(), reset=reset)
    assert len([w for w in said if "no gradient" in str(w.message)]) == 1


# ---- who writes into W between merges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "data", "another tensor"])
@pytest.mark.parametrize(
    "lte", [{}, {"reset": True}, {"overlap": 1}, {"mode": "sequential"}, {"mode": "joint"}], ids=lambda lte: "-".join(lte)
)
def test_what_is_written_into_a_weight_stays(how, lte):
    gained = workers.written(1, at=(1, 4, 6), how=how, **lte)  # within a window, at a merge, at the end
    torch.testing.assert_close(gained.pop("net.0.weight"), torch.full((WIDTH, WIDTH), 0.75, dtype=torch.float64))
    assert not any(value.any() for value in gained.values())


def test_it_is_said_once():
    with pytest.warns(UserWarning, match="net.0 was written to between two merges") as caught:
        workers.written(1, at=(1, 3, 5))
    assert len([w for w in caught if "written to" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*written to.*")
        fit(steps=9, val=1)


def test_half_precision_keeps_what_is_written():
    module = Net(lr=0.0, dtype=torch.bfloat16)
    before = module.net[0].weight.detach().clone()
    fit(module=module, merge_every=2, steps=6, trainer={"callbacks": [workers.Writes((1, 3), by=0.25)]})
    assert torch.equal(module.net[0].weight, before + 0.25 + 0.25)


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"overlap": 2}])
def test_clamped_weights_end_clamped(how):
    assert workers.clamped(1, **how)[0] <= 0.05 + 1e-9 or how  # a pending merge comes on top
    assert workers.clamped(1, **how)[0] < 0.2


@pytest.mark.parametrize("hook", ["on_validation_end", "on_validation_batch_end"])
def test_what_is_written_while_the_merged_model_is_looked_at_stays(hook):
    callbacks = [workers.Clamps(hook)]
    module, _, _ = fit(
        steps=8, merge_every=4, val=1, trainer={"val_check_interval": 4, "callbacks": callbacks}, net={"lr": 0.0}
    )
    assert module.net[0].weight.abs().max() <= 0.05 + 1e-9


def test_pruning_in_the_middle_of_a_fit_holds():
    prune = pl.callbacks.ModelPruning("l1_unstructured", amount=0.5)
    module = Net(dtype=torch.float32)
    fit(module=module, steps=16, trainer={"callbacks": [prune], "max_epochs": 2})
    assert (module.net[0].weight == 0).float().mean() > 0.4
    assert {type(m) for m in module.net} == {type(m) for m in Net().net}


class Loads(pl.Callback):
    def __init__(self, at, state=None):
        self.at, self.state = at, state

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.at:
            module.load_state_dict(self.state or copy.deepcopy(module.state_dict()))


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"mode": "sequential"}])
def test_a_state_that_is_loaded_in_mid_fit_is_the_model_from_then_on(how):
    other = {name: value + 0.5 for name, value in weights(Net()).items()}
    module, _, _ = fit(steps=6, net={"lr": 0.0}, trainer={"callbacks": [Loads(3, other)]}, **how)
    for name, value in weights(module).items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-12)


def test_reading_and_loading_in_mid_window_changes_nothing():
    plain, _, _ = fit(steps=7)
    loaded, _, _ = fit(steps=7, heads=1, trainer={"callbacks": [Loads(6)]})
    alone, _, _ = fit(steps=7, heads=1)
    for name, value in weights(loaded).items():
        torch.testing.assert_close(value, weights(alone)[name], rtol=0, atol=0)
    assert (weights(plain)["net.0.weight"] - weights(alone)["net.0.weight"]).abs().max() > 1e-6


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"overlap": 2}, {"mode": "sequential"}])
def test_resume_after_someone_wrote_is_exact(tmp_path, how):
    same(*workers.resumed_after_writing(1, tmp_path, **how))


@pytest.mark.parametrize("how", [{}, {"reset": True}, {"route": "dense"}, {"galore": True}], ids=str)
def test_workers_that_write_different_things_go_on_from_the_mean(ranks, how):
    found = ranks(2, workers.written, 2, at=(1, 5), by=(0.25, 0.75), **how)
    same(found[0], found[1])
    torch.testing.assert_close(found[0].pop("net.0.weight"), torch.full((WIDTH, WIDTH), 1.0, dtype=torch.float64))
    assert not found[0]["net.4.weight"].any()


@pytest.mark.parametrize("how", [{"sync_rest": "merge"}, {"galore": True}], ids=str)
def test_two_workers_resume_exactly_after_they_wrote(ranks, tmp_path, how):
    for on, resumed in ranks(2, workers.resumed_after_writing, 2, tmp_path, **how):
        same(on, resumed)


@pytest.mark.parametrize("galore", [False, True])
def test_two_workers_clamp(ranks, galore):
    (largest, a), (_, b) = ranks(2, workers.clamped, 2, galore=galore)
    assert largest <= 0.05 + 1e-9
    same(a, b)


# ---- is every target called? ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["linear", "product", "normalised"])
@pytest.mark.parametrize("lte", [{}, {"mode": "joint"}, {"trainer": {"accumulate_grad_batches": 2}}], ids=str)
def test_a_layer_whose_weight_is_used_without_a_call_trains_in_full_from_the_first_step(how, lte):
    with pytest.warns(UserWarning, match="net.4 is never called"):
        found = workers.bypassed(1, how=how, **lte)
    assert found["targets"] == ["net.0"]
    same(found["weights"], workers.bypassed(1, targets=["all", "!net.4"], how=how, **lte)["weights"])


@pytest.mark.parametrize("sync_rest", ["step", "merge"])
def test_on_two_workers_too_and_after_a_resume(ranks, tmp_path, sync_rest):
    found = ranks(2, workers.bypassed, 2, folder=tmp_path, steps=6, sync_rest=sync_rest)
    apart = ranks(2, workers.bypassed, 2, targets=["all", "!net.4"], steps=6, sync_rest=sync_rest, exact=True)
    resumed = ranks(2, workers.bypassed, 2, ckpt=tmp_path / "step=3.ckpt", steps=6, sync_rest=sync_rest)
    for a, b, c in zip(found, apart, resumed, strict=True):
        same(a["weights"], b["weights"])
        same(a["weights"], c["weights"])


def test_named_it_is_refused_before_a_step_is_lost():
    module = workers.Bypassed()
    before = weights(module)
    with pytest.raises(ConfigError, match="targets=.net.4.: is never called"):
        fit(module=module, targets=["net.0", "net.4"])
    same(before, weights(module))
    assert type(module.net[0]) is nn.Linear and module.net[0].weight.requires_grad


def test_nothing_watches_after_the_first_step():
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            layer = module.net[0]
            self.left = [*layer._forward_pre_hooks, *layer._forward_hooks], layer.weight.requires_grad, layer.weight.grad

    looks = Looks()
    fit(steps=1, trainer={"callbacks": [looks]})
    assert looks.left == ([], False, None)


def test_a_penalty_on_a_target_is_named():
    with pytest.warns(UserWarning, match="weight of net.4 outside of its layer"):
        fit(module=workers.Penalised(), steps=2)


def test_a_layer_that_nobody_calls_is_no_error():
    module = Net()
    module.spare = nn.Linear(WIDTH, WIDTH).double()
    before = module.spare.weight.detach().clone()
    fit(module=module, steps=5)
    assert torch.equal(module.spare.weight, before)


def spoilt(kind):
    module = Net(dtype=torch.float32)
    if kind == "frozen":
        module.net[4].requires_grad_(False)
        module.configure_optimizers = lambda: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], 1e-2)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(module.net[4])
    elif kind == "pruned":
        nn.utils.prune.l1_unstructured(module.net[4], "weight", 0.5)
    elif kind == "old spectral_norm":
        nn.utils.spectral_norm(module.net[4])
    elif kind == "subclass":

        class Own(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        module.net[4] = Own(WIDTH, 2 * WIDTH)
    elif kind == "in no optimizer":
        module.configure_optimizers = lambda: torch.optim.AdamW([p for n, p in module.named_parameters() if "net.4" not in n])
    elif kind == "hook on its gradient":
        module.net[4].weight.register_hook(lambda g: g * (g > 0))
    return module


KINDS = ["frozen", "parametrized", "pruned", "old spectral_norm", "subclass", "in no optimizer", "hook on its gradient"]


@pytest.mark.parametrize("kind", KINDS)
def test_presets_leave_out_what_cannot_have_heads(kind):
    with pytest.warns(UserWarning, match="leaves out what cannot be a target: net.4"):
        _, _, strategy = fit(module=spoilt(kind), steps=2)
    assert [piece.name for piece in strategy.local.pieces] == ["net.0"]
    with pytest.raises(ConfigError, match=r"targets=.net\.4.: "):
        fit(module=spoilt(kind), steps=2, targets=["net.0", "net.4"])


def test_presets_cut_ranks_down():
    with pytest.warns(UserWarning, match="at most 8"):
        _, _, strategy = fit(rank=12, steps=2)
    assert {piece.part.rank for piece in strategy.local.pieces} == {8}


# ---- what is averaged -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "kept", "none", "other names", "grows"])
def test_only_what_training_changes_is_averaged(ranks, kind):
    a, b = ranks(2, workers.buffers, 2, kind=kind, sync_rest="merge", val=1 if kind == "grows" else 0)
    for found, rank in ((a, 0), (b, 1)):
        assert (found["mask"] == torch.finfo(torch.float32).min).all() and found["count"] == 5 == found["whole"] / (1 + rank)
        assert torch.equal(found["table"], torch.linspace(0, 1, 7))
        if kind in ("", "kept"):
            assert torch.equal(found["cache"], torch.arange(2.0 + rank))
    for name in ("norm.running_mean", "norm.running_var"):
        assert torch.equal(a[name], b[name])


def test_statistics_agree_where_nothing_else_is_synchronised(ranks):
    a, b = ranks(2, workers.statistics, 2)
    assert len(a["seen"]) == 2 and all(torch.equal(x, y) for x, y in zip(a["seen"], b["seen"], strict=True))
    same(a["weights"], b["weights"])


def test_huge_numbers_have_a_mean_and_sizes_travel_before_data(ranks):
    for world in (2, 3):
        results = ranks(world, workers.means, world)
        for huge, small, _ in results:
            assert torch.equal(huge, torch.full((3,), torch.finfo(torch.float32).max))
            assert small[1] == (world + 1) / 2 and abs(small[0] - 0.1) < 1e-7
        first, *others = (found for *_, found in results)
        assert not any(others) and [t is None for t in first["a", 0]] == [False] + [True] * (world - 1)
        assert [tuple(t.shape) for t in first["both"]] == [(r + 1, 2) for r in range(world)]
        assert all((t == r).all() for r, t in enumerate(first["both"])) and [int(t) for t in first["step"]] == [*range(world)]
        assert all(t.numel() == 0 for t in first["empty"])


@pytest.mark.parametrize("how", [{}, {"rest": True, "sync_rest": "merge"}, {"sync_rest": "merge"}], ids=str)
def test_a_layer_that_one_worker_uses_is_saved_and_resumed(ranks, tmp_path, how):
    for (on, moments), (resumed, theirs) in ranks(2, workers.by_chance, 2, tmp_path, **how):
        same(on, resumed)
        assert len(moments) == len(theirs) and all(torch.equal(a, b) for a, b in zip(moments, theirs, strict=True))


def test_only_the_writer_holds_what_is_saved(ranks, tmp_path):
    ranks(2, workers.saving, 2, tmp_path)
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["lte_state"]
    assert all(len(value) == 4 for key, value in state["record"].items() if key.startswith("layer"))
    assert all(value.device.type == "cpu" for value in state["record"].values())


@pytest.mark.parametrize("routes", ["factors", "dense"])
def test_targets_of_two_widths_merge(ranks, routes):
    assert workers.two_widths(1)["moved"] > 1e-4
    a, b = ranks(2, workers.two_widths, 2, route=routes)
    same(a, b)
    assert a["moved"] > 1e-4 and a["narrow.weight"].dtype == torch.float32


def test_clipping_by_hand_is_named(ranks):
    with pytest.raises(Exception, match="if it clips by hand, use gradient_clip_val or self.clip_gradients"):
        ranks(2, workers.clips, 2)


def test_drift_that_begins_later_is_noticed_at_the_next_merge(ranks):
    with pytest.raises(Exception, match=r"ranks disagree after the merge at step 6: net\.0\.bias"):
        ranks(2, workers.drifts, 2)


@pytest.mark.parametrize("sync_rest", ["step", "merge"])
def test_a_parameter_that_the_module_keeps_from_ddp_stays_each_workers_own(ranks, sync_rest):
    a, b = ranks(2, workers.own_parameter, 2, sync_rest=sync_rest, trainer={"gradient_clip_val": 0.01})
    assert (a["mine"] - b["mine"]).abs().min() > 0.5 and a["list"] == b["list"] == ["mine"]
    shared = [{name: value for name, value in found["weights"].items() if name != "mine"} for found in (a, b)]
    same(*shared)


# ---- looking from inside a fit ----------------------------------------------------------------------------------------


class Asks(pl.Callback):
    """Looks at the model after every step, in the ways that people do."""

    def __init__(self, build):
        self.bare, self.by_position, self.by_name, self.seen = build(), build(), build(), []

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, *_):
        state = module.state_dict()
        self.bare.load_state_dict(state)  # strict
        for mine, theirs in zip(self.by_position.state_dict().values(), state.values(), strict=True):
            mine.lerp_(theirs, 0.5)
        mine = self.by_name.state_dict()
        for name, value in state.items():
            mine[name].lerp_(value, 0.5)
        copied = copy.deepcopy(module).state_dict()
        assert copied.keys() == state.keys() and all(torch.equal(copied[name], state[name]) for name in state)
        assert module.net.state_dict().keys() == self.bare.net.state_dict().keys()
        trainer.strategy.converted.swap_in()
        merged = {name: value.clone() for name, value in module.state_dict().items()}
        trainer.strategy.converted.swap_out()
        assert not any("lora" in name for name in merged)
        self.seen.append(max(float((merged[name] - state[name]).abs().max()) for name in merged))


@pytest.mark.parametrize(
    "how", [{}, {"reset": True}, {"mode": "sequential"}, {"overlap": 1}, {"heads": 3}, {"targets": ["net.0"]}], ids=str
)
def test_the_state_of_a_model_in_mid_fit_is_that_of_the_plain_model(how):
    asks = Asks(Net)
    module, _, _ = fit(steps=6, trainer={"callbacks": [asks]}, **how)
    assert max(asks.seen) < 1e-12  # one worker: what it would merge to alone is what it merges to
    same(weights(asks.by_position), weights(asks.by_name))
    plain, _, _ = fit(steps=6, **how)
    same(weights(module), weights(plain))  # looking changed nothing


def test_one_worker_may_ask_alone(ranks):
    state, nothing = ranks(2, workers.asked, 2)
    assert nothing is None and state.keys() == weights(Net()).keys()
    assert (state["net.0.weight"] - weights(Net())["net.0.weight"]).abs().max() > 1e-4


# ---- second derivatives, torch.func -----------------------------------------------------------------------------------


def a_layer(heads, merged_before, transposed=False, rest=False):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows, cols, rank = 6, 5, 2
    parts = (Part("q", 0, 3, 0, rank, 0.7), Part("k", 3, 3 - rest, rank, 1, 1.3))
    W, b, A = draw(rows, cols), draw(rows), draw(heads, 3, cols)
    B = [draw(heads, 3, 2), draw(heads, 3 - rest, 1)]
    old = (draw(heads, 3, cols), [draw(heads, 3, 2), draw(heads, 3 - rest, 1)]) if merged_before else (None, [])
    spans = ((0, 2), (2, 5))[:heads] if heads > 1 else ((0, 5),)
    rests = (RestPart("v", 5, 1),) if rest else ()
    layout = Layout(parts, rests, transposed)
    W = W.t().contiguous() if transposed else W
    own_rows = tuple(W.narrow(1 if transposed else 0, 5, 1).clone() for _ in rests)

    def apply(x, b, A, *others):
        return heads_linear(x, W, b, A, list(others[:2]), *old, spans, layout, others[2:])

    return apply, [t.requires_grad_() for t in (draw(5, cols), b, A, *B, *own_rows)]


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize(("transposed", "rest"), [(False, False), (True, False), (False, True), (True, True)])
def test_second_derivatives_of_one_head(merged_before, transposed, rest):
    apply, inputs = a_layer(1, merged_before, transposed, rest)
    if rest:  # W holds their values: numerically they have no derivative
        whole, own_rows = apply, inputs.pop().detach()
        apply = lambda *others: whole(*others, own_rows)  # noqa: E731
    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


def test_second_derivatives_of_several_heads_in_x():
    apply, (x, b, A, *B) = a_layer(2, True)
    assert torch.autograd.gradgradcheck(lambda x: apply(x, b, A, *B), (x,))


def test_a_followed_backward_gives_the_gradients_of_the_usual_one():
    apply, inputs = a_layer(2, True, rest=True)
    usual = torch.autograd.grad(apply(*inputs).square().sum(), inputs)
    followed = torch.autograd.grad(apply(*inputs).square().sum(), inputs, create_graph=True)
    for a, b in zip(usual, followed, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=0, atol=1e-12)


class GradientPenalty(Net):
    def training_step(self, batch, batch_idx):
        index, x, y = batch
        x = x.requires_grad_()
        z = self.out(self.net(x))
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        return F.cross_entropy(z, y) + g.square().mean()


class PerSample(Net):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(torch.func.vmap(lambda x: self.out(self.net(x[None]))[0])(batch[1]), batch[2])


class Forward(Net):
    def training_step(self, batch, batch_idx):
        z, along = torch.func.jvp(lambda x: self.out(self.net(x)), (batch[1],), (torch.ones_like(batch[1]),))
        return F.cross_entropy(z, batch[2]) + along.square().mean()


@pytest.mark.parametrize("model", [GradientPenalty, PerSample, Forward])
@pytest.mark.parametrize("how", [{"heads": 1}, {"heads": 1, "reset": True}, {"heads": 2}], ids=str)
def test_models_that_differentiate_twice_or_forward_train(model, how):
    if model is PerSample and how["heads"] > 1:
        with pytest.raises(ConfigError, match="at least one per head"):
            fit(module=model(), steps=2, **how)
        return
    module, _, strategy = fit(module=model(), steps=6, **how)
    assert (module.net[0].weight - Net().net[0].weight).abs().max() > 1e-3 and strategy.local.merges == 1


# ---- optimizers -------------------------------------------------------------------------------------------------------


class Takes(torch.optim.Optimizer):
    """An optimizer of the user's own: ``matrices``, ``factored``, ``lists``, ``whole`` or ``plain``."""

    def __init__(self, params, kind):
        super().__init__(params, {"lr": 1e-2})
        self.kind, self.steps = kind, 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self.kind == "matrices" and p.ndim > 2:
                    raise ValueError("only matrices")
                if self.kind == "factored":
                    self.state[p]["row"] = p.grad.mean(-1)
                if self.kind == "lists":
                    self.state[p]["factors"] = [p.grad.clone()]
                size = p.grad.norm() if self.kind == "whole" else 1.0
                p.sub_(p.grad / size, alpha=group["lr"])
        return loss


@pytest.mark.parametrize(
    ("kind", "words"), [("matrices", "only matrices"), ("factored", "keeps row"), ("lists", "keeps factors")]
)
def test_an_optimizer_that_cannot_train_heads_is_refused_at_the_start(kind, words):
    module = Net()
    module.configure_optimizers = lambda: Takes(module.parameters(), kind)
    with pytest.raises(ConfigError, match=f"optimizer='Takes'.*{words}"):
        fit(module=module)
    assert not module.losses


def test_torchs_own_are_judged_likewise():
    for name, words in (("Muon", "three dimensions"), ("Adafactor", "keeps row_var")):
        if not hasattr(torch.optim, name):
            continue
        module = Net(dtype=torch.float32)
        two = [module.net[0].weight, module.net[4].weight]
        module.configure_optimizers = lambda name=name, two=two: getattr(torch.optim, name)(two, lr=1e-2)
        with pytest.raises(ConfigError, match=words):
            fit(module=module)
    for name in ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta"):
        module = Net(dtype=torch.float32)
        module.configure_optimizers = lambda name=name, m=module: getattr(torch.optim, name)(m.parameters(), lr=1e-2)
        fit(module=module, steps=1)


@pytest.mark.parametrize(("kind", "words"), [(Muon, "three dimensions"), (SinkGD, "three dimensions")])
def test_our_own_optimizers_of_matrices_are_judged_by_the_group_that_holds_the_heads(kind, words):
    module = Net(dtype=torch.float32)
    two = [module.net[0].weight, module.net[4].weight]
    rest = [p for p in module.parameters() if not any(p is one for one in two)]
    module.configure_optimizers = lambda: kind([{"params": rest}, {"params": two, "matrices": True}], lr=1e-2)
    with pytest.raises(ConfigError, match=f"optimizer='{kind.__name__}'.*{words}"):
        fit(module=module)
    assert not module.losses


def test_an_optimizer_is_judged_by_heads_as_large_as_the_models():
    class Few(torch.optim.SGD):  # as libraries with 8-bit states: small tensors keep full ones
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.numel() >= 4096:
                        self.state[p] = {"codes": p.grad.new_zeros(p.numel() // 256)}
            return super().step(closure)

    for rank, refused in ((2, False), (64, True)):
        module = Wide()
        module.configure_optimizers = lambda m=module: Few(m.parameters(), lr=1e-2)
        if not refused:
            fit(module=module, rank=rank, steps=1)
            continue
        with pytest.raises(ConfigError, match="optimizer='Few': keeps codes"):
            fit(module=module, rank=rank)
        assert not module.losses


def test_an_optimizer_that_takes_heads_together_is_named_and_a_plain_one_is_left_as_it_was():
    for kind in ("whole", "plain"):
        module = Net()
        module.configure_optimizers = lambda kind=kind, m=module: Takes(m.parameters(), kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, run, _ = fit(module=module, steps=3)
        assert any("takes all heads of a matrix together" in str(w.message) for w in caught) == (kind == "whole")
        assert run.optimizers[0].steps == 3


# ---- autocast ---------------------------------------------------------------------------------------------------------


class Stepping(pl.Callback):
    """Whether a state dict is the same inside of autocast as outside."""

    def __init__(self):
        self.same = []

    def on_train_batch_end(self, trainer, module, *_):
        outside = {name: t.clone() for name, t in module.state_dict().items()}
        with torch.autocast("cpu", torch.bfloat16):
            self.same.append(all(torch.equal(t, outside[name]) for name, t in module.state_dict().items()))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"reset": True},
        {"route": "dense"},
        {"outer_momentum": 0.5},
        {"mode": "sequential"},
        {"update": "galore", "rank": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])  # autocast, and another default dtype
def test_steps_by_hand_inside_of_a_precisions_context_merge_as_others_do(how, precision):
    def trained(automatic):
        kind = GaLoreNet if how.get("update") == "galore" else Net
        module, seen, step = kind(dtype=torch.float32), Stepping(), kind.training_step
        module.automatic_optimization = automatic

        def by_hand(batch, batch_idx):
            loss, optimizer = step(module, batch, batch_idx), module.optimizers()
            optimizer.zero_grad()
            module.manual_backward(loss)
            optimizer.step()
            return loss

        module.training_step = module.training_step if automatic else by_hand
        options = {"precision": precision, "callbacks": [seen]}
        fit(module=module, trainer=options, **({"heads": 1} if how.get("update") else {}), **{"outer_lr": 0.9, **how})
        assert all(seen.same)
        return weights(module)

    same(trained(True), trained(False))


# ---- what thaws in the middle of a fit -------------------------------------------------------------------------------


def test_a_group_that_joins_in_the_middle_of_a_fit_is_in_the_checkpoint():
    _, moved, groups = workers.thawed(1)
    assert moved and groups == [7, 2]


@pytest.mark.parametrize("sync_rest", ["step", "merge"])
def test_what_thaws_is_averaged_like_the_rest(ranks, sync_rest):
    (first, moved, _), (second, _, _) = ranks(2, workers.thawed, 2, sync_rest=sync_rest)
    assert moved and torch.equal(first, second)


# ---- who averages by position -----------------------------------------------------------------------------------------


class Averages(pl.Callback):
    """Keeps torch's average of a part of the model, by position."""

    def on_fit_start(self, trainer, pl_module):
        self.average = torch.optim.swa_utils.AveragedModel(pl_module.net)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.average.update_parameters(pl_module.net)


class HoldsAverage(Net):
    """The same, with the average inside of the module and in the optimizer."""

    def __init__(self):
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(self.net)

    def on_train_batch_end(self, *_):
        self.average.update_parameters(self.net)


class Teaches(Net):
    """A frozen copy, updated by position or by name."""

    def __init__(self, by_name=False):
        super().__init__()
        self.teacher, self.by_name = copy.deepcopy(self.net).requires_grad_(False), by_name

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        if self.by_name:
            plain = self.net.state_dict()
            for name, value in self.teacher.state_dict().items():
                value.lerp_(plain[name], 0.5)
        else:
            for p, q in zip(self.net.parameters(), self.teacher.parameters(), strict=False):
                q.lerp_(p, 0.5)


@pytest.mark.parametrize(
    ("module", "callbacks", "line"),
    [
        (Net, [Averages()], "targets='Net': another model pairs its parameters with these by position: update it by name"),
        (HoldsAverage, [], "targets='HoldsAverage': average pairs its parameters"),
        (Teaches, [], "targets='net': teacher pairs its parameters"),
    ],
)
def test_who_averages_by_position_is_refused_in_the_first_step(module, callbacks, line):
    parameters, module = nn.Module.parameters, module()
    with pytest.raises(ConfigError, match=line):
        fit(module=module, trainer={"callbacks": callbacks})
    assert len(module.losses) == 1 and nn.Module.parameters is parameters


def test_who_averages_by_name_follows_the_plain_model_and_asking_both_models_for_their_dtype_is_no_pairing():
    class Asks(Teaches):
        def training_step(self, batch, batch_idx):
            for _ in range(3):
                assert next(self.net.parameters()).dtype == next(self.teacher.parameters()).dtype
            return super().training_step(batch, batch_idx)

    module = Asks(by_name=True)
    before = weights(module)["teacher.0.weight"].clone()
    fit(module=module, steps=5)
    assert not torch.equal(module.teacher[0].weight, before)
