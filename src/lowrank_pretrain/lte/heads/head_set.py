"""Hold all heads of a model on this worker, and the clock by which they merge (LTE, arXiv 2402.16828, algorithm 1).

    window:  every head trains on its own data for T optimizer steps
    merge:   W ← W₀ + (s/N) Σ BₙAₙ; then heads continue (``reset=False``: each trains on next to what W holds of it)
             or start again (``reset=True``: B = 0, A drawn again, their optimizer state gone)

Without reset the updates telescope: W − W₀ has rank N·R at most, however many merges. With reset every merge adds rank.
``sequential`` adds one head's update a window, so W₀ moves on with every merge there too.

With an outer step W moves by what the merge before (B'A') did not have: W ← W + OuterStep((s/N) Σ (BₙAₙ − B'ₙA'ₙ)). Heads go
on next to their factors as merged. Momentum mixes increments in new proportions, so the rank of W − W₀ has no bound.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import HEAD_SETTINGS, Inherit
from lowrank_pretrain.core.targets import Target, families, parts
from lowrank_pretrain.core.wrapped import state_of
from lowrank_pretrain.lora import model as lora
from lowrank_pretrain.lora.products import RestPart
from lowrank_pretrain.lte import conversion
from lowrank_pretrain.lte.bare_groups import check_stacked
from lowrank_pretrain.lte.heads import checkpoint, prune, record
from lowrank_pretrain.lte.heads.layer import (
    HeadTarget,
    Held,
    MultiheadLoRALinear,
    draw_A,
    factor_parameters,
    give_heads,
    prev_names,
    take_heads,
    weight_of,
)
from lowrank_pretrain.lte.heads.record import Record, State
from lowrank_pretrain.lte.increments import refuse_nonfinite
from lowrank_pretrain.lte.local_targets import AllHeads, Fit, LocalTarget, LocalTargets
from lowrank_pretrain.lte.merge import PIECEMEAL, Exchange, Factors, chunks
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.settings import Settings
from lowrank_pretrain.lte.view import Writes
from lowrank_pretrain.lte.workers import Workers


class HeadSet(LocalTargets):
    """Hold the heads of a module, from ``convert`` to ``detach``.

    Args:
        settings: how they train.
        workers: who merges with whom.

    Attributes:
        accumulates: whether a merge adds to the W of the merge before, instead of being formed from the first W₀.
        unmoved: layers whose heads had not moved by the first merge.
        turn: in ``sequential``, number of the head whose turn it is among this worker's.
        parked: in ``sequential``, this worker's heads that await their turn.
        pending: a merge under way and the step after which it is applied (``overlap``).
        cost: bytes sent and seconds waited since the last merge.
        writes: detects other code's writes into W.
        outer: moves W by the merged increments.
    """

    stacked = True
    makes_adapters = True

    def __init__(self, settings: Settings, workers: Workers) -> None:
        joint = settings.mode == "joint"  # every worker has the same heads: nothing to merge
        merging = Workers() if joint else workers
        self.total = (1 if settings.mode == "sequential" else settings.heads) * merging.size
        super().__init__(settings, merging, self.total)
        self.outer = OuterStep(settings.outer_lr, settings.outer_momentum, settings.keep_on)
        self.accumulates = settings.starts_anew or not self.outer.plain
        self.turn = 0
        self.unmoved: list[str] = []
        self.pieces: list[HeadTarget] = []
        self.layers: dict[str, MultiheadLoRALinear | Held] = {}
        self.pending: tuple[Exchange, int] | None = None
        self.parked: dict[int, Record] = {}
        self.plan = Plan({})  # of the joint phase
        self._was_trained: dict[str, bool] = {}
        self.writes = Writes(self)
        self._touched_in_view: list[int] = []  # pieces that others had written into when the merged weights were formed
        self.cost = (0.0, 0.0)

    @classmethod
    def decides(cls, settings: Settings) -> Mapping[str, Any]:
        """Return settings that a phase callback cannot change: heads use the strategy's scale and train their A."""
        return {**HEAD_SETTINGS, **{key: getattr(settings, key) for key in ("alpha", "recompute_inputs", "frozen_dtype")}}

    # -- beginning and ending ---------------------------------------------------------------------------------------

    def begin(self, fit: Fit) -> list[Inherit]:
        """Give heads to the targets that the settings choose."""
        return conversion.begin_heads(self, fit)

    def check_adopt(self, names: Iterable[str], fit: Fit) -> None:
        """Refuse an optimizer that cannot train heads now, not days later at the freeze."""
        conversion.check_fit(self, names, fit)

    def adopt(self, plan: Plan, fit: Fit) -> list[Inherit]:
        """Give each target one synchronous adapter, averaged like all other parameters."""
        self.plan = plan
        return lora.Adapters(self.settings.alpha, recompute_inputs=self.settings.recompute_inputs).adopt(plan, fit.module)

    def release(self, fit: Fit) -> list[Inherit]:
        """Start every head from the joint phase's adapter, which is merged into W."""
        return conversion.begin_from_adapters(self, fit)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer that cannot train stacked heads."""
        check_stacked(optimizer, self.parameters().values())

    def head_ids(self) -> list[int]:
        """Return the ids of the live heads on this worker."""
        heads = self.settings.heads
        if self.settings.mode == "joint":
            return list(range(heads))
        first = self.workers.rank * heads
        return [first + self.turn] if self.settings.mode == "sequential" else list(range(first, first + heads))

    def convert(self, targets: Mapping[str, Target], ranks: Mapping[str, int]) -> list[Inherit]:
        """Give every target its heads; W freezes. Outputs do not change (B = 0).

        Args:
            targets: by name, all row blocks of a layer that are targets.
            ranks: rank by target name; 0: frozen without a head.

        Returns:
            What new parameters take over, for the optimizer.
        """
        by_layer: dict[str, list[Target]] = {}
        for target in targets.values():
            by_layer.setdefault(target.layer_name, []).append(target)
        for name, group in by_layer.items():
            layer, chosen = cast(MultiheadLoRALinear, group[0].layer), {t.part for t in group}
            self._was_trained[name] = layer.weight.requires_grad
            rest = [RestPart(*block) for block in parts(name, layer) if block[0] not in chosen]
            ranked = [(t, ranks[t.name]) for t in group if ranks[t.name]]
            self.layers[name] = layer
            seeded = self.settings.alpha, self.settings.seed, self.settings.recompute_inputs
            self.row_blocks += give_heads(name, layer, ranked, self.head_ids(), self.shared, rest, *seeded)
            wide = at_least_32(layer.weight.dtype)
            for (target, _), part in zip(ranked, layer._parts, strict=True):
                piece = HeadTarget(target.name, layer, part)
                if self.settings.mode != "joint" and not (self.accumulates and layer.weight.dtype == wide):
                    piece.base = piece.live().to(wide, copy=True)
                coded = "factors" if self.settings.codec else None
                piece.route = self.settings.route or coded or self.workers.cheaper_route(*piece.factors(), part.rows)
                self.pieces.append(piece)
        self.writes.mark()
        self.begun = self.attached = True
        return list(self.row_blocks)

    @torch.no_grad()
    def start_from(self, adapters: Mapping[str, tuple[nn.Parameter, Mapping[str, nn.Parameter]]]) -> list[Inherit]:
        """Make every head a copy of one adapter, which is merged into W; the layers' function does not change.

        Args:
            adapters: per layer A (ΣR, D) and B per part (O_part, R_part), of the ranks given to ``convert``.

        Returns:
            The parameters whose optimizer state the heads take over.
        """
        inherited = []
        for name, (A, B) in adapters.items():
            layer = self.layers[name]
            layer.lora_A.copy_(A.expand_as(layer.lora_A))
            inherited.append(Inherit(layer.lora_A, A, 0, 0, len(A)))
            for part, factor in layer.lora_B.items():
                factor.copy_(B[part].expand_as(factor))
                inherited.append(Inherit(factor, B[part], 0, 0, len(B[part])))
        if self.settings.mode != "joint":  # there W never holds what heads learn
            self._apply(Exchange(self.pieces, self.snapshot(), self.workers, self.total), outer=False)
        return [] if self.settings.reset else inherited

    def leave_out(self, names: Iterable[str]) -> tuple[dict[str, nn.Parameter], set[int]]:
        """Give some layers their plain classes back before their first merge; return W by layer, and removed ids."""
        names = list(names)
        gone = {name: self._live_layer(name) for name in names}
        ids = {id(p) for p in factor_parameters(gone).values()}
        ids |= {id(p) for layer in gone.values() for p in getattr(layer, "rest_weight", {}).values()}
        self.left_out_names += [piece.name for piece in self.pieces if piece.weight_name in gone]
        self.pieces = [piece for piece in self.pieces if piece.weight_name not in gone]
        for name, layer in gone.items():
            del self.layers[name]
            take_heads(layer)
            weight_of(layer).requires_grad_(self._was_trained.pop(name))
        self.writes.mark()
        return {name: cast(nn.Parameter, layer.weight) for name, layer in gone.items()}, ids

    def detach(self) -> None:
        """Give the layers their plain classes back, keeping W as it is; the heads stay here."""
        if not self.attached:
            return
        self.writes.keep(self._touched_in_view)
        for piece in self.pieces:
            if piece.base is None:
                piece.base = self.writes.training_rows(piece).clone()
        self.attached = False  # first: if anything below fails, a second try would meet layers without heads
        for name in list(self.layers):
            layer = self._live_layer(name)
            held = self.layers[name] = take_heads(layer)
            # who has frozen the layer meanwhile has frozen its heads
            weight_of(layer).requires_grad_(self._was_trained[name] and held.lora_A.requires_grad)
            for piece in self.pieces:
                if piece.layer is layer:
                    piece.layer = held
        self.view.keep()

    def _live_layer(self, name: str) -> MultiheadLoRALinear:
        return cast(MultiheadLoRALinear, self.layers[name])

    def live_layers(self) -> dict[str, MultiheadLoRALinear]:
        """Return the layers, which still have their heads."""
        return {name: self._live_layer(name) for name in self.layers}

    # -- what belongs to it -----------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the live heads' parameters by name, as the module would name them."""
        return factor_parameters(self.layers)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return W by layer."""
        return {name: weight_of(layer) for name, layer in self.live_layers().items()}

    def frozen_weights(self) -> list[nn.Parameter]:
        """Return every W, which is frozen while its heads train."""
        return list(self.weights().values())

    def unsynced(self, module: nn.Module) -> set[str]:
        """Return the names of tensors that DDP must neither broadcast nor average."""
        return set() if self.settings.mode == "joint" else self.hidden(module)

    def hidden(self, module: nn.Module) -> set[str]:
        """Return the names of heads and of what W holds of them, as the module gives them (``torch.compile`` adds to them)."""
        factors = {id(p) for p in self.parameters().values()}
        converted = {id(layer): layer for layer in self.layers.values()}
        names = {name for name, p in nn.Module.named_parameters(module) if id(p) in factors}
        # by name and not by tensor: before the first merge W holds nothing of them, and DDP would broadcast what comes later
        for prefix, layer in module.named_modules(remove_duplicate=False):
            if id(layer) in converted:
                names |= {f"{prefix}.{name}" if prefix else name for name in prev_names(converted[id(layer)])}
        return names

    def record(self) -> Record:
        """Return the live heads, factors and moments."""
        return record.record_of(self.layers, self.optimizers)

    def all_heads(self) -> AllHeads:
        """Yield per layer its name, A (N, ΣR, D), B (N, O, R) per part, and the parts. All workers call it together."""
        found = {
            (name, key): value
            for name, heads in record.record_of(self.layers, ()).items()
            for key, value in {"A": heads.A, **{f"B.{part}": B for part, B in heads.B.items()}}.items()
        }
        gathered = dict(zip(found, self.workers.gather_heads(list(found.values())), strict=True))
        for name, layer in self.layers.items():
            B = {part.name: gathered[name, f"B.{part.name}"] for part in layer._parts}
            yield name, gathered[name, "A"], B, layer._parts

    # -- the clock --------------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """Count an optimizer step that was taken or attempted, and merge if it is time. Return whether W changed."""
        self.clock += 1
        changed, before = False, (self.workers.sent, self.workers.seconds)
        # a merge that was begun earlier is due
        if self.pending is not None and self.clock >= self.pending[1]:
            exchange, self.pending = self.pending[0], None
            self._apply(exchange)
            changed = True
        # the window ends
        if self.settings.mode != "joint" and self.clock % self.settings.merge_every == 0:
            exchange = self.exchange(overlap=self.settings.overlap > 0)
            if self.settings.overlap:
                self.pending = exchange, self.clock + self.settings.overlap
            else:
                self._apply(exchange)
                changed = True
        self.cost = (self.cost[0] + self.workers.sent - before[0], self.cost[1] + self.workers.seconds - before[1])
        if changed:
            self.last_cost, self.cost = self.cost, (0.0, 0.0)
        return changed

    def snapshot(self) -> list[Factors]:
        """Return each piece's factors for a merge; in ``sequential`` with those of the same head that W holds."""
        result = []
        for piece in self.pieces:
            A, B = piece.factors()
            old = piece.prev_factors() if self.settings.mode == "sequential" else None
            if old is not None:
                A, B = torch.cat([A, old[0]], 1), torch.cat([B, -old[1]], 2)
            result.append((A, B))
        return result

    def exchange(self, overlap: bool = False) -> Exchange:
        """Send the present factors for a merge; with ``overlap`` send a copy, without waiting."""
        snapshot = self.snapshot()
        if overlap:
            snapshot = [(A.clone(), B.clone()) for A, B in snapshot]
        if self.settings.checks_finite:
            named = zip(self.pieces, snapshot, strict=True)
            refuse_nonfinite({f"{p.name} {key}": t for p, (A, B) in named for key, t in (("A", A), ("B", B))}, self.workers)
        return Exchange(self.pieces, snapshot, self.workers, self.total, overlap, self.settings.codec)

    @torch.no_grad()
    def _apply(self, exchange: Exchange, outer: bool = True) -> None:
        """Merge W, then the heads; with ``outer=False`` by the plain mean."""
        if self.merges == 0:
            self.unmoved = [name for name, layer in self.layers.items() if not any(B.any() for B in layer.lora_B.values())]
        # others' writes join W₀
        touched = self.writes.touched()
        self.warn_of_writes([self.pieces[index].name for index in touched])
        for index, (base, _) in self.writes.bases(touched).items():
            piece = self.pieces[index]
            (piece.live() if piece.base is None else piece.base).copy_(base)
        # W ← W₀ + (s/N) Σ BₙAₙ, or by the outer step
        for index, piece in enumerate(self.pieces):
            step = self.outer if outer else None
            plain, anew = self.outer.plain, self.settings.starts_anew
            new = exchange.updated(index) if plain else piece.stepped(exchange.summed(index), step, anew)
            piece.live().copy_(new)
            if self.accumulates and piece.base is not None:
                piece.base.copy_(new)
        self.writes.mark()
        self.merges += 1
        # the heads start again, or continue next to what W holds of them
        if self.settings.reset:
            self.renew()
        else:
            for layer in self.live_layers().values():
                layer.set_prev(*self._given(exchange, layer))
        if self.settings.mode == "sequential":
            self._next_turn()

    @torch.no_grad()
    def merged(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[LocalTarget, Tensor]]:
        """Yield every target with its merged rows, (O, D); changes nothing. All workers call it together."""
        with self.workers.uncounted():  # evaluation is not a merge
            touched = self._touched_in_view = self.writes.touched()
            bases = self.writes.bases(touched)
            still = self.writes.still(touched)
            snapshot = self.snapshot()
            for chunk in chunks([A.numel() + B.numel() for A, B in snapshot], PIECEMEAL if piecemeal else None):
                pieces = [self.pieces[index] for index in chunk]
                exchange = Exchange(pieces, [snapshot[index] for index in chunk], self.workers, self.total)
                exchange.wait()
                for at, index in enumerate(chunk if wanted else ()):
                    base, held = bases[index][0] if index in bases else None, pieces[at].held
                    if held is None:
                        rows = exchange.updated(at, base)
                    else:  # W and what heads have learnt since the last merge
                        base = pieces[at].merge_base(held.dtype) if base is None else base
                        rows = base + (exchange.summed(at) - held)
                    # where nothing was learnt since, what was written is what is seen, bit for bit
                    yield pieces[at], bases[index][1] if index in still else rows

    # -- heads after a merge ----------------------------------------------------------------------------------------

    def _given(self, exchange: Exchange, layer: MultiheadLoRALinear) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a layer's factors that this worker gave to a merge: A (H, ΣR, D) and B per part."""
        if self.settings.mode == "sequential":
            return layer.lora_A, dict(layer.lora_B.items())
        mine = {p.part.name: f for p, f in zip(self.pieces, exchange.snapshot, strict=True) if p.layer is layer}
        A = torch.cat([mine[part.name][0] for part in layer._parts], 1)
        return A, {part.name: mine[part.name][1] for part in layer._parts}

    @torch.no_grad()
    def renew(self) -> None:
        """Restart the heads after a resetting merge: B = 0, A drawn again, their optimizer state gone (or pruned)."""
        self.draw(self.merges)
        for optimizer in self.optimizers:
            if self.settings.prune is None:
                prune.reset_moments(optimizer, self._held_by(optimizer))
            else:
                prune.prune_moments(optimizer, self._held_by(optimizer), self.settings.prune)

    @torch.no_grad()
    def draw(self, redraw: int) -> None:
        """Start the live heads: A drawn, B = 0, nothing of them in W."""
        for piece in self.pieces:
            A, B = piece.factors()
            for k, head in enumerate(self.head_ids()):
                A[k].copy_(draw_A(piece.name, head, redraw, piece.part.rank, A.shape[2], self.settings.seed))
            B.zero_()
        for layer in self.live_layers().values():
            layer.set_prev(None, None)

    def _held_by(self, optimizer: Optimizer) -> list[nn.Parameter]:
        return [p for p in self.parameters().values() if state_of(optimizer, p)]

    def _next_turn(self) -> None:
        """Park the head whose window is over, and attach the next one (``sequential``)."""
        if self.settings.heads == 1:
            return
        self.parked[self.turn] = {name: heads.pick(0, 1) for name, heads in self.record().items()}
        self.turn = (self.turn + 1) % self.settings.heads
        for optimizer in self.optimizers:
            prune.reset_moments(optimizer, self._held_by(optimizer))
        if (parked := self.parked.pop(self.turn, None)) is None:
            self.draw(0)  # its first turn
        else:
            record.put_layers(parked, self.live_layers())
            record.put_moments(parked, self.layers, self.optimizers)

    # -- what to tell the user --------------------------------------------------------------------------------------

    def warn_at_start(self) -> None:
        """Warn of heads that cannot reach full rank together."""
        if self.settings.reset or self.settings.mode == "joint":
            return
        narrow = min(min(p.part.rows, p.factors()[0].shape[2]) for p in self.pieces)
        rank, count = max(p.part.rank for p in self.pieces), self.settings.heads * self.workers.size
        if count * rank < narrow and not self.outer.momentum:
            rank_zero_warn(
                f"LTE: {count} heads of rank {rank} reach updates of rank {count * rank} only, the matrices have "
                f"{narrow} or more: use more heads, a higher rank, or reset=True"
            )

    def warn_after_first_merge(self, module: nn.Module) -> None:
        """Warn of layers whose heads no gradient has reached, where others have moved."""
        if self.unmoved and len(self.unmoved) < len(self.layers):
            names = ", ".join(dict.fromkeys(families(module, self.unmoved).values()))
            rank_zero_warn(
                f"LTE: no gradient in the {self.settings.merge_every} steps before the first merge reached the heads of "
                f'{names}: they train only if later steps use them. If none does, leave them out ("!name")'
            )

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def saved_state(self) -> dict[str, Any] | None:
        """Return the heads' part of ``lte_state``."""
        return checkpoint.saved_heads(self)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of other heads."""
        checkpoint.check_heads(state, self)

    def load_state(self, state: Mapping[str, Any]) -> tuple[dict[str, State], str | None]:
        """Restore the heads of a checkpoint."""
        return checkpoint.load_heads(state, self)
