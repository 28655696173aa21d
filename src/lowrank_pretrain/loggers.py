"""Loggers beside metrics.csv: TensorBoard, and Weights & Biases, offline where nobody has logged in."""

import hashlib
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from .build import build
from .errors import ConfigError


def more_loggers(values: dict[str, Any], run_dir: Path, config: dict[str, Any], multirun: bool = False) -> list[Logger]:
    """What the ``logger`` group asks for besides metrics.csv.

    Args:
        values: the group's plain node; ``_target_: null`` asks for nothing more.
        run_dir: the run directory, where an offline run is written.
        config: the run's whole configuration, for a logger that shows it.
        multirun: whether this is one job of a sweep: its runs make one group, named after the sweep's directory.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    if not values.get("_target_"):
        return []
    if values["_target_"].endswith("TensorBoardLogger"):
        try:
            return [build("logger", values, save_dir=str(run_dir), name="", version="tensorboard")]
        except ModuleNotFoundError as error:
            raise ConfigError("logger", "tensorboard", "needs tensorboard: pip install tensorboard") from error
    if not values["_target_"].endswith("WandbLogger"):
        return [build("logger", values)]
    if values.get("offline") is None:
        values = {**values, "offline": not has_wandb_key()}
        if values["offline"]:
            later = f"upload it later with: wandb sync {os.path.relpath(run_dir / 'wandb' / 'latest-run')}"
            rank_zero_only(print)(f"wandb: no API key found, writing an offline run; {later}")
    # the same directory is the same run, so that a resumed one goes on in it
    run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    names = {
        "name": values.get("name") or run_dir.name,
        "group": values.get("group") or (run_dir.parent.name if multirun else None),
    }
    return [build("logger", {**values, **names}, save_dir=str(run_dir), id=run_id, config=config)]


def has_wandb_key() -> bool:
    """Whether wandb would find an API key, without asking its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


@rank_zero_only
def publish(summary: dict[str, Any], config: dict[str, Any], run_dir: Path, loggers: list[Logger]) -> None:
    """With W&B: the exported weights and their card as an artifact, and the report's page.

    Args:
        summary: the contents of summary.json, which is written by now.
        config: the run's whole configuration.
        run_dir: the run directory.
        loggers: of the run.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            from .wandb_sections import publish as to_wandb

            to_wandb(logger.experiment, summary, run_dir)


def finish(loggers: list[Logger]) -> None:
    """Close wandb's run, which a sweep's next job would go on in otherwise; one that failed is marked so."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish(exit_code=1 if sys.exc_info()[0] else 0)
