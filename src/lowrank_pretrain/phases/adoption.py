"""Find who takes a plan over, the first of strategy, optimizer and adapters, and check before training that it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import pruned_layers
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import ADAPTER_DEFAULTS, Adopter, adopters, overruled
from lowrank_pretrain.core.targets import Target, all_targets
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.phases.transition import note_of

if TYPE_CHECKING:
    from lowrank_pretrain.phases.callback import PhaseCallback


def find_adopter(phases: PhaseCallback, trainer: pl.Trainer) -> Adopter:
    """Return who takes the plan over: the strategy or the first optimizer that is an ``Adopter``, else adapters.

    Args:
        phases: the run's phase callback, whose settings its own adapters take.
        trainer: the running trainer.

    Raises:
        ConfigError: a strategy or optimizer has an ``adopt`` and is no ``Adopter``; or ``then="galore"``, and the strategy
            takes the plan, or no optimizer does.
    """
    for kind, part in (("strategy", trainer.strategy), *(("optimizer", optimizer) for optimizer in trainer.optimizers)):
        if hasattr(part, "adopt") and not isinstance(part, Adopter):
            cure = "has a method adopt and would be passed over: inherit from lowrank_pretrain.core.protocols.Adopter"
            raise ConfigError(kind, type(part).__name__, cure)
    if isinstance(trainer.strategy, Adopter):
        if phases.then == "galore":
            name = type(trainer.strategy).__name__
            raise ConfigError("then", "galore", f"{name} takes the plan: leave `then` out; with LTE use update=galore")
        return trainer.strategy
    for optimizer in adopters(trainer.optimizers):
        return optimizer
    if phases.then == "galore":
        raise ConfigError("then", "galore", "needs GaLoreAdamW from configure_optimizers (a group without rank is AdamW)")
    return lora.Adapters(phases.alpha, phases.train_A, phases.freeze_rest)


def check_adopter(phases: PhaseCallback, adopter: Adopter, pl_module: pl.LightningModule) -> None:
    """Refuse before training what the adopter could not take over at the switch, which comes after days.

    Raises:
        ConfigError: a setting of adapters that the adopter decides (``adapter_settings``); or what its ``check_adopt`` says.
    """
    asked = {key: getattr(phases, key) for key in ADAPTER_DEFAULTS}
    key = overruled(asked, adopter.adapter_settings)
    if key is not None:
        who = type(adopter).__name__
        raise ConfigError(
            key, asked[key], f"is for the callback's own adapters, and {who} takes the targets over: leave it out"
        )
    if phases.targets is not None:
        adopter.check_adopt(list(phases.plan or phases.chosen), pl_module)


def unfit(trainer: pl.Trainer) -> Callable[[Target], str | None]:
    """Return a check of one target: is its weight in an optimizer, and will it stay a parameter?"""
    owned = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    pruning = [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelPruning)]  # at an epoch's end
    pruned = {id(layer) for callback in pruning for layer in pruned_layers(callback)}

    def reason(target: Target) -> str | None:
        if id(target.layer) in pruned:
            return "is pruned by ModelPruning: its weight is computed at every forward then. Leave it out of one of the two"
        if id(target.layer.weight) not in owned:
            return "is in no optimizer: configure_optimizers must hand over its weight, or leave it out"
        return None

    return reason


def freeze_rest(pl_module: pl.LightningModule, plan: Plan) -> None:
    """Freeze everything but the plan's targets, which train on in full. Adapters do this themselves."""
    targets = all_targets(pl_module)
    kept = {id(targets[name].layer.weight) for name in plan}
    note = note_of(pl_module)
    for name, p in pl_module.named_parameters():
        if note is not None and name in note.requires_grad and id(p) not in kept:
            p.requires_grad_(False)
