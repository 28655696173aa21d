import random
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import strategies
from lightning.pytorch.loggers.logger import DummyLogger
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

from lowrank_pretrain import LoRA, PreLoRA
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.memory import GIB
from lowrank_pretrain.core.targets import families
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.observe.monitor import Monitor
from lowrank_pretrain.prelora.decisions import Window, assign_ranks, check_convergence, relative_change, still_flat
from tests.reference import prelora as reference
from tests.toy import AtEnd, Toy, adapted, adapters, loader, toy, trained, trainer

FAMILIES = {f"blocks.{i}.{leaf}": f"blocks.*.{leaf}" for i in range(4) for leaf in ("qkv.q", "fc1", "fc2")}


@pytest.mark.parametrize("seed", range(60))
def test_convergence_in_lockstep_with_the_authors_formula(seed):
    rng = random.Random(seed)
    k, loss_tol, weight_tol = rng.choice([2, 3, 4]), rng.choice([0.01, 0.05, 0.2]), rng.choice([0.0025, 0.01, 0.05])
    loss, norms, windows, outcomes = 3.0, {name: rng.uniform(1, 5) for name in FAMILIES}, [], set()
    for step in range(30):
        windows.append(Window(loss, dict(norms)))
        ours = check_convergence(windows[-k:], FAMILIES, k, loss_tol, weight_tol)
        theirs = reference.should_switch(
            [w.loss for w in windows], [w.norms for w in windows], FAMILIES, k, loss_tol * 100, weight_tol * 100
        )
        assert ours.converged == theirs
        outcomes.add(theirs)
        speed = 0.5 / (1 + step) ** 2
        loss *= 1 + rng.uniform(-2, 1) * speed
        norms = {name: n * (1 + rng.uniform(-1, 1) * speed) for name, n in norms.items()}
    assert outcomes == {True, False}


@pytest.mark.parametrize("seed", range(40))
def test_ranks_in_lockstep_with_the_authors_formula(seed):
    rng = random.Random(seed)
    before = {name: rng.choice([0.0, rng.uniform(0.1, 5)]) if seed % 4 == 0 else rng.uniform(0.1, 5) for name in FAMILIES}
    after = {name: n * rng.choice([1.0, rng.uniform(0.9, 1.1)]) for name, n in before.items()}
    r_min, r_max = rng.choice([(4, 32), (1, 64), (8, 16)])
    ladder = [r for r in (2**i for i in range(8)) if r_min <= r <= r_max]
    assert assign_ranks(before, after, FAMILIES, ladder) == reference.ranks(before, after, FAMILIES, r_min, r_max)


def test_rank_assignment_by_hand():
    before = dict.fromkeys("abcde", 1.0)
    after = {"a": 1.0, "b": 1.125, "c": 1.25, "d": 1.375, "e": 1.5}
    family = dict.fromkeys("abcde", "f")
    # x = 0, .25, .5, .75, 1 -> index 0, 0, 1, 2, 3 of four ranks
    assert assign_ranks(before, after, family, [4, 8, 16, 32]) == {"a": 4, "b": 4, "c": 8, "d": 16, "e": 32}
    assert assign_ranks(before, after, family, [0, 8]) == {"a": 0, "b": 0, "c": 0, "d": 8, "e": 8}


def test_equal_changes_and_lone_members_get_the_smallest_rank():
    assert assign_ranks({"a": 1.0, "b": 2.0}, {"a": 1.1, "b": 2.2}, {"a": "f", "b": "g"}, [4, 8]) == {"a": 4, "b": 4}


def test_a_weight_that_left_zero_gets_the_largest_rank_and_bars_convergence():
    assert relative_change(0.0, 0.0) == 0.0 and relative_change(0.0, 1.0) == float("inf")
    ranks = assign_ranks({"a": 0.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 1.1, "c": 1.2}, dict.fromkeys("abc", "f"), [4, 8])
    assert ranks == {"a": 8, "b": 4, "c": 8}
    windows = [Window(1.0, {"a": 0.0}), Window(1.0, {"a": 1.0})]
    assert not check_convergence(windows, {"a": "f"}, 2, 0.5, 0.5).converged


def test_nan_never_converges():
    windows = [Window(float("nan"), {"a": 1.0})] * 3
    assert not check_convergence(windows, {"a": "f"}, 3, 0.5, 0.5).converged
    windows = [Window(1.0, {"a": float("nan")})] * 3
    assert not check_convergence(windows, {"a": "f"}, 3, 0.5, 0.5).converged


BAD = [
    ("ranks", [3]), ("ranks", [8, 4]), ("ranks", [4, 4]), ("ranks", []), ("ranks", [-2]), ("ranks", 8), ("ranks", ["4"]),
    ("ranks", [4.0]), ("ranks", "48"), ("ranks", None), ("ranks", [0]),
    ("weight_tol", 0), ("weight_tol", 1), ("weight_tol", -0.1),
    ("loss_tol", 1.5), ("loss_tol", "x"), ("loss_tol", None), ("warmup", -1), ("warmup", 1.5), ("window", 0), ("windows", 1),
    ("earliest", -1), ("latest", 0), ("window_unit", "batch"), ("rank_signal", "norm"), ("alpha", -1), ("alpha", "a"),
    ("freeze_rest", "yes"), ("train_A", 1), ("recompute_inputs", 1), ("rewarm", -1), ("optimizer_state", "drop"),
    ("then", "lte"),
    ("adapter_lr", 0), ("adapter_lr", float("nan")), ("adapter_weight_decay", -1), ("alpha", float("inf")), ("alpha", True),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD)
def test_wrong_values_name_key_value_and_what_is_allowed(key, value):
    with pytest.raises(ConfigError, match=f"^{key}=") as error:
        PreLoRA(**{key: value})
    assert "\n" not in str(error.value) and len(str(error.value)) > len(f"{key}={value!r}: ") + 8


def steps(**kwargs) -> PreLoRA:
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


def test_three_phases_by_steps(tmp_path):
    module, callback = toy(), steps()
    end = AtEnd(trained)
    trainer(tmp_path, callback, end, max_epochs=4).fit(module, loader())
    assert (callback.phase, callback.switch_step, callback.freeze_step) == ("lowrank", 8, 14)
    assert len(module.losses) == 24
    assert {n for n in end.found if "lora_" not in n} == {
        "head.weight", "head.bias", *(f"blocks.{i}.norm.{w}" for i in (0, 1) for w in ("weight", "bias"))
    }  # fmt: skip
    assert set(callback.plan.values()) <= {2, 4, 8} and len(callback.plan) == 11


def test_windows_by_epochs_and_a_switch_by_convergence(tmp_path):
    module, callback = toy(lr=1e-5), PreLoRA(ranks=(1, 2), windows=3, warmup=1)  # it hardly moves: converged at once
    trainer(tmp_path, callback, max_epochs=6).fit(module, loader())
    assert (callback.switch_step, callback.freeze_step) == (18, 24)
    assert callback.verdict.converged and callback.verdict.loss_change <= 0.05


@pytest.mark.parametrize(
    ("first", "now", "flat"),
    [
        (4.5, 4.3, True),
        (4.5, 3.0, False),
        (None, 4.3, False),
        (-1.0, -1.0, False),
        (2.0, 2.5, True),
        (float("nan"), 1.0, False),
    ],
)
def test_a_loss_that_has_hardly_fallen_is_flat(first, now, flat):
    assert bool(still_flat(first, now)) is flat


def test_a_switch_on_a_flat_start_says_so_and_names_the_cure(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lowrank_pretrain.prelora.callback.rank_zero_info", lambda text, *_: said.append(text))
    start = toy(lr=1e-5)
    trainer(tmp_path, PreLoRA(ranks=(1, 2), windows=3), max_epochs=6, every=6).fit(start, loader())
    again = PreLoRA(ranks=(1, 2), windows=3)  # resumed after the first window, it still knows that window's loss
    trainer(tmp_path, again, max_epochs=6).fit(toy(lr=1e-5), loader(), ckpt_path=tmp_path / "step=6.ckpt")
    flat = [text for text in said if "earliest=N waits" in text]
    assert len(flat) == 2 and flat[0] == flat[1] and "converged at window 3, with a loss of" in flat[0]
    said.clear()
    falls = PreLoRA(ranks=(1, 2), windows=2, earliest=4, loss_tol=0.99, weight_tol=0.99)
    trainer(tmp_path, falls, max_epochs=6).fit(toy(lr=3e-2), loader())
    assert falls.verdict.converged and not [text for text in said if "earliest=N waits" in text]


def test_earliest_delays_and_warmup_0_freezes_at_once(tmp_path):
    module, callback = toy(lr=1e-5), PreLoRA(ranks=(1, 2), windows=2, earliest=4, warmup=0)
    trainer(tmp_path, callback, max_epochs=6).fit(module, loader())
    assert (callback.switch_step, callback.freeze_step, callback.phase) == (24, 24, "lowrank")


@pytest.mark.parametrize(("warmup", "ended"), [(3, "in phase joint, after 2 of warmup=3 windows"), (2, "with the freeze")])
def test_a_run_without_a_low_rank_step_says_so_and_how_to_get_one(tmp_path, warmup, ended):
    callback = PreLoRA(ranks=(1, 2), windows=2, latest=2, warmup=warmup, loss_tol=1e-9)
    with pytest.warns(UserWarning, match=f"the run ended {ended}: no step was low-rank. Train longer, lower warmup"):
        trainer(tmp_path, callback, max_epochs=4).fit(toy(), loader())


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_window_loss_is_the_mean_of_what_training_step_returned(tmp_path, accumulate):
    module, callback = toy(), PreLoRA(ranks=(1,), windows=3, loss_tol=1e-9)
    with pytest.warns(UserWarning, match="ended in phase full.*Train longer"):
        trainer(tmp_path, callback, max_epochs=3, accumulate_grad_batches=accumulate).fit(module, loader())
    for epoch in range(3):
        mean = sum(module.losses[6 * epoch : 6 * epoch + 6]) / 6
        assert callback.history[epoch].loss == pytest.approx(mean, rel=1e-6)


def test_accumulation_counts_optimizer_steps_and_switches_between_them(tmp_path):
    module, callback = toy(), steps(window=1, latest=2, warmup=2)
    trainer(tmp_path, callback, max_epochs=2, accumulate_grad_batches=4).fit(module, loader())  # 6 batches: 2 steps an epoch
    assert (callback.switch_step, callback.freeze_step) == (2, 4)


def test_rank_0_targets_freeze_without_an_adapter(tmp_path):
    module, callback = toy(), steps(ranks=(0, 4))
    end = AtEnd(trained)
    trainer(tmp_path, callback, end, max_epochs=4).fit(module, loader())
    zero = [name for name, rank in callback.plan.items() if rank == 0]
    assert zero and any(rank == 4 for rank in callback.plan.values())
    for name in zero:
        layer = name.removesuffix(".q").removesuffix(".k").removesuffix(".v")
        assert not {f"{layer}.weight", f"{layer}.bias"} & end.found
    assert not any(name + ".lora_A" in adapters(module) for name in zero)


def test_freeze_rest_leaves_only_adapters(tmp_path):
    module, callback = toy(), steps(freeze_rest=True)
    end = AtEnd(trained)
    fit = trainer(tmp_path, callback, end, max_epochs=4)
    fit.fit(module, loader())
    assert end.found and all("lora_" in name for name in end.found)
    held = [p for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in adapters(module).values()}


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(tmp_path):
    module, callback = toy(), steps()

    def look(fit, module):
        frozen = [p for p in module.parameters() if not p.requires_grad]
        assert frozen and all(p.grad is None for p in frozen)
        assert not {id(p) for p in frozen} & {id(p) for p in fit.optimizers[0].state}
        assert {id(p) for p in fit.optimizers[0].state} == {id(p) for p in module.parameters() if p.requires_grad}
        return len(frozen)

    end = AtEnd(look)
    trainer(tmp_path, callback, end, max_epochs=4).fit(module, loader())
    assert end.found and all(p.requires_grad for p in module.parameters())  # as the user made it


def test_train_A_false_moves_b_alone(tmp_path):
    module, callback = toy(), steps(train_A=False)
    drawn = {}

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if callback.phase == "joint" and not drawn:
                drawn.update({n: layer.lora_A.clone() for n, layer in lora.lora_layers(pl_module)})

    trainer(tmp_path, callback, Note(), max_epochs=4).fit(module, loader())
    assert adapted(module)
    for name, layer in adapted(module):
        assert torch.equal(layer.lora_A, drawn[name]) and not layer.lora_A.requires_grad
        assert all(factor.any() for factor in layer.lora_B.values())


def test_grad_norm_ranks_come_from_the_gradients_of_the_last_two_windows(tmp_path):
    module, callback = toy(), steps(rank_signal="grad_norm")
    seen = []

    class Spy(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            q = pl_module.blocks[0].qkv.weight.grad
            seen.append((q[:16].norm().item(), pl_module.blocks[1].fc2.weight.grad.norm().item()))

    spy = Spy()
    trainer(tmp_path, spy, callback, max_epochs=2).fit(module, loader())
    for norms, step in zip(callback.grad_norms, (5, 7), strict=True):  # windows end after steps 6 and 8
        assert norms["blocks.0.qkv.q"] == pytest.approx(seen[step][0], rel=1e-5)
        assert norms["blocks.1.fc2"] == pytest.approx(seen[step][1], rel=1e-5)
    assert callback.plan == assign_ranks(*callback.grad_norms, families(module, callback.plan), callback.ranks)


def test_one_window_only_gives_the_smallest_rank_and_says_so(tmp_path):
    callback = steps(latest=1)
    with pytest.warns(UserWarning, match="fewer than two windows"):
        trainer(tmp_path, callback, max_epochs=2).fit(toy(), loader())
    assert set(callback.plan.values()) == {2}


def test_a_plan_of_nothing_but_zeros_is_not_taken(tmp_path):
    callback = steps(ranks=(0, 2, 4), latest=1, freeze_rest=True)
    with pytest.warns(UserWarning, match="every target would get rank 0: they get 2"):
        trainer(tmp_path, callback, max_epochs=2).fit(toy(), loader())
    assert set(callback.plan.values()) == {2} and callback.phase == "lowrank"


def test_bf16_mixed_goes_through_all_phases(tmp_path):
    module, callback = toy(), steps()
    trainer(tmp_path, callback, max_epochs=4, precision="bf16-mixed").fit(module, loader())
    assert callback.phase == "lowrank" and all(p.dtype == torch.float32 for p in module.parameters())
    assert all(factor.any() for factor in adapters(module).values())


@pytest.mark.parametrize(
    ("kwargs", "trainer_kwargs", "message"),
    [
        ({"ranks": (32,), "targets": ["embed", "fc1"]}, {}, r"ranks=32: embed is 16 x 12: at most 12"),
        ({"targets": ["blocks.*.fc1", "nothing.*"]}, {}, r"targets='nothing\.\*': matches no target"),
        ({"window_unit": "epoch", "window": 1, "windows": 3, "latest": None}, {"max_epochs": 2}, r"max_epochs=2: .*= 3"),
        ({"window": 10, "windows": 3, "latest": None}, {"max_epochs": 4}, r"max_steps=24: .*= 30"),
        ({"window": 10, "windows": 3, "latest": None}, {"max_steps": 20}, r"max_steps=20: .*= 30"),
    ],
)
def test_mistakes_show_before_the_first_step(tmp_path, kwargs, trainer_kwargs, message):
    module = toy()
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, steps(**kwargs), **trainer_kwargs).fit(module, loader())
    assert not module.losses


def test_a_second_phase_callback_and_manual_optimization_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks='LoRA': cannot run beside PreLoRA"):
        trainer(tmp_path, steps(), LoRA(rank=2)).fit(toy(), loader())
    module = toy()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match="automatic_optimization=False"):
        trainer(tmp_path, steps(), max_epochs=2).fit(module, loader())


def test_strategies_that_cannot_follow_are_refused_before_anything_runs(tmp_path):
    """Only DDP's own parameters may change in mid-run. Most of these want a GPU or a package, so the fit is a stand-in."""

    class Mine(strategies.DeepSpeedStrategy):
        pass

    for kind in (strategies.FSDPStrategy, strategies.ModelParallelStrategy, strategies.DeepSpeedStrategy, Mine):
        run, name = SimpleNamespace(strategy=kind.__new__(kind), callbacks=[]), kind.__mro__[kind is Mine].__name__
        with pytest.raises(ConfigError, match=f"strategy='{name}': PreLoRA changes the model in mid-run, .*: use ddp") as error:
            steps().setup(run, toy(), "fit")
        assert "\n" not in str(error.value)
    state = PostLocalSGDState(None, None, start_localSGD_iter=8)
    run = SimpleNamespace(strategy=strategies.DDPStrategy(ddp_comm_state=state, model_averaging_period=4), callbacks=[])
    with pytest.raises(ConfigError, match="ddp_comm_state='PostLocalSGDState': .*LTEStrategy"):
        steps().setup(run, toy(), "fit")


def test_a_forked_or_spawned_fit_hands_back_the_merged_model_and_the_plan(tmp_path):
    """Lightning hands a module back by `load_state_dict(strict=False)`, which drops adapters without a word."""
    if torch.distributed.is_initialized():  # what another test left; a forked process would wait for its threads
        torch.distributed.destroy_process_group()
    here, there = toy(), toy()
    trained = steps()
    trainer(tmp_path, trained, max_epochs=4).fit(here, loader())
    run = trainer(tmp_path, steps(), max_epochs=4, strategy="ddp_fork", devices=1, use_distributed_sampler=False)
    run.fit(there, loader())
    x = torch.randn(5, 12)
    torch.testing.assert_close(there.eval()(x), here.eval()(x), rtol=1e-4, atol=1e-5)
    assert type(there.embed) is torch.nn.Linear
    metrics = {name: int(value) for name, value in run.callback_metrics.items() if name.startswith("lowrank/")}
    assert [metrics.pop(f"lowrank/{key}") for key in ("phase", "switch_step", "freeze_step")] == [2, 8, 14]
    assert metrics == {f"lowrank/rank/{name}": rank for name, rank in trained.plan.items()}

    class Tied(Toy):
        def __init__(self):
            super().__init__()
            self.read = torch.nn.Embedding(3, 16)
            self.head.weight = self.read.weight

    run = trainer(tmp_path, steps(targets=["head", "embed"], ranks=(2,)), strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match="targets='head': is tied and comes untied, which spawned processes cannot hand back"):
        run.fit(Tied(), loader())


def test_the_optimizers_memory_falls_at_the_freeze(tmp_path):
    monitor, rows = Monitor(), []

    class Rows(DummyLogger):
        def log_metrics(self, metrics, step=None):
            rows.append((step, metrics))

    module, callback = toy(), steps(freeze_rest=True)
    run = trainer(tmp_path, monitor, callback, max_epochs=4, logger=Rows(), log_every_n_steps=1)
    run.fit(module, loader())
    full, joint, low = (record.optimizer_gib for record in monitor.records)
    moments = sum(2 * p.nbytes + 4 for p in adapters(module).values()) / GIB  # two moments and a step each
    assert low == pytest.approx(moments) and joint == pytest.approx(full + moments)
    assert low < 0.6 * full
    logged = {step: metrics["memory/optimizer_gib"] for step, metrics in rows if "memory/optimizer_gib" in metrics}
    assert logged[max(logged)] == pytest.approx(low) and logged[min(logged)] == pytest.approx(full)
    hashes = [(step, metrics["lowrank/hash"]) for step, metrics in rows if "lowrank/hash" in metrics]
    assert [step for step, _ in hashes] == [7, 13] and all(value == int(value) > 0 for _, value in hashes)


@pytest.mark.parametrize("phase", ["joint", "lowrank"])
def test_a_file_written_between_transition_and_first_step_still_looks_for_dead_adapters(tmp_path, phase):
    class Spare(Toy):
        def __init__(self, dead):
            super().__init__()
            self.spare = torch.nn.Linear(16, 16)
            self.dead = dead

        def forward(self, x):
            x = self.embed(x)
            return self.head(x if self.dead else self.spare(x))

    at = {"joint": 8, "lowrank": 14}[phase]
    settings = {"targets": ["spare", "embed"]}
    torch.manual_seed(7)
    trainer(tmp_path, steps(**settings), every=at, max_epochs=3).fit(Spare(False), loader())
    with pytest.warns(UserWarning, match=r"no gradient in the 2 optimizer steps .* reached the adapters of spare"):
        trainer(tmp_path, steps(**settings), max_epochs=4).fit(Spare(True), loader(), ckpt_path=tmp_path / f"step={at}.ckpt")


def test_a_target_that_no_step_calls_is_named_after_a_window_and_left_out_at_the_switch(tmp_path):
    module, callback = toy(), steps()
    module.spare = torch.nn.Linear(16, 16)
    with pytest.warns(UserWarning) as said:
        trainer(tmp_path, callback, max_epochs=4).fit(module, loader())
    said = [str(w.message) for w in said if "spare" in str(w.message)]
    assert "called spare in the 2 optimizer steps so far" in said[0] and len(said) == 2
    assert "leaves out what cannot be a target: spare was not called in any of the 8 optimizer steps watched" in said[1]
    assert callback.phase == "lowrank" and "spare" not in callback.plan and module.spare.weight.requires_grad
