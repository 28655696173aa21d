"""DiLoCo and local SGD: train whole weights on each worker, and merge their changes (``update="full"``).

    window:  worker n trains Wₙ by any optimizer, whose state stays with it
    merge:   Δ = mean(Wₙ − W_base), through the wire; the outer step moves W_base by Δ; everyone continues from W_base

DiLoCo (arXiv 2311.08105, Algorithm 1) has an outer step with Nesterov momentum; ``outer_lr=1, outer_momentum=0`` is local SGD,
and with ``merge_every=1`` and SGD inside it is DDP.

Targets are, as DiLoCo has it, everything that trains: matrices, biases, norms and embeddings. ``targets`` limits them to the
weights of the layers that it chooses; biases and all else then belong to the rest, which follows ``sync_rest``.

Evaluation between merges sees W_base + mean(Δ), without the outer step; at a merge that is W.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.targets import select
from lowrank_pretrain.lte import full_checkpoint
from lowrank_pretrain.lte.increments import Increments, Weights
from lowrank_pretrain.lte.local_targets import Fit, LocalTarget, WholeTargets
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.workers import Workers


class FullTarget:
    """Hold one parameter that a worker trains on its own.

    Args:
        name: its name in the module.
        p: the parameter.
    """

    route = "dense"

    def __init__(self, name: str, p: nn.Parameter) -> None:
        self.name, self.p = name, p

    @property
    def weight_name(self) -> str:
        """Return the parameter's name."""
        return self.name

    def live(self) -> Tensor:
        """Return a view of the weight that is in place now."""
        return self.p.detach()

    def as_live(self, merged: Tensor) -> Tensor:
        """Return a merged weight unchanged."""
        return merged

    def write(self, merged: Tensor, into: Tensor) -> None:
        """Write a merged weight into a tensor of the parameter's shape."""
        into.copy_(merged)

    def bytes_sent(self) -> int:
        """Return the size of the target's increment in bytes, in full precision."""
        return self.p.numel() * at_least_32(self.p.dtype).itemsize


class FullSet(WholeTargets):
    """Train whole weights separately on each worker, from ``start`` to ``detach``.

    It keeps W_base, plus a copy of the weights for outer momentum, and another for a lossy wire.

    Args:
        settings: ``targets``, ``merge_every``, ``wire`` and the outer step's are used.
        workers: who merges with whom. A lone worker takes the outer step too; a plain outer step then costs nothing.

    Attributes:
        outer: moves W_base.
        increments: W_base and the wire; ``None`` where a merge changes nothing.
        own: W of this worker by name, where a fit ended between two merges.
    """

    low_rank = False

    def __init__(self, settings: Settings, workers: Workers) -> None:
        super().__init__(settings, workers, workers.size)
        self.outer = OuterStep(settings.outer_lr, settings.outer_momentum)
        self.differs = workers.size > 1 or not self.outer.plain
        self.pieces: list[FullTarget] = []
        self.increments: Increments | None = None
        self.own: dict[str, Tensor] = {}

    # -- beginning and ending ---------------------------------------------------------------------------------------

    def begin(self, fit: Fit) -> list[Inherit]:
        """Take the parameters that an optimizer trains, as ``targets`` limits them."""
        held = {id(p) for optimizer in fit.optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = {n: p for n, p in fit.module.named_parameters() if id(p) in held and n not in fit.ignored}
        self.start(self.chosen(fit.module, trained))
        return []

    def chosen(self, module: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return the targets by name.

        Args:
            module: the module that the patterns of ``targets`` start from.
            trained: the candidates.

        Raises:
            ConfigError: nothing is left; or a pattern chooses a row block, or a weight that no optimizer trains.
        """
        patterns = self.settings.targets
        trained = {name: p for name, p in trained.items() if p.requires_grad}
        if patterns == "all" and trained:
            return dict(trained)
        rows: dict[int, int] = {}
        found = select(module, patterns).targets
        names = {id(p): name for name, p in trained.items()}
        for target in found.values():
            rows[id(target.layer.weight)] = rows.get(id(target.layer.weight), 0) + target.rows
        for name, target in found.items():
            W = cast(nn.Parameter, target.layer.weight)
            if id(W) not in names:
                raise ConfigError("targets", name, "is in no optimizer: configure_optimizers must hand over its weight")
            if rows[id(W)] * target.cols != W.numel():
                raise ConfigError("targets", name, f"is a part of {names[id(W)]}: with update=full a weight merges as a whole")
        return {name: p for name, p in trained.items() if id(p) in rows}

    def start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Train these separately from the other workers from now on; at this point all hold the same."""
        self.pieces = [FullTarget(name, p) for name, p in parameters.items()]
        if self.differs:
            self.increments = Increments(self.training_weights(), self.workers, self.settings.wire)
        self.begun = self.attached = True

    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Refuse a phase callback."""
        raise ConfigError("update", "full", "has no low-rank phase for a callback to begin: use lora or galore, or no callback")

    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Refuse a plan."""
        self.check_adopt(plan, fit)
        return []

    def release(self, fit: Fit) -> list[Inherit]:
        """Refuse a freeze."""
        self.check_adopt((), fit)
        return []

    @torch.no_grad()
    def detach(self) -> None:
        """Keep W as it is, or, after an exception, as the last merge left it."""
        if not self.attached:
            return
        if self.view.swapped_in and self.clock % self.settings.merge_every:
            self.own = dict(self.training_weights())
        elif not self.view.swapped_in and self.increments is not None:
            for piece in self.pieces:
                piece.p.copy_(self.increments.base[piece.name])
        self.attached = False
        self.view.keep()

    # -- what belongs to it -----------------------------------------------------------------------------------------

    def training_weights(self) -> Weights:
        """Return the W being trained, by name, also while the merged weights replace it."""
        found = {}
        for piece in self.pieces:
            kept = self.view.kept_weight(piece)
            found[piece.name] = piece.live() if kept is None else kept
        return found

    # -- the clock --------------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Count an optimizer step that was taken or attempted, and merge if it is time. Return whether W changed."""
        self.clock += 1
        if self.clock % self.settings.merge_every:
            return False
        self.merges += 1
        if self.increments is not None:
            sent, seconds = self.workers.sent, self.workers.seconds
            self._merge(self.increments)
            self.last_cost = self.workers.sent - sent, self.workers.seconds - seconds
        return True

    @torch.no_grad()
    def _merge(self, increments: Increments) -> None:
        # what all workers did since the last merge
        mean = increments.mean(self.training_weights(), overwrite=True)
        # the outer step; everyone continues from W_base
        for piece in self.pieces:
            base = increments.base[piece.name]
            self.outer.step(piece.name, base, mean[piece.name].to(base.dtype))
            piece.p.copy_(base)

    @torch.no_grad()
    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield every target with W_base + mean(Δ); changes nothing. All workers call it together."""
        if self.increments is None:
            return
        mean = self.increments.now(self.training_weights())
        for piece in self.pieces if wanted else ():
            yield piece, self.increments.base[piece.name] + mean[piece.name]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[str, Any] | None:
        """Return the targets' part of ``lte_state``."""
        return full_checkpoint.saved_targets(self)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other targets, of another wire or outer step."""
        full_checkpoint.check_targets(state, self)

    def load_state(self, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], str | None]:
        """Restore clock, weights, outer buffers and error feedback."""
        return full_checkpoint.load_targets(state, self)
