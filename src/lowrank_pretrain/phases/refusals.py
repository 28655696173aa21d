"""What a callback that changes the model in mid-run cannot work with: each refused in one line with the cure, beforehand."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import HasPhase
from lowrank_pretrain.core.targets import Target, all_targets, tied_layers
from lowrank_pretrain.phases import averaging

SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


def check_run(phases: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Strategy, other callbacks and the module's way to optimize, for the phase callback ``phases``.

    Raises:
        ConfigError: one of them cannot follow a change of the model.
    """
    name = type(phases).__name__
    for kind in type(trainer.strategy).__mro__:
        if kind.__name__ in SHARDED:
            allowed = f"{name} changes the model in mid-run, which sharded parameters cannot follow: use ddp"
            raise ConfigError("strategy", kind.__name__, allowed)
    state = getattr(trainer.strategy, "_ddp_comm_state", None)  # Lightning offers no public way to ask
    if type(state).__name__ == "PostLocalSGDState":
        allowed = (
            f"lets ranks drift apart, which {name}'s switch would undo: use plain ddp, or LTEStrategy to merge now and then"
        )
        raise ConfigError("ddp_comm_state", type(state).__name__, allowed)
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging) and phases.has_own_groups():
            allowed = "sets rates by group, which adapters with a rate of their own break: leave out adapter_lr"
            raise ConfigError("callbacks", type(callback).__name__, allowed)
        if isinstance(callback, HasPhase) and callback is not phases:
            raise ConfigError("callbacks", type(callback).__name__, f"cannot run beside {name}: both change the model")
    if not pl_module.automatic_optimization:
        allowed = f"{name} needs Lightning's automatic optimization (with one optimizer)"
        raise ConfigError("automatic_optimization", False, allowed)


def check_targets(phases: Any, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Mapping[str, Target]) -> None:
    """What cannot work with these targets.

    Raises:
        ConfigError: a tied target whose own copy spawned processes cannot hand back; parts of a fused layer under averaging.
    """
    tied = tied_layers(pl_module)
    for name, target in targets.items():
        if target.layer_name in tied and spawned(trainer):
            raise ConfigError("targets", name, "is tied and comes untied, which spawned processes cannot hand back: use ddp")
    kept = [c for c in trainer.callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]
    for target in targets.values() if kept and not phases.freeze_rest else ():
        if any(other.name not in targets for other in all_targets(pl_module).values() if other.layer is target.layer):
            averaging.refuse_views(kept[0])


def spawned(trainer: pl.Trainer) -> bool:
    """Whether training runs in processes that ``fit`` spawns or forks, and that end with it."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
