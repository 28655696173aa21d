"""One run from the command line: compose -> instantiate -> fit -> test -> export -> summary.

    python -m lowrank_pretrain experiment=NAME KEY=VALUE ...

The run directory then holds metrics.csv, summary.json, checkpoints/{last,best}.ckpt, export/ and .hydra/.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import hydra
import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_pretrain.checkpoints.files import BestCheckpoint, LastCheckpoint, check_fits, take_states
from lowrank_pretrain.checkpoints.longer_run import LongerRun
from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.checkpoints.random_state import RandomState
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import CountsClasses, TriesOut
from lowrank_pretrain.core.versions import version_line
from lowrank_pretrain.export.facts import Facts, RememberFacts, facts_of_checkpoint
from lowrank_pretrain.guards.divergence import DivergenceGuard
from lowrank_pretrain.guards.finite import Diverged
from lowrank_pretrain.guards.ranks import RanksAgree
from lowrank_pretrain.guards.stall import StallGuard
from lowrank_pretrain.loggers.csv import RunCSVLogger, final_metrics, forget_after
from lowrank_pretrain.models.checks import name_fused_experts
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.observe.closing_loss import ClosingLoss
from lowrank_pretrain.observe.monitor import Monitor
from lowrank_pretrain.observe.norms import WeightNorms
from lowrank_pretrain.run import failures, method, summary
from lowrank_pretrain.run.build import build, plain
from lowrank_pretrain.run.command_line import prepare_process
from lowrank_pretrain.run.interrupts import Interrupts
from lowrank_pretrain.run.loggers import finish, more_loggers, publish
from lowrank_pretrain.run.ownership import owned
from lowrank_pretrain.run.progress import progress, quiet_lightning
from lowrank_pretrain.run.run_dir import start_from
from lowrank_pretrain.run.sweeps import named_lines, show_end
from lowrank_pretrain.run.trainer import build_trainer, check_values, refuse_popen_sweep

GROUPS = ("data", "model", "optim", "method", "trainer", "logger")
NEEDED = ("data", "model", "optim", "method")  # the other two may be empty
KEYS = (*GROUPS, "seed", "ckpt_path", "save_every")
KEYS += ("on_divergence", "max_rewinds", "loss_spike", "stall_timeout", "agree_every")


def train(cfg: DictConfig, run_dir: Path, multirun: bool = False) -> dict[str, Any]:
    """Train, test and export what `cfg` describes.

    Args:
        cfg: the composed configuration, without Hydra's own node.
        run_dir: where everything is written.
        multirun: whether this is one job of a sweep.

    Returns:
        The contents of summary.json.

    Raises:
        ConfigError: a wrong key or value.
        Interrupted: SIGINT or SIGTERM; a checkpoint was written if training had begun.
        Diverged: the loss, a gradient or a weight became NaN or infinite, and no rewind was asked for or left.
        Stalled: a loader has handed out nothing for ``stall_timeout`` seconds.
        Disagreement: the ranks' weights are no longer the same.
    """
    for key in GROUPS:  # before other groups' interpolations refer to it
        if key == "logger" and cfg.get(key) is None:  # logger=null, ~logger: metrics.csv alone
            continue
        if not isinstance(cfg.get(key), DictConfig) or (key in NEEDED and not cfg[key]):
            raise ConfigError(key, cfg.get(key), f"must be the name of a file in conf/{key}, or a group of keys")
    config = plain(cfg)
    for key in config.keys() - set(KEYS):
        raise ConfigError(key, config[key], f"unknown key; must be one of {', '.join(KEYS)}")
    seed = config["seed"]
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ConfigError("seed", seed, "must be an integer from 0 to 4294967295")
    with owned(run_dir):
        ckpt = start_from(run_dir, config["ckpt_path"], multirun)
        summary.forget_failure(run_dir)
        return attempts(config, run_dir, ckpt, multirun)


def attempts(config: dict[str, Any], run_dir: Path, ckpt: Path | None, multirun: bool) -> dict[str, Any]:
    """One attempt, and another from the last checkpoint after each divergence that may be rewound."""
    while True:
        guard = DivergenceGuard(config["on_divergence"], config["max_rewinds"], config["loss_spike"])
        try:
            return attempt(config, run_dir, ckpt, guard, multirun)
        except (Diverged, FloatingPointError) as error:
            checkpoints = run_dir / "checkpoints"
            line = guard.rewind(checkpoints, checkpoints / "last.ckpt")
            if line is None:
                raise
            print(f"{error}; {line}", flush=True)
        ckpt = checkpoints / "last.ckpt"
        gc.collect()  # trainer and module hold one another; the next attempt needs their memory


def attempt(config: dict[str, Any], run_dir: Path, ckpt: Path | None, guard: DivergenceGuard, multirun: bool) -> dict[str, Any]:
    """One fit from `ckpt` or from the beginning, with everything built anew; test, export and summary if it ends well."""
    quiet_lightning()
    pl.seed_everything(config["seed"], workers=True, verbose=False)
    check_values(config["trainer"])  # what is cheap to look at comes first
    watches = [StallGuard(config["stall_timeout"]), RanksAgree(config["agree_every"])]
    last = LastCheckpoint(run_dir / "checkpoints", config["save_every"])
    chosen = method.build(config["method"])
    optim = build("optim", config["optim"], base=Optim, build=chosen.optimizer)
    data = build("data", config["data"], base=pl.LightningDataModule)
    if config["model"].get("num_classes", 0) is None and isinstance(data, CountsClasses):
        config["model"]["num_classes"] = data.count_classes()
    module = build("model", config["model"], base=pl.LightningModule)
    module.optim = optim
    if (chosen.callbacks or chosen.strategy) and {"all", "mlp"} & {*_listed(config["method"].get("targets", "all"))}:
        name_fused_experts(module)
    if isinstance(module, TriesOut):
        module.try_out()

    loggers = [RunCSVLogger(run_dir), *more_loggers(config.get("logger") or {}, run_dir, config, multirun)]
    grouped = torch.distributed.is_initialized()
    try:
        with Interrupts() as interrupts:
            last.interrupts = interrupts
            monitor = Monitor()
            callbacks = [
                LoopState(),  # before everything that asks how long the run is
                guard,
                *watches,
                RememberFacts(data),
                LongerRun(),
                ClosingLoss(),
                monitor,  # sees a step before the method changes the model behind it
                *chosen.callbacks,
                WeightNorms(),
                *progress(monitor, config["trainer"].get("enable_progress_bar")),
                interrupts,
                RandomState(),  # behind everything that might draw
                BestCheckpoint(last.path.parent, ckpt),
                last,
            ]
            trainer = build_trainer(config["trainer"], run_dir, callbacks, loggers, chosen.strategy)
            refuse_popen_sweep(trainer, multirun)
            step = 0 if ckpt is None else check_fits(ckpt, module)
            if trainer.is_global_zero:
                forget_after(run_dir / "metrics.csv", step)
            if ckpt is not None:
                announce(trainer, f"going on from {os.path.relpath(ckpt)} behind step {step}")
            announce(trainer, f"run directory: {os.path.relpath(run_dir)}")

            trainer.fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
            if ckpt is not None and trainer.global_step == step:
                limit = f"trainer.max_epochs={trainer.max_epochs}, trainer.max_steps={trainer.max_steps}"
                announce(trainer, f"nothing was left to train: the checkpoint is at the end of the run ({limit})")
            trainer.test(module, datamodule=data, verbose=False)
            found = finish_run(trainer, monitor, module, data, config, run_dir)
            publish(found, config, run_dir, loggers)
            return found
    finally:
        finish(loggers)
        # LTE on one device: the next job of a sweep would take its group over, and processes forked then wait for its threads
        if not grouped and torch.distributed.is_initialized() and torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def finish_run(
    trainer: pl.Trainer,
    monitor: Monitor,
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    config: dict[str, Any],
    run_dir: Path,
) -> dict[str, Any]:
    """Export the merged weights, write summary.json and print the closing table; returns the summary."""
    facts = Facts.of(data)
    if not monitor.records:  # a spawning strategy trained in other processes, whose callbacks are gone
        last = run_dir / "checkpoints" / "last.ckpt"
        take_states(trainer.callbacks, last)
        facts = facts_of_checkpoint(last)
    final = final_metrics(run_dir / "metrics.csv")
    closing = next((callback.mean for callback in trainer.callbacks if isinstance(callback, ClosingLoss)), None)
    if closing is not None:
        final = {"train/loss": closing, **{key: value for key, value in final.items() if key != "train/loss"}}
    found = summary.summarize(trainer, monitor, final)
    if trainer.is_global_zero:
        from lowrank_pretrain.export import card as model_card
        from lowrank_pretrain.export.weights import export_module

        export_module(module, run_dir / "export", facts)
        model_card.write(run_dir / "export", config, found, facts)
        summary.write(found, run_dir / "summary.json")
        where = {"checkpoints": run_dir / "checkpoints", "merged weights": run_dir / "export", "all metrics": run_dir}
        summary.show(monitor.records, final, where)
    return found


def announce(trainer: pl.Trainer, line: str) -> None:
    """Print `line`, from one process only."""
    if trainer.is_global_zero:
        print(line, flush=True)


class JobFailed(CompactHydraException):
    """A job of a sweep failed for a reason that has been printed; Hydra shows no traceback and runs the other jobs."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)
        self.line, self.code = line, code

    def __str__(self) -> str:
        return self.line


_exit_codes: list[int] = []  # of a sweep's failed jobs
_composed = False  # whether a configuration was ever complete enough for a job to start


@hydra.main(version_base="1.3", config_path="pkg://lowrank_pretrain.conf", config_name="train")
def _job(cfg: DictConfig) -> float | None:
    """Hydra's task: one run, its failures as one line. Returns the validation loss, for sweepers that minimise."""
    global _composed
    _composed = True
    hydra_cfg = HydraConfig.get()
    run_dir, multirun = Path(hydra_cfg.runtime.output_dir), hydra_cfg.mode == RunMode.MULTIRUN
    with named_lines(hydra_cfg.launcher.get("_target_", "") if multirun else "", run_dir.name):
        return _run(cfg, run_dir, multirun)


def _run(cfg: DictConfig, run_dir: Path, multirun: bool) -> float | None:
    try:
        return train(cfg, run_dir, multirun)["final"].get("val/loss")
    except BaseException as error:
        described = failures.describe(error, cfg, run_dir)
        summary.note_failure(run_dir, error, described and described[0])
        if described is None:
            raise
        line, code = described
        print(line, file=sys.stderr, flush=True)
        if not multirun or code > 2:  # an interrupt ends a sweep too
            sys.exit(code)
        _exit_codes.append(code)
        raise JobFailed(line, code) from None


def main() -> None:
    """The console command. Exit codes: 0, 1 failed, 2 wrong configuration, 130 SIGINT, 143 SIGTERM."""
    global _composed
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(version_line())
        return
    _composed = False
    _exit_codes.clear()
    prepare_process()
    try:
        _job()
    except SystemExit as end:
        if end.code != 1:
            raise
        if isinstance(end.__context__, JobFailed):  # of a job in another process, whose list of codes is its own
            _exit_codes.append(end.__context__.code)
            _composed = True
        # Hydra ends everything with 1: what it could not compose (an unknown experiment, say) is a wrong configuration
        sys.exit(max(_exit_codes, default=1) if _composed else 2)
    finally:
        show_end()
