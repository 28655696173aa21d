"""DiLoCo and local SGD: train whole weights on each worker, and merge their changes (``update="full"``).

    window:  worker n trains Wₙ by any optimizer, whose state stays with it
    merge:   Δ = mean(Wₙ − W_base), through the wire; the outer step moves W_base by Δ; everyone continues from W_base

DiLoCo (arXiv 2311.08105, Algorithm 1) has an outer step with Nesterov momentum; ``outer_lr=1, outer_momentum=0`` is local SGD,
and with ``merge_every=1`` and SGD inside it is DDP.

With ``overlap=τ`` training goes on while increments travel: what was sent at step s is applied at step s + τ. A worker then
continues from W_base and what it has learnt since step s: W ← W_base + (W − W at s), so no step is lost, and W_base has the
same bits everywhere. (Streaming DiLoCo, arXiv 2501.18512, takes the mean of W and W_base there, which halves both.)

With ``fragments=k`` the targets are divided into k parts of nearly equal size, which merge in turn, each every ``merge_every``
steps (Streaming DiLoCo too): a merge sends a k-th, so the largest number of bytes in a step falls with the mean.

Targets are, as DiLoCo has it, everything that trains: matrices, biases, norms and embeddings. ``targets`` limits them to the
weights of the layers that it chooses; biases and all else then belong to the rest, which follows ``sync_rest``.

Evaluation between merges sees W_base + mean(Δ), without the outer step; at a merge of all targets that is W.
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
from lowrank_pretrain.lte.underway import Pending
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


def fragments_of(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """Divide targets into fragments of nearly equal size, the same on all workers.

    The largest goes first, each to the smallest fragment so far; a fragment keeps the order of `sizes`.

    Args:
        sizes: numbers by target.
        count: how many fragments, at most as many as targets.

    Example:
        >>> fragments_of({"a": 1, "b": 4, "c": 2, "d": 3}, 2)
        [['a', 'b'], ['c', 'd']]
    """
    place = {name: at for at, name in enumerate(sizes)}
    held: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], place[name])):
        to = min(range(count), key=lambda at: (loads[at], len(held[at]), at))
        held[to].append(name)
        loads[to] += sizes[name]
    return [sorted(names, key=place.__getitem__) for names in held]


class FullSet(WholeTargets):
    """Train whole weights separately on each worker, from ``start`` to ``detach``.

    Next to weights, gradients and the optimizer's state it keeps, in numbers of the size of float32 (of W, if that is larger):

    ====================  ==============================================================================================
    W_base                one copy of the targets (none for one worker with a plain outer step)
    ``outer_momentum``    one more
    a wire below float32  one more, and 1/N of one on N workers
    a merge               parts of the targets, one after another: 11 to 32 MiB in all on a CPU
    one with ``overlap``  a copy of W as sent, of the fragment's size, and Δ or its messages: 1.1 to 2 copies while it is under
                          way, 2.3 where it is read and written
    ====================  ==============================================================================================

    ``keep_on="cpu"`` moves the first three rows to (pinned) main memory; the last two stay on the device, where the
    overlapped one is smaller by the number of ``fragments``. ``benchmarks/lte_memory.py`` counts them.

    Args:
        settings: ``targets``, ``merge_every``, ``overlap``, ``fragments``, ``keep_on``, ``wire`` and the outer step's are used.
        workers: who merges with whom. A lone worker takes the outer step too; a plain outer step then costs nothing.

    Attributes:
        outer: moves W_base.
        divided: the targets' names by fragment.
        fragments: W_base and the wire of each fragment; empty where a merge changes nothing.
        pending: a merge under way.
        cost: bytes sent and seconds waited since the last merge.
        own: W of this worker by name, where a fit ended between two merges.
    """

    low_rank = False

    def __init__(self, settings: Settings, workers: Workers) -> None:
        super().__init__(settings, workers, workers.size)
        self.outer = OuterStep(settings.outer_lr, settings.outer_momentum, settings.keep_on)
        self.differs = workers.size > 1 or not self.outer.plain
        self.pieces: list[FullTarget] = []
        self.divided: list[list[str]] = []
        self.fragments: list[Increments] = []
        self.pending: Pending | None = None
        self.cost = (0.0, 0.0)
        self.own: dict[str, Tensor] = {}
        self._merged_last: set[str] = set()  # targets that are equal on all workers right after a merge

    # -- beginning and ending ---------------------------------------------------------------------------------------

    def begin(self, fit: Fit) -> list[Inherit]:
        """Take the parameters that an optimizer trains, as ``targets`` limits them."""
        held = {id(p) for optimizer in fit.optimizers for group in optimizer.param_groups for p in group["params"]}
        trained = {n: p for n, p in nn.Module.named_parameters(fit.module) if id(p) in held and n not in fit.ignored}
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
        """Train these separately from the other workers from now on; at this point all hold the same.

        Raises:
            ConfigError: more fragments than targets.
        """
        count = self.settings.fragments
        if count > len(parameters):
            raise ConfigError("fragments", count, f"must be at most the number of targets, {len(parameters)}")
        self.divided = fragments_of({name: p.numel() for name, p in parameters.items()}, count)
        # in the order of the fragments: merges yield them so
        self.pieces = [FullTarget(name, parameters[name]) for names in self.divided for name in names]
        weights, settings = self.training_weights(), self.settings
        if self.differs:
            parts = [{name: weights[name] for name in names} for names in self.divided]
            self.fragments = [Increments(part, self.workers, settings.wire, settings.keep_on) for part in parts]
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
        if self.view.swapped_in:
            if not self.all_merged:
                self.own = dict(self.training_weights())
            if self.pending is not None:
                self.pending.arrived()  # for a checkpoint after the fit
        else:
            self.pending = None  # others may be gone
            weights = self.parameters()
            for increments in self.fragments:
                increments.storage.wait()
                for name, base in increments.base.items():
                    weights[name].copy_(base)
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

    @property
    def all_merged(self) -> bool:
        """Return whether all workers hold the same W, which is W_base."""
        settings = self.settings
        whole = settings.fragments == 1 and settings.overlap == 0 and self.pending is None
        return whole and self.clock % settings.merge_every == 0

    def after_step(self) -> bool:
        """Count an optimizer step that was taken or attempted, and merge if it is time. Return whether W changed."""
        self.clock += 1
        changed, before = False, (self.workers.sent, self.workers.seconds)
        # a merge that was begun earlier: its second half, and its end
        if self.pending is not None:
            if self.clock >= self.pending.due - self.settings.overlap // 2:
                self.pending.advance()
            if self.clock >= self.pending.due:
                changed = self._finish()
        # a fragment's turn
        if self.clock % self.settings.interval == 0:
            if self.pending is not None:  # resumed with shorter windows
                changed = self._finish()
            changed = self._begin() or changed
        self.cost = (self.cost[0] + self.workers.sent - before[0], self.cost[1] + self.workers.seconds - before[1])
        if changed:
            self.last_cost, self.cost = self.cost, (0.0, 0.0)
        return changed

    @torch.no_grad()
    def _begin(self) -> bool:
        """Send the increments of the fragment whose turn it is; without overlap apply them. Return whether W changed."""
        if not self.fragments:  # one worker, and a plain mean
            self.merges += 1
            return True
        self.meet()
        number = (self.clock // self.settings.interval - 1) % len(self.fragments)
        increments, overlap, weights = self.fragments[number], self.settings.overlap, self.training_weights()
        if not overlap:
            return self._apply(increments, increments.mean(weights, overwrite=True), {})
        sent = {name: weights[name].clone() for name in increments.base}
        self.pending = Pending(number, self.clock + overlap, sent, increments.begin(weights))
        return False

    @torch.no_grad()
    def _finish(self) -> bool:
        """Apply the merge under way; return True: W changed."""
        pending, self.pending = cast(Pending, self.pending), None
        increments = self.fragments[pending.number]
        return self._apply(increments, increments.by_name(pending.arrived()), pending.sent)

    def _apply(self, increments: Increments, mean: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> bool:
        """Step W_base by the workers' mean of Δ, and W after it; return True: W changed.

        Args:
            increments: of a fragment.
            mean: by name; overwritten.
            sent: W as it was sent, by name, if training has gone on since.
        """
        weights = self.parameters()
        for name, increment in mean.items():
            # the outer step
            base = increments.moved(name, increment, self.outer)
            # everyone continues from W_base, and from what it has learnt since its increment was sent
            W, before = weights[name], sent.get(name)
            W.copy_(base if before is None else base + (W.to(base.dtype) - before.to(base.dtype)))
        self.merges += 1
        self._merged_last = set() if sent else set(increments.base)
        return True

    def differing(self) -> set[str]:
        """Return the names of targets that differ between workers after a merge: of other fragments, or moved during it."""
        return set(self.parameters()) - self._merged_last

    def agreed(self) -> dict[str, Tensor]:
        """Return what all workers share of these: their W_base, by name."""
        unlike = self.differing()
        for increments in self.fragments:
            increments.storage.wait()
        return {f"{n} (W_base)": b for increments in self.fragments for n, b in increments.base.items() if n in unlike}

    def meet(self) -> None:
        """Check that all workers have taken equally many steps. All workers call it together.

        Raises:
            RuntimeError: one has not.
        """
        clocks = [clock for (clock,) in self.workers.gather_numbers([self.clock])]
        for rank, clock in enumerate(clocks):
            if clock != clocks[0]:
                raise RuntimeError(
                    f"LTE: worker {rank} has taken {clock} optimizer steps and worker 0 {clocks[0]}: all workers must take "
                    "equally many between two merges"
                )

    @torch.no_grad()
    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield every target with W_base + mean(Δ); changes nothing. All workers call it together."""
        pieces, weights = {piece.name: piece for piece in self.pieces}, self.training_weights()
        for increments in self.fragments:
            mean = increments.now(weights)
            for name, part in mean.items() if wanted else ():
                yield pieces[name], increments.storage.get(increments.base[name], part.device) + part

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
