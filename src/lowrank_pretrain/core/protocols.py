"""Declare how the parts of a run meet: which takes over a plan, which has a phase, which reports figures.

No part looks up another's method by name: it asks ``isinstance`` for one of these classes.

PreLoRA (or any phase callback) decides *when* training becomes low-rank, and for which targets. It then hands the plan
``{target: rank}`` to one :class:`Adopter`: the strategy, else an optimizer, else its own adapters (``lora.Adapters``).
Inherit from the classes here to join a run; each method has a default, so a new method writes only what it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from lowrank_pretrain.core.trainer import callbacks_of

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from lowrank_pretrain.core.plan import Plan

PHASES = ("full", "joint", "lowrank")  # logged as 0, 1, 2
# A phase callback's settings of adapters, each with the value that leaves the choice to the adopter.
ADAPTER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "alpha": None,
        "train_A": True,
        "adapter_lr": 1.0,
        "adapter_weight_decay": None,
        "recompute_inputs": False,
        "frozen_dtype": None,
        "keep_original": False,
    }
)

# The values that LTE's heads allow.
HEAD_SETTINGS: Mapping[str, Any] = MappingProxyType({"train_A": True, "keep_original": False})


class Inherit(NamedTuple):
    """Name a new parameter that takes over rows ``start … start+rows`` (along ``dim``) of an old one, with its optimizer state.

    With ``rows`` 0 it only joins the old one's parameter group, without any state.
    """

    new: nn.Parameter
    old: nn.Parameter
    dim: int
    start: int
    rows: int


class Adopter:
    """Take a plan over at the switch, and finish with it at the freeze.

    A strategy, an optimizer or a callback's own object inherits from this class and implements ``adopt``.

    Example:
        >>> class Tenth(Adopter):
        ...     def adopt(self, plan, module):
        ...         self.targets = list(plan)
        ...         return []
        >>> adopter = Tenth()
        >>> adopter.adopt({"layer": 4}, None), adopter.targets, adopter.release()
        ([], ['layer'], [])
    """

    #: Whether targets get adapters or heads. Those train only if the layer is called; a projection needs only a gradient.
    makes_adapters: bool = False
    #: Settings of adapters (:data:`ADAPTER_DEFAULTS`) that the adopter decides, with the only value it allows.
    adapter_settings: Mapping[str, Any] = ADAPTER_DEFAULTS
    #: Optimizer steps that the adopter needs between switch and freeze, at least.
    joint_steps: int = 0
    #: Optimizer steps between two moments at which all ranks hold the same weights (``settled``).
    settles_every: int = 1
    #: Whether ranks have gradients of their own when they step, and not the mean.
    gradients_differ: bool = False
    #: Whether the adopter compares the weights of all ranks itself when training starts and after a change of the model.
    compares_ranks: bool = False

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Say before training begins whether ``adopt`` will be able to take these targets.

        Args:
            names: the targets' names.
            module: the module that the names start from.

        Raises:
            ConfigError: it cannot take them.
        """

    def adopt(self, plan: Plan, module: nn.Module) -> list[Inherit] | None:
        """Take the plan over, at the switch.

        Args:
            plan: rank by target name; a target of rank 0 is frozen without an adapter.
            module: the module that the names start from.

        Returns:
            New parameters, each with the one whose rows it takes over: it joins that one's parameter group.
        """
        raise NotImplementedError(f"{type(self).__name__} must write adopt(plan, module)")

    def release(self) -> list[Inherit] | None:
        """Finish the joint phase, at the freeze; return the same as ``adopt``."""
        return []

    def settled(self, ahead: int = 0) -> bool:
        """Return whether a window may end now, with weights that all ranks hold alike; a callback waits until then.

        Args:
            ahead: ask for the moment after so many more optimizer steps.
        """
        return True

    def agreed_weights(self) -> AbstractContextManager[None]:
        """Show, in a block, the weights that a callback's decision looks at: the same on all ranks."""
        return nullcontext()

    def before_transition(self) -> None:
        """Prepare a strategy's ranks for a change of the model, after which their weights are compared. All ranks call it."""

    def after_replay(self) -> None:
        """React to a finished resume: the changes are repeated, and the checkpoint's exact values are restored."""

    def before_checkpoint(self) -> None:
        """Prepare for a file that holds the first process's values. All processes call it."""

    def after_transition(self) -> None:
        """React to a change of the model: optimizers hold the new parameters, but the model is not wrapped again yet."""


class HasPhase:
    """Tell which phase a run is in.

    A callback of this class is *the* phase callback (:func:`phase_callback`): it decides the run's phases, and hands a plan
    over at the switch. It takes precedence over a strategy.
    """

    #: One of :data:`PHASES`.
    phase: str = "full"
    #: {target: rank} after the switch.
    plan: Plan | None = None
    #: The optimizer step after which the switch came.
    switch_step: int | None = None
    #: The optimizer step after which the freeze came.
    freeze_step: int | None = None


class Reports:
    """Report figures, which the monitor logs and ``summary.json`` keeps."""

    def metrics(self) -> dict[str, float]:
        """Return figures by metric name, e.g. ``{"lte/merge_mib": 3.5}``."""
        return {}

    def sent_mebibytes(self) -> dict[str, float]:
        """Return MiB that each process has sent in the run, by phase, for the ``rest`` and for ``all``; nothing if unknown."""
        return {}

    def formula_bytes(self) -> int | None:
        """Return the bytes of optimizer state that the method's paper promises; None if it gives none."""
        return None


class Merges:
    """Train separately on each worker, and merge periodically: for strategies."""

    #: Optimizer steps between two merges.
    merge_every: int
    #: Whether workers hold different weights between merges, heads aside.
    workers_differ: bool = False

    def all_heads(self) -> Iterable[tuple[str, Tensor, dict[str, Tensor], tuple[Any, ...]]]:
        """Yield per layer its name, all workers' A (N, ΣR, D) and B (N, O, R) per part, and the parts. All must call it."""
        return ()


class LogsPhases:
    """Log the beginning of a phase as an event: for loggers."""

    def log_phase(self, phase: str, step: int, counts: Mapping[str, int]) -> None:
        """Log that a phase begins, or continues after a resume.

        Args:
            phase: one of :data:`PHASES`.
            step: optimizer steps taken before it.
            counts: counts of parameters, by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must write log_phase(phase, step, counts)")


class TriesOut:
    """Run once before the first batch, to fail early: for modules."""

    def try_out(self) -> None:
        """Run the model on the smallest input.

        Raises:
            ConfigError: it cannot run.
        """


class CountsClasses:
    """Tell the number of classes in the data: for data modules."""

    def count_classes(self) -> int | None:
        """Return the number of classes; None if the data have none."""
        return None


def overruled(asked: Mapping[str, Any], decided: Mapping[str, Any]) -> str | None:
    """Return the first adapter setting that the adopter does not allow; None if there is none.

    Args:
        asked: settings by name; a missing one asks for nothing.
        decided: an adopter's ``adapter_settings``.

    Example:
        >>> overruled({"alpha": 8.0, "train_A": False}, HEAD_SETTINGS)
        'train_A'
    """
    for key, allowed in decided.items():
        if asked.get(key, ADAPTER_DEFAULTS[key]) not in (ADAPTER_DEFAULTS[key], allowed):
            return key
    return None


def adopters(optimizers: Iterable[Optimizer]) -> Iterator[Adopter]:
    """Yield the optimizers that can take over a plan."""
    return (optimizer for optimizer in optimizers if isinstance(optimizer, Adopter))


def phase_callback(trainer: pl.Trainer) -> HasPhase | None:
    """Return the callback that decides the run's phases; None if the phase never changes."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, HasPhase)), None)


def phase_of(trainer: pl.Trainer) -> str:
    """Return a run's phase: as the callback says, else the strategy (LTE trains heads from the start), else ``full``."""
    known = phase_callback(trainer) or trainer.strategy
    return known.phase if isinstance(known, HasPhase) else HasPhase.phase
