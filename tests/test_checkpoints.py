"""A checkpoint reaches the disk whole or not at all; metrics.csv keeps step with it; a finished run may be resumed."""

import csv
import errno
import os
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lowrank_pretrain import WholeCheckpointIO
from lowrank_pretrain.checkpoints.files import inspect
from lowrank_pretrain.checkpoints.io import NotWritten
from lowrank_pretrain.core.files import replace_durably
from lowrank_pretrain.loggers import csv as csv_log
from lowrank_pretrain.run.run_dir import RefuseOldRun
from tests.chaos.compare import differences
from tests.conftest import SHORT, VIT
from tests.toy import loader, toy, trainer

ROOM = 100_000  # bytes that a file may have on a disk that is full


@contextmanager
def full_disk(room: int = ROOM):
    """No file of this process grows beyond `room` bytes: the system refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class DiskFull(Callback):
    """From the end of an optimizer step on there is no room."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def as_nobody():
    """A directory of root's that this process may read and not write in: permissions do not bind root itself."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        yield directory
        if os.geteuid() != os.getuid():
            os.seteuid(os.getuid())
        directory.chmod(0o755)


def lock(directory: Path) -> None:
    directory.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)


# -- the file -----------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_file_that_was_there_and_says_so(tmp_path):
    io, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"a": 1}, path)
    with full_disk(), pytest.raises(NotWritten, match=rf"{path} could not be written, \d+ MiB were free on its disk: "):
        io.save_checkpoint({"a": torch.zeros(ROOM)}, path)
    assert io.load_checkpoint(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_read_only_directory_leaves_the_file_that_was_there_and_says_so(as_nobody):
    io, path = WholeCheckpointIO(), as_nobody / "last.ckpt"
    io.save_checkpoint({"a": 1}, path)
    lock(as_nobody)
    with pytest.raises(NotWritten, match=f"{path} could not be written, .*Permission denied"):
        io.save_checkpoint({"a": 2}, path)
    with pytest.raises(NotWritten, match="Permission denied"):
        io.save_checkpoint({"a": 2}, as_nobody / "new" / "last.ckpt")
    assert io.load_checkpoint(path) == {"a": 1}


def test_file_and_directory_are_synced_around_the_replacing(tmp_path, monkeypatch):
    """Without the first a power cut may leave an empty file under the new name, without the second the old one."""
    seen, fsync, replace = [], os.fsync, os.replace

    def kind(fd):
        seen.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", kind)
    monkeypatch.setattr(os, "replace", lambda *args: (seen.append("replace"), replace(*args)))
    WholeCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    assert seen == ["file", "replace", "directory"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_a_directory_is_no_failure_but_a_broken_one_is(tmp_path, monkeypatch, number):
    new, old, fsync = tmp_path / "new", tmp_path / "old", os.fsync
    new.write_text("1")

    def refuse(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if number == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            replace_durably(new, old)
    else:
        replace_durably(new, old)
    monkeypatch.setattr(os, "fsync", fsync)
    assert old.read_text() == "1"


def test_the_best_file_of_a_trainer_of_ones_own_survives_a_full_disk(tmp_path):
    """ModelCheckpoint writes through the Trainer's plugin: one line in a user's script."""
    saver = ModelCheckpoint(tmp_path, "best", monitor="step", mode="max", every_n_train_steps=1, enable_version_counter=False)
    fit = trainer(tmp_path, saver, DiskFull(3), plugins=[WholeCheckpointIO()], max_epochs=2)
    try:
        with pytest.raises(NotWritten, match="best.ckpt could not be written"):
            fit.fit(toy(dim=64), loader())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert inspect(tmp_path / "best.ckpt")["global_step"] == 2
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["best.ckpt"] and not list(tmp_path.glob(".*.part"))


# -- a run --------------------------------------------------------------------------------------------------------------


def test_a_run_whose_disk_fills_up_names_its_last_good_checkpoint_and_goes_on_from_there(run, composed, tmp_path):
    from lowrank_pretrain.run import failures

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = "+trainer.callbacks=[{_target_: tests.test_checkpoints.DiskFull, step: 6}]"
    try:
        with pytest.raises(NotWritten) as ended:
            run("cut", "save_every=1", full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line, code = failures.describe(ended.value, composed(), tmp_path / "cut")
    assert code == 1 and line.count("\n") == 0
    assert line.endswith(f"; the last good checkpoint is {tmp_path / 'cut' / 'checkpoints' / 'last.ckpt'}")
    assert inspect(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == 5
    whole, _ = run("whole", "save_every=1")
    cut, _ = run("cut", "save_every=1", "ckpt_path=last")
    assert not differences(cut, whole)


def test_a_run_directory_that_cannot_be_made_is_one_line_before_anything_starts(as_nobody, composed, capsys):
    from omegaconf import OmegaConf

    lock(as_nobody)
    config = OmegaConf.create({"hydra": {"run": {"dir": str(as_nobody / "runs" / "x")}}, "ckpt_path": "last"})
    with pytest.raises(SystemExit) as end:
        RefuseOldRun().on_run_start(config)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith(f"error: hydra.run.dir='{as_nobody}/runs/x': cannot be written to (") and err.count("\n") == 1


def test_a_checkpoint_takes_its_place_only_when_its_step_is_logged(run, tmp_path, monkeypatch):
    """A run killed in between went on behind the step, and never wrote its row."""
    seen, replace = [], os.replace

    def noting(new, old, *args):
        if str(old).endswith("/last.ckpt"):
            with (tmp_path / "rows" / "metrics.csv").open() as file:
                rows = [int(row["step"]) + 1 for row in csv.DictReader(file)]  # Lightning counts from 0
            seen.append((inspect(Path(new))["global_step"], max(rows)))
        replace(new, old, *args)

    monkeypatch.setattr(os, "replace", noting)
    run("rows", "save_every=1")
    assert seen == [(step, step) for step in range(1, 13)]


EMA = "+trainer.callbacks=[{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, update_every_n_steps: 2}]"


def test_a_finished_run_resumed_exports_its_averaged_weights_again(run):
    """Killed between fit and export: Lightning then leaves ``on_train_end`` out, where the average becomes the model."""
    directory, _ = run("done", "method=full", EMA, base=[*SHORT, *VIT])
    before = (directory / "export" / "model.safetensors").read_bytes()
    (directory / "summary.json").unlink()
    run("done", "method=full", EMA, "ckpt_path=last", base=[*SHORT, *VIT])
    assert (directory / "export" / "model.safetensors").read_bytes() == before


# -- metrics.csv --------------------------------------------------------------------------------------------------------


def test_new_columns_never_empty_the_file(tmp_path, monkeypatch):
    """Lightning's writer opens the file for writing and fills it again: a kill in between loses every row."""
    logger = csv_log.RunCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    monkeypatch.setattr(csv_log.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        logger.log_metrics({"b": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,step", "1.0,0"]
    monkeypatch.undo()
    logger = csv_log.RunCSVLogger(tmp_path)  # as a resumed process does
    logger.log_metrics({"b": 2.0}, step=1)
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,b,step", "1.0,,0", ",2.0,1"]


def test_every_row_is_in_the_file_at_once(tmp_path):
    """A row in memory is lost with the process, and the checkpoint beside it says that it was written."""
    csv_log.RunCSVLogger(tmp_path).log_metrics({"a": 1.0}, step=7)
    assert (tmp_path / "metrics.csv").read_text().split() == ["a,step", "1.0,7"]


@pytest.mark.parametrize("left", ["", "a,st"])
def test_a_file_without_a_whole_header_is_as_good_as_none(tmp_path, left):
    path = tmp_path / "metrics.csv"
    path.write_text(left)
    csv_log.forget_after(path, 5)
    assert not path.exists()


# -- other file systems ---------------------------------------------------------------------------------------------------


def test_another_file_system_is_written_by_its_own_means_and_a_resume_reads_it(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="Lightning brings it")
    saver = ModelCheckpoint("memory://runs", "{step}", every_n_train_steps=3, save_top_k=-1)
    first = toy()
    trainer(tmp_path, saver, plugins=[WholeCheckpointIO()], max_epochs=1).fit(first, loader())
    memory = fsspec.filesystem("memory")
    assert {path.rpartition("/")[2] for path in memory.ls("/runs", detail=False)} == {"step=3.ckpt", "step=6.ckpt"}
    assert not list(tmp_path.glob("memory*")) and not Path("memory:").exists()  # no local folder of that name
    again = toy()
    run = trainer(tmp_path, plugins=[WholeCheckpointIO()], max_epochs=1)
    run.fit(again, loader(), ckpt_path="memory://runs/step=3.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    memory.rm("/runs", recursive=True)


def test_a_file_system_that_refuses_is_one_line(tmp_path):
    with pytest.raises(NotWritten, match="nosuch://x/y.ckpt could not be written: ") as error:
        WholeCheckpointIO().save_checkpoint({"a": 1}, "nosuch://x/y.ckpt")
    assert "\n" not in str(error.value)


def test_a_local_path_may_have_its_scheme(tmp_path):
    WholeCheckpointIO().save_checkpoint({"a": 1}, f"file://{tmp_path}/new/x.ckpt")
    assert WholeCheckpointIO().load_checkpoint(tmp_path / "new" / "x.ckpt") == {"a": 1}


def test_what_must_replace_files_in_place_refuses_another_file_system(tmp_path):
    from lowrank_pretrain import DivergenceGuard
    from lowrank_pretrain.checkpoints.files import LastCheckpoint
    from lowrank_pretrain.core.errors import ConfigError
    from lowrank_pretrain.export.weights import export

    with pytest.raises(ConfigError, match="^directory='s3://bucket/run': must be on a file system of this machine"):
        LastCheckpoint("s3://bucket/run")
    with pytest.raises(ConfigError, match="^out='s3://bucket/out': must be"):
        export(tmp_path / "x.ckpt", None, "s3://bucket/out")
    with pytest.raises(ConfigError, match="^ckpt='gs://bucket/x.ckpt': must be"):
        export("gs://bucket/x.ckpt", None, tmp_path / "out")
    guard = DivergenceGuard(on_divergence="rewind")
    run = trainer(tmp_path, guard, ModelCheckpoint("memory://runs"), max_epochs=1)
    with pytest.raises(ConfigError, match="^dirpath='memory://runs': must be"):
        guard.fit(run, toy(), loader())
