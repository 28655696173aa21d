"""Sweeps: every job of every sweep composes, one that fails ends nothing and is told of, in whatever process jobs run."""

import contextlib
import importlib.util
import itertools
import logging
import math
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.report import find_runs, render
from lowrank_pretrain.report.closing import show
from lowrank_pretrain.run import method, sweeps, train
from lowrank_pretrain.run.build import plain
from lowrank_pretrain.run.run_dir import job_dir
from lowrank_pretrain.run.sweeps import named_lines
from tests.conftest import SHORT, VIT
from tests.test_cli import ONE_STEP, ROOT, cli, names  # noqa: F401  cli is a fixture
from tests.test_report import make

# sweep -> the experiment it is made for; LTE's are tested beside LTE's configuration
MADE_FOR = {
    "prelora_thresholds": "prelora_vitl",
    "prelora_warmup": "prelora_vitl",
    "galore_rank": "galore_llama1b",
    "methods": "prelora_pocket",
    "seeds": "prelora_pocket",
}
ELSEWHERE = {"lte_heads_rank", "lte_merge_every", "layers_replaced", "lte_vit_scales", "lte_mixer", "optuna", "tuned"}


def choices(sweep: str) -> dict[str, list[str]]:
    """Each key of the sweep and its values, as Hydra's own parser reads them."""
    params = OmegaConf.load(ROOT / "conf" / "sweep" / f"{sweep}.yaml").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return {o.key_or_group: [str(value) for value in o.sweep_string_iterator()] for o in overrides}


@pytest.mark.parametrize("sweep", sorted(set(names("sweep")) - ELSEWHERE))
def test_every_job_of_every_sweep_composes_and_its_method_can_be_built(composed, sweep):
    found = choices(sweep)
    keys = list(found)
    jobs = [
        [f"{key}={value}" for key, value in zip(keys, values, strict=True)] for values in itertools.product(*found.values())
    ]
    assert len(jobs) >= 2
    configs = [plain(composed(f"experiment={MADE_FOR[sweep]}", *job)) for job in jobs]
    for config in configs:
        method.build(config["method"])
    assert len({str(config) for config in configs}) == len(jobs), "two jobs are the same run"


def test_the_sources_values_are_swept():
    assert choices("prelora_warmup") == {"method.warmup": ["5", "10", "15"]}
    assert choices("lte_merge_every") == {"method.merge_every": ["10", "20", "30", "40"]}
    tolerances = [OmegaConf.load(ROOT / "conf" / "method" / f"prelora_exp{i}.yaml") for i in (1, 2, 3)]
    assert [(t.weight_tol, t.loss_tol) for t in tolerances] == [(0.01, 0.05), (0.005, 0.025), (0.0025, 0.01)]
    assert choices("prelora_thresholds") == {"method": ["full", "prelora_exp1", "prelora_exp2", "prelora_exp3"]}


def plugin(name: str) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{name}") is None:
        pytest.skip(f"Hydra's plugin {name} is not installed (the extra `sweep`)")


def seen(directory: Path) -> tuple[dict[str, str], str]:
    """{label: state} of the jobs on the sweep's page, and the page."""
    runs = find_runs([directory])
    return {run.label: run.state for run in runs}, render(runs, "sweep")


def test_a_sweep_outlives_a_failing_job_and_its_page_shows_it(cli, tmp_path):  # noqa: F811
    code, _, err = cli("-m", *ONE_STEP, "optim.lr=-1,1e-3")
    states, page = seen(tmp_path / "runs" / "prelora_pocket-sweep")
    assert err.count("error: optim.lr=-1: ") >= 1 and "Traceback" not in err
    (job,) = (path.parent for path in (tmp_path / "runs" / "prelora_pocket-sweep").glob("*/summary.json"))
    assert OmegaConf.load(job / ".hydra" / "config.yaml").optim.lr == 1e-3
    assert code == 2 and states == {"lr=-1": "failed", "lr=0.001": "finished"}
    assert "error: optim.lr=-1: must be a number above 0" in page
    # the same again: the finished job's directory holds a run, which the refusal leaves as it is
    code, _, err = cli("-m", *ONE_STEP, "optim.lr=-1,1e-3")
    assert code == 2 and "holds a run" in err
    assert seen(tmp_path / "runs" / "prelora_pocket-sweep")[0] == states


def directories(top: Path) -> set[str]:
    return {path.name for path in top.iterdir() if path.is_dir()}


def test_a_job_is_named_after_what_is_swept_and_a_table_ends_the_sweep(cli, tmp_path):  # noqa: F811
    code, out, err = cli("-m", *ONE_STEP, "seed=0,1", "optim.lr=1e-3,1e-4")
    sweep = tmp_path / "runs" / "prelora_pocket-sweep"
    assert code == 0, err
    assert directories(sweep) == {f"optim.lr={lr},seed={seed}" for lr in ("0.001", "0.0001") for seed in (0, 1)}
    _, _, table = out.rpartition("all metrics: ")
    assert all(f"seed={seed}, lr={lr}" in table for lr in ("0.001", "0.0001") for seed in (0, 1))
    assert "val/loss" in table and " *" in table and "2 seeds" in table and "±" in table
    assert "4 runs: 4 finished; * is the best of a column" in table
    assert table.rstrip().endswith("python -m lowrank_pretrain.report runs/prelora_pocket-sweep")


def test_a_sweeps_own_keys_name_its_jobs_too(cli, tmp_path):  # noqa: F811
    code, _, err = cli("sweep=seeds", *ONE_STEP, "seed=3,4", "hydra.sweep.dir=mine")
    assert code == 0 and directories(tmp_path / "mine") == {"seed=3", "seed=4"}, err
    code, _, err = cli("-m", *ONE_STEP, "hydra.sweep.dir=one")
    assert code == 0 and len(directories(tmp_path / "one")) == 1, err  # nothing is swept: all that was given


def test_a_tuned_sweep_moves_to_the_better_neighbours_and_tells_the_best(cli, tmp_path, monkeypatch):  # noqa: F811
    def bowl(cfg, run_dir, multirun):  # the best: 3e-3 and 1e-2, a weight decay of 0.1; too large a rate diverges
        optim = cfg.optim
        asked.append((optim.lr, optim.rest_lr, optim.weight_decay))
        if optim.lr > 5e-3:
            raise train.JobFailed("diverged", 1)
        far = [math.log(optim.lr / 3e-3), math.log(optim.rest_lr / 1e-2), math.log(optim.weight_decay / 0.1)]
        return 3 + 0.01 * sum(x * x for x in far)

    asked = []
    monkeypatch.setattr(train, "_run", bowl)
    words = ["hydra.sweeper.coordinates=[lr,rest_lr,weight_decay]", "hydra.sweeper.gain=0",
             "hydra.sweeper.lists.weight_decay=[0.01,0.03,0.1,0.3]"]  # fmt: skip
    code, out, err = cli("sweep=tuned", "-m", "optim.lr=2e-3", "hydra.sweep.dir=tuned", *words)
    assert code == 0, err
    assert asked[0] == (2e-3, 2e-3, 0.03) and len(set(asked)) == len(asked)
    (line,) = (line for line in out.splitlines() if line.startswith("tuned: "))
    assert line.startswith("tuned: optim.lr=0.003 optim.rest_lr=0.0101 optim.weight_decay=0.1  val/loss 3.0000 of ")
    assert line.endswith(f"{len(asked)} runs; no neighbour is better")
    code, out, err = cli("sweep=tuned", "-m", "optim.lr=2e-3", "hydra.sweep.dir=short", "hydra.sweeper.budget=4")
    assert code == 0 and "the budget of 4 runs ended the search" in out, err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.sweeper.lists.beta1=[0.9,0.95]"], "beta1=[0.9, 0.95]: must be three or more increasing values: a search "),
        (["optim.lr=1e-3,2e-3"], "optim.lr='1e-3,2e-3': sweep=tuned chooses values itself: give one"),
        (["hydra.sweeper.coordinates=[rank]"], "hydra.sweeper.coordinates=['rank']: must be some of lr, rest_lr, beta1"),
        (["hydra.sweeper.factor=1.0"], "factor=1.0: must be a number above 1"),
        (["hydra.sweeper.lists.beta1=0.9"], "beta1=0.9: must be three or more increasing values: a search "),
        (["hydra.sweeper.lists.beta1=[0.8,high,0.9]"], "beta1='high': must be a number"),
        (["optim.lr=fast"], "optim.lr='fast': must be a number above 0"),
        (["hydra.sweeper.budget=2"], "hydra.sweeper.budget=2: must be 3 or more: the first comparison takes so many runs"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_one_line(cli, tmp_path, words, message):  # noqa: F811
    code, out, err = cli("sweep=tuned", "-m", *words)
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_a_search_without_losses_ends_in_one_line(cli, tmp_path, monkeypatch):  # noqa: F811
    def diverges(cfg, run_dir, multirun):
        raise train.JobFailed("diverged", 1)

    for run, message in (
        (lambda *_: None, "sweep='tuned': compares runs by val/loss"),
        (diverges, "sweep=tuned: none of 5 runs"),
    ):
        monkeypatch.setattr(train, "_run", run)
        code, out, err = cli("sweep=tuned", "-m", "hydra.sweep.dir=none")
        assert code == (1 if run is diverges else 2) and "tuned: " not in out, out
        assert f"error: {message}" in err and "Traceback" not in err, err


def test_an_option_that_there_is_not_is_one_line_before_any_job(cli, tmp_path):  # noqa: F811
    for words in (["method=full,nosuch"], ["method=nosuch,lora", "seed=0,1"], ["optim=adamw,nosuch"], ["logger=csv,nosuch"]):
        code, out, err = cli("-m", *ONE_STEP[:-4], "hydra.sweep.dir=none", *words)
        assert code == 2 and err.count("\n") == 1 and "run directory" not in out, err
        assert err.startswith(f"error: {words[0].partition('=')[0]}='nosuch': must be one of ") and "no job was started" in err
    assert not (tmp_path / "none").exists()


def test_a_refused_job_names_the_sweeps_key_and_leaves_the_record_of_the_run_that_lies_there(cli, tmp_path):  # noqa: F811
    assert cli("-m", *ONE_STEP, "seed=0,1")[0] == 0
    sweep = tmp_path / "runs" / "prelora_pocket-sweep"
    before = {path: path.read_bytes() for path in sweep.glob("*/**/*") if path.is_file()}
    code, _, err = cli("-m", *ONE_STEP, "seed=0,1", "optim.lr=0.5")
    assert code == 2 and "hydra.run.dir" not in err
    assert "error: hydra.sweep.dir='runs/prelora_pocket-sweep': seed=0 in it holds a run; go on with ckpt_path=last" in err
    assert before == {path: path.read_bytes() for path in sweep.glob("*/**/*") if path.is_file()}


def test_a_sweep_that_was_cut_off_goes_on_by_the_same_command(cli, tmp_path):  # noqa: F811
    words = ["-m", *ONE_STEP, "trainer.max_epochs=2", "seed=0,1,2", "hydra.sweep.dir=sweep", "ckpt_path=last"]
    stop = "+trainer.callbacks=[{_target_: tests.test_train.Signal, step: 1}]"
    code, _, err = cli(*words, stop)
    assert code == 143 and "the same command with ckpt_path=last goes on" in err
    code, out, err = cli(*words)
    assert code == 0 and "3 runs: 3 finished" in out and "after step 1" in out, err
    assert directories(tmp_path / "sweep") >= {"seed=0", "seed=1", "seed=2"}
    rows = [(tmp_path / "sweep" / f"seed={i}" / "metrics.csv").read_text().count("\n") for i in range(3)]
    assert len(set(rows)) == 1, "every job is whole"


def test_another_methods_jobs_are_not_gone_on_with(cli, tmp_path):  # noqa: F811
    words = ["-m", *ONE_STEP, "seed=0,1", "hydra.sweep.dir=sweep"]
    assert cli(*words)[0] == 0
    code, out, err = cli(*words, "method=lora", "ckpt_path=last")
    assert code == 2 and err.count("\n") == 1 and "run directory" not in out
    assert err.startswith(
        "error: hydra.sweep.dir='sweep': holds a sweep with method=full, this one has method=lora; start it with"
    )
    code, _, err = cli(*words, "seed=2", "method=lora,full", "ckpt_path=last")
    assert code == 0 and directories(tmp_path / "sweep") == {"seed=0", "seed=1", "method=lora", "method=full"}, err


LONG = [f"model.model_kwargs.some_long_key_{i}" for i in range(6)]


@pytest.mark.parametrize("overrides", [
    "method=full", "a=1,b=[2,3],c={x: [4,5]}", f"a={'1' * 500},method.rank=4", f"method.targets=[{','.join(LONG)}],seed=3",
    ",".join(f"{key}={'9' * 40}" for key in LONG[:2]), f"data.root=/{'ü' * 200},seed=1", "data.root=/日/本,optim.lr=1e-3",
    "a=b=c", "method.targets=['x','y']", "~method.rank,seed=0", "a.b=",
])  # fmt: skip
def test_a_jobs_name_keeps_every_key_and_fits_any_file_system(overrides):
    name = job_dir(overrides)
    keys = [override.partition("=")[0] for override in re.findall(r"(?:^|,)((?:[^,\[{]|\[.*?\]|\{.*?\})+)", overrides)]
    assert all(key in name for key in keys), (name, keys)
    assert len(name.encode()) <= 140 and not set(name) & set("/\\ '\"{}[]$*?") and name not in (".", "..")


def test_no_two_jobs_have_one_name():
    told = ["a=/x", "a=_x", "a=x y", "a=x_y", "a=[1]", "a=_1_", *(f"a={'1' * 300}{i}" for i in range(50))]
    told += [f"{LONG[0]}={'x' * 200},{LONG[1]}={i}" for i in range(20)]
    assert len({job_dir(overrides) for overrides in told}) == len(told)
    many = ",".join(f"model.model_kwargs.some_very_long_key_{i}={i}" for i in range(30))
    assert len(job_dir(many).encode()) <= 140 and job_dir(many) != job_dir(many + "0")


def test_lines_of_jobs_side_by_side_begin_with_their_names(capsys):
    log, handler = logging.getLogger("tests.sweeps"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    with named_lines("x.JoblibLauncher", "seed=1"):
        log.warning("logged")
    log.removeHandler(handler)
    assert capsys.readouterr().err == "[seed=1] logged\n" and handler.stream is sys.stderr
    with named_lines("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "seed=1"):
        print("one")
        print("two", end=" ")
        print("halves\nthree\n")
        print("error: x", file=sys.stderr)
        print("0 %\r50 %\r100 %", end="")
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"[seed=1] {text}" for text in ("one", "two halves", "three", "", "100 %")]
    assert err == "[seed=1] error: x\n"
    with named_lines("hydra._internal.core_plugins.basic_launcher.BasicLauncher", "seed=1"):
        print("alone")
    assert capsys.readouterr().out == "alone\n"


@pytest.mark.parametrize(("optuna", "sqlalchemy", "refused"), [
    ("2.10.1", "2.0.1", True), ("2.10.1", "1.4.54", False), ("3.6.0", "2.1.0", False), ("2.10.1", None, False),
])  # fmt: skip
def test_a_storage_that_optuna_cannot_open_is_one_line_with_the_cure(monkeypatch, optuna, sqlalchemy, refused):
    def version(name):
        found = {"optuna": optuna, "sqlalchemy": sqlalchemy}[name]
        if found is None:
            raise sweeps.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(sweeps.metadata, "version", version)
    sweeper = {"_target_": "x.OptunaSweeper", "storage": "sqlite:///a.db"}
    with pytest.raises(ConfigError, match="pip install 'sqlalchemy<2'") if refused else contextlib.nullcontext():
        sweeps.check_storage(OmegaConf.create({"hydra": {"sweeper": sweeper}}))
    sweeps.check_storage(OmegaConf.create({"hydra": {"sweeper": {**sweeper, "storage": None}}}))
    sweeps.check_storage(OmegaConf.create({"hydra": {"sweeper": {"_target_": "x.BasicSweeper"}}}))


def test_the_closing_table_says_what_failed_and_marks_the_best(tmp_path, capsys):
    for job, loss in enumerate([2.0, 1.0, 3.0]):
        make(tmp_path / f"{job}", job, (f"method.targets=[a,b{job}]",), loss=loss)
    refused = make(tmp_path / "3", 3, ("method.targets=[c]",))
    for name in ("metrics.csv", "summary.json"):
        (refused / name).unlink()
    (refused / "failure.txt").write_text("error: method.targets='c': [no such]\n")
    show(find_runs([tmp_path]), tmp_path)
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "0.05 *" in line]
    assert "targets=[a,b1]" in row, "brackets are no markup"
    assert "4 runs: 3 finished, 1 failed" in out
    assert "targets=[c]: error: method.targets='c': [no such]" in out


@pytest.mark.slow
def test_optuna_goes_on_with_a_stored_search(cli, tmp_path):  # noqa: F811
    plugin("hydra_optuna_sweeper")
    if int(metadata.version("sqlalchemy").split(".")[0]) >= 2:
        pytest.skip("Optuna 2 cannot store with this SQLAlchemy (the extra `sweep` asks for 1.4)")
    words = [
        "sweep=optuna",
        *ONE_STEP,
        "hydra.sweeper.n_trials=1",
        "hydra.sweeper.storage=sqlite:///search.db",
        "hydra.sweep.dir=s",
    ]
    assert cli(*words)[0] == 0
    code, out, err = cli(*words, "hydra.sweeper.sampler.seed=7")
    assert code == 0 and len(directories(tmp_path / "s")) == 2, err


@pytest.mark.slow
def test_jobs_in_parallel_processes_outlive_a_failing_one(cli, tmp_path):  # noqa: F811
    plugin("hydra_joblib_launcher")
    two = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    code, out, err = cli("-m", *ONE_STEP, "optim.lr=1e-3,-1,2e-3", *two)
    states, page = seen(tmp_path / "sweep")
    assert "[optim.lr=-1] error: optim.lr=-1: must be" in err and "[optim.lr=0.001] run directory: " in out
    assert "3 runs: 2 finished, 1 failed" in out and "lr=-1: error: optim.lr=-1: must be" in out
    assert code == 2 and states == {"lr=0.001": "finished", "lr=-1": "failed", "lr=0.002": "finished"}
    assert "error: optim.lr=-1: must be a number above 0" in page


@pytest.mark.slow
def test_optuna_searches_the_learning_rate_on_past_a_failing_trial(cli, tmp_path):  # noqa: F811
    plugin("hydra_optuna_sweeper")
    wide = 'hydra.sweeper.params={optim.lr: "choice(-1, 1e-3)"}'  # with this seed both are tried
    code, _, err = cli("sweep=optuna", *ONE_STEP, wide, "hydra.sweeper.n_trials=4", "hydra.sweep.dir=sweep", "seed=1")
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert code == 0 and found.best_params == {"optim.lr": 0.001}, err
    assert 0 < found.best_value < 10


def test_optuna_looks_at_the_validation_loss_of_a_logarithmic_range():
    with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        plugin("hydra_optuna_sweeper")
        config = compose("train", overrides=["sweep=optuna"], return_hydra_config=True).hydra.sweeper
    assert config.direction.name.lower() == "minimize" if hasattr(config.direction, "name") else config.direction == "minimize"
    assert config.params == {"optim.lr": "tag(log, interval(1e-4, 1e-2))"} and config.max_failure_rate == 1.0


def test_the_cluster_launcher_is_one_override():
    plugin("hydra_submitit_launcher")
    with initialize_config_module("lowrank_pretrain.conf", version_base="1.3"):
        config = compose("train", overrides=["hydra/launcher=submitit_slurm", "sweep=seeds"], return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")


def test_a_job_of_one_device_leaves_no_process_group_to_the_next(run):
    run("lte", "method=lte", "method.rank=2", "method.heads=2", "trainer.max_epochs=1", base=[*SHORT, *VIT])
    assert not torch.distributed.is_initialized()
