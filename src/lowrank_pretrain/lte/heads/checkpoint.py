"""Save the heads in a checkpoint as if one process held all N heads, and resume on any number of workers.

    checkpoint["lte_state"] = {format, mode, reset, alpha, merge_every, targets {name: rank}, heads (of a worker), workers,
        clock, merges, turn, at_merge, record {"kind|name|key": (N, …)}, missing {"kind|name|key": [workers without it]},
        base {target: (O, D)}, written {target: (1 or w, O, D)}, pending, …}

``written``: the present W of targets that other code has written into since the last merge.

At a merge nothing of a head is outside W, so heads may be left out or added and the function stays what it is. Between
merges another number of heads merges first: the checkpoint's ``state_dict`` is that merge.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lowrank_pretrain.checkpoints.format import FORMAT
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.checkpoint import check_saved, how_merged
from lowrank_pretrain.lte.heads import record
from lowrank_pretrain.lte.heads.layer import draw_A
from lowrank_pretrain.lte.heads.record import NUMBER, LayerHeads, Record, State
from lowrank_pretrain.lte.merge import Exchange, Factors

if TYPE_CHECKING:
    from lowrank_pretrain.lte.heads.head_set import HeadSet


def saved_heads(heads: "HeadSet") -> dict[str, Any] | None:
    """Return the heads' part of ``lte_state``, plain types and tensors, on the worker that writes; ``None`` on the others.

    All workers call it together.
    """
    settings, local = heads.settings, record.to_file(_all_turns(heads))
    if heads.pending is not None:
        for piece, (A, B) in zip(heads.pieces, heads.pending[0].snapshot, strict=True):
            local |= {f"pending|{piece.name}|A": A.contiguous(), f"pending|{piece.name}|B": B}
    written = heads.workers.to_first(heads.writes.rows())
    everyone = heads.workers.to_first(local)
    if everyone is None or written is None:
        return None
    missing = {key: [w for w, t in enumerate(values) if t is None] for key, values in everyone.items()}
    bases = {p.name: heads.writes.training_rows(p) if p.base is None else p.base for p in heads.pieces}
    return {
        "format": FORMAT, "mode": settings.mode, "reset": settings.reset, "alpha": settings.alpha,
        "merge_every": settings.merge_every, "targets": {p.name: p.part.rank for p in heads.pieces},
        "heads": settings.heads, "workers": heads.workers.size, "clock": heads.clock, "merges": heads.merges,
        "turn": heads.turn, "at_merge": heads.clock % settings.merge_every == 0 and heads.pending is None,
        "record": {key: _stack(values) for key, values in everyone.items()},
        "missing": {key: workers for key, workers in missing.items() if workers},
        "left_out": list(heads.left_out_names),
        "written": {name: _differing(values) for name, values in written.items()},
        "base": {name: base.cpu().clone() for name, base in bases.items()},
        "pending": None if heads.pending is None else heads.pending[1],
        "sent": [heads.cost[0], heads.last_cost[0]],  # the same on every worker
        **({} if heads.outer.plain else {"outer": {name: t.cpu().clone() for name, t in heads.outer.state_dict().items()}}),
        **how_merged(settings),
    }  # fmt: skip


def _stack(values: list[Tensor | None]) -> Tensor:
    """Return all workers' heads one after another; zeros for a worker without them."""
    like = next(value for value in values if value is not None)
    return torch.cat([torch.zeros_like(like) if value is None else value for value in values])


def _differing(values: list[Tensor | None]) -> Tensor:
    """Return (w, O, D), or (1, O, D) where all workers hold the same."""
    held = cast(list[Tensor], values)  # all workers report the same written targets
    same = all(torch.equal(value, held[0]) for value in held)
    return torch.stack(held[:1] if same else held)


def check_heads(state: Mapping[str, Any], heads: "HeadSet") -> None:
    """Refuse a checkpoint of other heads.

    Raises:
        ConfigError: another mode, reset, alpha, rank or other targets; or a newer format.
    """
    check_saved(state, "lora", heads.settings)
    for key in ("mode", "reset", "alpha"):
        mine = getattr(heads.settings, key)
        if state[key] != mine:
            raise ConfigError(key, mine, f"the checkpoint was trained with {state[key]}")
    here = {p.name: p.part.rank for p in heads.pieces}
    if set(here) != set(state["targets"]):
        other = sorted(set(here) ^ set(state["targets"]))[0]
        raise ConfigError("targets", other, f"the checkpoint has {len(state['targets'])} targets, this run {len(here)}")
    for name, rank in here.items():
        if state["targets"][name] != rank:
            raise ConfigError("rank", rank, f"the checkpoint's {name} has rank {state['targets'][name]}")


def load_heads(state: Mapping[str, Any], heads: "HeadSet") -> tuple[dict[str, State], str | None]:
    """Restore the heads; on entry the module's W is the checkpoint's merged one. All workers call it together.

    Args:
        state: ``lte_state``.
        heads: the heads, freshly converted.

    Returns:
        The heads' optimizer state here, by factor, and what to tell the user, if anything.
    """
    everyone = record.from_file(state["record"])
    pending = {key: value for key, value in state["record"].items() if key.startswith("pending|")}
    settings, there = heads.settings, state["heads"] * state["workers"]
    heads.clock, heads.merges = state["clock"], state["merges"]
    sent, last = state.get("sent", (0.0, 0.0))
    heads.cost, heads.last_cost = (sent, 0.0), (last, 0.0)
    heads.outer.load_state_dict(state.get("outer", {}), {piece.name: piece.live() for piece in heads.pieces})
    same_layout = (settings.heads, heads.workers.size) == (state["heads"], state["workers"])
    # 1 × 4 and 4 × 1 hold the same heads; in `sequential` a turn is a worker's, so only the same layout resumes in mid-window
    same = same_layout or (settings.mode == "parallel" and settings.heads * heads.workers.size == there)
    if settings.mode == "joint":
        same = settings.heads == state["heads"]
        everyone = _pick(everyone, 0, state["heads"])  # every worker had the same
    if not same:
        mine, message = _restore_other(state, heads, everyone)
        heads.writes.mark()
        return _states(mine), message
    mine = _restore_same(state, heads, everyone, pending)
    if same_layout and settings.mode == "parallel":
        _drop_missing(mine, state.get("missing", {}), heads.workers.rank)
    return _states(mine), None


def _all_turns(heads: "HeadSet") -> Record:
    """Return this worker's heads; in ``sequential`` those of all turns, with zeros for heads not yet drawn."""
    live = heads.record()
    if heads.settings.mode != "sequential":
        return live
    turns = [live if k == heads.turn else heads.parked.get(k, {}) for k in range(heads.settings.heads)]
    # in main memory, where the heads that a resume has parked lie already
    return {name: LayerHeads.stack([turn[name].cpu() if turn else None for turn in turns]) for name in live}


def _put(heads: "HeadSet", mine: Record) -> Record:
    """Attach this worker's heads, or in ``sequential`` park all but the one whose turn it is; return the live ones."""
    if heads.settings.mode == "sequential":
        stages = next(iter(mine.values())).stage
        turns = [_pick(mine, k, 1) for k in range(heads.settings.heads)]
        heads.parked = {k: turns[k] for k in range(len(turns)) if k != heads.turn and stages[k] != record.UNBORN}
        mine = turns[heads.turn]
    record.put_layers(mine, heads.live_layers())
    return mine


def _pick(everyone: Record, first: int, count: int) -> Record:
    return {name: held.pick(first, count) for name, held in everyone.items()}


def _mine(heads: "HeadSet") -> tuple[int, int]:
    """Return the index of this worker's first head over all its turns, and the number of its heads."""
    return 0 if heads.settings.mode == "joint" else heads.workers.rank * heads.settings.heads, heads.settings.heads


@torch.no_grad()
def _restore_same(state: Mapping[str, Any], heads: "HeadSet", everyone: Record, pending: Mapping[str, Tensor]) -> Record:
    """Restore all heads, their number being unchanged; return this worker's."""
    heads.turn = state["turn"]
    mine = _put(heads, _pick(everyone, *_mine(heads)))
    # W₀
    for piece in heads.pieces:
        base = state["base"][piece.name]
        if piece.base is not None:
            piece.base.copy_(base)
        piece.live().copy_(base)
        piece.held = None
    # W as of the last merge, by the sum that made it: bit for bit what the run that saved it trained on
    before = [piece.prev_factors() for piece in heads.pieces]
    if heads.settings.mode == "parallel" and not heads.settings.reset and any(before):
        sent = heads.workers.sent
        exchange = Exchange(heads.pieces, [cast(Factors, factors) for factors in before], heads.workers, heads.total)
        for index, piece in enumerate(heads.pieces):
            if heads.outer.plain:
                piece.live().copy_(exchange.updated(index))
            else:  # W is what the outer step made of it
                piece.held = exchange.summed(index).clone()
        heads.workers.sent = sent
    heads.writes.mark()
    # others' writes since then join at the next merge, as they would have
    for piece in heads.pieces:
        rows = state.get("written", {}).get(piece.name)
        if rows is not None:
            piece.live().copy_(rows[heads.workers.rank if len(rows) == heads.workers.size else 0])
    # a merge under way
    if state["pending"] is not None:
        first, count = _mine(heads)
        snapshot = []
        for piece in heads.pieces:
            A, B = (pending[f"pending|{piece.name}|{key}"][first : first + count].clone() for key in "AB")
            snapshot.append((A.to(piece.layer.lora_A), B.to(piece.layer.lora_A)))
        with heads.workers.uncounted():  # the run before has counted it
            exchange = Exchange(heads.pieces, snapshot, heads.workers, heads.total, overlap=True)
        heads.pending = exchange, state["pending"]
    return mine


@torch.no_grad()
def _restore_other(state: Mapping[str, Any], heads: "HeadSet", everyone: Record) -> tuple[Record, str | None]:
    """Restore another number of heads: W holds everything, kept heads continue, new ones begin. Return this worker's."""
    settings, message = heads.settings, None
    there, here = state["heads"] * state["workers"], settings.heads * heads.workers.size
    if settings.mode == "joint":
        raise ConfigError(
            "heads", settings.heads, f"the checkpoint has {there}, and in mode joint W does not hold their update"
        )
    if not state["at_merge"]:
        message = (
            f"LTE: the checkpoint lies between two merges of {there} heads; they were merged first, {here} go on from there"
        )
    if settings.mode == "sequential" or settings.reset:
        # W holds everything: every head starts again
        heads.merges += not state["at_merge"]
        heads.turn, heads.parked = 0, {}
        heads.draw(heads.merges)
        for piece in heads.pieces:
            if piece.base is not None:
                piece.base.copy_(piece.live())
        return {}, message
    for held in everyone.values():
        held.prev_A, held.prev_B = held.A, dict(held.B)  # W holds every head as it is now
    everyone = {name: held.pick(0, here).extend(here) for name, held in everyone.items()}
    for held in everyone.values():
        held.stage.fill_(record.MERGED)  # of a new head W holds nothing, which zeros say
    for piece in heads.pieces:  # A of the heads that are new
        A = everyone[piece.weight_name].A
        for head in range(there, here):
            rows = slice(piece.part.a, piece.part.a + piece.part.rank)
            A[head, rows] = draw_A(piece.name, head, heads.merges, piece.part.rank, A.shape[2], settings.seed).to(A)
    mine = _put(heads, _pick(everyone, *_mine(heads)))
    # W₀ such that W₀ + (s/N) Σ over the heads that stayed is W; with an outer step W itself, and that sum
    before = [cast(Factors, piece.prev_factors()) for piece in heads.pieces]
    kept = Exchange(heads.pieces, before, heads.workers, heads.total)
    for index, piece in enumerate(heads.pieces):
        if not heads.outer.plain:
            piece.held = kept.summed(index).clone()
            if piece.base is not None:
                piece.base.copy_(piece.live())
            continue
        base = cast(Tensor, piece.base)  # merges do not accumulate here
        W = piece.live().to(base.dtype)
        base.zero_()
        base.copy_(W - kept.updated(index))
    return mine, message


def _drop_missing(mine: Record, missing: Mapping[str, list[int]], rank: int) -> None:
    """Drop optimizer state that this worker did not have."""
    for name, held in mine.items():
        for factor, moments in held.moments.items():
            lost = [key for key in moments if rank in missing.get(f"moment|{record.factor_name(name, factor)}|{key}", ())]
            for key in lost:
                del moments[key]


def _states(mine: Record) -> dict[str, State]:
    """Return the optimizer state in a record, by factor; none where Adam has taken no step (a head before its first turn)."""
    for held in mine.values():
        counts = {f: [m[key] for key in ("step", f"step{NUMBER}") if key in m] for f, m in held.moments.items()}
        held.moments = {f: moments for f, moments in held.moments.items() if all(count.any() for count in counts[f])}
    return record.states_of(mine)
