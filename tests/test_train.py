"""Whole runs, tiny, in this process: what lies in a run directory, and what survives interruption, resume and damage."""

import csv
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import warnings
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lowrank_pretrain.checkpoints import random_state
from lowrank_pretrain.checkpoints.files import NotWritten, WholeCheckpointIO, inspect, newest_whole
from lowrank_pretrain.checkpoints.longer_run import LongerRun
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.ownership import owned
from lowrank_pretrain.data.text.stream import TextData
from lowrank_pretrain.guards.finite import Diverged
from lowrank_pretrain.loggers import csv as csv_log
from lowrank_pretrain.observe.closing_loss import ClosingLoss
from lowrank_pretrain.run import failures
from tests.conftest import PHASES, SHORT, TINY, VIT
from tests.toy import loader, toy, trainer

TIMED = ("throughput/", "memory/", "time/")


class Signal(Callback):
    """Sends this process a signal at the end of an optimizer step, as Ctrl-C or a scheduler would."""

    def __init__(self, step: int, name: str = "SIGTERM") -> None:
        self.step, self.name = step, name

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.Signals[self.name])


class Crash(Callback):
    """The process dies."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class Poison(Callback):
    """Makes the loss, or a weight after the step, NaN at an optimizer step (counted from 1)."""

    def __init__(self, step: int, where: str) -> None:
        self.step, self.where = step, where

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step + 1 == self.step and self.where == "loss":
            pl_module.model.head.weight.data.fill_(float("nan"))

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step and self.where == "weight":
            pl_module.model.head.weight.data[0, 0] = float("inf")


def sends(step: int, name: str = "SIGTERM") -> str:
    return f"+trainer.callbacks=[{{_target_: tests.test_train.Signal, step: {step}, name: {name}}}]"


def poisoned(step: int, where: str) -> str:
    return f"+trainer.callbacks=[{{_target_: tests.test_train.Poison, step: {step}, where: {where}}}]"


def rows(directory, timed=False):
    """metrics.csv, without the columns that measure time and memory, and without empty cells."""
    with (directory / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v and (timed or not k.startswith(TIMED))} for row in csv.DictReader(file)]


def weights(directory):
    return (directory / "export" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, composed):
    """One uninterrupted run: (directory, summary)."""
    from lowrank_pretrain.run.train import train

    directory = tmp_path_factory.mktemp("whole") / "run"
    return directory, train(composed(*TINY), directory)


def test_a_run_directory_holds_what_it_should(whole):
    directory, summary = whole
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert found == {
        "metrics.csv", "summary.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
        "export/model.safetensors", "export/config.json", "export/README.md",
    }  # fmt: skip
    assert json.loads((directory / "summary.json").read_text()) == summary


def test_the_summary_has_the_agreed_keys(whole):
    _, summary = whole
    assert list(summary) == ["phases", "switch_step", "freeze_step", "plan", "final", "versions"]
    assert list(summary["versions"]) == ["lowrank_pretrain", "torch", "lightning", "timm", "transformers"]
    assert [(p["phase"], p["steps"]) for p in summary["phases"]] == [("full", 3), ("joint", 3), ("lowrank", 6)]
    for phase in summary["phases"]:
        agreed = ["phase", "steps", "seconds", "samples_per_sec", "peak_gib", "trainable", "total"]
        assert list(phase) == [*agreed, "adapters", "optimizer_gib", "flops_per_sample"]
        assert phase["seconds"] > 0 and phase["samples_per_sec"] > 0 and phase["peak_gib"] > 0
    full, joint, lowrank = summary["phases"]
    assert full["trainable"] == full["total"] < joint["trainable"] == joint["total"] == lowrank["total"]
    assert lowrank["trainable"] < full["trainable"]
    assert (summary["switch_step"], summary["freeze_step"]) == (3, 6)
    assert set(summary["plan"].values()) <= {2, 4}
    assert {"train/loss", "val/loss", "val/acc1", "test/loss", "test/acc1"} <= set(summary["final"])


def test_the_metrics_have_the_agreed_names(whole):
    names = {name for row in rows(whole[0], timed=True) for name in row}
    assert {
        "train/loss", "val/loss", "val/acc1", "val/acc5", "throughput/samples_per_sec", "memory/peak_gib",
        "memory/optimizer_gib", "params/trainable", "params/adapters", "params/total", "lowrank/phase",
    } <= names  # fmt: skip
    assert [float(row["lowrank/phase"]) for row in rows(whole[0]) if "lowrank/phase" in row] == [0] * 3 + [1] * 3 + [2] * 6


# 2 full, 3 the switch, 4 an epoch's end (the checkpoint waits for it), 5 joint, 6 the freeze, 9 lowrank, 12 the last step
@pytest.mark.parametrize("step", [2, 3, 4, 5, 6, 9, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(run, whole, step):
    with pytest.raises(Interrupted) as stopped:
        run("cut", sends(step))
    assert stopped.value.exit_code == 143
    assert stopped.value.checkpoint.name == "last.ckpt"
    directory, summary = run("cut", "ckpt_path=last")
    assert weights(directory) == weights(whole[0])
    assert rows(directory) == rows(whole[0])
    for ours, theirs in zip(summary["phases"], whole[1]["phases"], strict=True):
        assert {k: ours[k] for k in ("phase", "steps", "trainable", "total")} == {
            k: theirs[k] for k in ("phase", "steps", "trainable", "total")
        }


VARIANTS = {
    "accumulated": ("trainer.accumulate_grad_batches=3", "method.window=1"),
    "validated twice an epoch": ("trainer.val_check_interval=2",),
    "limited by steps": ("trainer.max_steps=10",),  # Lightning alone resumes this one wrongly: loop_state.py
    "limited by steps alone": ("trainer.max_steps=10", "trainer.max_epochs=-1"),
    "with workers": ("data.num_workers=1",),
    "text": (),
}
TEXT = [
    "experiment=prelora_gpt2_pocket",
    "data.seq_len=16",
    "model.config.n_embd=24",
    "model.config.n_layer=1",
    "model.config.resid_pdrop=0.1",
]


@pytest.mark.parametrize("name", VARIANTS)
def test_it_does_so_in_other_kinds_of_run(run, name):
    base = [*SHORT, *TEXT, *PHASES] if name == "text" else TINY
    whole, _ = run("whole", *VARIANTS[name], base=base)
    # the end of the first epoch, where most can go wrong
    with pytest.raises(Interrupted):
        run("cut", *VARIANTS[name], sends(2 if name == "accumulated" else 4), base=base)
    cut, _ = run("cut", *VARIANTS[name], "ckpt_path=last", base=base)
    assert rows(cut) == rows(whole)
    assert weights(cut) == weights(whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_writes_no_row_twice(run, whole, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        run("cut", "+trainer.callbacks=[{_target_: tests.test_train.Crash, step: 7}]", "save_every=5")
    assert len(rows(tmp_path / "cut")) > 6
    assert inspect(newest_whole(tmp_path / "cut" / "checkpoints"))["global_step"] == 5
    directory, _ = run("cut", "ckpt_path=last", "save_every=5")
    assert rows(directory) == rows(whole[0])
    assert weights(directory) == weights(whole[0])


def test_a_finished_run_is_not_trained_again_but_reported_again(run, monkeypatch):
    looks = itertools.count(2**30, 2**20)  # each look at the memory finds more of it in use
    monkeypatch.setattr("lowrank_pretrain.core.memory.PeakMemory.peak", lambda self: next(looks))
    directory, first = run("done")
    before = rows(directory)
    _, second = run("done", "ckpt_path=last")
    assert rows(directory) == before
    assert first == second


def test_method_full_has_one_phase(run):
    _, summary = run("full", "method=full", base=[*SHORT, *VIT])
    assert [(p["phase"], p["steps"]) for p in summary["phases"]] == [("full", 12)]
    assert (summary["plan"], summary["switch_step"], summary["freeze_step"]) == (None, None, None)


def test_method_lora_is_low_rank_from_the_start(run):
    _, summary = run("lora", "method=lora", "method.rank=4", base=[*SHORT, *VIT])
    assert [(p["phase"], p["steps"]) for p in summary["phases"]] == [("lowrank", 12)]
    assert summary["switch_step"] == summary["freeze_step"] == 0


# -- checkpoints --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(whole, tmp_path):
    """A copy of the finished run's directory."""
    return shutil.copytree(whole[0], tmp_path / "run")


def test_last_skips_a_truncated_checkpoint_and_names_it(copied):
    last = copied / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    with pytest.warns(UserWarning, match="skipped .*last.ckpt: is truncated"):
        assert newest_whole(copied / "checkpoints").name == "best.ckpt"


def test_last_is_where_a_run_goes_on_exactly_else_the_one_furthest_on_and_none_where_there_is_none(copied, tmp_path):
    last, best = copied / "checkpoints" / "last.ckpt", copied / "checkpoints" / "best.ckpt"
    for path, step in ((best, 13), (copied / "checkpoints" / "kept.ckpt", 11)):
        torch.save({**torch.load(last, weights_only=True), "global_step": step}, path)
    assert newest_whole(copied / "checkpoints") == last
    last.unlink()
    assert newest_whole(copied / "checkpoints") == best
    assert newest_whole(tmp_path / "nothing") is None


def test_last_starts_afresh_where_there_is_nothing(run):
    directory, summary = run("fresh", "ckpt_path=last", "trainer.max_epochs=1")
    assert summary["phases"][0]["steps"] == 3


def damaged(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no zip":
        path.write_bytes(b"words")
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "weights only":
        checkpoint = torch.load(path)
        del checkpoint["optimizer_states"]
        torch.save(checkpoint, path)
    elif kind == "code":
        torch.save({"state_dict": os.system}, path)


@pytest.mark.parametrize("kind", ["missing", "truncated", "no zip", "foreign", "weights only", "code"])
def test_a_checkpoint_that_cannot_be_resumed_from_is_named(run, copied, kind):
    path = copied / "checkpoints" / "last.ckpt"
    damaged(path, kind)
    with pytest.raises(ConfigError) as wrong:
        run("new", f"ckpt_path={path}")
    assert wrong.value.key == "ckpt_path"
    assert str(path) in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor_that_differs(run, copied):
    with pytest.raises(ConfigError, match=r"of another model: .* is \(\d+.* there and .* here"):
        run("new", f"ckpt_path={copied / 'checkpoints' / 'last.ckpt'}", "model.model_kwargs.embed_dim=48")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "last.ckpt"
    io = WholeCheckpointIO()
    io.save_checkpoint({"a": 1}, path)
    with pytest.raises(NotWritten, match=f"{path} could not be written, \\d+ MiB were free on its disk: .*No space left"):
        io.save_checkpoint({"a": torch.zeros(8), "b": Full()}, path)
    assert io.load_checkpoint(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class Full:
    def __reduce__(self):
        raise OSError(28, "No space left on disk")


def test_starting_afresh_in_a_directory_that_holds_a_run_is_refused_with_the_cure(run, copied):
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="ckpt_path=last.*seed=N.*hydra.run.dir=DIR"):
        run("run")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# -- what goes wrong ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_and_names_step_and_checkpoint(run, composed, tmp_path):
    with pytest.raises(Diverged) as ended:
        run("nan", poisoned(6, "loss"))
    assert (ended.value.what, ended.value.step) == ("train/loss", 6)
    line, code = failures.describe(ended.value, composed(), tmp_path / "nan")
    assert code == 1 and "step 6" in line and str(tmp_path / "nan" / "checkpoints" / "last.ckpt") in line
    checkpoint = inspect(tmp_path / "nan" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(t).all() for t in checkpoint["state_dict"].values())


def test_no_checkpoint_is_written_of_a_model_that_is_no_number(run, tmp_path):
    # the loss of step 4 is fine, its update was not: validation and the epoch's checkpoint come before the next loss
    with pytest.raises(Diverged, match="model.head.weight is not finite at step 8"):
        run("inf", poisoned(8, "weight"))
    for name in ("last", "best"):
        checkpoint = inspect(tmp_path / "inf" / "checkpoints" / f"{name}.ckpt")
        assert checkpoint["global_step"] == 4
        assert all(torch.isfinite(t).all() for t in checkpoint["state_dict"].values())


def test_a_signal_outside_of_steps_ends_the_run_at_once(run, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr("lowrank_pretrain.run.attempt.finish_run", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        run("late", "trainer.max_epochs=1")
    assert (stopped.value.exit_code, stopped.value.checkpoint) == (130, None)
    assert signal.getsignal(signal.SIGINT) is handler


# -- small parts --------------------------------------------------------------------------------------------------------


def test_random_states_come_back():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.randn()  # leaves half a pair of Gaussians behind
    state = random_state.capture()
    draw = lambda: (random.gauss(0, 1), np.random.randn(), np.random.rand(), random.random(), torch.rand(()).item())  # noqa: E731
    first = draw()
    random_state.restore(torch.load(io.BytesIO(saved(state)), weights_only=True))
    assert draw() == first


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_rows_behind_the_checkpoint_and_half_a_row_are_forgotten(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("loss,step\n1.0,3\n0.9,4\n0.8,5\n0.7,")
    csv_log.forget_after(path, 5)
    assert path.read_text().split() == ["loss,step", "1.0,3", "0.9,4"]
    csv_log.forget_after(tmp_path / "none.csv", 5)
    csv_log.forget_after(path, 0)
    assert not path.exists(), "a run that starts afresh, after one that was killed before its first checkpoint"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("seed=1,method=full", "seed=1,method=full"),
        ("data.root=/a/b", "data.root=_a_b-"),
        ("x=" + "1" * 500, "x=1111"),
        ("", "job"),
    ],
)
def test_a_sweeps_jobs_have_directories_of_their_own(overrides, name):
    from lowrank_pretrain.run.run_dir import job_dir

    assert job_dir(overrides).startswith(name)
    assert "/" not in job_dir(overrides) and len(job_dir(overrides)) < 140
    assert job_dir("data.root=/a/b") != job_dir("data.root=_a_b")


@pytest.mark.parametrize(
    "text",
    [
        "LTE: another worker died or did not answer within 600 s (…); resume from the last checkpoint",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer",
    ],
)
def test_a_dead_process_is_one_line(composed, tmp_path, text):
    line, code = failures.describe(RuntimeError(text), composed(), tmp_path)
    assert code == 1 and line.startswith("error: another process died or did not answer") and "\n" not in line
    assert failures.describe(RuntimeError("shapes differ"), composed(), tmp_path) is None


# -- a run that goes on under other settings ------------------------------------------------------------------------------


class Watch(Callback):
    """Notes, for each optimizer step, its rate, its decay and how far the weights moved."""

    seen: list[dict] = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.before = torch.cat([p.detach().flatten() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer, pl_module, *args):
        now = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
        moved = (now - self.before).abs().max().item() if len(now) == len(self.before) else 1.0
        group = trainer.optimizers[0].param_groups[0]
        settings = {key: group[key] for key in ("weight_decay", "betas", "eps")}
        Watch.seen.append({"step": trainer.global_step, "next_lr": group["lr"], "moved": moved, **settings})


WATCH = "+trainer.callbacks=[{_target_: tests.test_train.Watch}]"
FULL = [*SHORT, *VIT, "method=full"]  # epochs of 4 steps


def watched(run, name, *overrides, base=FULL):
    """The run's steps, as `Watch` saw them."""
    Watch.seen = []
    run(name, WATCH, *overrides, base=base)
    return Watch.seen


@pytest.mark.parametrize(
    ("base", "short", "long"),
    [
        (FULL, ["trainer.max_epochs=2"], ["trainer.max_epochs=4"]),
        (FULL, ["trainer.max_epochs=2", "optim.warmup=0.1"], ["trainer.max_epochs=4", "optim.warmup=0.1"]),  # 0 steps, then 1
        (FULL, ["trainer.max_epochs=2", "optim.warmup=3"], ["trainer.max_epochs=4", "optim.warmup=3"]),
        (FULL, ["trainer.max_steps=6", "trainer.max_epochs=-1"], ["trainer.max_steps=11", "trainer.max_epochs=-1"]),
        (FULL, ["trainer.max_epochs=2", "optim.schedule=constant"], ["trainer.max_epochs=4", "optim.schedule=cosine"]),
        (TINY, ["trainer.max_epochs=3"], ["trainer.max_epochs=5"]),  # PreLoRA's warning advises to train longer
        ([*SHORT, *VIT], ["method=galore", "method.rank=4", "trainer.max_epochs=2"],
         ["method=galore", "method.rank=4", "trainer.max_epochs=4"]),
        ([*SHORT, *VIT], ["method=lte", "method.rank=2", "method.heads=2", "trainer.max_epochs=2"],
         ["method=lte", "method.rank=2", "method.heads=2", "trainer.max_epochs=4"]),
    ],
    ids=["epochs", "warm-up share", "warm-up steps", "steps", "another schedule", "prelora", "galore", "lte"],
)  # fmt: skip
def test_a_run_that_is_made_longer_has_the_schedule_of_its_new_length(run, capfd, base, short, long):
    rates = [seen["next_lr"] for seen in watched(run, "long from the start", *long, base=base)]
    first = watched(run, "run", *short, base=base)
    capfd.readouterr()
    second = watched(run, "run", *long, "ckpt_path=last", base=base)
    said = capfd.readouterr().out
    assert [seen["step"] for seen in second] == list(range(first[-1]["step"] + 1, len(rates) + 1))
    assert all(seen["moved"] > 0 for seen in second), "in every added step"
    assert [seen["next_lr"] for seen in second] == pytest.approx(rates[len(first) :], abs=1e-12)
    if "schedule=constant" not in str(short):
        assert f"no longer of {len(first)} steps" in said


def test_a_run_of_another_batch_size_ends_its_schedule_where_it_ends(run):
    """Twice as many samples per step: half as many steps per epoch from there on, and twice so."""
    whole = ["data.batch_size=8", "trainer.max_epochs=6"]
    changes = ["trainer.limit_train_batches=2", "trainer.limit_train_batches=5"]
    watched(run, "run", *whole, "trainer.max_steps=8")  # epochs 0 and 1 of 4 steps
    second = watched(run, "run", *whole, changes[0], "trainer.max_steps=12", "ckpt_path=last")  # epochs 2 and 3 of 2
    third = watched(run, "run", *whole, changes[1], "ckpt_path=last")  # epochs 4 and 5 of 5
    assert [seen["step"] for seen in second] == [9, 10, 11, 12]
    assert [seen["step"] for seen in third] == list(range(13, 23))
    assert [seen["next_lr"] > 0 for seen in third] == [True] * 9 + [False]
    assert all(seen["moved"] > 0 for seen in second + third)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("optim.lr=0.0003", "next_lr", None),
        ("optim.weight_decay=0.3", "weight_decay", 0.3),
        ("optim.betas=[0.8,0.9]", "betas", (0.8, 0.9)),
        ("optim.eps=1e-4", "eps", 1e-4),
        ("optim.final_lr=0.5", "next_lr", None),
        ("optim.schedule=constant", "next_lr", None),
        ("optim.warmup=2", "next_lr", None),
    ],
)
@pytest.mark.parametrize("how", ["full", "prelora", "galore"])
def test_a_changed_setting_takes_effect_in_a_resumed_run(run, capfd, how, change, key, value):
    base = {"full": FULL, "prelora": TINY, "galore": [*SHORT, *VIT, "method=galore", "method.rank=4"]}[how]
    with pytest.raises(Interrupted):
        watched(run, "run", sends(6).replace("+trainer.callbacks=[", "++trainer.callbacks=["), base=base)
    capfd.readouterr()
    seen = watched(run, "run", change, "ckpt_path=last", base=base)
    said = capfd.readouterr().out
    if value is None:
        fresh = watched(run, "so from the start", change, base=base)
        assert [s[key] for s in seen] == pytest.approx([s[key] for s in fresh][6:])
    else:
        assert all(s[key] == value for s in seen)
    name = change.partition("=")[0].removeprefix("optim.")
    assert [line for line in said.splitlines() if line.startswith(f"{name} is now ")]


@pytest.mark.parametrize(
    ("scheduler", "epochs", "warned"),
    [("cosine", 4, True), ("onecycle", 4, True), ("sequential", 4, True), ("lambda", 4, True), ("step", 4, False),
     (None, 4, False), ("cosine", 2, False)],
)  # fmt: skip
def test_a_schedule_of_a_modules_own_that_may_have_ended_is_named(tmp_path, scheduler, epochs, warned):
    trainer(tmp_path, LongerRun(), every=3, max_epochs=2).fit(toy(scheduler=scheduler), loader(n=24))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer(tmp_path, LongerRun(), max_epochs=epochs).fit(
            toy(scheduler=scheduler), loader(n=24), ckpt_path=tmp_path / "step=3.ckpt"
        )
    found = [str(w.message) for w in said if "whose run was of 6 steps; this one is of 12" in str(w.message)]
    assert len(found) == warned


@pytest.mark.parametrize(("batch_size", "fine"), [(4, True), (6, True), (2, True), (5, False)])
def test_a_streams_batch_size_may_change_where_its_blocks_do_not(tmp_path, batch_size, fine):
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("In the beginning God created the heaven and the earth. " * 200)

    def stream(batch_size):
        data = TextData(str(tmp_path), tokenizer="kjv", batch_size=batch_size, num_workers=0, seq_len=8, vocab_size=2048,
                        shuffle_block=12, seed=0)  # fmt: skip
        data.setup()
        return data.train_dataloader()

    loader = stream(4)
    next(iter(loader))
    other = stream(batch_size)
    if fine:
        other.load_state_dict(loader.state_dict())
        assert next(iter(other))["input_ids"].shape == (batch_size, 8)
    else:
        with pytest.raises(
            ConfigError, match="batch_size=5: makes blocks of 15 .* the checkpoint's have 12: use .* divides 12"
        ):
            other.load_state_dict(loader.state_dict())


def test_a_changed_interval_of_saving_takes_effect_in_a_resumed_run(run, tmp_path):
    with pytest.raises(Interrupted):
        run("run", sends(5), base=FULL)
    crash = "+trainer.callbacks=[{_target_: tests.test_train.Crash, step: 8}]"
    with pytest.raises(RuntimeError, match="killed"):
        run("run", crash, "save_every=1", "trainer.log_every_n_steps=2", "ckpt_path=last", base=FULL)
    assert inspect(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 7


def test_a_run_that_has_nothing_left_to_do_says_so(run, capfd):
    run("run", "trainer.max_epochs=1", base=FULL)
    assert "nothing was left to train" not in capfd.readouterr().out
    run("run", "trainer.max_epochs=1", "ckpt_path=last", base=FULL)
    assert "nothing was left to train: the checkpoint is at the end of the run (trainer.max_epochs=1" in capfd.readouterr().out


@pytest.mark.parametrize("batches", [1, 3])
def test_the_closing_loss_of_a_short_run_is_a_mean_over_its_end(run, batches):
    """Nothing is logged in so short a run."""
    losses = []

    class Losses(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)

    sys.modules[__name__].Losses = Losses
    quiet = ["trainer.log_every_n_steps=50", f"trainer.accumulate_grad_batches={batches}", "trainer.max_epochs=2"]
    _, summary = run("run", "+trainer.callbacks=[{_target_: tests.test_train.Losses}]", *quiet, base=FULL)
    assert summary["final"]["train/loss"] == pytest.approx(sum(losses) / len(losses))
    assert len(losses) == 8


def test_the_closing_loss_forgets_what_is_long_ago_and_survives_a_resume():
    module, trainer = (
        SimpleNamespace(device=torch.device("cpu")),
        SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_rank=0),
    )
    kept = ClosingLoss()
    kept.on_train_start(trainer, module)
    for i in range(250):
        if i == 220:
            state = kept.state_dict()
            kept = ClosingLoss()
            kept.load_state_dict(state)
            kept.on_train_start(trainer, module)
        kept.on_train_batch_end(trainer, module, {"loss": torch.tensor(float(i))}, None, i)
    kept.on_train_epoch_end(trainer, module)
    assert kept.mean == sum(range(150, 250)) / 100


@pytest.mark.parametrize(("processes", "goes_on"), [(2, [[0.0, 1.0], [10.0, 11.0]]), (3, [[5.0, 6.0]] * 3)])
def test_every_process_keeps_its_own_closing_losses_in_a_resume(processes, goes_on):
    module, sent, saved = SimpleNamespace(device=torch.device("cpu")), [], {}
    strategy = SimpleNamespace(all_gather=lambda mine: sent.append(mine) or torch.stack((sent * 2)[:2]))
    for rank in (1, 0):  # the last one to "save" has seen what both hold
        kept = ClosingLoss()
        trainer = SimpleNamespace(accumulate_grad_batches=1, world_size=2, global_rank=rank, strategy=strategy)
        kept.on_train_start(trainer, module)
        for i in range(2):
            kept.on_train_batch_end(trainer, module, {"loss": torch.tensor(10.0 * rank + i)}, None, i)
        saved = {"callbacks": {"ClosingLoss": kept.state_dict()}}
        kept.on_save_checkpoint(trainer, module, saved)
    saved["callbacks"]["ClosingLoss"]["losses"].reverse()  # they came as 1, 0
    found = []
    for rank in range(processes):
        kept = ClosingLoss()
        kept.load_state_dict(saved["callbacks"]["ClosingLoss"])
        kept.on_train_start(SimpleNamespace(world_size=processes, global_rank=rank), module)
        found += kept.state_dict()["losses"]
    assert found == goes_on


# -- directories ----------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_was_moved_keeps_its_best(run, whole, tmp_path):
    """A best that nothing can be better than: the file stays as it is."""
    moved = shutil.copytree(whole[0], tmp_path / "run")
    best, last = (moved / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    checkpoint = torch.load(last, weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("ModelCheckpoint")]
    state = checkpoint["callbacks"][key]
    assert state["best_model_path"] == str(whole[0] / "checkpoints" / "best.ckpt")
    score = torch.tensor(-1.0)
    state |= {"best_model_score": score, "kth_value": score, "best_k_models": {state["best_model_path"]: score}}
    torch.save(checkpoint, last)
    before = best.read_bytes()
    run("run", "ckpt_path=last", "trainer.max_epochs=4")
    assert best.read_bytes() == before
    state = torch.load(last, weights_only=True)["callbacks"][key]
    assert state["best_model_path"] == str(best) and state["dirpath"] == str(best.parent)


def test_a_branch_of_another_run_has_a_best_of_its_own(run, whole, tmp_path):
    directory, _ = run("branch", f"ckpt_path={whole[0] / 'checkpoints' / 'last.ckpt'}", "trainer.max_epochs=4")
    assert (directory / "checkpoints" / "best.ckpt").is_file()


def own(directory, conn):
    with owned(directory):
        conn.send("mine")
        conn.recv()


@pytest.fixture
def owner(tmp_path):
    """Another process that owns tmp_path/run."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=own, args=(tmp_path / "run", there))
    child.start()
    assert here.recv() == "mine"
    yield child
    child.kill()
    child.join()


@pytest.mark.parametrize("overrides", [[], ["ckpt_path=last"]])
def test_two_processes_cannot_own_one_directory(run, owner, tmp_path, overrides):
    with pytest.raises(ConfigError, match=rf"run': belongs to a run that goes on \(process {owner.pid} on .*seed=N"):
        run("run", *overrides, base=FULL)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_killed_owner_owns_nothing(run, owner, tmp_path):
    owner.kill()
    owner.join()
    assert (tmp_path / "run" / ".lock").is_file()
    directory, _ = run("run", "trainer.max_epochs=1", base=FULL)
    assert not (directory / ".lock").exists()


def test_a_process_cannot_own_a_directory_twice(tmp_path):
    with (
        owned(tmp_path),
        pytest.raises(ConfigError, match="belongs to a run that goes on .process .*, this one"),
        owned(tmp_path),
    ):
        pass
    with owned(tmp_path):
        pass


def test_a_launcher_that_started_another_number_of_processes_names_the_devices(composed, tmp_path, monkeypatch):
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    for key, value in {"WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "run"}.items():
        monkeypatch.setenv(key, value)
    for environment in (TorchElasticEnvironment, SLURMEnvironment):
        with pytest.raises(ValueError) as ended:
            environment().validate_settings(num_devices=1, num_nodes=1)
        line, code = failures.describe(ended.value, composed(), tmp_path)
        assert code == 2 and line.startswith("error: trainer.devices=1: You set `devices=1`") and "\n" not in line
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(RuntimeError) as ended:
        SLURMEnvironment._validate_srun_variables()
    line, code = failures.describe(ended.value, composed(), tmp_path)
    assert code == 2 and "--ntasks=2" in line and "\n" not in line


def test_a_port_that_another_job_has_is_named(composed, tmp_path):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(torch.distributed.DistError) as ended:
            torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=5))
    line, code = failures.describe(ended.value, composed(), tmp_path)
    assert code == 2 and line.startswith(f"error: MASTER_PORT={port}: is in use") and "\n" not in line
    with pytest.raises(torch.distributed.DistError) as ended:  # nobody is there
        torch.distributed.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=timedelta(milliseconds=100))
    line, code = failures.describe(ended.value, composed(), tmp_path)
    assert code == 1 and line.startswith("error: another process died or did not answer") and "\n" not in line
