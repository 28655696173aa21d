"""All heads of a model on this worker, and the clock by which they merge (LTE, arXiv 2402.16828, algorithm 1).

    window:  every head trains on its own data for T optimizer steps
    merge:   W ← W₀ + (s/N) Σ BₙAₙ; then heads live on (``reset=False``: each trains on beside what W holds of it)
             or start anew (``reset=True``: B = 0, A drawn again, their optimizer state gone)

Without reset the updates telescope: W − W₀ has rank N·R at most, however many merges. With reset every merge adds rank.
``sequential`` adds one head's update a window, so W₀ moves on with every merge there too.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.targets import Target, parts
from lowrank_pretrain.lora.function import RestPart
from lowrank_pretrain.lte.heads import prune, record
from lowrank_pretrain.lte.heads.layer import MODES, Shared, draw_A, give_heads, prev_names, take_heads
from lowrank_pretrain.lte.heads.record import Record
from lowrank_pretrain.lte.heads.view import MergedView
from lowrank_pretrain.lte.merge import Exchange, Factors, Piece
from lowrank_pretrain.lte.workers import Workers
from lowrank_pretrain.lte.written import everyones, leaf, mean_of, stamps, tell


@dataclass(frozen=True)
class Settings:
    """How heads train and merge; ``LTEStrategy`` explains each."""

    heads: int = 4
    merge_every: int = 10
    alpha: float | None = None
    mode: str = MODES[0]
    reset: bool = False
    route: str | None = None
    overlap: int = 0
    prune: float | None = None
    seed: int | None = None

    @property
    def accumulates(self) -> bool:
        """Whether a merge adds to the W of the merge before, instead of being formed from the first W₀."""
        return self.reset or self.mode == "sequential"


class HeadSet:
    """Heads of a module, from ``convert`` to ``take_off``.

    Args:
        settings: how they train.
        workers: who merges with whom.

    Attributes:
        clock: optimizer steps taken.
        merges: merges applied.
        pieces: the targets, in the module's order.
        last_cost: bytes that this worker sent for the last merge, and seconds that it waited.
        unmoved: layers whose heads had not moved by the first merge.
        turn: in ``sequential``, whose turn it is among this worker's heads.
        view: the merged weights, to be looked at.
        pending: a merge under way and the step after which it is applied (``overlap``).
    """

    def __init__(self, settings: Settings, workers: Workers) -> None:
        self.settings = settings
        self.workers = workers if settings.mode != "joint" else Workers()  # every worker has the same heads: nothing to merge
        live = 1 if settings.mode == "sequential" else settings.heads
        self.total = live * self.workers.size
        self.shared = Shared(settings.mode, self.total)
        self.clock = self.merges = self.turn = 0
        self.unmoved: list[str] = []
        self.pieces: list[Piece] = []
        self.layers: dict[str, nn.Module] = {}
        self.optimizers: list[Optimizer] = []
        self.pending: tuple[Exchange, int] | None = None
        self.parked: dict[int, Record] = {}  # `sequential`: this worker's heads whose turn it is not
        self.view = MergedView(self)
        self._was_trained: dict[str, bool] = {}
        self._stamps: list[int] = []  # of every piece's rows, as the last merge left them
        self._told: set[str] = set()
        self.left_out_names: list[str] = []  # targets that turned out to be none in the first step
        self._gone: dict[str, dict[str, Tensor]] = {}
        self._written: dict[str, Tensor] = {}  # after a fit
        self.last_cost = self._cost = (0.0, 0.0)  # of a merge: bytes sent from here, seconds waited
        self.worn = True  # whether the layers still have their heads

    # -- putting on and taking off ----------------------------------------------------------------------------------

    def head_ids(self) -> list[int]:
        """Ids of the heads that live here now."""
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
        inherited = []
        for name, group in by_layer.items():
            layer, chosen = group[0].layer, {t.part for t in group}
            self._was_trained[name] = layer.weight.requires_grad
            rest = [RestPart(*block) for block in parts(name, layer) if block[0] not in chosen]
            ranked = [(t, ranks[t.name]) for t in group if ranks[t.name]]
            self.layers[name] = layer
            inherited += give_heads(
                name, layer, ranked, self.head_ids(), self.shared, rest, self.settings.alpha, self.settings.seed
            )
            wide = at_least_32(layer.weight.dtype)
            for (target, _), part in zip(ranked, layer._parts, strict=True):
                piece = Piece(target.name, layer, part)
                if self.settings.mode != "joint" and not (self.settings.accumulates and layer.weight.dtype == wide):
                    piece.base = piece.rows().to(wide, copy=True)
                piece.choose_route(self.settings.route, self.workers.size)
                self.pieces.append(piece)
        self.mark()
        return inherited

    @torch.no_grad()
    def start_from(self, adapters: Mapping[str, tuple[Tensor, Mapping[str, Tensor]]]) -> list[Inherit]:
        """Every head becomes a copy of one adapter, which W holds from now on; the layers' function stays what it was.

        Args:
            adapters: per layer A (ΣR, D) and B per part (O_part, R_part), of the ranks given to ``convert``.

        Returns:
            What the heads' optimizer state starts from.
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
            self._apply(self.exchange())
        return [] if self.settings.reset else inherited

    def leave_out(self, names: Collection[str]) -> dict[str, nn.Module]:
        """Give some layers their plain classes back before anything of them was merged; returns them by name."""
        gone = {name: self.layers.pop(name) for name in names}
        self._gone = {name: record.factors({name: layer}) | dict(_rest_weights(name, layer)) for name, layer in gone.items()}
        self.pieces = [piece for piece in self.pieces if piece.layer_name not in names]
        for name, layer in gone.items():
            take_heads(layer)
            leaf(layer).requires_grad_(self._was_trained.pop(name))
        self.mark()
        return gone

    def parameters_of(self, names: Collection[str]) -> set[int]:
        """Ids of the parameters that layers had which were left out."""
        return {id(p) for name in names for p in self._gone[name].values()}

    def take_off(self) -> None:
        """Give the layers their plain classes back, with W as it is (merged, if the view is on); heads stay here."""
        self._written = {self.pieces[i].name: self.view.training_rows(self.pieces[i]).clone() for i in self.view.touched}
        for piece in self.pieces:
            if piece.base is None:
                piece.base = self.view.training_rows(piece).clone()
        self.worn = False  # whatever comes: a second try would meet layers that have none
        for name, layer in self.layers.items():
            held = self.layers[name] = take_heads(layer)
            leaf(layer).requires_grad_(self._was_trained[name])
            for piece in self.pieces:
                if piece.layer is layer:
                    piece.layer = held
        self.view.settle()

    # -- the clock --------------------------------------------------------------------------------------------------

    def after_step(self) -> bool:
        """One optimizer step was taken or attempted: merge if it is time. Returns whether W changed."""
        self.clock += 1
        changed, before = False, (self.workers.sent, self.workers.seconds)
        if self.pending is not None and self.clock >= self.pending[1]:
            exchange, self.pending = self.pending[0], None
            self._apply(exchange)
            changed = True
        if self.settings.mode != "joint" and self.clock % self.settings.merge_every == 0:
            exchange = self.exchange(overlap=self.settings.overlap > 0)
            if self.settings.overlap:
                self.pending = exchange, self.clock + self.settings.overlap
            else:
                self._apply(exchange)
                changed = True
        self._cost = (self._cost[0] + self.workers.sent - before[0], self._cost[1] + self.workers.seconds - before[1])
        if changed:
            self.last_cost, self._cost = self._cost, (0.0, 0.0)
        return changed

    def snapshot(self) -> list[Factors]:
        """What each piece brings to a merge: its factors, in ``sequential`` beside those that W holds of the same head."""
        result = []
        for piece in self.pieces:
            A, B = piece.factors()
            if self.settings.mode == "sequential" and piece.layer.has_prev:
                old_A, old_B = prev_of(piece)
                A, B = torch.cat([A, old_A], 1), torch.cat([B, -old_B], 2)
            result.append((A, B))
        return result

    def exchange(self, overlap: bool = False) -> Exchange:
        """Send what is to be merged now; with ``overlap`` a copy of it, without waiting."""
        snapshot = self.snapshot()
        if overlap:
            snapshot = [(A.clone(), B.clone()) for A, B in snapshot]
        return Exchange(self.pieces, snapshot, self.workers, self.total, overlap)

    @torch.no_grad()
    def _apply(self, exchange: Exchange) -> None:
        """The merge itself: W, then the heads."""
        if self.merges == 0:
            self.unmoved = [name for name, layer in self.layers.items() if not any(B.any() for B in layer.lora_B.values())]
        touched = self.touched()
        tell([self.pieces[index].name for index in touched], self._told)
        for index, (base, _) in self.bases(touched).items():
            if self.pieces[index].base is not None:
                self.pieces[index].base.copy_(base)
            else:
                self.pieces[index].rows().copy_(base)
        self.write(exchange)
        self.merges += 1
        if self.settings.reset:
            self.renew()
        else:
            for layer in self.layers.values():
                layer.set_prev(*self._own(exchange, layer))
        if self.settings.mode == "sequential":
            self._next_turn()

    @torch.no_grad()
    def write(self, exchange: Exchange) -> None:
        """W from a merge, and W₀ where merges accumulate."""
        for index, piece in enumerate(self.pieces):
            new = exchange.updated(index)
            piece.rows().copy_(new)
            if self.settings.accumulates and piece.base is not None:
                piece.base.copy_(new)
        self.mark()

    # -- who else writes into W -------------------------------------------------------------------------------------

    def mark(self) -> None:
        """W is what it should be: whatever differs at the next merge was written by others."""
        if self.settings.mode != "joint":
            self._stamps = self._stamp()

    def _stamp(self) -> list[int]:
        """By piece a stamp of its W, which all row blocks of a layer share where all of them are targets."""
        held: dict[tuple[int, int], Tensor] = {}
        keys = []
        for index, piece in enumerate(self.pieces):
            whole = not piece.layer._rest
            keys.append((id(piece.layer), -1 if whole else index))
            if keys[-1] not in held:
                held[keys[-1]] = self.view.training_weight(piece) if whole else self.view.training_rows(piece)
        found = dict(zip(held, stamps(list(held.values())), strict=True))
        return [found[key] for key in keys]

    def touched(self) -> list[int]:
        """Numbers of the pieces that anyone has written into since the last merge, on any worker. All together."""
        if self.settings.mode == "joint":
            return []
        everyone = everyones(self._stamp(), self.workers)
        self._apart = {i for i in range(len(self.pieces)) if any(theirs[i] != everyone[0][i] for theirs in everyone)}
        return [i for i, was in enumerate(self._stamps) if any(theirs[i] != was for theirs in everyone)]

    def written(self) -> dict[str, Tensor]:
        """By target W as it stands, (O, D), where others wrote into it since the last merge. All together."""
        if not self.worn:
            return self._written
        return {self.pieces[i].name: self.view.training_rows(self.pieces[i]) for i in self.touched()}

    @torch.no_grad()
    def bases(self, touched: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Of pieces that were written into what merges add to from now on, W₀, and W as it is now. All together.

        W is the workers' mean where they wrote different things.
        """
        if not touched:
            return {}
        now = {}
        for index in touched:
            rows = self.view.training_rows(self.pieces[index])
            now[index] = mean_of(rows, self.workers) if index in self._apart else rows
        chosen = [index for index in touched if self.pieces[index].base is not None]
        then = dict(zip(chosen, self._as_merged([self.pieces[index] for index in chosen]), strict=True))
        result = {}
        for index in touched:
            piece, W = self.pieces[index], now[index]
            if piece.base is None:
                base = W.to(at_least_32(W.dtype))
            else:
                base = piece.base + (W.to(piece.base) - then[index].to(W.dtype))  # what was added since, exactly 0 elsewhere
            result[index] = base, W
        return result

    def _as_merged(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """What the last merge made of these pieces, by the sum that made it; of W₀ if there was none."""
        if self.settings.accumulates or not any(piece.layer.has_prev for piece in pieces):
            return [piece.base for piece in pieces]
        sent = self.workers.sent
        exchange = Exchange(pieces, [prev_of(piece) for piece in pieces], self.workers, self.total)
        self.workers.sent = sent
        return [exchange.updated(index) for index in range(len(pieces))]

    def still(self, touched: Sequence[int]) -> set[int]:
        """Which of these pieces no head of any worker has learnt anything of since the last merge. All together."""
        if not touched:
            return set()
        flags = []
        for index in touched:
            piece = self.pieces[index]
            A, B = piece.factors()
            old = prev_of(piece) if piece.layer.has_prev else None
            flags.append(int(not B.any() if old is None else torch.equal(A, old[0]) and torch.equal(B, old[1])))
        everyone = everyones(flags, self.workers)
        return {index for at, index in enumerate(touched) if all(theirs[at] for theirs in everyone)}

    def _own(self, exchange: Exchange, layer: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """What this worker's heads of a layer gave to a merge: A (H, ΣR, D) and B per part."""
        if self.settings.mode == "sequential":
            return layer.lora_A, dict(layer.lora_B.items())
        mine = {p.part.name: f for p, f in zip(self.pieces, exchange.snapshot, strict=True) if p.layer is layer}
        A = torch.cat([mine[part.name][0] for part in layer._parts], 1)
        return A, {part.name: mine[part.name][1] for part in layer._parts}

    @torch.no_grad()
    def renew(self) -> None:
        """After a resetting merge: B = 0, A drawn again, nothing of the heads in W, their optimizer state gone (or pruned)."""
        self.draw(self.merges)
        for optimizer in self.optimizers:
            if self.settings.prune is None:
                prune.reset_moments(optimizer, self._held_by(optimizer))
            else:
                prune.prune_moments(optimizer, self._held_by(optimizer), self.settings.prune)

    @torch.no_grad()
    def draw(self, redraw: int) -> None:
        """The live heads begin: A drawn, B = 0, nothing of them in W."""
        for piece in self.pieces:
            A, B = piece.factors()
            for k, head in enumerate(self.head_ids()):
                A[k].copy_(draw_A(piece.name, head, redraw, piece.part.rank, A.shape[2], self.settings.seed))
            B.zero_()
        for layer in self.layers.values():
            layer.set_prev(None, None)

    def _held_by(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The live heads' parameters that the optimizer has state of."""
        return [p for p in self.factors().values() if p in optimizer.state]

    def _next_turn(self) -> None:
        """``sequential``: park the head whose window is over, and put the next one on."""
        if self.settings.heads == 1:
            return
        self.parked[self.turn] = record.choose(self.record(), 0, 1)
        self.turn = (self.turn + 1) % self.settings.heads
        for optimizer in self.optimizers:
            prune.reset_moments(optimizer, self._held_by(optimizer))
        parked = self.parked.pop(self.turn, None)
        if parked is None:
            self.draw(0)  # its first turn
        else:
            record.put_layers(parked, self.layers)
            record.put_moments(parked, self.layers, self.optimizers)

    def record(self) -> Record:
        """The live heads, factors and moments."""
        return record.of_layers(self.layers) | record.of_moments(self.layers, self.optimizers)

    def factors(self) -> dict[str, nn.Parameter]:
        """The live heads' parameters by name, as the module would name them."""
        return record.factors(self.layers)

    def left_out(self, module: nn.Module) -> set[str]:
        """What DDP must neither broadcast nor average."""
        return set() if self.settings.mode == "joint" else head_names(module, self.layers)


def _rest_weights(name: str, layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the row blocks that train in full next to heads."""
    return ((f"{name}.rest_weight.{part}", p) for part, p in getattr(layer, "rest_weight", {}).items())


def prev_of(piece: Piece) -> Factors:
    """What W holds of a piece's heads: A (H, R, D) and B (H, O, R)."""
    index = piece.layer._parts.index(piece.part)
    return piece.layer.prev_A[:, piece.part.a : piece.part.a + piece.part.rank], piece.layer.prev_B[index]


def head_names(module: nn.Module, layers: Mapping[str, nn.Module]) -> set[str]:
    """What DDP must neither broadcast nor average, and no checkpoint shows: heads and what W holds of them.

    Names as the module gives them (``torch.compile`` adds to them).
    """
    factors = {id(p) for p in record.factors(layers).values()}
    converted = {id(layer) for layer in layers.values()}
    names = {name for name, p in module.named_parameters() if id(p) in factors}
    # by name and not by tensor: before the first merge W holds nothing of them, and DDP would broadcast what comes later
    for prefix, layer in module.named_modules(remove_duplicate=False):
        if id(layer) in converted:
            names |= {f"{prefix}.{name}" if prefix else name for name in prev_names(layer)}
    return names
