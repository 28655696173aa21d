"""Validate strategy, callbacks, targets and resumed settings before training; raise ConfigError with the cure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BaseFinetuning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lowrank_pretrain.core.checks import choice, flag, number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import comm_state, spawns_processes
from lowrank_pretrain.core.protocols import HasPhase
from lowrank_pretrain.core.targets import Target, all_targets, find_targets, tied_layers
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.lora.frozen import AUTO, KINDS
from lowrank_pretrain.phases import transition

if TYPE_CHECKING:
    from lowrank_pretrain.phases.callback import PhaseCallback

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_run(phases: PhaseCallback, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Refuse a strategy, a callback or a module that cannot follow a change of the model.

    Raises:
        ConfigError: naming it.
    """
    name = type(phases).__name__
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in SHARDED:
            allowed = f"{name} changes the model in mid-run, which sharded parameters cannot follow: use ddp"
            raise ConfigError("strategy", kind.__name__, allowed)
    state = comm_state(trainer.strategy)
    if type(state).__name__ == "PostLocalSGDState":
        allowed = (
            f"lets ranks drift apart, which {name}'s switch would undo: use plain ddp, or LTEStrategy to merge now and then"
        )
        raise ConfigError("ddp_comm_state", type(state).__name__, allowed)
    for callback in callbacks_of(trainer):
        if isinstance(callback, StochasticWeightAveraging) and phases.has_own_groups():
            cure = "WeightAveraging keeps an average, too" if phases.then == "factorize" else "leave out adapter_lr"
            allowed = f"sets rates by group, which adapters and factors with a rate of their own break: {cure}"
            raise ConfigError("callbacks", type(callback).__name__, allowed)
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) and phases.frozen_dtype is not None:
            allowed = "keeps an average of W, which a cheaper type would round away: leave frozen_dtype out, or the average"
            raise ConfigError("callbacks", type(callback).__name__, allowed)
        if isinstance(callback, HasPhase) and callback is not phases:
            raise ConfigError("callbacks", type(callback).__name__, f"cannot run beside {name}: both change the model")
    check_order(phases, trainer)
    if not pl_module.automatic_optimization:
        allowed = f"{name} needs Lightning's automatic optimization (with one optimizer)"
        raise ConfigError("automatic_optimization", False, allowed)


def check_order(phases: PhaseCallback, trainer: pl.Trainer, resumed: bool = False) -> None:
    """Warn of a callback that restores optimizer groups of its own at a resume, on the wrong side of this one; refuse it then.

    It restores those of its first epoch: with adapters if they are there from the start, else without.

    Args:
        phases: the run's phase callback.
        trainer: its callbacks run in their order.
        resumed: the model is about to change as a checkpoint's did.

    Raises:
        ConfigError: there is one, and the fit is resumed after the switch.
    """
    callbacks, name = callbacks_of(trainer), type(phases).__name__
    at = callbacks.index(phases) if phases in callbacks else 0
    side = "after" if phases.from_start else "before"
    for callback in callbacks[:at] if phases.from_start else callbacks[at + 1 :]:
        if isinstance(callback, BaseFinetuning):
            kind = type(callback).__name__
            if resumed:
                allowed = f"restores the optimizer groups of its first epoch: list it {side} {name}"
                raise ConfigError("callbacks", kind, allowed)
            when = "" if phases.from_start else " after the switch"
            rank_zero_warn(f"{name}: list {kind} {side} {name} in callbacks, else a resume{when} fails")


def check_targets(
    phases: PhaseCallback, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Mapping[str, Target]
) -> None:
    """Refuse targets that the run's processes or callbacks cannot follow.

    Raises:
        ConfigError: a tied target whose own copy spawned processes cannot hand back; parts of a fused layer under averaging.
    """
    tied = tied_layers(pl_module)
    for name, target in targets.items():
        if target.layer_name in tied and spawns_processes(trainer):
            raise ConfigError("targets", name, "is tied and comes untied, which spawned processes cannot hand back: use ddp")
    kept = [c for c in callbacks_of(trainer) if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    for target in targets.values() if kept and not phases.freeze_rest else ():
        if any(other.name not in targets for other in all_targets(pl_module).values() if other.layer is target.layer):
            transition.refuse_views(kept[0])


def check_adapter_settings(
    alpha: float | None, train_A: bool, freeze_rest: bool, adapter_lr: float, adapter_weight_decay: float | None,
    recompute_inputs: bool,
) -> None:  # fmt: skip
    """Refuse wrong values of the settings that adapters have in any phase callback.

    Raises:
        ConfigError: naming the first.
    """
    if alpha is not None:
        number("alpha", alpha, above=0, allowed="must be a number above 0, or null for alpha = rank")
    for key, value in (("train_A", train_A), ("freeze_rest", freeze_rest), ("recompute_inputs", recompute_inputs)):
        flag(key, value)
    number("adapter_lr", adapter_lr, above=0, allowed="must be a number above 0, times the base weight's learning rate")
    if adapter_weight_decay is not None:
        allowed = "must be a number of 0 or more, or null"
        number("adapter_weight_decay", adapter_weight_decay, least=0, allowed=allowed)


def check_rank_rule(then: str, energy: float | None, flops: float | None) -> tuple[float | None, float | None]:
    """Return the rules for the ranks of factors; refuse values out of range, both at once, or rules without effect.

    Raises:
        ConfigError: naming the one.
    """
    for key, value in (("energy", energy), ("flops", flops)):
        if value is not None:
            number(key, value, above=0, below=1, allowed="must be a fraction above 0 and below 1, or null")
            if then != "factorize":
                raise ConfigError(key, value, 'is for then="factorize": leave it out')
    if energy is not None and flops is not None:
        raise ConfigError("flops", flops, f"and energy={energy} both decide the ranks: give one of them")
    return energy, flops


def check_frozen_dtype(then: str, frozen_dtype: str | None, keep_original: bool) -> tuple[str | None, bool]:
    """Return both settings; refuse an unknown type, one without a frozen W, and an original without a cheaper copy.

    Raises:
        ConfigError: naming the one.
    """
    choice("frozen_dtype", frozen_dtype, (None, AUTO, *KINDS))
    flag("keep_original", keep_original)
    if frozen_dtype is not None and then != "lora":
        raise ConfigError(
            "frozen_dtype", frozen_dtype, f'is for a frozen W next to adapters, and then="{then}" has none: leave it out'
        )
    if keep_original and frozen_dtype is None:
        raise ConfigError("keep_original", True, "is for frozen_dtype: without it W stays as it is")
    return frozen_dtype, keep_original


def settings_of(phases: PhaseCallback) -> dict[str, Any]:
    """Return the arguments that a resumed run must have again, as plain types."""
    names = ["train_A", "adapter_lr", "adapter_weight_decay", "freeze_rest"]
    names += [name for name in ("targets", "ranks") if getattr(phases, name) is not None]
    names += ["then", "energy", "flops"] if phases.then == "factorize" else []
    names += ["frozen_dtype", "keep_original"] if phases.frozen_dtype is not None else []
    found = {name: getattr(phases, name) for name in names}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in found.items()}


def check_settings(phases: PhaseCallback, noted: Mapping[str, Any], pl_module: pl.LightningModule) -> None:
    """Compare the arguments with those of a checkpoint's run. Before its switch, everything but targets may change.

    Before the freeze, rules for the ranks of factors may: they decide there.

    Args:
        phases: the run's phase callback.
        noted: what ``settings_of`` gave there.
        pl_module: the module, plain.

    Raises:
        ConfigError: naming each that differs.
    """
    at_freeze = {"frozen_dtype": None, "keep_original": False}  # a file that does not say has neither
    noted = at_freeze | dict(noted) if noted else noted
    later = ("freeze_rest", *at_freeze)
    bound = {"full": ["targets"], "joint": [name for name in noted if name not in later]}.get(phases.phase, list(noted))
    rules = ("energy", "flops")
    if phases.phase == "joint" and any(noted.get(key) for key in rules) and any(getattr(phases, key) for key in rules):
        bound = [name for name in bound if name not in rules]  # the freeze asks them, so they may still change
    now, differing = {"then": phases.then} | at_freeze | settings_of(phases), []
    for name in bound:
        if name not in noted or name not in now or now[name] == noted[name]:
            continue
        if name == "targets":
            there, here = (find_targets(pl_module, words["targets"], warn=False, frozen=True) for words in (noted, now))
            if set(there) == set(here):
                continue  # other words for the same layers
        differing.append(name)
    if differing:
        more = "".join(f"; {name}={now[name]!r}, there {noted[name]!r}" for name in differing[1:])
        first = differing[0]
        allowed = f"the checkpoint's run has {noted[first]!r}{more}: give the same, or start afresh from its weights alone"
        raise ConfigError(first, now[first], allowed)


def check_finite(diverged: bool) -> None:
    """Refuse to begin a fit with weights of which nothing good can come.

    Raises:
        ValueError: the last fit left adapters that are NaN or infinite, and no file has replaced them.
    """
    if diverged:
        raise ValueError(
            "the module's adapters held numbers that are not finite when its last fit ended: give a good file as "
            "ckpt_path, or load good weights first"
        )
