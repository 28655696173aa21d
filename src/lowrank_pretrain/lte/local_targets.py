"""Declare the interface of the targets that a worker trains on its own between merges.

One class per value of the strategy's ``update``: heads next to W (``lora``: ``heads.head_set.HeadSet``), W itself in a
subspace (``galore``: ``projected.ProjectedSet``), or all of W (``full``: ``full.FullSet``). A further one inherits from
``LocalTargets`` and gets a line in ``strategy.KINDS``; the strategy needs no other change. ``NoTargets`` stands in until a
fit has some.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import ADAPTER_DEFAULTS, Inherit
from lowrank_pretrain.lora.function import Part
from lowrank_pretrain.lte.first_step import Unwatched
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.view import MergedView
from lowrank_pretrain.lte.workers import Workers

AllHeads = Iterator[tuple[str, Tensor, dict[str, Tensor], tuple[Part, ...]]]


class LocalTarget(Protocol):
    """Describe one target: a parameter, or a row block of one.

    Attributes:
        name: the target's name.
        route: ``factors`` or ``dense``.
    """

    name: str
    route: str

    @property
    def weight_name(self) -> str:
        """Return the key of its parameter in ``LocalTargets.weights``."""

    def live(self) -> Tensor:
        """Return a view of the weight that is in place now."""

    def as_live(self, merged: Tensor) -> Tensor:
        """Return a merged weight, as ``LocalTargets.merged`` yields it, in the shape of ``live``."""

    def write(self, merged: Tensor, into: Tensor) -> None:
        """Write a merged weight into a tensor laid out like the parameter."""

    def bytes_sent(self) -> int:
        """Return the bytes of this worker's factors."""


@dataclass
class Shared:
    """Hold the state shared by all layers with heads of one model.

    Attributes:
        mode: one of ``settings.MODES``.
        total: N, the heads over which a merge averages (in ``sequential``: the workers).
        batch: samples in the batch that is being trained on; 0: not known; ``None`` outside a training step.
        viewing: W holds the merged weights for evaluation: heads add nothing.
        seen: per layer the largest dim 0 of its inputs in the first training step; ``None`` after it.
        refused: why a layer's input cannot be shared out, as the first training step showed.
    """

    mode: str
    total: int
    batch: int | None = None
    viewing: bool = False
    seen: dict[str, int] | None = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def check_seen(self, heads: int, families: Callable[[Iterable[str]], Mapping[str, str]]) -> dict[str, str]:
        """Return which layers saw fewer samples than there are heads, after the first forward pass.

        A layer passes with its family (of experts, some may see few tokens).

        Args:
            heads: number of heads on this worker.
            families: maps names to families (``targets.families``).

        Returns:
            Why a layer cannot have heads, by its name.

        Raises:
            ConfigError: no layer sees as many samples as there are heads.
        """
        seen, self.seen = self.seen, None
        if heads == 1 or not (seen or self.refused):
            return {}
        reasons = dict(self.refused)
        if not seen:
            return reasons
        if max(seen.values()) < heads:
            raise ConfigError(
                "heads", heads, f"a batch holds {max(seen.values())} samples on this worker: at least one per head is needed"
            )
        of = families(seen)
        for name in seen:
            size = max(n for other, n in seen.items() if of[other] == of[name])
            if size < heads:
                reasons[name] = (
                    f"its input has {size} in dim 0, fewer than the {heads} heads: leave it out of the targets, or use heads=1"
                )
        return reasons


@dataclass
class Fit:
    """Hold what targets need from a fit to begin.

    Attributes:
        module: the LightningModule.
        optimizers: the module's optimizers.
        workers: who trains together.
        ignored: parameters that the module itself excludes from DDP.
        left_out: targets that a resumed run had left out in its first step.
    """

    module: pl.LightningModule
    optimizers: list[Optimizer]
    workers: Workers
    ignored: set[str] = field(default_factory=set)
    left_out: Sequence[str] = ()


class LocalTargets(ABC):
    """Hold the targets of a module, which this worker trains on its own data and merges periodically with the others.

    One exists from the start of a fit; it has no targets before ``begin`` or ``release``.

    Attributes:
        settings: how workers train and merge.
        workers: who merges with whom.
        shared: the state that converted layers share, such as the batch in training.
        view: the merged weights.
        clock: optimizer steps taken or attempted.
        merges: merges applied.
        last_cost: bytes that this worker sent for the last merge, and seconds that it waited.
        pieces: the targets, in the module's order.
        layers: converted layers by name.
        optimizers: set once the strategy has separated targets from other parameters; the clock follows the first.
        begun: whether targets are trained here, or were until ``detach``.
        attached: whether they are still the worker's own.
        row_blocks: parameters that are row blocks of a converted layer's W and train in full.
        untied: own weights of layers that were tied.
        left_out_names: targets that the first step found unfit.
        first_step: watches the first step.
    """

    stacked = False  #: whether ``parameters`` are stacks of heads, each of which is clipped by its own norm
    differs = True  #: whether the merged weights are other tensors than W
    makes_adapters = False  #: see ``Adopter``
    low_rank = True  #: whether training is low-rank from here on

    def __init__(self, settings: Settings, workers: Workers, total: int) -> None:
        self.settings, self.workers = settings, workers
        self.shared = Shared(settings.mode, total)
        self.view = MergedView(self)
        self.clock = self.merges = 0
        self.last_cost = (0.0, 0.0)
        self.pieces: Sequence[LocalTarget] = []
        self.layers: dict[str, Any] = {}
        self.optimizers: list[Optimizer] = []
        self.begun = self.attached = False
        self.row_blocks: list[Inherit] = []
        self.untied: list[Inherit] = []
        self.left_out_names: list[str] = []
        self.first_step = Unwatched()
        self._warned = False

    @classmethod
    def decides(cls, settings: Settings) -> Mapping[str, Any]:
        """Return the settings of a phase callback's adapters that these targets decide, with the only value allowed."""
        return ADAPTER_DEFAULTS

    # -- beginning and ending ---------------------------------------------------------------------------------------

    @abstractmethod
    def begin(self, fit: Fit) -> list[Inherit]:
        """Take the targets of a bare module, as the settings choose them; return what new parameters take over."""

    @abstractmethod
    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Raise ConfigError if ``adopt`` could not take these targets."""

    @abstractmethod
    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Begin the joint phase, in which workers agree at every step; return what new parameters take over."""

    @abstractmethod
    def release(self, fit: Fit) -> list[Inherit]:
        """End the joint phase: the targets become this worker's own; return the same as ``adopt``."""

    @abstractmethod
    def detach(self) -> None:
        """Make the module plain, keeping W as it is; what a checkpoint needs stays here."""

    def check_optimizer(self, optimizer: Optimizer) -> None:  # noqa: B027  # a default
        """Raise ConfigError if this optimizer, which holds the targets, cannot train them."""

    def leave_out(self, names: Iterable[str]) -> tuple[dict[str, nn.Parameter], set[int]]:
        """Give up some layers before their first merge; their W trains in full.

        Returns:
            W by layer name, and the ids of the parameters that are gone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no targets to leave out")

    # -- what belongs to it -----------------------------------------------------------------------------------------

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that this worker trains on its own, by name."""

    @abstractmethod
    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that merged weights replace, by name."""

    def frozen_weights(self) -> list[nn.Parameter]:
        """Return parameters that must not train next to the targets."""
        return []

    @abstractmethod
    def unsynced(self, module: nn.Module) -> set[str]:
        """Return the names of tensors that DDP must neither broadcast nor average."""

    def hidden(self, module: nn.Module) -> set[str]:
        """Return the names of tensors that a plain model lacks, and that may differ between workers."""
        return set()

    # -- the clock --------------------------------------------------------------------------------------------------

    @abstractmethod
    def after_step(self) -> bool:
        """Count an optimizer step that was taken or attempted, and merge if it is time. Return whether W changed."""

    @abstractmethod
    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield every target with its merged weight, one after the other; change nothing. All workers call it together.

        Args:
            piecemeal: send a few at a time, to limit memory.
            wanted: ``False``: only send this worker's part; nothing is needed here.
        """

    def meet(self) -> None:  # noqa: B027  # a default
        """Check, before all workers send something together, that all have come to the same step."""

    def differing(self) -> set[str]:
        """Return the names of parameters that may differ between workers after a merge, beyond ``hidden``."""
        return set()

    def agreed(self) -> dict[str, Tensor]:
        """Return tensors outside the module, by name, that all workers must share after a merge."""
        return {}

    def all_heads(self) -> AllHeads:
        """Yield per layer its name, A (N, ΣR, D), B (N, O, R) per part, and the parts. All workers call it together."""
        return iter(())

    # -- what to tell the user --------------------------------------------------------------------------------------

    def warn_at_start(self) -> None:  # noqa: B027  # a default
        """Warn of settings that run but cannot have the desired effect."""

    def warn_after_first_merge(self, module: nn.Module) -> None:  # noqa: B027  # a default
        """Warn of targets that have not trained in the first window."""

    def warn_of_writes(self, names: Sequence[str]) -> None:
        """Warn once that weights were written between merges."""
        if names and not self._warned:
            self._warned = True
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            rank_zero_warn(
                f"LTE: {names[0]}{more} was written to between two merges: what was added stays in W, and what the heads learn "
                "is added to it at each merge"
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @abstractmethod
    def saved_state(self) -> dict[str, Any] | None:
        """Return ``lte_state`` on the worker that writes, ``None`` on the others. All workers call it together."""

    @abstractmethod
    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError if ``lte_state`` belongs to other targets."""

    @abstractmethod
    def load_state(self, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Restore ``lte_state``; on entry W is the checkpoint's merged one. All workers call it together.

        Returns:
            Optimizer state by a parameter's name, to load into the optimizers later, and what to tell the user, if anything.
        """

    def finish_load(self) -> None:  # noqa: B027  # a default
        """Finish what ``load_state`` began, when the optimizers have their states."""


class WholeTargets(LocalTargets):
    """Hold targets that are parameters of the model themselves: no layer is converted, and merged weights replace them.

    Each of ``pieces`` has its parameter as ``p``.
    """

    pieces: Sequence[Any]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that this worker trains on its own, by name."""
        return {piece.name: piece.p for piece in self.pieces}

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the same parameters."""
        return self.parameters()

    def unsynced(self, module: nn.Module) -> set[str]:
        """Return the names of tensors that DDP must neither broadcast nor average."""
        return set() if self.workers.size == 1 else set(self.parameters())


class NoTargets(LocalTargets):
    """Stand in for targets before a fit."""

    def __init__(self) -> None:
        super().__init__(Settings(), Workers(), 1)

    def begin(self, fit: Fit) -> list[Inherit]:
        """Begin nothing."""
        return []

    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Allow anything."""

    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Adopt nothing."""
        return []

    def release(self, fit: Fit) -> list[Inherit]:
        """Release nothing."""
        return []

    def detach(self) -> None:
        """Change nothing."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return none."""
        return {}

    def weights(self) -> dict[str, nn.Parameter]:
        """Return none."""
        return {}

    def unsynced(self, module: nn.Module) -> set[str]:
        """Return none."""
        return set()

    def after_step(self) -> bool:
        """Count nothing."""
        return False

    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield nothing."""
        return iter(())

    def saved_state(self) -> dict[str, Any] | None:
        """Return none."""
        return None

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Allow any."""

    def load_state(self, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Take nothing."""
        return {}, None
