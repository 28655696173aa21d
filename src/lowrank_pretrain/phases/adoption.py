"""Who takes a plan over: the first of strategy, optimizer and adapters; and what must be known of them before training."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.targets import Target, all_targets
from lowrank_pretrain.lora import model as lora

ADAPTERS = {"alpha": None, "train_A": True, "adapter_lr": 1.0, "adapter_weight_decay": None}  # what is said of adapters alone


def find_adopter(phases: Any, trainer: pl.Trainer) -> Any:
    """The strategy or optimizer that offers ``adopt``, else adapters of the phase callback ``phases``'s own.

    Raises:
        ConfigError: ``then="galore"``, and the strategy takes the plan, or no optimizer does.
    """
    if callable(getattr(trainer.strategy, "adopt", None)):
        if phases.then == "galore":
            name = type(trainer.strategy).__name__
            raise ConfigError("then", "galore", f"{name} takes the plan: leave `then` out; with LTE use update=galore")
        return trainer.strategy
    for optimizer in trainer.optimizers:
        if callable(getattr(optimizer, "adopt", None)):
            return optimizer
    if phases.then == "galore":
        raise ConfigError("then", "galore", "needs GaLoreAdamW from configure_optimizers (a group without rank is AdamW)")
    return lora.Adapters(phases.alpha, phases.train_A, phases.freeze_rest)


def check_adopter(phases: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Look now, rather than when the switch comes after days, whether the plan can be taken over.

    Raises:
        ConfigError: a setting of adapters where who takes the targets over makes none, or decides it (``adapter_settings``;
            an optimizer makes none); or what its ``check_adopt`` says.
    """
    adopter = find_adopter(phases, trainer)
    decides = getattr(adopter, "adapter_settings", ADAPTERS if isinstance(adopter, Optimizer) else {})
    for key, value in decides.items():
        asked = getattr(phases, key)
        if asked not in (ADAPTERS[key], value):
            who = type(adopter).__name__
            raise ConfigError(key, asked, f"is for the callback's own adapters, and {who} takes the targets over: leave it out")
    check = getattr(adopter, "check_adopt", None)
    if callable(check) and hasattr(phases, "targets"):
        check(list(phases.plan or phases.chosen), pl_module)


def gives_adapters(phases: Any, trainer: pl.Trainer) -> bool:
    """Whether targets will get adapters or heads, which train only where they are called; projections need just a gradient."""
    adopter = find_adopter(phases, trainer)
    return not isinstance(adopter, Optimizer) and getattr(adopter, "update", "lora") != "galore"


def unfit(trainer: pl.Trainer) -> Callable[[Target], str | None]:
    """What to ask of every target when a fit begins: is its weight in an optimizer, and will it stay a parameter?"""
    owned = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    pruning = [callback for callback in trainer.callbacks if isinstance(callback, ModelPruning)]
    # Lightning has no public way to ask what it prunes; it does so at the end of an epoch
    pruned = {id(layer) for callback in pruning for layer, _ in callback._parameters_to_prune or ()}

    def reason(target: Target) -> str | None:
        if id(target.layer) in pruned:
            return "is pruned by ModelPruning: its weight is computed at every forward then. Leave it out of one of the two"
        if id(target.layer.weight) not in owned:
            return "is in no optimizer: configure_optimizers must hand over its weight, or leave it out"
        return None

    return reason


def freeze_rest(pl_module: pl.LightningModule, plan: Plan) -> None:
    """Stop everything but the plan's targets, where those train on in full (adapters see to it themselves)."""
    targets = all_targets(pl_module)
    kept = {id(targets[name].layer.weight) for name in plan}
    known = pl_module.__dict__["_lowrank_requires_grad"]
    for name, p in pl_module.named_parameters():
        if name in known and id(p) not in kept:
            p.requires_grad_(False)
