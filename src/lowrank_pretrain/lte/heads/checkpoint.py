"""What a checkpoint holds of LTE, in the form "one process that holds all N heads"; resume, also on other numbers of workers.

    checkpoint["lte_state"] = {format, mode, reset, alpha, merge_every, targets {name: rank}, heads (of a worker), workers,
        clock, merges, turn, at_merge, record {"kind|name|key": (N, …)}, missing {"kind|name|key": [workers without it]},
        base {target: (O, D)}, written {target: (1 or w, O, D)}, pending, …}

``written``: W as it stands, of targets into which others than the heads wrote since the last merge.

At a merge nothing of a head is outside W, so heads may be left out or added and the function stays what it is. Between
merges another number of heads merges first: the checkpoint's ``state_dict`` is that merge.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.checkpoints.format import FORMAT, check_format
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.heads import record
from lowrank_pretrain.lte.heads.head_set import HeadSet, prev_of
from lowrank_pretrain.lte.heads.layer import draw_A
from lowrank_pretrain.lte.heads.record import Record
from lowrank_pretrain.lte.merge import Exchange

KEY = "lte_state"


def collect(heads: HeadSet) -> dict[str, Any] | None:
    """The heads' part of ``lte_state``, plain types and tensors, on the worker that writes; ``None`` on the others.

    All workers must call it together.
    """
    settings = heads.settings
    local = heads.record()
    if settings.mode == "sequential":
        local = _all_turns(heads, local)
    if heads.pending is not None:
        for piece, (A, B) in zip(heads.pieces, heads.pending[0].snapshot, strict=True):
            local["pending", piece.name, "A"], local["pending", piece.name, "B"] = A.contiguous(), B
    written = heads.workers.to_first(heads.written())
    everyone = heads.workers.to_first(local)
    if everyone is None:
        return None
    missing = {"|".join(k): [w for w, t in enumerate(v) if t is None] for k, v in everyone.items()}
    return {
        "format": FORMAT, "mode": settings.mode, "reset": settings.reset, "alpha": settings.alpha,
        "merge_every": settings.merge_every, "targets": {p.name: p.part.rank for p in heads.pieces},
        "heads": settings.heads, "workers": heads.workers.size, "clock": heads.clock, "merges": heads.merges,
        "turn": heads.turn, "at_merge": heads.clock % settings.merge_every == 0 and heads.pending is None,
        "record": {"|".join(key): _stack(values) for key, values in everyone.items()},
        "missing": {key: workers for key, workers in missing.items() if workers},
        "left_out": list(heads.left_out_names),
        "written": {name: _differing(values) for name, values in written.items()},
        "base": {p.name: (heads.view.training_rows(p) if p.base is None else p.base).cpu().clone() for p in heads.pieces},
        "pending": None if heads.pending is None else heads.pending[1],
        "sent": [heads._cost[0], heads.last_cost[0]],  # the same on every worker
    }  # fmt: skip


def _stack(values: list[Tensor | None]) -> Tensor:
    """All workers' heads below one another; zeros for those of a worker that has none of it."""
    like = next(value for value in values if value is not None)
    return torch.cat([torch.zeros_like(like) if value is None else value for value in values])


def _differing(values: list[Tensor]) -> Tensor:
    """(w, O, D), or (1, O, D) where all workers hold the same."""
    same = all(torch.equal(value, values[0]) for value in values)
    return torch.stack(values[:1] if same else values)


def _all_turns(heads: HeadSet, live: Record) -> Record:
    """``sequential``: this worker's H heads, those unborn as zeros."""
    turns = [live if k == heads.turn else heads.parked.get(k, {}) for k in range(heads.settings.heads)]
    keys = dict.fromkeys(key for turn in turns for key in turn)
    like = {key: next(turn[key] for turn in turns if key in turn) for key in keys}
    return {key: torch.cat([turn.get(key, torch.zeros_like(like[key])) for turn in turns]) for key in keys}


def check(state: Mapping[str, Any], heads: HeadSet) -> None:
    """Refuse a checkpoint of other heads.

    Raises:
        ConfigError: another mode, reset, alpha, rank or other targets; or a newer format.
    """
    check_format(state, "lte_state")
    if state.get("update", "lora") != "lora":
        raise ConfigError("update", "lora", f"the checkpoint was trained with {state['update']}")
    for key in ("mode", "reset", "alpha"):
        here = getattr(heads.settings, key)
        if state[key] != here:
            raise ConfigError(key, here, f"the checkpoint was trained with {state[key]}")
    here = {p.name: p.part.rank for p in heads.pieces}
    if set(here) != set(state["targets"]):
        other = sorted(set(here) ^ set(state["targets"]))[0]
        raise ConfigError("targets", other, f"the checkpoint has {len(state['targets'])} targets, this run {len(here)}")
    for name, rank in here.items():
        if state["targets"][name] != rank:
            raise ConfigError("rank", rank, f"the checkpoint's {name} has rank {state['targets'][name]}")


def restore(state: Mapping[str, Any], heads: HeadSet) -> tuple[Record, str | None]:
    """Put the heads back; the module's W is the checkpoint's merged one on entry. All workers must call it together.

    Args:
        state: ``lte_state``.
        heads: freshly converted.

    Returns:
        The optimizer state of the heads here (a record of moments, for ``own``), and what to tell the user, if anything.
    """
    everyone: Record = {tuple(key.split("|")): value for key, value in state["record"].items()}
    settings, there = heads.settings, state["heads"] * state["workers"]
    heads.clock, heads.merges = state["clock"], state["merges"]
    sent, last = state.get("sent", (0.0, 0.0))
    heads._cost, heads.last_cost = (sent, 0.0), (last, 0.0)
    same = (settings.heads, heads.workers.size) == (state["heads"], state["workers"])
    # 1 × 4 and 4 × 1 hold the same heads; in `sequential` a turn is a worker's, so only the same layout goes on in mid-window
    layout = same
    same = same or (settings.mode == "parallel" and settings.heads * heads.workers.size == there)
    if settings.mode == "joint":
        same = settings.heads == state["heads"]
        everyone = record.choose(everyone, 0, state["heads"])  # every worker had the same
    pending = {key: everyone.pop(key) for key in list(everyone) if key[0] == "pending"}
    if same:
        moments = _moments_only(_restore_same(state, heads, everyone, pending))
        lost = state.get("missing", {}) if layout and settings.mode == "parallel" else {}
        return {k: v for k, v in moments.items() if heads.workers.rank not in lost.get("|".join(k), ())}, None
    mine, told = _restore_other(state, heads, everyone)
    heads.mark()
    return _moments_only(mine), told


def own(heads: HeadSet, moments: Record) -> dict[int, dict[str, Tensor]]:
    """By a head parameter's id, its optimizer state here."""
    return {id(p): record.state_of(moments, name) for name, p in heads.factors().items()}


def _mine(heads: HeadSet, everyone: Record) -> Record:
    """This worker's heads, of all its turns."""
    first = 0 if heads.settings.mode == "joint" else heads.workers.rank * heads.settings.heads
    return record.choose(everyone, first, heads.settings.heads)


def _take(heads: HeadSet, mine: Record) -> Record:
    """Put this worker's heads on, or in ``sequential`` park all but the one whose turn it is; returns the live ones' record."""
    if heads.settings.mode == "sequential":
        stages = next(value for key, value in mine.items() if key[2] == "stage")
        turns = [record.choose(mine, k, 1) for k in range(heads.settings.heads)]
        heads.parked = {k: turns[k] for k in range(len(turns)) if k != heads.turn and stages[k] != record.UNBORN}
        mine = turns[heads.turn]
    record.put_layers(mine, heads.layers)
    return mine


@torch.no_grad()
def _restore_same(state: Mapping[str, Any], heads: HeadSet, everyone: Record, pending: Record) -> Record:
    heads.turn = state["turn"]
    mine = _take(heads, _mine(heads, everyone))
    for piece in heads.pieces:
        base = state["base"][piece.name]
        if piece.base is not None:
            piece.base.copy_(base)
        piece.rows().copy_(base)
    has_prev = any(piece.layer.has_prev for piece in heads.pieces)
    if heads.settings.mode == "parallel" and not heads.settings.reset and has_prev:
        # W as of the last merge, by the sum that made it: bit for bit what the run that saved it trained on
        sent = heads.workers.sent
        before = [prev_of(piece) for piece in heads.pieces]
        exchange = Exchange(heads.pieces, before, heads.workers, heads.total)
        for index, piece in enumerate(heads.pieces):
            piece.rows().copy_(exchange.updated(index))
        heads.workers.sent = sent
    heads.mark()
    for piece in heads.pieces:  # what others wrote since: it joins at the next merge, as it would have
        rows = state.get("written", {}).get(piece.name)
        if rows is not None:
            piece.rows().copy_(rows[heads.workers.rank if len(rows) == heads.workers.size else 0])
    if state["pending"] is not None:
        mine_pending = _mine(heads, pending)
        snapshot = [tuple(mine_pending["pending", p.name, k].to(p.layer.lora_A) for k in "AB") for p in heads.pieces]
        heads.pending = Exchange(heads.pieces, snapshot, heads.workers, heads.total, overlap=True), state["pending"]
    return mine


@torch.no_grad()
def _restore_other(state: Mapping[str, Any], heads: HeadSet, everyone: Record) -> tuple[Record, str | None]:
    """Another number of heads: everything is in W; those that stay go on, new ones begin."""
    settings, told = heads.settings, None
    there, here = state["heads"] * state["workers"], settings.heads * heads.workers.size
    if settings.mode == "joint":
        raise ConfigError(
            "heads", settings.heads, f"the checkpoint has {there}, and in mode joint W does not hold their update"
        )
    if not state["at_merge"]:
        told = f"LTE: the checkpoint lies between two merges of {there} heads; they were merged first, {here} go on from there"
    if settings.mode == "sequential" or settings.reset:
        # W holds all: every head starts anew
        heads.merges += not state["at_merge"]
        heads.turn, heads.parked = 0, {}
        heads.draw(heads.merges)
        for piece in heads.pieces:
            if piece.base is not None:
                piece.base.copy_(piece.rows())
        return {}, told
    everyone = {key: value for key, value in everyone.items() if key[2] not in ("prev_A",) and not key[2].startswith("prev_B")}
    for kind, name, key in [key for key in everyone if key[2] == "A" or key[2].startswith("B.")]:
        everyone[kind, name, f"prev_{key}"] = everyone[kind, name, key]  # W holds every head as it is now
    everyone = record.padded(record.choose(everyone, 0, here), here)
    for key, value in everyone.items():
        if key[2] == "stage":
            value.fill_(record.MERGED)  # of a new head W holds nothing, which zeros say
    for piece in heads.pieces:  # A of the heads that are new
        A = everyone["layer", _layer_name(heads, piece.layer), "A"]
        for head in range(there, here):
            rows = slice(piece.part.a, piece.part.a + piece.part.rank)
            A[head, rows] = draw_A(piece.name, head, heads.merges, piece.part.rank, A.shape[2], settings.seed).to(A)
    mine = _take(heads, _mine(heads, everyone))
    # W₀ such that W₀ + (s/N) Σ over the heads that stayed is W
    kept = Exchange(heads.pieces, [prev_of(piece) for piece in heads.pieces], heads.workers, heads.total)
    for index, piece in enumerate(heads.pieces):
        W = piece.rows().to(piece.base.dtype)
        piece.base.zero_()
        piece.base.copy_(W - kept.updated(index))
    return mine, told


def _layer_name(heads: HeadSet, layer: Any) -> str:
    return next(name for name, of in heads.layers.items() if of is layer)


def _moments_only(mine: Mapping[tuple[str, str, str], Tensor]) -> Record:
    """The optimizer state in a record; none where Adam has taken no step (a head before its first turn)."""
    unstepped = {name for (kind, name, key), v in mine.items() if kind == "moment" and key == "step" and not v.any()}
    return {key: value for key, value in mine.items() if key[0] == "moment" and key[1] not in unstepped}
