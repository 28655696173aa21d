"""Build the parts of a configuration: method, data, and a model with its optimizer."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lowrank_pretrain.core.protocols import CountsClasses, TriesOut
from lowrank_pretrain.models.checks import name_fused_experts
from lowrank_pretrain.models.optim import Optim
from lowrank_pretrain.run.build import build
from lowrank_pretrain.run.method import Method
from lowrank_pretrain.run.method import build as build_method


@dataclass
class Parts:
    """Hold the objects that a run trains with."""

    method: Method
    data: pl.LightningDataModule
    module: pl.LightningModule


def build_parts(config: dict[str, Any]) -> Parts:
    """Build the objects of a run, those that are cheap to check first.

    Args:
        config: the run's plain configuration; ``model.num_classes`` is filled in from the data if it is null.

    Raises:
        ConfigError: a wrong key or value.
    """
    method = build_method(config["method"])
    optim = build("optim", config["optim"], base=Optim, build=method.optimizer)
    data = build("data", config["data"], base=pl.LightningDataModule)
    if config["model"].get("num_classes", 0) is None and isinstance(data, CountsClasses):
        config["model"]["num_classes"] = data.count_classes()
    module = build("model", config["model"], base=pl.LightningModule)
    module.optim = optim
    targets = config["method"].get("targets", "all")
    presets = {*targets} if isinstance(targets, list) else {targets}
    if (method.callbacks or method.strategy) and presets & {"all", "mlp"}:
        name_fused_experts(module)
    if isinstance(module, TriesOut):
        module.try_out()
    return Parts(method, data, module)
