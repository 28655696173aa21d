"""What Lightning's loop offers beside a plain step, with each method: precision, accumulation, clipping, averages, schedules,
checkpointed activations, torch.compile. What cannot work is refused in one line before training."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.checkpoint import checkpoint

from lowrank_pretrain import GaLoreAdamW, LTEStrategy, PreLoRA, galore_param_groups
from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.phases import transition
from tests.test_resume import assert_equal
from tests.toy import AtEnd, Toy, adapters, loader, trainer

METHODS = ("prelora", "galore", "lte")


class Net(Toy):
    """The toy with the optimizer that the method wants, and every schedule Lightning drives."""

    galore: dict | None = None
    dropout: float | None = None
    schedule: str | None = None
    reentrant: bool | None = None

    def __init__(self, **kwargs):
        torch.manual_seed(7)
        super().__init__(**kwargs)

    def on_fit_start(self):
        for block in self.blocks if self.dropout is not None else ():
            block.drop.p = self.dropout

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x.to(self.embed.weight.dtype))
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("flat", 1.0)  # a metric that never improves: every run's plateau is in the same place
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        if self.galore is not None:
            groups = galore_param_groups(self, **{"rank": 4, "update_proj_gap": 3, **self.galore})
            optimizer = GaLoreAdamW(groups, lr=1e-2)
        s = torch.optim.lr_scheduler
        if self.schedule == "epoch":
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": s.StepLR(optimizer, 1, 0.7), "interval": "epoch"}}
        if self.schedule == "plateau":
            plateau = s.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[1e-5] * len(optimizer.param_groups))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "flat", "interval": "epoch"}}
        return optimizer


def net(method: str, **features) -> Net:
    """A fresh module; `features` are attributes of Net."""
    module = Net(lr_groups=2)
    if method == "galore":
        module.galore = {}
    for name, value in features.items():
        setattr(module, name, value)
    return module


def steps(**kwargs) -> PreLoRA:
    """Full for 8 steps, joint for 6, then low-rank."""
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


def fit(path, method, *callbacks, module=None, ckpt=None, prelora=None, lte=None, data=None, **options):
    """Four epochs of six batches; returns (module, trainer). Every step's file lies in `path` if `every` says so."""
    module = net(method) if module is None else module
    method = {"prelora": [steps(**(prelora or {}))]}.get(method, []), method == "lte"
    if method[1]:
        options["strategy"] = LTEStrategy(**{"rank": 2, "heads": 2, "merge_every": 4, **(lte or {})})
    run = trainer(Path(path), LoopState(), *method[0], *callbacks, **{"max_epochs": 4, **options})
    run.fit(module, data or loader(), ckpt_path=ckpt)
    return module, run


def outcome(module, run) -> dict:
    return {
        "model": dict(module.state_dict()),
        "optimizer": run.optimizers[0].state_dict(),
        "lr": [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        "averages": {where: dict(model.state_dict()) for where, model, _ in transition.averages(run.callbacks)},
    }


def phases(run) -> PreLoRA:
    return next(c for c in run.callbacks if isinstance(c, PreLoRA))


class Steps(pl.Callback):
    """Calls a function behind every optimizer step."""

    def __init__(self, look):
        self.look, self.last = look, 0

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step != self.last:
            self.last = trainer.global_step
            self.look(trainer, module)


# -- precision ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prelora", "lte"])  # GaLore: test_galore_lightning
def test_bf16_true(tmp_path, method):
    module, run = fit(tmp_path, method, precision="bf16-true")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert all(p.isfinite().all() for p in module.parameters())
    early, late = sum(module.losses[:6]), sum(module.losses[-6:])
    assert late < 0.95 * early
    if method == "prelora":
        assert phases(run).freeze_step == 14
        assert adapters(module) and all(factor.any() for factor in adapters(module).values())


# behind steps 7 and 13 (counted from 0) PreLoRA switches and freezes
@pytest.mark.parametrize(("method", "bad_step"), [("prelora", 7), ("prelora", 13), ("lte", None), ("lte", 7)])
def test_16_mixed_with_a_scaler_that_skips_a_step(tmp_path, method, bad_step):
    """Lightning makes 16-mixed of a CPU into bf16-mixed; its plugin, given by hand, scales there too."""

    class Overflow(pl.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == bad_step:
                next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = float("inf")

    def run(path, ckpt=None):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        return fit(path, method, Overflow(), plugins=[plugin], every=1, ckpt=ckpt), scaler

    (module, done), scaler = run(tmp_path / "whole")
    assert scaler.get_scale() == (256 if bad_step is None else 128)
    taken = {int(state["step"]) for p, state in done.optimizers[0].state.items() if p is module.head.weight}
    assert taken == {24 - (bad_step is not None)}
    if method == "prelora":
        assert (phases(done).switch_step, phases(done).freeze_step) == (8, 14)  # of 24 attempts
        whole = outcome(module, done)
        for at in (8, 14):
            again, _ = run(tmp_path / "again", tmp_path / "whole" / f"step={at}.ckpt")
            assert_equal(outcome(*again), whole, f"from {at}: ")


# -- accumulation and clipping ------------------------------------------------------------------------------------------


def schedule() -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})  # six, three, two and two optimizer steps


def test_prelora_under_a_schedule_of_accumulation(tmp_path):
    settings = {"window": 3, "latest": 2, "warmup": 1}
    module, run = fit(tmp_path, "prelora", schedule(), prelora=settings, every=1)
    callback = phases(run)
    assert run.global_step == 13 and (callback.switch_step, callback.freeze_step) == (6, 9)
    means = [sum(module.losses[3 * i : 3 * i + 3]) / 3 for i in (0, 1)]
    assert [window.loss for window in callback.history] == pytest.approx(means, rel=1e-6)
    for at in (5, 8, 11):
        again = fit(tmp_path / "x", "prelora", schedule(), prelora=settings, ckpt=tmp_path / f"step={at}.ckpt")
        assert_equal(outcome(*again), outcome(module, run), f"from {at}: ")
    module, run = fit(tmp_path, "prelora", schedule(), prelora={**settings, "window_unit": "epoch", "window": 1, "latest": 2})
    assert (phases(run).switch_step, phases(run).freeze_step) == (9, 11)
    assert phases(run).history[1].loss == pytest.approx(sum(module.losses[6:12]) / 6, rel=1e-6)


def test_layerwise_galore_under_a_schedule_of_accumulation(tmp_path):
    normal, layerwise = (
        fit(tmp_path, "galore", schedule(), module=net("galore", galore={"layerwise": on}))[0] for on in (False, True)
    )
    for (name, a), b in zip(normal.named_parameters(), layerwise.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_lte_merges_by_optimizer_steps_under_a_schedule_of_accumulation(tmp_path):
    merges = []
    _, run = fit(tmp_path, "lte", schedule(), Steps(lambda t, _: merges.append(t.strategy.local.merges)))
    assert merges == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.2), ("value", 0.01)])
def test_clipping_bounds_what_the_optimizer_sees_in_every_phase(tmp_path, algorithm, limit):
    seen = {}
    module = net("prelora")
    configure = module.configure_optimizers

    def spy(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        flat = torch.cat([g.flatten() for g in grads])
        size = flat.norm() if algorithm == "norm" else flat.abs().max()
        seen.setdefault(phases(module.trainer).phase, []).append(size.item())

    def configure_and_spy():
        optimizer = configure()
        optimizer.register_step_post_hook(spy)  # the backward pass runs inside the step
        return optimizer

    module.configure_optimizers = configure_and_spy
    fit(tmp_path, "prelora", module=module, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert {phase: len(sizes) for phase, sizes in seen.items()} == {"full": 8, "joint": 6, "lowrank": 10}
    for sizes in seen.values():
        assert max(sizes) == pytest.approx(limit, rel=1e-4)


# -- averages of the weights --------------------------------------------------------------------------------------------


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.8)


@pytest.mark.parametrize("first", [True, False])
def test_ema_follows_prelora_by_name(tmp_path, first):
    """Lightning pairs the averaged and the trained parameters by position, which a switch moves."""
    average, expected, values = ema(), {}, {}

    def by_hand(trainer, module):
        for name, p in module.named_parameters():
            old = expected.get(name)  # an adapter's average begins with what it is at the switch
            values[name] = p.detach().clone()
            begins = old is None and (trainer.global_step == 1 or trainer.global_step == 8 and not first)
            expected[name] = (
                values[name] if old is None and not begins else values[name] if begins else 0.8 * old + 0.2 * p.detach()
            )
        averaged = dict(average._average_model.module.named_parameters())
        assert list(averaged) == [name for name, _ in module.named_parameters()]
        for name in expected:
            torch.testing.assert_close(
                averaged[name], expected[name], rtol=1e-5, atol=1e-7, msg=f"{name} {trainer.global_step}"
            )

    method = steps()
    callbacks = [method, average] if first else [average, method]
    module = net("prelora")
    run = trainer(tmp_path, *callbacks, Steps(by_hand), every=24, max_epochs=4)
    run.fit(module, loader())
    assert method.phase == "lowrank"
    file = torch.load(tmp_path / "step=24.ckpt", weights_only=True)
    assert set(file["state_dict"]) == set(file["current_model_state"]) == set(net("prelora").state_dict())
    plain, x = net("prelora").eval(), torch.randn(5, 12)
    plain.load_state_dict(file["state_dict"])  # the file is the average, as a plain model
    torch.testing.assert_close(plain(x), module.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "ats"), [("prelora", (5, 8, 11, 14, 19)), ("galore", (5, 19))])
def test_resume_with_ema_is_bit_exact(tmp_path, method, ats):
    whole = outcome(*fit(tmp_path, method, ema(), every=1))
    assert whole["averages"]
    for at in ats:
        again = fit(tmp_path / "x", method, ema(), ckpt=tmp_path / f"step={at}.ckpt")
        assert_equal(outcome(*again), whole, f"from {at}: ")


@pytest.mark.parametrize("method", ["prelora", "galore"])
def test_swa_averages_the_epochs_and_its_file_goes_on(tmp_path, method):
    """Epochs 0, 1, 2 and 3 begin in PreLoRA's full, full, joint and low-rank phase."""
    starts, held = [], {}

    class Begin(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            starts.append({name: p.detach().clone() for name, p in module.named_parameters()})

    def swa():
        return StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2)

    at_end = AtEnd(lambda _, module: {name: p.detach().clone() for name, p in module.named_parameters()})
    module, run = fit(tmp_path, method, swa(), Begin(), at_end, every=1)
    chosen = starts[1:]
    for name, p in at_end.found.items():
        mean = torch.stack([start[name] for start in chosen if name in start]).mean(0)
        if "lora_" not in name:  # an adapter's average counts the epochs before it as if it had been as at the switch
            torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")

    class Look(pl.Callback):
        def on_train_start(self, trainer, module):
            averaged = next(transition.averages(trainer.callbacks))[1]  # unmerged, where state_dict would be the plain model's
            held.update(lora.clone_state(dict([*averaged.named_parameters(), *averaged.named_buffers()])))

    for at in (7, 13, 19):
        file = torch.load(tmp_path / f"step={at}.ckpt", weights_only=True)
        stored = file["callbacks"]["StochasticWeightAveraging"]["average_model_state"]
        assert set(stored) == set(net(method).state_dict())
        again, _ = fit(tmp_path / "x", method, swa(), Look(), ckpt=tmp_path / f"step={at}.ckpt")
        exact = file.get("lowrank_pretrain", {}).get("averages", {}).get("StochasticWeightAveraging", {})
        for name, value in (stored | exact).items():
            assert torch.equal(held[name], value), (at, name)
        assert all(p.isfinite().all() for p in again.parameters())


def test_averages_that_cannot_follow_are_refused_in_one_line(tmp_path):
    cases = [
        ({"targets": ["q", "v"]}, ema(), "callbacks='EMAWeightAveraging': would average the rows .* twice"),
        (
            {"adapter_lr": 2.0},
            StochasticWeightAveraging(swa_lrs=1e-3),
            "callbacks='StochasticWeightAveraging': .*leave out adapter_lr",
        ),
    ]
    for prelora, average, message in cases:
        module = net("prelora")
        with pytest.raises(ConfigError, match=message) as error:
            fit(tmp_path, "prelora", average, module=module, prelora=prelora)
        assert not module.losses and "\n" not in str(error.value)
    fit(tmp_path, "prelora", ema(), prelora={"targets": ["q", "v"], "freeze_rest": True})  # the cure


# -- schedules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prelora", "lte"])
@pytest.mark.parametrize("kind", ["epoch", "plateau"])
def test_schedules_by_epoch_and_by_a_metric_notice_nothing(tmp_path, method, kind):
    def trace(method, **kwargs):
        rates = []
        look = Steps(lambda t, _: rates.append([group["lr"] for group in t.optimizers[0].param_groups]))
        done = fit(tmp_path / method, method, look, module=net(method, schedule=kind), every=1, **kwargs)
        return rates, done

    plain, _ = trace("full")
    rates, done = trace(method)
    assert rates == plain and len({rate for rate, _ in plain}) == {"epoch": 5, "plateau": 3}[kind]
    if method == "prelora":
        for at in (11, 19):
            file = tmp_path / method / f"step={at}.ckpt"
            again = fit(tmp_path / "x", method, module=net(method, schedule=kind), ckpt=file)
            assert_equal(outcome(*again), outcome(*done), f"from {at}: ")
        own, _ = trace("prelora", prelora={"adapter_lr": 3.0})
        for at, (a, b) in enumerate(zip(plain, own, strict=True)):
            assert b[:2] == a and len(b) == (2 if at < 7 else 3)


# -- checkpointed activations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("method", "how"),
    [("prelora", {}), ("prelora", {"prelora": {"targets": ["q", "v", "fc1"]}}), ("lte", {}), ("lte", {"lte": {"reset": True}}),
     ("galore", {}), ("galore", {"galore": {"layerwise": True}})],
    ids=str,
)  # fmt: skip
def test_checkpointed_activations_change_nothing(tmp_path, method, how, reentrant):
    results = []
    for value in (None, reentrant):
        features = {"galore": how["galore"]} if "galore" in how else {}
        module = net(method, reentrant=value, **features)
        fit(tmp_path, method, module=module, **{k: v for k, v in how.items() if k != "galore"})
        results.append(module)
    for (name, a), (_, b) in zip(*(module.state_dict().items() for module in results), strict=True):
        assert torch.equal(a, b), name


def test_reentrant_checkpointing_that_cuts_adapters_off_is_named(tmp_path):
    """Its input needs a gradient; once everything below is frozen it has none, and the block would silently never train."""
    settings = {"targets": ["fc1", "head"], "ranks": [2], "freeze_rest": True}
    module = net("prelora", reentrant=True)
    with pytest.raises(ConfigError, match=r"targets='blocks.0.fc1, blocks.1.fc1': .*use_reentrant=False"):
        fit(tmp_path, "prelora", module=module, prelora=settings)
    assert len(module.losses) == 15  # the first step behind the freeze
    fit(tmp_path, "prelora", module=net("prelora", reentrant=False), prelora=settings)


@pytest.mark.parametrize("then", ["lora", "factorize"])
def test_a_loss_that_nothing_trainable_reaches_any_more_is_explained(tmp_path, then):
    settings = {"targets": ["fc1"], "ranks": [0.25] if then == "factorize" else [2], "freeze_rest": True, "then": then}
    with pytest.raises(ConfigError, match=r"targets='blocks.0.fc1, blocks.1.fc1': .*use_reentrant=False"):
        fit(tmp_path, "prelora", module=net("prelora", reentrant=True), prelora=settings)


# -- torch.compile ------------------------------------------------------------------------------------------------------


class Inner(Net):
    """One block in an inner module, compiled or not, and nothing in the step that breaks a graph."""

    def __init__(self, backend=None):
        super().__init__(lr_groups=2, depth=1)
        inner = torch.nn.Sequential(self.embed, self.blocks[0], self.head)
        self.blocks[0].drop.p = 0.0  # a compiled graph draws its own numbers
        del self.embed, self.blocks, self.head
        self.net = inner if backend is None else torch.compile(inner, backend=backend)

    def get_classifier(self):
        return self.net[-1] if isinstance(self.net, torch.nn.Sequential) else self.net._orig_mod[-1]

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("method", "form"), [("prelora", "inner"), ("prelora", "outer"), ("galore", "inner"), ("lte", "inner")]
)
def test_compile_makes_one_graph_per_phase_and_names_stay(tmp_path, method, form):
    torch._dynamo.reset()
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def make(compiled):
        module = Inner(backend if compiled and form == "inner" else None)
        module.galore = {} if method == "galore" else None
        return torch.compile(module, backend=backend) if compiled and form == "outer" else module

    eager, _ = fit(tmp_path, method, module=make(False), max_epochs=3)
    module, run = fit(
        tmp_path / form, method, Steps(lambda *_: counts.append(len(graphs))), module=make(True), max_epochs=3, every=1
    )
    plain = {name.replace("_orig_mod.", ""): p for name, p in module.state_dict().items()}
    assert plain.keys() == eager.state_dict().keys()
    for name, p in eager.state_dict().items():
        torch.testing.assert_close(plain[name], p, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if method != "prelora":
        assert counts[0] == 1 and counts[-1] - counts[0] <= (method == "lte"), counts  # LTE: once W holds what heads did
        return
    assert counts == [1] * 8 + [2] * 6 + [3] * 4
    assert list(phases(run).plan)[:2] == ["net.0", "net.1.fc1"]
    file = tmp_path / form / "step=16.ckpt"
    fresh = make(True)
    inside = getattr(fresh, "_orig_mod", fresh)  # Lightning trains, and saves, what the outer form wraps
    assert set(torch.load(file, weights_only=True)["state_dict"]) == set(inside.state_dict())
    fit(tmp_path / "x", method, module=fresh, ckpt=file, max_epochs=3)
    for name, p in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], p), name


def test_layers_compiled_one_by_one_keep_compiled_code_when_their_ranks_differ(tmp_path):
    """They share their code, and dynamo's limit on its graphs; a limit of 2 stands for the many layers of a large model."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module = net("prelora", dropout=0.0)
    for block in module.blocks:
        block.compile(backend=backend)
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        _, run = fit(tmp_path, "prelora", module=module, max_epochs=3, prelora={"targets": ["fc1", "fc2"]})
    plan = phases(run).plan
    shapes = {(plan[f"blocks.{i}.fc1"], plan[f"blocks.{i}.fc2"]) for i in (0, 1)}
    assert len(shapes) == 2 and len(graphs) == 1 + 2 + 2, (plan, len(graphs))


# -- several optimizers -------------------------------------------------------------------------------------------------


class Two(Net):
    """An optimizer for the blocks and one for the rest; by hand, or (which Lightning 2 refuses) automatically."""

    def __init__(self, manual=True, order=(0, 1)):
        super().__init__()
        self.automatic_optimization, self.order = not manual, order

    def training_step(self, batch, batch_idx):
        loss = Toy.training_step(self, batch, batch_idx)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def configure_optimizers(self):
        shares = [*self.blocks.parameters()], [*self.embed.parameters(), *self.head.parameters()]
        return [torch.optim.AdamW(shares[i], lr=1e-2) for i in self.order]


class One(Two):
    def configure_optimizers(self):
        return Net.configure_optimizers(self)

    def optimizers(self):
        found = super().optimizers()
        return found if isinstance(found, list) else [found]


def test_several_optimizers_and_manual_optimization_are_refused_by_prelora(tmp_path):
    for manual, error, message in (
        (True, ConfigError, "automatic_optimization=False: PreLoRA needs .*with one optimizer"),
        (False, RuntimeError, "multiple optimizers is only supported with manual optimization"),
    ):
        module = Two(manual)
        with pytest.raises(error, match=message):
            fit(tmp_path, "prelora", module=module)
        assert not module.losses


@pytest.mark.parametrize("lte", [{}, {"reset": True}, {"mode": "sequential"}, {"overlap": 2}], ids=str)
def test_lte_by_hand_is_lte_by_lightning(tmp_path, lte):
    byhand, automatic = (fit(tmp_path, "lte", module=One(manual), lte=lte)[0] for manual in (True, False))
    for (name, a), b in zip(byhand.state_dict().items(), automatic.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("reset", [False, True])
def test_lte_with_two_optimizers_merges_behind_the_step_of_that_which_holds_the_heads(tmp_path, reset):
    """Whichever steps first, and whether or not the rest is apart: the same as one optimizer with everything."""
    lte = {"targets": "blocks.*", "reset": reset}
    one, _ = fit(tmp_path, "lte", module=One(True), lte=lte)
    for order in ((0, 1), (1, 0)):
        module, run = fit(tmp_path, "lte", module=Two(True, order), lte=lte)
        assert run.strategy.local.clock == 24 and run.strategy.local.merges == 6
        for (name, a), b in zip(one.state_dict().items(), module.state_dict().values(), strict=True):
            assert torch.equal(a, b), (order, name)


def test_lte_refuses_targets_in_two_optimizers(tmp_path):
    module = Two(True)
    cure = r"choose them by targets, as targets=\[\"[a-z]+\.\*\"\]"
    line = f"configure_optimizers='2 optimizers': LTE's targets must all be in one of them: {cure}"
    with pytest.raises(ConfigError, match=line):
        fit(tmp_path, "lte", module=module)
    assert not module.losses
