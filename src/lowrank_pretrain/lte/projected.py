"""LTE × GaLore: step ``GaLoreAdamW`` on each worker's own full weights, and send the changes as factors.

    window:  worker n's targets are Wₙ = Cₙ·W_base + Pₙ·Dₙ (``galore.local``); Pₙ stays what the window's first step found
    merge:   W_base ← mean(C)·W_base + (1/N) Σ PₙDₙ, in one order on all workers; W = W_base, D = 0, C = 1

``basis="own"``: every worker follows its own gradients, so a merge may add rank N·r; P and D travel, r(m+n) numbers a matrix.
``basis="shared"``: one basis from all workers' sketches; D alone travels at a merge, and r·m numbers at the refresh.
Moments stay with their worker. The model is not converted. A lone worker is plain GaLore, at no extra cost.

Layout d×k, the projected side first: P d×r, D r×k.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Inherit, adopters
from lowrank_pretrain.core.targets import all_targets
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.galore.groups import RESIDUALS
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.galore.projection import Projected
from lowrank_pretrain.lora.products import Part
from lowrank_pretrain.lte import projected_checkpoint
from lowrank_pretrain.lte.increments import refuse_nonfinite
from lowrank_pretrain.lte.local_targets import Fit, LocalTarget, WholeTargets
from lowrank_pretrain.lte.merge import Exchange, Factors
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.wire import Codec, DenseMean
from lowrank_pretrain.lte.workers import Workers


class ProjectedTarget:
    """Hold one matrix that a worker trains by GaLore on its own: W = C·W_base + P·D.

    Args:
        name: the parameter's name in the module.
        p: the parameter.
        optimizer: the optimizer whose target it is.

    Attributes:
        local: this worker's update; ``None`` if the worker is alone.
        exact: W from a checkpoint, if others had written into it.
        share: mean(C), while a merge is being formed.
    """

    def __init__(self, name: str, p: nn.Parameter, optimizer: GaLoreAdamW) -> None:
        self.name, self.p, self.optimizer = name, p, optimizer
        self.local: LocalUpdate | None = None
        self.exact: Tensor | None = None
        self.route = "factors"
        self.share = 1.0
        d, k = self.slot.matrix(p).shape
        self.shape = (d, k)
        self.part = Part(name, 0, d, 0, self.slot.rank, 1.0)

    @property
    def slot(self) -> Projected:
        """Return its present projection."""
        return cast(Projected, self.optimizer.projected(self.p))

    @property
    def weight_name(self) -> str:
        """Return the parameter's name."""
        return self.name

    @property
    def update(self) -> LocalUpdate:
        """Return this worker's update, which merges with those of others."""
        return cast(LocalUpdate, self.local)

    def live(self) -> Tensor:
        """Return a view of the weight that is in place now."""
        return self.p.detach()

    def as_live(self, merged: Tensor) -> Tensor:
        """Return a d×k tensor in the parameter's own shape."""
        return (merged if self.slot.left else merged.t()).reshape(self.p.shape)

    def write(self, merged: Tensor, into: Tensor) -> None:
        """Write a merged d×k weight into a tensor of the parameter's shape."""
        into.copy_(self.as_live(merged))

    def merge_base(self, dtype: torch.dtype) -> Tensor:
        """Return mean(C)·W_base, d×k."""
        return self.slot.matrix(self.update.base) * self.share

    def factors(self) -> Factors:
        """Return D (1, r, k) and P (1, d, r); zeros before the first step."""
        if self.local is None or self.local.D is None:
            dtype = torch.float32 if self.local is None else self.local.base.dtype
            d, k = self.shape
            D = torch.zeros(1, self.part.rank, k, dtype=dtype, device=self.p.device)
            return D, torch.zeros(1, d, self.part.rank, dtype=dtype, device=self.p.device)
        P, D = self.local.factors(self.optimizer.state[self.p])
        return D[None].contiguous(), P[None].contiguous()

    def bytes_sent(self) -> int:
        """Return the bytes of this worker's factors."""
        return sum(factor.numel() * factor.itemsize for factor in self.factors())


class ProjectedSet(WholeTargets):
    """Hold the targets of a GaLoreAdamW, from ``start`` to ``detach``.

    Args:
        settings: ``merge_every``, ``route`` and ``basis`` are used.
        workers: who merges with whom.

    Attributes:
        sketch: with ``basis="shared"``, makes the common basis.
        outer: moves W_base by the merged increments.
        alone: nothing is merged: one worker, and a plain outer step.
    """

    def __init__(self, settings: Settings, workers: Workers) -> None:
        super().__init__(settings, workers, workers.size)
        self.outer = OuterStep(settings.outer_lr, settings.outer_momentum, settings.keep_on)
        self.alone = workers.size == 1 and self.outer.plain
        self.differs = not self.alone
        self.pieces: list[ProjectedTarget] = []
        self.basis = settings.basis
        self.sketch = SketchMean(workers, self._apart_so_far) if settings.basis == "shared" else None
        self._galore: list[GaLoreAdamW] = []

    def _apart_so_far(self) -> bool:
        """Return whether workers may hold bases of their own: those of a joint phase in which they merged."""
        return self.settings.before == "merge" and self.merges == 0

    # -- beginning and ending ---------------------------------------------------------------------------------------

    def begin(self, fit: Fit) -> list[Inherit]:
        """Take the targets of the optimizer's groups."""
        self.start(fit.optimizers, fit.module)
        return []

    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Refuse targets that the optimizer could not take, or whose updates would leave the subspace."""
        targets, names, optimizer = all_targets(fit.module), list(names), _projecting(fit)
        optimizer.check_adopt(names, fit.module)
        chosen = {id(targets[name].layer.weight) for name in names}
        for p, entry in optimizer.lookup().items():
            if id(p) in chosen:
                check_group(entry.group)

    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Hand the plan to the optimizer: projections that all workers average."""
        _projecting(fit).adopt(plan, fit.module)
        return []

    def release(self, fit: Fit) -> list[Inherit]:
        """Make the optimizer's targets this worker's own, at the freeze."""
        _projecting(fit).release()
        self.start(fit.optimizers, fit.module)
        return []

    def start(self, optimizers: Sequence[Optimizer], module: nn.Module) -> None:
        """Train the targets separately from the other workers from now on.

        Args:
            optimizers: the module's; the targets are the projected parameters of the GaLore ones among them.
            module: the module that the targets' names start from.

        Raises:
            ConfigError: no GaLoreAdamW, no target, or a setting of it that leaves the subspace.
        """
        self._galore = [o for o in optimizers if isinstance(o, GaLoreAdamW)]
        names = {id(p): name for name, p in nn.Module.named_parameters(module)}
        for optimizer in self._galore:
            projected = [cast(nn.Parameter, p) for p, entry in optimizer.lookup().items() if entry.slot is not None]
            self.pieces += [ProjectedTarget(names[id(p)], p, optimizer) for p in projected]
        if not self.pieces:
            raise ConfigError("update", "galore", "needs GaLoreAdamW with a projected group from configure_optimizers")
        for piece in self.pieces:
            check_group(piece.slot.group)
        self.keep_time()
        self.begun = self.attached = True
        if self.alone:
            return
        for piece in self.pieces:
            piece.local = piece.optimizer.local[piece.p] = LocalUpdate(piece.p)
            coded = "factors" if self.settings.codec else None
            piece.route = self.settings.route or coded or self.workers.cheaper_route(*piece.factors(), piece.shape[0])
        for optimizer in self._galore:
            optimizer.shared = self.sketch

    def keep_time(self) -> None:
        """Make every target refresh at the first step after a merge."""
        for optimizer in self._galore:
            for group in optimizer.param_groups:
                group["update_proj_gap"], group["stagger"] = self.settings.merge_every, False
            optimizer._index = None  # it holds the staggered offsets

    @torch.no_grad()
    def detach(self) -> None:
        """Release the optimizer, keeping W (or the last merge's W), and the state that a checkpoint needs."""
        if not self.attached:
            return
        for optimizer in self._galore:
            optimizer.local, optimizer.shared = {}, None
        if not self.view.swapped_in and not self.alone:
            for piece in self.pieces:
                piece.p.copy_(piece.update.base)
        self.attached = False
        self.view.keep()

    # -- the clock --------------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Count an optimizer step that was taken or attempted, and merge if it is time. Return whether W changed."""
        self.clock += 1
        if self.clock % self.settings.merge_every:
            return False
        self.merges += 1
        if not self.alone:
            before = self.workers.sent, self.workers.seconds
            if self.settings.checks_finite:
                refuse_nonfinite({piece.name: piece.factors()[0] for piece in self.pieces}, self.workers)
            for piece, base in self._merged(self.settings.codec):
                piece.update.restart(piece.p, self._stepped(piece, piece.as_live(base)))
            sent, seconds = self.sketch.cost() if self.sketch else (0.0, 0.0)
            self.last_cost = self.workers.sent - before[0] + sent, self.workers.seconds - before[1] + seconds
        return True

    def _stepped(self, piece: ProjectedTarget, merged: Tensor) -> Tensor:
        """Return W_base after the outer step, in the parameter's shape."""
        if self.outer.plain:
            return merged
        base = piece.update.base.clone()
        self.outer.step(piece.name, base, merged - base)
        return base

    def sent_so_far(self) -> list[float]:
        """Return the bytes sent for the last merge, and since then: for a checkpoint (the same on every worker)."""
        return [self.last_cost[0], self.sketch.sent[0] if self.sketch else 0.0]

    def take_sent(self, last: float, since: float) -> None:
        """Restore what ``sent_so_far`` returned."""
        self.last_cost = last, 0.0
        if self.sketch:
            self.sketch.sent = since, 0.0

    def send(self, codec: Codec | None = None) -> tuple[Exchange | list[Tensor], Tensor]:
        """Send one merge; return the factors' exchange, or the mean of D by target, and the mean of C, (targets,).

        Args:
            codec: writes the factors in few bits; ``None``: uncoded, for evaluation.
        """
        C = torch.tensor([p.update.C for p in self.pieces], dtype=torch.float64, device="cpu")
        factors = [piece.factors() for piece in self.pieces]
        sent: Exchange | list[Tensor]
        if self.basis != "shared":
            sent = Exchange(self.pieces, factors, self.workers, self.workers.size, codec=codec)
        elif codec is None:
            sent = [D[0].clone() for D, _ in factors]
            self.workers.average(sent)
        else:
            sizes = [D.numel() for D, _ in factors]
            mean = DenseMean(self.workers, codec.wire, sum(sizes)).mean(torch.cat([D.flatten().float() for D, _ in factors]))
            sent = [part.view(D[0].shape).to(D.dtype) for part, (D, _) in zip(mean.split(sizes), factors, strict=True)]
        self.workers.average([C])
        return sent, C

    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield every target with its merged weight, d×k; changes nothing. All workers call it together."""
        with self.workers.uncounted():  # evaluation is not a merge
            yield from self._merged()

    def _merged(self, codec: Codec | None = None) -> Iterator[tuple[ProjectedTarget, Tensor]]:
        # others' writes into W
        for piece in self.pieces:
            piece.update.absorb(piece.slot, self.view.kept_weight(piece))
        everyone = self.workers.gather_numbers([int(piece.update.X is not None) for piece in self.pieces])
        touched = [any(theirs[index] for theirs in everyone) for index in range(len(self.pieces))]
        self.warn_of_writes([piece.name for piece, added in zip(self.pieces, touched, strict=True) if added])
        # mean(C)·W_base + (1/N) Σ PₙDₙ, and their mean
        sent, C = self.send(codec)
        for index, (piece, share) in enumerate(zip(self.pieces, C.tolist(), strict=True)):
            piece.share = share
            if isinstance(sent, Exchange):
                new = sent.updated(index)
            else:
                new = torch.addmm(piece.merge_base(sent[index].dtype), piece.factors()[1][0], sent[index])
            piece.share = 1.0
            if touched[index]:
                added = torch.zeros_like(piece.update.base) if piece.update.X is None else piece.update.X
                new = new + piece.slot.matrix(self.workers.mean_of(added))
            yield piece, new

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[str, Any] | None:
        """Return the targets' part of ``lte_state``."""
        return projected_checkpoint.saved_targets(self)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other targets."""
        projected_checkpoint.check_targets(state, self)

    def load_state(self, state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], str | None]:
        """Restore clock, W_base, C and D from a checkpoint."""
        return projected_checkpoint.load_targets(state, self)

    def finish_load(self) -> None:
        """Form this worker's own W from the restored state."""
        self.keep_time()
        for piece in self.pieces:
            if piece.local is not None:
                piece.local.form(piece.slot)
                exact, piece.exact = piece.exact, None
                if exact is not None:
                    piece.p.detach().copy_(exact)
                    piece.local.mark(piece.p)


def _projecting(fit: Fit) -> GaLoreAdamW:
    """Return the one optimizer that projects.

    Raises:
        ConfigError: there is none, or more than one.
    """
    found = [*adopters(fit.optimizers)]
    if len(found) != 1:
        raise ConfigError("update", "galore", "needs one GaLoreAdamW from configure_optimizers (a group without rank is AdamW)")
    return cast(GaLoreAdamW, found[0])


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse settings with which P D does not represent a worker's update.

    Raises:
        ConfigError: naming the optimizer's key.
    """
    outside = "leaves the subspace, so that no factors could tell what a worker did"
    for key, wrong, why in (
        ("refresh", "track", "moves the basis at every step, and between merges it must stay: use subspace or svd"),
        *(("residual", kind, f"{outside}: use null") for kind in RESIDUALS if kind),
        ("variant", "apollo", f"{outside}: use galore"),
        ("layerwise", True, "steps before the rest is averaged: use false"),
    ):
        if group[key] == wrong:
            raise ConfigError(key, wrong, f"{why} (LTE with update=galore)")


class SketchMean:
    """Make one basis for all workers (``basis="shared"``): each one's sketch M MᵀP, averaged; the first basis is worker 0's.

    All workers must take part, so a target without a gradient on one of them steps there with a zero gradient.

    Args:
        workers: who shares it.
        apart: tells whether they hold different bases now: then a sketch is none of all, and worker 0's basis is taken.

    Attributes:
        sent: bytes sent and seconds waited since ``cost`` was asked.
    """

    def __init__(self, workers: Workers, apart: Callable[[], bool] = lambda: False) -> None:
        self._workers, self._apart = workers, apart
        self.sent = (0.0, 0.0)

    def cost(self) -> tuple[float, float]:
        """Return bytes sent and seconds waited since the last call."""
        cost, self.sent = self.sent, (0.0, 0.0)
        return cost

    def _counted(self, call: Callable[..., None], tensors: list[Tensor]) -> None:
        before = self._workers.sent, self._workers.seconds
        call(tensors)
        self.sent = (
            self.sent[0] + self._workers.sent - before[0], self.sent[1] + self._workers.seconds - before[1]
        )  # fmt: skip

    def same(self, bases: list[Tensor], averaged: bool) -> None:
        """Broadcast worker 0's bases, except those that all workers computed from one sketch."""
        if not averaged or self._apart():
            self._counted(self._workers.spread, bases)

    def mean(self, sketch: Tensor) -> None:
        """Average a sketch over the workers, in place."""
        self._counted(self._workers.average, [sketch])

    def agree(self, flag: Tensor) -> Tensor:
        """Return a flag that is true only if it is true on all workers."""
        votes = flag.to(torch.float32)
        self._workers.average([votes], counted=False)
        return votes == 1.0
