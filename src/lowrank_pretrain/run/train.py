"""Run one training from the command line: compose, build, fit, test, export, summarize.

    python -m lowrank_pretrain experiment=NAME KEY=VALUE ...

The run directory then holds metrics.csv, summary.json, checkpoints/{last,best}.ckpt, export/ and .hydra/.
"""

import gc
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from lowrank_pretrain.core.checks import is_integer
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.ownership import owned
from lowrank_pretrain.guards.divergence import DIVERGENCES, DivergenceGuard
from lowrank_pretrain.run import failures, summary
from lowrank_pretrain.run.attempt import attempt
from lowrank_pretrain.run.build import plain
from lowrank_pretrain.run.command_line import prepare_process
from lowrank_pretrain.run.progress import quiet_lightning
from lowrank_pretrain.run.run_dir import start_from
from lowrank_pretrain.run.sweeps import named_lines, show_end

GROUPS = ("data", "model", "optim", "method", "trainer", "logger")
NEEDED = ("data", "model", "optim", "method")  # the other two may be empty
SAFETY = ("on_divergence", "max_rewinds", "loss_spike", "stall_timeout", "agree_every")
KEYS = (*GROUPS, "seed", "ckpt_path", "save_every", *SAFETY)


def train(cfg: DictConfig, run_dir: Path, multirun: bool = False) -> dict[str, Any]:
    """Train, test and export one configuration.

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
    quiet_lightning()
    for key in GROUPS:  # before other groups' interpolations refer to it
        if key == "logger" and cfg.get(key) is None:  # logger=null, ~logger: metrics.csv alone
            continue
        if not isinstance(cfg.get(key), DictConfig) or (key in NEEDED and not cfg[key]):
            raise ConfigError(key, cfg.get(key), f"must be the name of a file in conf/{key}, or a group of keys")
    config = plain(cfg)
    for key in config.keys() - set(KEYS):
        raise ConfigError(key, config[key], f"unknown key; must be one of {', '.join(KEYS)}")
    seed = config["seed"]
    if not is_integer(seed) or not 0 <= seed < 2**32:
        raise ConfigError("seed", seed, "must be an integer from 0 to 4294967295")
    with owned(run_dir):
        ckpt = start_from(run_dir, config["ckpt_path"], multirun)
        summary.forget_failure(run_dir)
        return attempts(config, run_dir, ckpt, multirun)


def attempts(config: dict[str, Any], run_dir: Path, ckpt: Path | None, multirun: bool) -> dict[str, Any]:
    """Make one attempt, and another from the last checkpoint after each divergence that may be rewound."""
    while True:
        guard = DivergenceGuard(config["on_divergence"], config["max_rewinds"], config["loss_spike"])
        try:
            return attempt(config, run_dir, ckpt, guard, multirun)
        except DIVERGENCES as error:
            checkpoints = run_dir / "checkpoints"
            line = guard.rewind(checkpoints, checkpoints / "last.ckpt")
            if line is None:
                raise
            print(f"{error}; {line}", flush=True)
        ckpt = checkpoints / "last.ckpt"
        gc.collect()  # trainer and module hold one another; the next attempt needs their memory


class JobFailed(CompactHydraException):
    """Say that a job of a sweep failed for a reason that has been printed; Hydra shows no traceback and runs the other jobs."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)
        self.line, self.code = line, code

    def __str__(self) -> str:
        return self.line


_exit_codes: list[int] = []  # of a sweep's failed jobs
_composed = False  # whether a configuration was ever complete enough for a job to start


@hydra.main(version_base="1.3", config_path="pkg://lowrank_pretrain.conf", config_name="train")
def _job(cfg: DictConfig) -> float | None:
    """Make one run as Hydra's task, with failures on one line; return the validation loss, for sweepers that minimise."""
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
    """Run the console command. Exit codes: 0, 1 failed, 2 wrong configuration, 130 SIGINT, 143 SIGTERM."""
    global _composed
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
