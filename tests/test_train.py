"""Whole runs, tiny, in this process: what lies in a run directory, and what survives interruption, resume and damage."""

import csv
import io
import json
import os
import random
import shutil
import signal
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from lowrank_pretrain import csv_log, failures, random_state
from lowrank_pretrain.checkpoints import NotWritten, WholeCheckpointIO, inspect, newest_whole
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.finite import Diverged
from lowrank_pretrain.interrupts import Interrupted
from tests.conftest import PHASES, SHORT, TINY, VIT

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
    from lowrank_pretrain.train import train

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
    assert list(summary) == ["phases", "switch_step", "freeze_step", "plan", "final"]
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


def test_a_finished_run_is_not_trained_again_but_reported_again(run):
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

    monkeypatch.setattr("lowrank_pretrain.train.finish_run", interrupted)
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
    from lowrank_pretrain.run_dir import job_dir

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
