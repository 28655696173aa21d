"""Loggers beside metrics.csv: at present Weights & Biases, offline where nobody has logged in."""

import hashlib
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from .build import build


def more_loggers(values: dict[str, Any], run_dir: Path) -> list[Logger]:
    """What the ``logger`` group asks for besides metrics.csv.

    Args:
        values: the group's plain node; ``_target_: null`` asks for nothing more.
        run_dir: the run directory, where an offline run is written.

    Raises:
        ConfigError: an unknown key or a wrong value.
    """
    if not values.get("_target_"):
        return []
    if not values["_target_"].endswith("WandbLogger"):
        return [build("logger", values)]
    if values.get("offline") is None:
        values = {**values, "offline": not has_wandb_key()}
        if values["offline"]:
            rank_zero_only(print)(f"wandb: no API key found, writing an offline run to {run_dir / 'wandb'}")
    # the same directory is the same run, so that a resumed one goes on in it
    run_id = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    return [build("logger", {**values, "name": values.get("name") or run_dir.name}, save_dir=str(run_dir), id=run_id)]


def has_wandb_key() -> bool:
    """Whether wandb would find an API key, without asking its server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def finish(loggers: list[Logger]) -> None:
    """Close wandb's run, which a sweep's next job would go on in otherwise."""
    if any(type(logger).__name__ == "WandbLogger" for logger in loggers):
        import wandb

        wandb.finish()
