"""LTE × GaLore: workers step ``GaLoreAdamW`` on their own full weights, and send what they did as factors.

    window:  worker n's targets are Wₙ = Cₙ·W_base + Pₙ·Dₙ (``galore.local``); Pₙ stays what the window's first step found
    merge:   W_base ← mean(C)·W_base + (1/N) Σ PₙDₙ, in one order on all workers; W = W_base, D = 0, C = 1

``basis="own"``: every worker follows its own gradients, so a merge may add rank N·r; P and D travel, r(m+n) numbers a matrix.
``basis="shared"``: one basis from all workers' sketches; D alone travels at a merge, and r·m numbers at the refresh.
Moments stay with their worker. The model is not converted. A worker that is alone is plain GaLore, and pays for nothing.

D is r×k.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW
from lowrank_pretrain.galore.local import LocalUpdate
from lowrank_pretrain.lte.heads.head_set import Settings
from lowrank_pretrain.lte.heads.layer import Shared
from lowrank_pretrain.lte.matrix import Matrix, check_group
from lowrank_pretrain.lte.merge import Exchange, cheaper_route
from lowrank_pretrain.lte.workers import Workers
from lowrank_pretrain.lte.written import everyones, mean_of, stamps, tell

BASES = ("own", "shared")


class ProjectedSet:
    """The targets of a module that this worker trains apart from the others; in the strategy it stands where heads do.

    Args:
        settings: ``merge_every`` and ``route`` are used.
        workers: who merges with whom.
        optimizers: the module's; the targets are the projected parameters of the GaLore ones among them.
        module: the LightningModule.
        basis: one of ``BASES``.

    Attributes:
        clock: optimizer steps taken or attempted.
        merges: merges done.
        last_cost: bytes that this worker sent for the last merge and the refresh before it, and seconds that it waited.
        pieces: the targets.

    Raises:
        ConfigError: no GaLoreAdamW, no target, or a setting of it that leaves the subspace.
    """

    layers: Mapping[str, nn.Module] = {}  # none is converted

    def __init__(
        self, settings: Settings, workers: Workers, optimizers: Sequence[Optimizer], module: nn.Module, basis: str = "own"
    ) -> None:
        self.settings, self.workers, self.basis = settings, workers, basis
        self.shared = Shared("parallel", workers.size)
        self.clock = self.merges = 0
        self.last_cost = (0.0, 0.0)
        self._sketch = SketchMean(workers) if basis == "shared" else None
        self.worn = True
        self.optimizers: list[Optimizer] = []  # set once the strategy has told rest and targets apart
        self._galore = [o for o in optimizers if isinstance(o, GaLoreAdamW)]
        names = {id(p): name for name, p in module.named_parameters()}
        self.pieces = [Matrix(names[id(p)], p, o) for o in self._galore for p, e in o.lookup().items() if e.slot is not None]
        if not self.pieces:
            raise ConfigError("update", "galore", "needs GaLoreAdamW with a projected group from configure_optimizers")
        for piece in self.pieces:
            check_group(piece.slot.group)
        self._told: set[str] = set()
        self.keep_time()
        self.view = MergedView(self)
        if workers.size == 1:
            return
        for piece in self.pieces:
            piece.local = piece.optimizer.local[piece.p] = LocalUpdate(piece.p)
            piece.route = cheaper_route(settings.route, workers.size, *piece.factors(), piece.shape[0])
        for optimizer in self._galore:
            optimizer.shared = self._sketch

    def keep_time(self) -> None:
        """Every target refreshes at the first step after a merge."""
        for optimizer in self._galore:
            for group in optimizer.param_groups:
                group["update_proj_gap"], group["stagger"] = self.settings.merge_every, False
            optimizer._index = None  # it holds the staggered offsets

    def factors(self) -> dict[str, nn.Parameter]:
        """What trains apart here, by name."""
        return {piece.name: piece.p for piece in self.pieces}

    def left_out(self, module: nn.Module) -> set[str]:
        """What DDP must neither broadcast nor average."""
        return set() if self.workers.size == 1 else set(self.factors())

    # -- the clock --------------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """One optimizer step was taken or attempted: merge if it is time. Returns whether W changed."""
        self.clock += 1
        if self.clock % self.settings.merge_every:
            return False
        self.merges += 1
        if self.workers.size > 1:
            before = self.workers.sent, self.workers.seconds
            for piece, base in self.merged():
                piece.local.restart(piece.p, piece.whole(base))
            sent, seconds = self._sketch.cost() if self._sketch else (0.0, 0.0)
            self.last_cost = self.workers.sent - before[0] + sent, self.workers.seconds - before[1] + seconds
        return True

    def sent_so_far(self) -> list[float]:
        """Bytes sent for the last merge, and since then: for a checkpoint (the same on every worker)."""
        return [self.last_cost[0], self._sketch._cost[0] if self._sketch else 0.0]

    def take_sent(self, last: float, since: float) -> None:
        """The inverse of `sent_so_far`."""
        self.last_cost = last, 0.0
        if self._sketch:
            self._sketch._cost = since, 0.0

    def send(self) -> tuple[Exchange | list[Tensor], Tensor]:
        """One merge's traffic: the factors' exchange, or the mean of D by target; and the mean of C, (targets,)."""
        C = torch.tensor([p.local.C for p in self.pieces], dtype=torch.float64)
        factors = [piece.factors() for piece in self.pieces]
        if self.basis == "shared":
            sent = [A[0].clone() for A, _ in factors]
            self.workers.average(sent)
        else:
            sent = Exchange(self.pieces, factors, self.workers, self.workers.size)
        self.workers.average([C])
        return sent, C

    def merged(self) -> Iterator[tuple[Matrix, Tensor]]:
        """What a merge makes of every target, d×k, one after the other. All workers call it together."""
        for piece in self.pieces:
            piece.local.absorb(piece.slot, self.view.training_weight(piece))
        everyone = everyones([int(piece.local.X is not None) for piece in self.pieces], self.workers)
        touched = [any(theirs[index] for theirs in everyone) for index in range(len(self.pieces))]
        tell([piece.name for piece, added in zip(self.pieces, touched, strict=True) if added], self._told)
        sent, C = self.send()
        for index, (piece, share) in enumerate(zip(self.pieces, C.tolist(), strict=True)):
            piece.share = share
            if isinstance(sent, Exchange):
                new = sent.updated(index)
            else:
                new = torch.addmm(piece.base, piece.factors()[1][0], sent[index])
            piece.share = 1.0
            if touched[index]:
                added = torch.zeros_like(piece.local.base) if piece.local.X is None else piece.local.X
                new = new + piece.slot.matrix(mean_of(added, self.workers))
            yield piece, new

    # -- the end ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def take_off(self) -> None:
        """The optimizer goes on alone, from W as the view has it, else as the last merge left it; a checkpoint's needs stay."""
        for optimizer in self._galore:
            optimizer.local, optimizer.shared = {}, None
        if not self.shared.viewing and self.workers.size > 1:
            for piece in self.pieces:
                piece.p.copy_(piece.local.base)
        self.worn = False
        self.view.settle()

    def form(self) -> None:
        """This worker's own W, from what a checkpoint gave back."""
        self.keep_time()
        for piece in self.pieces:
            if piece.local is not None:
                piece.local.form(piece.slot)
                exact, piece.exact = piece.exact, None
                if exact is not None:
                    piece.p.detach().copy_(exact)
                    piece.local.mark(piece.p)


class MergedView:
    """The merged weights in W's place, to be looked at, and away again; a worker's own weights are not touched.

    Args:
        targets: whose.
    """

    def __init__(self, targets: ProjectedSet) -> None:
        self._targets = targets
        self._kept: list[Tensor] = []
        self._stamps: list[int] = []

    def training_weight(self, piece: Matrix) -> Tensor | None:
        """This worker's own W where something else is in its place, else ``None``."""
        if not self._kept:
            return None
        return next(kept for of, kept in zip(self._targets.pieces, self._kept, strict=True) if of is piece)

    def look(self, piecemeal: bool = False, writes: bool = True) -> None:
        """Put them in place. All workers must call it together.

        Args:
            piecemeal: for a checkpoint, of which nobody writes into what is in place.
            writes: ``False``: only help the worker that writes; here W stays what it is.
        """
        of = self._targets
        if of.shared.viewing:
            return
        if of.workers.size > 1:
            before = of.workers.sent, of.workers.seconds
            with torch.inference_mode(False), torch.no_grad():
                merged = []
                for piece, new in of.merged():  # in the parameter's own memory layout: after the fit they stay
                    if writes:
                        merged.append(torch.empty_like(piece.p).copy_(piece.whole(new)))
                if not writes:
                    of.workers.sent, of.workers.seconds = before
                    return
                self._kept = [piece.p.data for piece in of.pieces]
                for piece, new in zip(of.pieces, merged, strict=True):
                    piece.p.data = new
            of.workers.sent, of.workers.seconds = before  # looking is no merge
        of.shared.viewing = True
        self._stamps = [] if piecemeal else stamps([piece.p for piece in of.pieces])

    def look_away(self) -> None:
        """Undo ``look``."""
        if self._targets.shared.viewing:
            for piece, kept in zip(self._targets.pieces, self._kept, strict=False):
                piece.p.data = kept
            self.settle()

    @torch.no_grad()
    def look_away_with_care(self) -> None:
        """Undo ``look``, and keep what anyone wrote into the weights meanwhile. All workers must call it together."""
        of = self._targets
        if not of.shared.viewing or of.workers.size == 1:
            self.look_away()
            return
        now = everyones(stamps([piece.p for piece in of.pieces]), of.workers)
        touched = [i for i, was in enumerate(self._stamps) if any(theirs[i] != was for theirs in now)]
        seen = {index: of.pieces[index].p.detach().clone() for index in touched}
        self.look_away()
        if not touched:
            return
        with torch.inference_mode(False):
            added = {}
            for index, (piece, new) in enumerate(of.merged()):
                if index in seen:
                    added[index] = seen[index] - piece.whole(new).to(seen[index].dtype)
            for index, what in added.items():
                of.pieces[index].p.add_(what)

    def settle(self) -> None:
        """What is in place stays."""
        self._stamps = []
        self._kept = []
        self._targets.shared.viewing = False


class SketchMean:
    """``basis="shared"``: every worker's sketch M MᵀP, averaged, makes the next basis; the first one is worker 0's.

    All workers must take part, so a target without a gradient on one of them steps there with a zero one.

    Args:
        workers: who shares it.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._cost = (0.0, 0.0)

    def cost(self) -> tuple[float, float]:
        """Bytes sent and seconds waited since the last call."""
        cost, self._cost = self._cost, (0.0, 0.0)
        return cost

    def _counted(self, call: Callable[..., None], tensors: list[Tensor]) -> None:
        before = self._workers.sent, self._workers.seconds
        call(tensors)
        self._cost = (
            self._cost[0] + self._workers.sent - before[0], self._cost[1] + self._workers.seconds - before[1]
        )  # fmt: skip

    def same(self, bases: list[Tensor], averaged: bool) -> None:
        """Worker 0's bases for all; none of those that were made of one sketch by all."""
        if not averaged:
            self._counted(self._workers.spread, bases)

    def mean(self, sketch: Tensor) -> None:
        """The workers' mean, in place."""
        self._counted(self._workers.average, [sketch])

    def agree(self, flag: Tensor) -> Tensor:
        """True only if it is on all workers."""
        votes = flag.to(torch.float32)
        self._workers.average([votes], counted=False)
        return votes == 1.0
