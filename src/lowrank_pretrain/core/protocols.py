"""Declare how the parts of a run meet: who takes a plan over, who has a phase, who reports figures.

PreLoRA (or any phase callback) decides *when* training becomes low-rank, and for which targets. It then hands the plan
``{target: rank}`` to one :class:`Adopter`: the strategy, else an optimizer, else adapters of its own (``lora.Adapters``).
Inherit from the classes here to join a run; each method has a default, so a new method writes only what it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from lowrank_pretrain.core.plan import Plan

PHASES = ("full", "joint", "lowrank")  # logged as 0, 1, 2
# A phase callback's settings of adapters, each with the value that leaves the choice to the adopter.
ADAPTER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"alpha": None, "train_A": True, "adapter_lr": 1.0, "adapter_weight_decay": None}
)


class Inherit(NamedTuple):
    """A new parameter that takes over rows ``start … start+rows`` (along ``dim``) of an old one, with its optimizer state."""

    new: nn.Parameter
    old: nn.Parameter
    dim: int
    start: int
    rows: int


class Adopter:
    """Take a plan over at the switch, and finish with it at the freeze.

    A strategy, an optimizer or an object of a callback's own inherits from this class and writes ``adopt``.

    Example:
        >>> class Tenth(Adopter):
        ...     def adopt(self, plan, module):
        ...         self.targets = list(plan)
        ...         return []
        >>> adopter = Tenth()
        >>> adopter.adopt({"layer": 4}, None), adopter.targets, adopter.release()
        ([], ['layer'], [])
    """

    #: Whether targets get adapters or heads. These train only where the layer is called; a projection needs just a gradient.
    makes_adapters: bool = False
    #: Settings of adapters (:data:`ADAPTER_DEFAULTS`) that the adopter decides, with the only value it allows.
    adapter_settings: Mapping[str, Any] = ADAPTER_DEFAULTS
    #: Whether the adopter compares the weights of all ranks itself when training starts and after a change of the model.
    compares_ranks: bool = False

    def check_adopt(self, names: Iterable[str], module: nn.Module) -> None:
        """Say before training begins whether ``adopt`` will be able to take these targets.

        Args:
            names: the targets' names.
            module: the module that they count from.

        Raises:
            ConfigError: it will not.
        """

    def adopt(self, plan: Plan, module: nn.Module) -> list[Inherit] | None:
        """Take the plan over, at the switch.

        Args:
            plan: rank by target name; a target of rank 0 is frozen without an adapter.
            module: the module that the names count from.

        Returns:
            New parameters, each with the one whose rows it takes over: it joins that one's parameter group.
        """
        raise NotImplementedError(f"{type(self).__name__} must write adopt(plan, module)")

    def release(self) -> list[Inherit] | None:
        """Finish the joint phase, at the freeze; returns as ``adopt`` does."""
        return []

    def after_transition(self) -> None:
        """Follow a change of the model: optimizers hold the new parameters now, and the wrapper is not there again yet."""


class HasPhase:
    """Tell which phase a run is in: one of :data:`PHASES`. A callback's word counts before a strategy's."""

    phase: str = "full"


class Reports:
    """Tell figures about itself, which the monitor logs and ``summary.json`` keeps."""

    def metrics(self) -> dict[str, float]:
        """Return figures by metric name, e.g. ``{"lte/merge_mib": 3.5}``."""
        return {}

    def formula_bytes(self) -> int | None:
        """Return the bytes of optimizer state that the method's paper promises; None where it says nothing."""
        return None


def adopters(optimizers: Iterable[Optimizer]) -> Iterator[Adopter]:
    """Yield the optimizers that can take a plan over."""
    return (optimizer for optimizer in optimizers if isinstance(optimizer, Adopter))
