"""Changing a model in the middle of a fit: groups, schedulers, and the protocol that other methods join by."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lowrank_pretrain import LoRA, PhaseCallback, Plan, PreLoRA
from lowrank_pretrain.core.agreement import fingerprint
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Adopter, Inherit
from lowrank_pretrain.core.targets import find_targets
from lowrank_pretrain.lora import model as lora
from tests.toy import AtEnd, Toy, adapters, loader, toy, trainer


def steps(**kwargs) -> PreLoRA:
    return PreLoRA(**{"ranks": (2, 4, 8), "window": 2, "window_unit": "step", "windows": 2, "latest": 4, "warmup": 3,
                      "loss_tol": 1e-6, **kwargs})  # fmt: skip


def lr_trace(tmp_path, callback, **kwargs):
    """Learning rate of every group in every step, as the optimizer used it."""
    trace = []
    module = toy(**kwargs)
    configure = module.configure_optimizers

    def configure_and_spy():
        made = configure()
        optimizer = made["optimizer"] if isinstance(made, dict) else made
        optimizer.register_step_post_hook(lambda opt, *_: trace.append([g["lr"] for g in opt.param_groups]))
        return made

    module.configure_optimizers = configure_and_spy
    callbacks = [callback] if callback else []
    fit = trainer(tmp_path, *callbacks, max_epochs=5)
    fit.fit(module, loader())
    return trace, module, fit


@pytest.mark.parametrize("scheduler", ["lambda", "cosine", "onecycle", "sequential", "step"])
def test_adapters_follow_the_group_of_their_weight_and_no_schedule_notices(tmp_path, scheduler):
    plain, _, _ = lr_trace(tmp_path, None, lr_groups=3, scheduler=scheduler)
    switched, module, fit = lr_trace(tmp_path, steps(), lr_groups=3, scheduler=scheduler)
    assert switched == plain  # three groups, the same rates at every step, to the bit
    owner = {id(p): i for i, group in enumerate(fit.optimizers[0].param_groups) for p in group["params"]}
    start = [name for name, p in toy().named_parameters()]
    for name, p in adapters(module).items():
        weight = name.partition(".lora_")[0] + ".weight"
        assert owner[id(p)] == start.index(weight) % 3


def test_moments_of_what_goes_on_training_are_kept_or_reset(tmp_path):
    counts = {}
    for mode in ("keep", "reset"):
        callback = steps(optimizer_state=mode)
        fit = trainer(tmp_path, callback, max_epochs=4)
        module = toy()
        fit.fit(module, loader())
        counts[mode] = int(fit.optimizers[0].state[module.head.weight]["step"])
    assert counts == {"keep": 24, "reset": 10}  # reset at steps 8 and 14


def test_rewarm_ramps_the_rate_after_the_freeze_and_leaves_the_schedule_alone(tmp_path):
    plain, _, _ = lr_trace(tmp_path, steps(), scheduler="sequential")
    ramped, _, _ = lr_trace(tmp_path, steps(rewarm=5), scheduler="sequential")
    for t, (a, b) in enumerate(zip(plain, ramped, strict=True)):
        factor = min(1.0, (t - 14 + 1) / 5) if t >= 14 else 1.0
        assert b == pytest.approx([rate * factor for rate in a], rel=1e-12), t


@pytest.mark.parametrize("save_first", [True, False])
def test_a_file_of_a_step_that_failed_while_the_rate_was_ramped_has_the_schedules_rate(tmp_path, save_first):
    class Fails(Toy):
        def training_step(self, batch, batch_idx):
            if self.global_step == 15:  # the freeze comes after step 14
                raise InterruptedError
            return super().training_step(batch, batch_idx)

    callbacks = [OnExceptionCheckpoint(tmp_path, "failed"), steps(rewarm=4)]
    running = trainer(tmp_path, *callbacks[:: 1 if save_first else -1], every=100, max_epochs=4)
    with pytest.raises(InterruptedError):
        running.fit(Fails(), loader())
    assert running.optimizers[0].param_groups[0]["lr"] < 1e-2  # still ramped
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)["optimizer_states"][0]
    assert [group["lr"] for group in saved["param_groups"]] == [1e-2]


@pytest.mark.parametrize("scheduler", [None, "lambda", "cosine", "onecycle", "sequential", "step"])
def test_adapters_with_a_rate_of_their_own_follow_their_weights_group(tmp_path, scheduler):
    plain, _, _ = lr_trace(tmp_path, None, lr_groups=3, scheduler=scheduler)
    callback = steps(adapter_lr=3.0, adapter_weight_decay=0.0, rewarm=4)
    traced, module, fit = lr_trace(tmp_path, callback, lr_groups=3, scheduler=scheduler)
    for t, (a, b) in enumerate(zip(plain, traced, strict=True)):
        factor = min(1.0, (t - 14 + 1) / 4) if t >= 14 else 1.0
        expected = [rate * factor for rate in a]
        assert b == pytest.approx(expected + [3.0 * rate for rate in expected] if t >= 8 else expected, rel=1e-12), t
    groups = fit.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.01] * 3 + [0.0] * 3
    own = {id(p) for p in adapters(module).values()}
    assert {id(p) for group in groups[3:] for p in group["params"]} == own


@pytest.mark.parametrize("adapter_lr", [1.0, 2.0])
def test_learning_rate_monitor_and_loggers_go_through_the_switch(tmp_path, adapter_lr):
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = steps(adapter_lr=adapter_lr), LearningRateMonitor("step")
    trainer(tmp_path, *callbacks, max_epochs=4, logger=logger, log_every_n_steps=1).fit(
        toy(lr_groups=2, scheduler="cosine"), loader()
    )
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    columns = rows[0].keys()
    assert sum("lr-AdamW" in column for column in columns) == 2
    assert "lowrank/weight_change/blocks.*.qkv.q" in columns and "lowrank/rank/blocks.0.fc1" in columns
    ranks = [row for row in rows if row["lowrank/rank/blocks.0.fc1"]]
    assert [row["step"] for row in ranks] == ["7"]  # the eighth step


def test_partial_targets_of_a_fused_layer_keep_the_other_rows_training_with_their_moments(tmp_path):
    module, callback = toy(), steps(targets=["q", "v"])
    snapshots = {}

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            layer, state = pl_module.blocks[0].qkv, trainer.optimizers[0].state
            snapshots[trainer.global_step] = layer.weight.detach().clone()
            if trainer.global_step == 13:
                snapshots["moment"] = state[layer.weight]["exp_avg"][16:32].clone()
            if trainer.global_step == 14 and callback.phase == "lowrank":
                snapshots["inherited"] = state[layer.rest_weight["k"]]["exp_avg"].clone()
                snapshots["step"] = int(state[layer.rest_weight["k"]]["step"])

    def look(fit, module):
        layer = module.blocks[0].qkv
        assert not layer.weight.requires_grad
        assert torch.equal(layer.weight[:16], snapshots[14][:16]) and torch.equal(layer.weight[32:], snapshots[14][32:])
        assert not torch.equal(layer.weight[16:32], snapshots[14][16:32])
        assert torch.equal(layer.rest_weight["k"], layer.weight[16:32])
        assert module.blocks[0].fc1.weight.requires_grad  # no target: rest

    trainer(tmp_path, callback, Spy(), AtEnd(look), max_epochs=4).fit(module, loader())
    assert snapshots["inherited"].shape == (16, 16) and snapshots["step"] == 14


def test_rows_take_over_what_an_optimizer_keeps_by_row_and_column(tmp_path):
    class Factored(Toy):
        def configure_optimizers(self):
            return torch.optim.Adafactor(self.parameters(), lr=1e-2)

    def look(fit, module):
        state = fit.optimizers[0].state[module.blocks[0].qkv.rest_weight["k"]]
        assert state["row_var"].shape == (16, 1) and state["col_var"].shape == (1, 16) and state["step"] == 24

    trainer(tmp_path, steps(targets=["q", "v"]), AtEnd(look), max_epochs=4).fit(Factored(), loader())


@pytest.mark.parametrize("dampening", [0.0, 0.2])
@pytest.mark.parametrize("then", ["lora", "factorize"])
def test_fused_sgd_with_momentum_takes_new_parameters_and_steps_as_the_loop_does(tmp_path, then, dampening):
    def run(fused):
        class Momentum(Toy):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9, dampening=dampening, fused=fused)

        torch.manual_seed(7)
        kind = {"ranks": (0.25,)} if then == "factorize" else {"ranks": (2, 4), "targets": ["q", "mlp"]}
        module, callback = Momentum(), steps(then=then, warmup=1, **kind)
        trainer(tmp_path, callback, max_epochs=4).fit(module, loader())
        assert callback.phase == "lowrank"
        return module.state_dict()

    for (name, one), other in zip(run(True).items(), run(False).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_rows_of_a_bias_that_nothing_trains_train_no_more_than_it_did(tmp_path):
    class Matrices(Toy):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.ndim == 2], lr=1e-2)

    torch.manual_seed(7)
    module = Matrices()
    before = module.blocks[0].qkv.bias.detach().clone()
    trainer(tmp_path, steps(targets=["q", "v"]), max_epochs=4).fit(module, loader())
    assert torch.equal(module.blocks[0].qkv.bias, before) and module.blocks[0].qkv.bias.requires_grad


def test_a_state_of_an_unknown_form_starts_afresh(tmp_path):
    class Books(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("sides", [torch.zeros(size, size) for size in p.shape])
                assert [len(side) for side in self.state[p]["sides"]] == list(p.shape)
            return loss

    class Kept(Toy):
        def configure_optimizers(self):
            return Books(self.parameters(), lr=1e-2, momentum=0.9)

    trainer(tmp_path, steps(targets=["q", "v"]), max_epochs=4).fit(Kept(), loader())


def test_named_parameters_in_the_optimizer_stay_in_line(tmp_path):
    module = toy()
    module.configure_optimizers = lambda: torch.optim.AdamW(module.named_parameters(), lr=1e-3)
    fit = trainer(tmp_path, steps(), max_epochs=4)
    fit.fit(module, loader())
    names = {id(p): name for name, p in [*module.named_parameters(), *adapters(module).items()]}
    for group in fit.optimizers[0].param_groups:
        assert [names[id(p)] for p in group["params"]] == group["param_names"]


def test_a_target_outside_every_optimizer_is_named(tmp_path):
    module = toy()
    module.configure_optimizers = lambda: torch.optim.SGD(module.head.parameters(), lr=1e-3)
    with pytest.raises(ConfigError, match="targets='embed': is in no optimizer"):
        trainer(tmp_path, steps(targets="embed"), max_epochs=4).fit(module, loader())


def test_no_change_between_micro_batches(tmp_path):
    class Hasty(PhaseCallback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.switch(trainer, pl_module, Plan({"embed": 2}))

    with pytest.raises(RuntimeError, match="only between two optimizer steps"):
        trainer(tmp_path, Hasty(), max_epochs=1, accumulate_grad_batches=3).fit(toy(), loader())


# -- a made-up fourth method joins by the protocol, and a made-up schedule ----------------------------------------------


class SwitchAt(PhaseCallback):
    """A schedule of one's own: low-rank from a fixed step on."""

    def __init__(self, step: int, rank: int) -> None:
        super().__init__()
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.phase == "full" and trainer.global_step == self.step:
            self.switch(trainer, pl_module, Plan(dict.fromkeys(find_targets(pl_module, "mlp"), self.rank)))
            self.freeze(trainer, pl_module)


class RowAdamW(Adopter, torch.optim.AdamW):
    """A fourth method: once it adopts a plan, it trains only the first `rank` rows of each target, through a new parameter."""

    calls: list[str]

    def adopt(self, plan, module):
        self.calls = [*getattr(self, "calls", []), "adopt"]
        self.plan, self.module = plan, module
        inherited = []
        for name, rank in plan.items():
            layer = module.get_submodule(name)
            layer.rows = nn.Parameter(layer.weight.data[:rank])
            inherited.append(Inherit(layer.rows, layer.weight, 0, 0, rank))
            layer.weight.register_hook(lambda g: torch.zeros_like(g))
        return inherited

    def release(self):
        self.calls.append("release")
        for name in self.plan:
            self.module.get_submodule(name).weight.requires_grad_(False)


def test_an_adopt_that_nobody_declared_is_refused_in_one_line(tmp_path):
    class Undeclared(torch.optim.SGD):
        def adopt(self, plan, module):
            raise AssertionError("it was asked")

    module = toy()
    module.configure_optimizers = lambda: Undeclared(module.parameters(), lr=1e-2)
    line = r"^optimizer='Undeclared': .* inherit from lowrank_pretrain.core.protocols.Adopter$"
    with pytest.raises(ConfigError, match=line):
        trainer(tmp_path, steps(targets="mlp"), max_epochs=1).fit(module, loader())


def test_a_schedule_of_ones_own_takes_twenty_lines(tmp_path):
    module, callback = toy(), SwitchAt(5, rank=4)
    trainer(tmp_path, callback, max_epochs=2).fit(module, loader())
    assert (callback.switch_step, callback.freeze_step, callback.phase) == (5, 5, "lowrank")
    assert set(callback.plan) == {f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
    assert adapters(module) and all(factor.any() for factor in adapters(module).values())


@pytest.mark.parametrize("resume_at", [None, 4, 9, 15])
def test_a_fourth_method_adopts_is_released_and_resumes(tmp_path, resume_at):
    def run(ckpt=None):
        module = toy()
        module.configure_optimizers = lambda: RowAdamW(module.parameters(), lr=1e-2)
        callback = steps(targets="mlp")
        fit = trainer(tmp_path / "ckpt" if ckpt is None else tmp_path / "again", callback, every=1, max_epochs=4)
        fit.fit(module, loader(), ckpt_path=ckpt)
        return module, callback, fit

    module, callback, fit = run()
    assert fit.optimizers[0].calls == ["adopt", "release"] and callback.phase == "lowrank"
    assert not list(lora.lora_layers(module))  # no adapters: the optimizer took the plan
    if resume_at:
        other, _, refit = run(tmp_path / "ckpt" / f"step={resume_at}.ckpt")
        assert refit.optimizers[0].calls == ["adopt", "release"]
        for (name, a), (_, b) in zip(module.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name


def test_then_galore_wants_an_optimizer_that_adopts(tmp_path):
    with pytest.raises(ConfigError, match="then='galore': needs GaLoreAdamW"):
        trainer(tmp_path, steps(then="galore"), max_epochs=4).fit(toy(), loader())


def test_lora_from_the_first_step(tmp_path):
    module, callback = toy(), LoRA(rank=4, targets="mlp", alpha=8)
    before = module.blocks[0].fc1.weight.detach().clone()

    def look(fit, module):
        assert torch.equal(module.blocks[0].fc1.weight, before) and module.blocks[0].fc1.lora_B["W"].any()
        assert module.blocks[0].fc1._parts[0].scale == 2.0

    trainer(tmp_path, callback, AtEnd(look), max_epochs=2).fit(module, loader())
    assert (callback.phase, callback.switch_step, callback.freeze_step) == ("lowrank", 0, 0)


@pytest.mark.parametrize(("key", "value"), [("rank", 0), ("rank", 1.5), ("rank", "8"), ("alpha", 0), ("freeze_rest", None)])
def test_lora_refuses_wrong_values(key, value):
    with pytest.raises(ConfigError, match=f"^{key}="):
        LoRA(**{key: value})


def test_lora_checks_ranks_before_the_first_step(tmp_path):
    module = toy()
    with pytest.raises(ConfigError, match=r"rank=13: embed is 16 x 12"):
        trainer(tmp_path, LoRA(rank=13, targets=["all", "embed"])).fit(module, loader())
    assert not module.losses


def test_a_module_of_another_kind_of_layer_order_is_refused_on_resume(tmp_path):
    """The same parameters in another order would load without an error: the groups are compared by name."""

    class Reversed(Toy):
        def configure_optimizers(self):
            return torch.optim.AdamW(list(self.parameters())[::-1], lr=1e-2)

    trainer(tmp_path, steps(), every=3, max_epochs=1).fit(toy(), loader())
    torch.manual_seed(7)
    with pytest.raises(ConfigError, match="ckpt_path=.*other parameters, or another order"):
        trainer(tmp_path, steps(), max_epochs=2).fit(Reversed(), loader(), ckpt_path=tmp_path / "step=3.ckpt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.uint8])
def test_a_fingerprint_is_of_the_bits(dtype):
    p = torch.arange(1, 13).reshape(3, 4).to(dtype)
    assert fingerprint(p) == fingerprint(p.clone()) == fingerprint(p.t().contiguous().t())
    other = p.clone()
    other[2, 3] += 1
    assert len({int(fingerprint(q)) for q in (p, other, p[[1, 0, 2]], p[:2], -p)}) == 5
    if dtype == torch.float32:
        tiny = p.clone()
        tiny[0, 0] = torch.nextafter(p[0, 0], torch.tensor(9.0))
        assert fingerprint(tiny) != fingerprint(p)
    assert fingerprint(p[:0]) == 0 and fingerprint(p[0, 0]) == fingerprint(p[0, 0].reshape(1))
