"""Find a plan's adopter, the first of strategy, optimizer and adapters, and check before training that it can take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lowrank_pretrain.core.dtypes import multiplies_bfloat16
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import pruned_layers
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import ADAPTER_DEFAULTS, PHASES, Adopter, Inherit, adopters, overruled
from lowrank_pretrain.core.targets import Target, all_targets, plain_name
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.factorize.model import Factors, obstacle_to_factors
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.frozen import AUTO
from lowrank_pretrain.phases import adapter_groups
from lowrank_pretrain.phases.gradient_hooks import UNSEEN, has_users_hook
from lowrank_pretrain.phases.transition import note_of

if TYPE_CHECKING:
    from lowrank_pretrain.phases.callback import PhaseCallback


def find_adopter(phases: PhaseCallback, trainer: pl.Trainer) -> Adopter:
    """Return the plan's adopter: the strategy or the first optimizer that is an ``Adopter``, else adapters.

    Args:
        phases: the run's phase callback, whose settings its own adapters use.
        trainer: the running trainer.

    Raises:
        ConfigError: a strategy or optimizer has an ``adopt`` and is no ``Adopter``; ``then="galore"``, and the strategy takes
            the plan, or no optimizer does; or ``then="factorize"``, and either takes it.
    """
    for kind, part in (("strategy", trainer.strategy), *(("optimizer", optimizer) for optimizer in trainer.optimizers)):
        if hasattr(part, "adopt") and not isinstance(part, Adopter):
            cure = "has a method adopt and would be passed over: inherit from lowrank_pretrain.core.protocols.Adopter"
            raise ConfigError(kind, type(part).__name__, cure)
    if isinstance(trainer.strategy, Adopter):
        name = type(trainer.strategy).__name__
        if phases.then == "factorize":
            raise ConfigError("then", "factorize", f"{name} takes the plan for its heads: use ddp, or fit with LTE afterwards")
        if phases.then == "galore":
            raise ConfigError("then", "galore", f"{name} takes the plan: leave `then` out; with LTE use update=galore")
        return trainer.strategy
    for optimizer in adopters(trainer.optimizers):
        if phases.then == "factorize":
            name = type(optimizer).__name__
            raise ConfigError("then", "factorize", f"{name} projects the gradients of whole weights: use AdamW, or then=galore")
        return optimizer
    if phases.then == "galore":
        raise ConfigError("then", "galore", "needs GaLoreAdamW from configure_optimizers (a group without rank is AdamW)")
    if phases.then == "factorize":
        return _factors(phases, trainer)
    if phases.frozen_dtype == AUTO:
        device = trainer.strategy.root_device
        phases.frozen_dtype = "bfloat16" if multiplies_bfloat16(device) else None
        phases.keep_original = phases.keep_original and phases.frozen_dtype is not None
        why = "bfloat16" if phases.frozen_dtype else "left out: this device has no instructions for bfloat16"
        rank_zero_info(f"{type(phases).__name__}: frozen_dtype=auto is {why}")
    how = (phases.alpha, phases.train_A, phases.freeze_rest, phases.recompute_inputs)
    return lora.Adapters(*how, phases.frozen_dtype, phases.keep_original)


def _factors(phases: PhaseCallback, trainer: pl.Trainer) -> Factors:
    """Return the adopter of ``then="factorize"``, which sums over this run's processes and follows its first one."""
    return Factors(
        energy=phases.energy,
        flops=phases.flops,
        freeze_rest=phases.freeze_rest,
        products=torch.bfloat16 if "mixed" in str(trainer.precision) else None,
        total=lambda local: trainer.strategy.reduce(local.clone(), reduce_op="sum"),
        from_first=lambda mine: trainer.strategy.broadcast(mine, 0),
        is_first=trainer.is_global_zero,
        exact=phases._brought.exact if phases.phase == "lowrank" else None,
    )


def settle_factors(
    phases: PhaseCallback, factors: Factors, trainer: pl.Trainer, pl_module: pl.LightningModule, replay: bool
) -> Plan:
    """Note and log the ranks after factoring, and give the factors their own groups.

    Returns:
        The resulting plan.
    """
    note = note_of(pl_module)
    if note is not None:
        note.plan = dict(factors.plan)
    adapter_groups.separate_factors(trainer, pl_module, phases.adapter_lr, phases.adapter_weight_decay)
    for logger in () if replay else trainer.loggers:
        # the row of the step just taken; Lightning counts rows from 0
        logger.log_metrics(factors.metrics(), step=max(trainer.global_step - 1, 0))
    return factors.plan


def check_adopter(phases: PhaseCallback, adopter: Adopter, pl_module: pl.LightningModule) -> None:
    """Refuse, before training, what the adopter could not take over at the switch days later.

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


def unfit(
    phases: PhaseCallback, trainer: pl.Trainer, pl_module: pl.LightningModule, frozen: bool
) -> Callable[[Target], str | None]:
    """Return a check of one target: is its weight in an optimizer, and will it stay a parameter?

    Args:
        phases: the run's phase callback; not every layer can be factored.
        trainer: whose optimizers and callbacks.
        pl_module: the module.
        frozen: W stops training before the first step, so that no step can show what a hook does to its gradient.
    """
    has_no_gradient = frozen and phases._adopter.makes_adapters
    owned = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    pruning = [callback for callback in callbacks_of(trainer) if isinstance(callback, ModelPruning)]  # at an epoch's end
    pruned = {id(layer) for callback in pruning for layer in pruned_layers(callback)}

    def reason(target: Target) -> str | None:
        if id(target.layer) in pruned:
            return "is pruned by ModelPruning: its weight is computed at every forward then. Leave it out of one of the two"
        if id(target.layer.weight) not in owned:
            return "is in no optimizer: configure_optimizers must hand over its weight, or leave it out"
        if has_no_gradient and has_users_hook(target.layer.weight):
            return UNSEEN
        if phases.then == "factorize":
            every = torch.nn.Module.named_parameters(pl_module, remove_duplicate=False)
            owners = [name.rpartition(".")[0] for name, p in every if p is target.layer.weight]
            # the layer itself may have several names
            others = [plain_name(name) for name in owners if pl_module.get_submodule(name) is not target.layer]
            return obstacle_to_factors(target.layer, others)
        return None

    return reason


def outcome(phases: PhaseCallback) -> dict[str, torch.Tensor]:
    """Return a run's phase, its two steps and its ranks as metrics."""
    found = {"phase": PHASES.index(phases.phase), "switch_step": phases.switch_step, "freeze_step": phases.freeze_step}
    found |= {f"rank/{name}": rank for name, rank in (phases.plan or {}).items()}
    return {f"lowrank/{key}": torch.tensor(float(value)) for key, value in found.items() if value is not None}


def freeze_rest(pl_module: pl.LightningModule, plan: Plan) -> None:
    """Freeze everything but the plan's targets, which continue to train in full. Adapters do this themselves."""
    targets = all_targets(pl_module)
    kept = {id(targets[name].layer.weight) for name in plan}
    note = note_of(pl_module)
    for name, p in torch.nn.Module.named_parameters(pl_module):
        if note is not None and name in note.requires_grad and id(p) not in kept:
            p.requires_grad_(False)


def release(phases: PhaseCallback, pl_module: pl.LightningModule) -> list[Inherit] | None:
    """Release the plan at the freeze, and freeze the rest, for an adopter that does not do it itself."""
    inherited = phases._adopter.release()
    freeze_rest(pl_module, phases.plan or Plan({}))
    return inherited


def explain(phases: PhaseCallback, exception: BaseException) -> None:
    """Warn of what led to torch's error on ``unfreeze()`` of a W that is stored in whole numbers."""
    if phases.frozen_dtype == "int8" and isinstance(exception, RuntimeError) and "can require gradients" in str(exception):
        rank_zero_warn(
            f"{type(phases).__name__}: frozen_dtype=int8 stores W in a type that cannot train: leave unfreeze() out, or use "
            "frozen_dtype=bfloat16"
        )
