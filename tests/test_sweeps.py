"""Sweeps: every job of every sweep composes, one that fails ends nothing and is told of, in whatever process jobs run."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lowrank_pretrain import method
from lowrank_pretrain.build import plain
from lowrank_pretrain.report import find_runs, render
from tests.conftest import SHORT, VIT
from tests.test_cli import ONE_STEP, ROOT, cli, names  # noqa: F401  cli is a fixture

# sweep -> the experiment it is made for; LTE's are tested beside LTE's configuration
MADE_FOR = {
    "prelora_thresholds": "prelora_vitl",
    "prelora_warmup": "prelora_vitl",
    "galore_rank": "galore_llama1b",
    "methods": "prelora_pocket",
    "seeds": "prelora_pocket",
}
ELSEWHERE = {"lte_heads_rank", "lte_merge_every", "layers_replaced", "lte_vit_scales", "lte_mixer", "optuna"}


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


@pytest.mark.slow
def test_jobs_in_parallel_processes_outlive_a_failing_one(cli, tmp_path):  # noqa: F811
    plugin("hydra_joblib_launcher")
    two = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    code, _, _ = cli("-m", *ONE_STEP, "optim.lr=1e-3,-1,2e-3", *two)
    states, page = seen(tmp_path / "sweep")
    assert code != 0 and states == {"lr=0.001": "finished", "lr=-1": "failed", "lr=0.002": "finished"}
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
