"""What the monitor counts: steps and nothing else, phases apart, live bytes; and that it costs next to nothing."""

import csv
import functools
import logging
import statistics
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lowrank_pretrain.core import memory
from lowrank_pretrain.core.memory import PeakMemory, formula_bytes, optimizer_bytes
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import HasPhase, Reports, phase_callback, phase_of
from lowrank_pretrain.core.text import digits
from lowrank_pretrain.loggers.csv import RunCSVLogger
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.observe import flops, step_clock
from lowrank_pretrain.observe.flops import FlopCount, peak_flops
from lowrank_pretrain.observe.monitor import (
    Monitor,
    PhaseRecord,
    batch_size_of,
    count_parameters,
    optimizer_metrics,
)
from lowrank_pretrain.observe.step_clock import Step, StepClock, Thinned
from lowrank_pretrain.run.progress import quiet_lightning
from lowrank_pretrain.run.summary import phase_table, show, summarize
from tests.toy import loader, toy, trainer

CPU = torch.device("cpu")


@pytest.fixture
def now(monkeypatch):
    """The clock's time, to be set by hand."""
    clock = SimpleNamespace(value=0.0)
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: clock.value)
    return clock


def test_a_step_lasts_from_the_end_of_the_last_one_so_waiting_for_data_counts(now):
    clock = StepClock(CPU)
    clock.start()
    now.value = 1.0
    clock.end_batch()
    clock.end_step("full", 8, 0)
    now.value = 4.0  # three seconds of waiting for data
    clock.start()
    now.value = 5.0
    clock.end_batch()
    clock.end_step("full", 8, 0)
    assert clock.drain() == [Step("full", 8, 0, 1.0), Step("full", 8, 0, 4.0)]
    assert clock.drain() == []


def test_an_interruption_belongs_to_no_step(now):
    clock = StepClock(CPU)
    clock.start()
    now.value = 1.0
    clock.end_batch()
    clock.end_step("full", 8, 0)
    clock.interrupt()
    now.value = 100.0  # a validation
    clock.start()
    now.value = 101.0
    clock.end_batch()
    clock.end_step("joint", 8, 0)
    assert [step.seconds for step in clock.drain()] == [1.0, 1.0]


def test_an_accumulated_step_adds_its_batches_up_around_an_interruption(now):
    clock = StepClock(CPU)
    clock.start()
    now.value = 1.0
    clock.end_batch()
    clock.interrupt()
    now.value = 50.0
    clock.start()
    now.value = 52.0
    clock.end_batch()
    clock.end_step("full", 16, 0)
    assert clock.drain() == [Step("full", 16, 0, 3.0)]


def test_on_cuda_a_mark_is_an_event_and_a_step_is_read_once_the_device_has_passed_it(monkeypatch):
    class Event:
        made = []

        def __init__(self, enable_timing):
            assert enable_timing
            self.passed, self.time = False, 10.0 * len(Event.made)
            Event.made.append(self)

        def record(self):
            pass

        def query(self):
            return self.passed

        def elapsed_time(self, end):
            return end.time - self.time  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    clock.start()
    for _ in range(2):
        clock.end_batch()
        clock.end_step("full", 8, 0)
    assert clock.drain() == []
    Event.made[1].passed = True
    assert clock.drain() == [Step("full", 8, 0, 0.01)]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(Event.made[2], "passed", True))
    assert clock.drain(wait=True) == [Step("full", 8, 0, 0.01)]


def test_a_thinned_list_is_bounded_and_keeps_its_median(monkeypatch):
    monkeypatch.setattr(step_clock, "KEPT", 64)
    values = Thinned()
    for value in range(10_000):
        values.append(float(value))
    assert len(values.values) < 64
    assert values.median() == pytest.approx(5000, rel=0.05)
    assert Thinned().median() is None
    assert Thinned([1.0, 2.0, 9.0, 9.0, 9.0]).median(last=3) == 9.0


def test_optimizer_bytes_are_those_of_live_storages_counted_once():
    weight = torch.nn.Parameter(torch.zeros(10, 10))
    optimizer = torch.optim.AdamW([weight])
    assert optimizer_bytes([optimizer]) == 0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer_bytes([optimizer]) == 2 * 400 + 4  # two moments, and the step as a float32
    state = optimizer.state[weight]
    state["exp_avg_sq"] = state["exp_avg"].view(-1)  # a second view of one storage
    assert optimizer_bytes([optimizer]) == 400 + 4
    del optimizer.state[weight]
    assert optimizer_bytes([optimizer]) == 0


@pytest.mark.parametrize("kernel_keeps_the_mark", [True, False])
def test_peak_memory_is_that_of_the_present_stretch(monkeypatch, kernel_keeps_the_mark):
    if not kernel_keeps_the_mark:
        monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    peak = PeakMemory(CPU)
    if kernel_keeps_the_mark and not memory._reset_high_water_mark():
        pytest.skip("this kernel does not let a process reset its high-water mark")
    peak.restart()
    before = peak.peak()
    big = torch.ones(64, 2**20)  # 256 MiB
    peak.sample()
    del big
    assert peak.peak() - before > 200 * 2**20
    peak.restart()
    assert peak.peak() - before < 100 * 2**20


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((torch.zeros(6, 3, 8, 8), torch.zeros(6)), (6, 0)),
        ({"input_ids": torch.zeros(4, 16)}, (4, 64)),
        ({"x": [torch.zeros(5, 2)]}, (5, 0)),
        (torch.zeros(7), (7, 0)),
        ("words", (0, 0)),
    ],
)
def test_batch_sizes(batch, found):
    assert batch_size_of(batch) == found


def test_adapters_are_told_by_their_names_and_counted_frozen_or_not():
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    module.lora_A = torch.nn.Parameter(torch.zeros(2, 4), requires_grad=False)
    module.lora_B = torch.nn.ParameterDict({"W": torch.nn.Parameter(torch.zeros(4, 2))})
    module.lora_Bias = torch.nn.Parameter(torch.zeros(3))
    assert count_parameters(module) == {"trainable": 8 + 3, "adapters": 8 + 8, "total": 16 + 8 + 8 + 3}


class Phases(HasPhase, Callback):
    """A method that nobody knows: it says its phase and freezes the head."""

    def __init__(self, switch: int) -> None:
        self.phase, self.at = "full", switch

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.at and self.phase == "full":
            self.phase = "lowrank"
            pl_module.head.requires_grad_(False)


def fit(tmp_path, monitor, method, logger=None, module=None, **kwargs):
    kwargs = {"max_epochs": 2, "limit_val_batches": 1, "log_every_n_steps": 1, **kwargs}
    run = trainer(tmp_path, method, monitor, logger=logger or False, **kwargs)
    run.fit(module or toy(), loader(), loader())
    return run


def test_phases_are_never_blended_and_validation_is_no_part_of_them(tmp_path, monkeypatch):
    real, slept = time.perf_counter, [0.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: real() + slept[0])
    method, monitor = Phases(switch=4), Monitor()
    method.on_validation_epoch_start = lambda *_: slept.append(slept.pop() + 1000)  # a validation of 1,000 seconds
    run = fit(tmp_path, monitor, method, num_sanity_val_steps=0)
    assert slept == [2000]
    full, lowrank = monitor.records
    assert (full.phase, full.steps, lowrank.phase, lowrank.steps) == ("full", 4, "lowrank", 8)
    assert full.seconds + lowrank.seconds < 500, "validation was counted as training"
    assert (
        full.trainable
        == full.total
        == lowrank.total
        == lowrank.trainable + sum(p.numel() for p in run.lightning_module.head.parameters())
    )
    assert full.samples_per_sec() == pytest.approx(1 / statistics.median(full.seconds_per_sample.values))
    assert full.peak_gib > 0.1 and full.optimizer_gib > 0


def test_a_short_phase_keeps_what_its_optimizer_held_before_the_freeze(tmp_path):
    class Empties(Phases):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            if trainer.global_step == self.at:
                trainer.optimizers[0].state.clear()

    monitor = Monitor()
    fit(tmp_path, monitor, Empties(switch=2), log_every_n_steps=50)
    held = sum(2 * 4 * p.numel() for p in toy().parameters()) / 2**30
    assert monitor.records[0].optimizer_gib >= held


def test_accumulated_batches_are_one_step(tmp_path):
    monitor = Monitor()
    fit(tmp_path, monitor, Phases(switch=99), accumulate_grad_batches=3)
    assert monitor.record.steps == 4
    assert len(monitor.record.seconds_per_sample.values) == 4


def test_what_is_logged(tmp_path):
    fit(tmp_path, Monitor(), Phases(switch=4), logger=RunCSVLogger(tmp_path), log_every_n_steps=2)
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["lowrank/phase"]]
    assert [(int(row["step"]), float(row["lowrank/phase"])) for row in rows] == [
        (1, 0), (3, 0), (5, 2), (7, 2), (9, 2), (11, 2),
    ]  # fmt: skip
    for key in ("throughput/samples_per_sec", "memory/peak_gib", "memory/optimizer_gib", "params/trainable"):
        assert all(float(row[key]) > 0 for row in rows), key
    assert all(float(row["params/adapters"]) == 0 for row in rows)
    assert "throughput/tokens_per_sec" not in rows[0]


class Talkative(Reports, torch.optim.SGD):
    """An optimizer that nobody knows, with something to say."""

    asked = 0

    def metrics(self):
        Talkative.asked += 1
        return {"some/overlap": 0.25 * Talkative.asked}

    def formula_bytes(self):
        return 3 * 2**20


def test_an_optimizer_speaks_for_itself_at_logged_steps_only(tmp_path, monkeypatch):
    monkeypatch.setattr(Talkative, "asked", 0)
    module, monitor = toy(), Monitor()
    module.configure_optimizers = lambda: Talkative(module.parameters(), lr=0.1)
    run = trainer(tmp_path, monitor, logger=RunCSVLogger(tmp_path), max_epochs=2, log_every_n_steps=4)
    run.fit(module, loader())
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["some/overlap"]]
    assert [float(row["some/overlap"]) for row in rows] == [0.25, 0.5, 0.75] and run.global_step == 12
    assert monitor.record.formula_gib == 3 / 1024
    (phase,) = summarize(run, monitor, {})["phases"]
    assert phase["optimizer_formula_gib"] == 3 / 1024 and phase["optimizer_gib"] == monitor.record.optimizer_gib


class Seldom(Reports, torch.optim.SGD):
    """It has something to say behind its third step, and forgets it with its process."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.taken, self.said = 0, {}

    def step(self, closure=None):
        self.taken += 1
        if self.taken == 3:
            self.said = {"some/overlap": 0.5}
        return super().step(closure)

    def metrics(self):
        return dict(self.said)


@pytest.mark.parametrize("every", [1, 5])
def test_a_resumed_run_repeats_what_an_optimizer_said_before(tmp_path, every):
    """Weights apart: a metric that is new only now and then must stand in the same rows of an interrupted run."""

    def rows(directory, steps, ckpt=None):
        module = toy()
        module.configure_optimizers = lambda: Seldom(module.parameters(), lr=0.1)
        run = trainer(
            directory, Monitor(), logger=RunCSVLogger(directory), max_steps=steps, max_epochs=-1, log_every_n_steps=every
        )
        run.fit(module, loader(), ckpt_path=ckpt, weights_only=True)
        run.save_checkpoint(directory / "at.ckpt")
        path = directory / "metrics.csv"  # none where no step was logged
        found = csv.DictReader(path.open()) if path.exists() else []
        return {int(row["step"]) for row in found if row.get("some/overlap")}

    whole = rows(tmp_path / "whole", 6)
    assert whole == ({2, 3, 4, 5} if every == 1 else {4})
    first = rows(tmp_path / "first", 4)
    assert first | rows(tmp_path / "second", 6, tmp_path / "first" / "at.ckpt") == whole


def test_two_optimizers_of_one_kind_keep_apart_and_a_silent_one_says_nothing():
    weight = torch.nn.Parameter(torch.zeros(2))
    silent, talkative = torch.optim.SGD([weight], lr=0.1), [Talkative([weight], lr=0.1) for _ in range(3)]
    assert list(optimizer_metrics([*talkative, silent])) == ["some/overlap", "some/overlap-1", "some/overlap-2"]
    assert formula_bytes([*talkative, silent]) == 9 * 2**20
    assert optimizer_metrics([silent]) == {} and formula_bytes([silent]) is None


def test_the_formula_stands_beside_what_is_held(capsys):
    record = PhaseRecord("full", 10, 2.0, optimizer_gib=0.5, total=1, formula_gib=0.25)
    show([record, PhaseRecord("lowrank", 10, 1.0, total=1)], {}, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    assert [line.replace("│", " ").split() for line in lines] == [
        ["optimizer,", "MiB", "512", "0", "(0.00x)"], ["by", "formula,", "MiB", "256", "-"],
    ]  # fmt: skip
    show([PhaseRecord("full", 10, 2.0, total=1)], {}, {})
    assert "formula" not in capsys.readouterr().out


def test_records_survive_a_resume():
    monitor = Monitor()
    monitor.records = [PhaseRecord("full", steps=3, seconds=1.5, seconds_per_sample=Thinned([0.1, 0.2, 0.3], 2, 1))]
    again = Monitor()
    again.load_state_dict(monitor.state_dict())
    assert again.state_dict() == monitor.state_dict()
    assert again.record.samples_per_sec() == pytest.approx(5.0)
    again.record.seconds_per_sample.append(9.0)
    assert len(monitor.record.seconds_per_sample.values) == 3, "two monitors share one list"


def test_a_step_costs_microseconds(tmp_path):
    monitor, module = Monitor(), toy()
    run = SimpleNamespace(
        global_step=0,
        world_size=1,
        callbacks=[Phases(99)],
        log_every_n_steps=0,
        optimizers=[],
        loggers=[],
        precision="32-true",
        strategy=None,
    )
    batch = (torch.zeros(8, 12), torch.zeros(8))
    monitor.on_train_start(run, module)
    costs = []
    for _ in range(300):
        begin = time.perf_counter()
        monitor.on_train_batch_start(run, module, batch, 0)
        run.global_step += 1
        monitor.on_train_batch_end(run, module, None, batch, 0)
        costs.append(time.perf_counter() - begin)
    assert sorted(costs)[150] < 2e-4, "1 % of a step of 20 ms"


def test_who_knows_the_phase():
    assert phase_callback(SimpleNamespace(callbacks=[Callback(), Monitor()])) is None
    assert phase_of(SimpleNamespace(callbacks=[], strategy=None)) == "full"
    method = Phases(1)
    method.phase = "joint"
    assert phase_of(SimpleNamespace(callbacks=[Monitor(), method])) == "joint"


def test_the_closing_table_sets_phases_against_the_full_one(capsys):
    full = PhaseRecord("full", 10, 2.0, 0, 4.0, 0.5, 100, 0, 100, 1, Thinned([0.01]))
    low = PhaseRecord("lowrank", 10, 1.0, 0, 3.0, 0.1, 20, 15, 115, 1, Thinned([0.005]))
    show([full, low], {"val/loss": 0.5}, {"merged weights": Path("export")})
    text = capsys.readouterr().out
    for words in ("200 (2.00x)", "3.00 (0.75x)", "15 (13.0%)", "20 (17.4%)", "val/loss 0.5", "merged weights: export"):
        assert words in text, words
    assert "x)" not in "".join(phase_table([low]).columns[1]._cells), "a ratio without a full phase"


def test_numbers_for_people_have_no_exponent():
    assert [digits(v) for v in (0.28719, 118.74, 999.96, 1234.5, 370912.3)] == ["0.2872", "118.7", "1000", "1,234", "370,912"]


def test_a_warning_of_ours_is_its_words_alone(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back behind the test
    quiet_lightning()
    assert warnings.formatwarning(UserWarning("use more heads"), UserWarning, lora.__file__, 17) == "warning: use more heads\n"
    others = warnings.formatwarning(UserWarning("not ours"), UserWarning, "/elsewhere.py", 18)
    assert "/elsewhere.py:18" in others and "not ours" in others


def test_what_lightning_says_at_every_start_is_left_out():
    quiet_lightning()
    for name in ("lightning.pytorch", "lightning.fabric"):
        handlers = logging.getLogger(name).handlers
        assert handlers
        for handler in handlers:
            say = functools.partial(logging.LogRecord, name, logging.INFO, "", 0, args=None, exc_info=None)
            assert not handler.filter(say(msg="Initializing distributed: GLOBAL_RANK: 0, MEMBER: 1/2"))
            assert not handler.filter(say(msg="-" * 100 + "\ndistributed_backend=gloo"))
            assert handler.filter(say(msg="PreLoRA: switch after step 6"))


def one_matrix():
    """A toy whose output is its head's: D = 12 by O = 3."""
    module = toy(dim=12)
    module.forward = lambda x: module.head(x)
    return module


def test_operations_are_those_of_forward_and_backward_counted_anew_in_each_phase(tmp_path):
    class Grows(Phases):
        """Behind the switch the head has a rank-2 adapter, and its own weight rests."""

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == self.at and self.phase == "full":
                self.phase = "lowrank"
                lora.inject(pl_module, Plan({"head": 2}))
                pl_module.head.weight.requires_grad_(False)

    monitor = Monitor()
    fit(tmp_path, monitor, Grows(switch=4), module=one_matrix(), accumulate_grad_batches=2, max_epochs=4)
    full, lowrank = monitor.records
    assert full.flops_per_sample == 2 * 2 * 12 * 3  # W x and dW; nobody asks for dx
    # for so few rows W + BA is formed, once per batch of 8; then (W + BA) x; behind it dz, dA, z once more and dB
    assert lowrank.flops_per_sample == 2 * (12 * 2 * 3 / 8 + 12 * 3 + 3 * 2 + 2 * 12 + 12 * 2 + 2 * 3)
    assert full.flops_per_sec() == pytest.approx(144 * full.samples_per_sec())
    assert full.peak_flops is None and full.mfu() is None, "a CPU's peak is not known"


def test_what_an_optimizer_computes_is_not_the_models(tmp_path):
    class Multiplies(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            torch.ones(9, 9) @ torch.ones(9, 9)
            return loss

    module, monitor = one_matrix(), Monitor()
    module.configure_optimizers = lambda: Multiplies(module.parameters(), lr=0.1)
    fit(tmp_path, monitor, Phases(switch=99), module=module, max_epochs=1)
    assert monitor.record.flops_per_sample == 2 * 2 * 12 * 3


def test_operations_in_place_count_and_nothing_is_left_behind_by_a_step_that_raises(tmp_path):
    counter = FlopCount()
    counter.begin(toy())
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    torch.zeros(3, 5).addmm_(a, b)
    assert counter.end() == 2 * 3 * 4 * 5
    assert counter.end() is None
    module, monitor = toy(), Monitor()

    def training_step(batch, batch_idx):
        raise RuntimeError("no step")

    module.training_step = training_step
    with pytest.raises(RuntimeError, match="no step"):
        trainer(tmp_path, monitor).fit(module, loader())
    assert _get_current_dispatch_mode() is None


def test_what_the_counter_cannot_see_is_not_counted():
    counter, module = FlopCount(), toy()
    module.head._compiled_call_impl = len  # as module.compile() sets it
    counter.begin(module)
    torch.ones(2, 3) @ torch.ones(3, 2)
    assert counter.end() is None


def test_mfu_is_the_share_of_what_the_devices_could_do(monkeypatch):
    record = PhaseRecord("full", world_size=2, seconds_per_sample=Thinned([0.5]), flops_per_sample=100.0, peak_flops=1000)
    assert record.samples_per_sec() == 4 and record.mfu() == pytest.approx(0.2)
    assert peak_flops(CPU, "32-true") is None
    asked = []
    monkeypatch.setattr(flops, "get_available_flops", lambda *args: asked.append(args) or 7)
    cuda = torch.device("cuda")
    assert [peak_flops(cuda, p) for p in ("bf16-mixed", "16-true", "32-true", "transformer-engine")] == [7, 7, 7, None]
    assert [dtype for _, dtype in asked] == [torch.bfloat16, torch.float16, torch.float32]


def test_counting_changes_no_number():
    """Torch's own counter takes silu's backward apart, which rounds otherwise."""
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    gradients = []
    for counts in (False, True):
        counter, module = FlopCount(), toy()
        leaf = x.clone().requires_grad_()
        if counts:
            counter.begin(module)
        (torch.nn.functional.silu(leaf) * x).sum().backward()
        counter.end()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_row_block_that_trains_on_is_counted_once():
    from lowrank_pretrain.core.plan import Plan
    from lowrank_pretrain.lora import model as lora
    from tests.toy import toy

    module = toy()
    before = count_parameters(module)
    adapters = lora.Adapters()
    adapters.adopt(Plan({"blocks.0.qkv.q": 2, "blocks.0.qkv.v": 2}), module)
    adapters.release()
    after = count_parameters(module)
    assert after["total"] == before["total"] + after["adapters"]
    assert after["trainable"] == before["trainable"] + after["adapters"] - 2 * (16 * 16 + 16)  # W and b of q and v are frozen
