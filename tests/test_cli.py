"""The command line as a user meets it: exit codes and single lines, directories, sweeps, the wheel, the README."""

import logging
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Callback
from omegaconf import OmegaConf

import lowrank_pretrain
from lowrank_pretrain.run import method
from lowrank_pretrain.run.build import plain
from tests.conftest import SHORT, TINY, VIT

ROOT = Path(__file__).parents[1]
ONE_STEP = [*SHORT, *VIT, "method=full", "trainer.max_epochs=1", "trainer.limit_train_batches=1", "save_every=1"]


@pytest.fixture
def cli(monkeypatch, tmp_path, capfd):
    """``cli("key=value", …)`` in tmp_path and in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()  # Hydra sets it up for a process of its own
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    level = root.level

    def call(*args: str) -> tuple[int, str, str]:
        from lowrank_pretrain.run.train import main

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["lowrank-pretrain", *args])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    yield call
    root.setLevel(level)


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


# -- configuration ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_composes_and_leaves_the_method_alone(composed, experiment):
    config = plain(composed(f"experiment={experiment}"))
    assert config["data"]["_target_"] and config["model"]["_target_"] and config["method"]["uses"]
    written = OmegaConf.load(ROOT / "conf" / "experiment" / f"{experiment}.yaml")
    assert "method" not in written, "it would leak into another method of a sweep"


@pytest.mark.parametrize("name", names("method"))
def test_every_method_can_be_built(composed, name):
    built = method.build(plain(composed(f"method={name}"))["method"])
    assert any((built.callbacks, built.strategy, built.optimizer)) == (name != "full")


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("data", "model", "optim", "trainer") for n in names(g)])
def test_every_key_of_every_group_is_an_argument_of_what_it_builds(composed, group, name):
    import lightning.pytorch as pl
    from hydra.utils import get_class

    from lowrank_pretrain.run.build import check_arguments

    values = OmegaConf.to_container(composed("experiment=none", f"{group}={name}")[group], resolve=False)
    target = get_class(values.pop("_target_")) if "_target_" in values else pl.Trainer
    check_arguments(group, target, {key: v for key, v in values.items() if v is not None and "${" not in str(v)})


def test_data_of_the_command_line_wins_over_the_experiments_and_keeps_its_size(composed):
    config = composed("experiment=prelora_vitl", "data=fashion_mnist_sample")
    assert config.data._target_.endswith("FashionMNIST")
    assert (config.data.img_size, config.model.img_size, config.model.in_chans, config.model.num_classes) == (224, 224, 3, 10)


def test_cfg_job_shows_the_default_experiment(cli):
    code, out, _ = cli("--cfg", "job")
    assert code == 0 and "name: prelora_pocket" in out and "FashionMNIST" in out


# -- mistakes -----------------------------------------------------------------------------------------------------------

WRONG = {
    "trainer.max_epochs=abc": "trainer.max_epochs='abc': must be an integer or null",
    "trainer.accelerator=abacus": "trainer.accelerator='abacus': .*Available names are",
    "trainer.precision=17": "trainer.precision=17: must be .*'bf16-mixed'",
    "trainer.strategy=nope": "trainer.strategy='nope': ",
    "trainer.limit_train_batches=2.5": "trainer.limit_train_batches=2.5: ",
    "trainer.devices=0": "trainer.devices=0: ",
    "trainer.val_check_interval=9999": "trainer.val_check_interval=9999: ",
    "+trainer.logger=true": "trainer.logger=True: is set by the run; use the logger group",
    "+trainer.nosuch=1": "trainer.nosuch=1: unknown key; must be one of accelerator,",
    "+data.nosuch=1": "data.nosuch=1: unknown key",
    "+model.nosuch=1": "model.nosuch=1: unknown key",
    "+optim.nosuch=1": "optim.nosuch=1: unknown key",
    "+optim.build=1": "optim.build=1: unknown key",  # an argument, but not the configuration's to give
    "+method.nosuch=1": "method.nosuch=1: ",
    "+nosuch=1": "nosuch=1: unknown key",
    "data.batch_size=0": "data.batch_size=0: must be",
    "data.batch_size=99999": "data.batch_size=99999: .*12000",
    "data._target_=no.such.Class": "data._target_='no.such.Class': must be",
    "model.name=vit_nope": "model.name='vit_nope': ",
    "optim.lr=-1": "optim.lr=-1: must be",
    "optim.warmup=-1": "optim.warmup=-1: must be",
    "method.warmup=-1": "method.warmup=-1: must be",
    "method.ranks=[3]": "method.ranks=3: .*power of two",
    "method.ranks=[4,512] method.targets=*.fc1": "method.ranks=512: ",  # a preset cuts it down, a name is taken at its word
    "method.targets=nothing.*": "method.targets='nothing.*'",
    "data=kjv_sample": "model.num_classes=.*data.num_classes",
    "data=medmnist": "data.root=None: must",
    "save_every=-1": "save_every=-1: must be",
    "seed=-1": "seed=-1: must be an integer from 0",
    "ckpt_path=nowhere.ckpt": "ckpt_path='nowhere.ckpt': no such file",
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_line_with_key_value_and_what_is_allowed(cli, mistake):
    code, _, err = cli(*SHORT, *mistake.split(" "))
    lines = [line for line in err.splitlines() if line and not line.startswith(("INFO", "WARNING"))]
    assert code == 2
    assert re.match(f"error: {WRONG[mistake]}", lines[-1]), lines[-1]
    assert len(lines) == 1 and "Traceback" not in err


def test_hydras_own_messages_stay(cli):
    code, _, err = cli("experiment=nope")
    assert code == 2 and "Could not find 'experiment/nope'" in err and "prelora_pocket" in err
    code, _, err = cli("trainer.nosuch=1")
    assert code == 2 and "Could not override 'trainer.nosuch'" in err


# -- directories and ends of runs ---------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_default_directory_and_its_refusal_before_anything_is_written(cli, tmp_path):
    code, out, _ = cli(*ONE_STEP)
    directory = tmp_path / "runs" / "prelora_pocket-full-0"
    assert code == 0 and f"run directory: {directory.relative_to(tmp_path)}" in out
    assert "samples/s" in out and "test/acc1" in out
    assert {path.name for path in directory.iterdir()} == {"metrics.csv", "summary.json", "checkpoints", "export", ".hydra"}
    before = contents(directory)
    code, _, err = cli(*ONE_STEP, "optim.lr=1e-5")
    assert code == 2 and err.count("\n") == 1 and "ckpt_path=last" in err
    assert contents(directory) == before
    assert cli(*ONE_STEP, "hydra.run.dir=elsewhere")[0] == 0
    assert (tmp_path / "elsewhere" / "summary.json").is_file()


def test_an_interrupted_run_says_how_to_go_on(cli, tmp_path):
    code, _, err = cli(*TINY, "hydra.run.dir=cut", "+trainer.callbacks=[{_target_: tests.test_train.Signal, step: 2}]")
    assert code == 143
    assert re.search(r"SIGTERM: stopped with .*cut/checkpoints/last.ckpt; the same command with ckpt_path=last goes on", err)
    code, out, _ = cli(*TINY, "hydra.run.dir=cut", "ckpt_path=last")
    assert code == 0 and "going on from cut/checkpoints/last.ckpt after step 2" in out


def test_a_loss_that_is_no_number_is_one_line_and_exit_1(cli):
    poison = "+trainer.callbacks=[{_target_: tests.test_train.Poison, step: 6, where: loss}]"
    code, _, err = cli(*TINY, "hydra.run.dir=nan", poison)
    assert code == 1
    assert re.search(r"^error: train/loss is not finite at step 6; the last good checkpoint is .*last.ckpt", err, re.M)
    assert "Traceback" not in err


def test_a_sweep_of_popen_processes_is_refused_with_both_cures(cli):
    code, _, err = cli("-m", *ONE_STEP, "seed=1", "trainer.strategy=ddp", "trainer.devices=2")
    assert code == 2 and "trainer=ddp_spawn" in err and "trainer.devices=1" in err


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.parametrize("sweep", [[], ["-m", "seed=1,2"]])
def test_a_disk_that_is_full_before_the_run_begins_is_one_line(tmp_path, sweep):
    """Hydra writes into .hydra before anything of ours runs; here no file may be larger than 4 KiB."""
    command = [sys.executable, "-m", "lowrank_pretrain", *sweep, *ONE_STEP]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    assert re.fullmatch(r"error: hydra\.run\.dir='runs/.*': cannot be written to: File too large\n", done.stderr), done.stderr
    assert not list(tmp_path.rglob("*.part"))


def test_a_second_signal_ends_the_process_at_once(composed, tmp_path):
    cfg = composed(*ONE_STEP, "+trainer.callbacks=[{_target_: tests.test_cli.Slow}]")
    child = multiprocessing.get_context("fork").Process(target=_slow_run, args=(cfg, tmp_path))
    child.start()
    log = tmp_path / "log"
    for words in ("steps have begun", "once more to stop at once"):
        deadline = time.monotonic() + 60
        while not (log.is_file() and words in log.read_text()):
            assert child.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGINT)
    child.join(timeout=20)
    assert child.exitcode == -signal.SIGINT


def _slow_run(cfg, directory):
    from lowrank_pretrain.run.train import train

    sys.stdout = sys.stderr = (directory / "log").open("w", buffering=1)
    train(cfg, directory / "run")


class Slow(Callback):
    """A step of a minute."""

    def on_train_batch_start(self, *args):
        print("steps have begun", flush=True)
        for _ in range(600):
            time.sleep(0.1)


# -- the package --------------------------------------------------------------------------------------------------------


IMPORTS = """
import sys, time
began = time.perf_counter(); import lightning.pytorch; lightning = time.perf_counter() - began
before = set(sys.modules)
began = time.perf_counter(); import lowrank_pretrain; ours = time.perf_counter() - began
heavy = {"timm", "transformers", "wandb", "matplotlib", "torchvision", "datasets", "hydra", "peft"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
assert ours < 0.1 * lightning, (ours, lightning)
import lowrank_pretrain.conf as conf
print(lowrank_pretrain.__file__, conf.__file__)
from lowrank_pretrain.run.train import main
main()
"""


def test_the_wheel_holds_everything_a_run_needs_and_imports_for_a_tenth_of_lightning(tmp_path):
    source = tmp_path / "source"
    for name in ("src", "conf", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    script = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")  # as `python -m build` does: the wheel is made from what the sdist holds
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", tmp_path, sdist],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "absent from the `packages`" not in built.stdout + built.stderr, "setuptools warns in a box for each folder"
    (wheel,) = tmp_path.glob("*.whl")
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    shutil.unpack_archive(wheel, target, "zip")
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(target)}
    args = [sys.executable, "-c", IMPORTS, *ONE_STEP, "hydra.run.dir=run"]
    done = subprocess.run(args, cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [str(target / "lowrank_pretrain" / name) for name in ("__init__.py", "conf/__init__.py")]
    assert (elsewhere / "run" / "summary.json").is_file()
    assert (target / "lowrank_pretrain" / "py.typed").is_file()
    scripts = next(target.glob("*.dist-info")) / "entry_points.txt"
    assert "lowrank-pretrain = lowrank_pretrain.__main__:main" in scripts.read_text()


def test_every_folder_of_ours_is_a_package_of_the_wheel():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in (ROOT / "src").rglob("*.py") if ".egg-info" not in str(path)}
    confs = {path.parent for path in (ROOT / "conf").rglob("*.yaml")}
    folders.add(ROOT / "src" / "lowrank_pretrain" / "data" / "samples")  # setuptools takes any folder for a package
    names = {str(path.relative_to(ROOT / "src")) for path in folders}
    names |= {str(Path("lowrank_pretrain") / path.relative_to(ROOT)) for path in confs}
    assert listed == {name.replace("/", ".") for name in names}


def test_no_hint_names_a_package_that_cannot_be_installed():
    for folder in ("src", "conf", "docs", "README.md"):
        for path in [ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md"):
                assert not re.search(r"pip install '?lowrank_pretrain\[", path.read_text()), path


def test_the_version_is_ours_with_those_it_depends_on(cli):
    code, out, _ = cli("--version")
    assert code == 0
    assert re.fullmatch(rf"lowrank_pretrain {re.escape(lowrank_pretrain.__version__)} \(torch \S+, lightning \S+, timm \S+, "
                        r"transformers \S+\)\n", out)  # fmt: skip


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    example, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path("example.py")
    assert found["trainer"].callbacks[0].phase == "lowrank"


@pytest.mark.parametrize("group", ["experiment", "method", "data", "model", "trainer", "logger", "sweep"])
def test_readme_and_site_name_only_what_there_is(group):
    text = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")))
    text = re.sub(r"```python.*?```", "", text, flags=re.S)  # there model=model is an argument
    named = re.findall(rf"\b{group}=([a-z][a-z0-9_,]*)", text)
    assert named and {name for some in named for name in some.split(",")} <= set(names(group))
