"""Save the state of LTE × GaLore in a checkpoint, and resume on any number of workers.

    checkpoint["lte_state"] = {format, update: "galore", basis, merge_every, targets {name: rank}, workers, clock, merges,
        at_merge, record {"name|key": (N, …)}, told [{name: {keys, C, fresh}} by worker], base {name: W_base}, …}

``record`` is every worker's optimizer state of the targets, and D. ``optimizer_states`` of the file have worker 0's, so that
a plain GaLore run can continue from there. A lone worker adds nothing to it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_pretrain.checkpoints.format import FORMAT
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.guard import closed
from lowrank_pretrain.lte.checkpoint import check_saved, how_merged

if TYPE_CHECKING:
    from lowrank_pretrain.lte.projected import ProjectedSet


@closed
def saved_targets(targets: "ProjectedSet") -> dict[str, Any] | None:
    """Return the targets' part of ``lte_state``, plain types and tensors, on the worker that writes; ``None`` on the others.

    All workers call it together.
    """
    workers, settings = targets.workers, targets.settings
    alone = targets.alone
    entry: dict[str, Any] = {
        "format": FORMAT, "update": "galore", "basis": targets.basis, "merge_every": settings.merge_every,
        "targets": {p.name: p.part.rank for p in targets.pieces}, "workers": workers.size,
        "clock": targets.clock, "merges": targets.merges, "sent": targets.sent_so_far(),
        "at_merge": alone or targets.clock % settings.merge_every == 0, "record": {}, "told": [], "base": {},
        **how_merged(settings),
    }  # fmt: skip
    if not targets.outer.plain:
        entry["outer"] = {name: t.cpu().clone() for name, t in targets.outer.state_dict().items()}
    if alone:
        return entry
    mine: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for piece in targets.pieces:
        update = piece.update
        found = {k: v for k, v in piece.optimizer.state.get(piece.p, {}).items() if isinstance(v, Tensor)}
        if update.D is not None:
            found["D"] = update.D
        own = targets.view.kept_weight(piece)
        if targets.attached:
            update.absorb(piece.slot, own)
        if update.X is not None:
            found["X"] = update.X
            if targets.attached:
                found["W"] = piece.live() if own is None else own
        mine |= {f"{piece.name}|{key}": value for key, value in found.items()}
        facts[piece.name] = {"keys": list(found), "C": update.C, "fresh": update.fresh}
    everyones: list[Any] = [facts] * workers.size
    if workers.size > 1:
        dist.all_gather_object(everyones, facts, group=workers.group)
    everyone = workers.to_first(mine)
    if everyone is None:
        return None
    for key in sorted(everyone):
        like = next(value for value in everyone[key] if value is not None)  # a worker may have taken no step yet
        entry["record"][key] = torch.stack([torch.zeros_like(like) if value is None else value for value in everyone[key]])
    entry["told"] = everyones
    entry["base"] = {piece.name: piece.update.base.cpu().clone() for piece in targets.pieces}
    return entry


def check_targets(state: Mapping[str, Any], targets: "ProjectedSet") -> None:
    """Refuse a checkpoint of other targets.

    Raises:
        ConfigError: another update, other targets or ranks, bases of each worker's own where one is to be shared; or a newer
            format.
    """
    check_saved(state, "galore", targets.settings)
    if state["basis"] == "own" and targets.basis == "shared" and min(state["workers"], targets.workers.size) > 1:
        raise ConfigError("basis", "shared", "the checkpoint's workers each have a basis of their own: use own")
    here = {p.name: p.part.rank for p in targets.pieces}
    for name in sorted(here.keys() | state["targets"].keys()):
        if here.get(name) != state["targets"].get(name):
            raise ConfigError("rank", here.get(name), f"the checkpoint's {name} has rank {state['targets'].get(name)}")


def load_targets(state: Mapping[str, Any], targets: "ProjectedSet") -> tuple[dict[str, dict[str, Tensor]], str | None]:
    """Restore clock, W_base, C and D; W follows when the optimizers have their states (``ProjectedSet.finish_load``).

    The module's W is the checkpoint's merged one on entry, and stays so on another number of workers.

    Returns:
        By target the optimizer state of this worker (of a worker that was alone, the file's ``optimizer_states`` have it), and
        what to tell the user, if anything.
    """
    there, here = state["workers"], targets.workers.size
    targets.clock, targets.merges = state["clock"], state["merges"]
    targets.take_sent(*state.get("sent", (0.0, 0.0)))
    targets.outer.load_state_dict(state.get("outer", {}), targets.parameters())
    moments: dict[str, dict[str, Tensor]] = {}
    message = None
    if state["told"]:
        of = targets.workers.rank % there
        for name, kept in state["told"][of].items():
            moments[name] = {key: state["record"][f"{name}|{key}"][of].clone() for key in kept["keys"]}
    for piece in targets.pieces:
        D, X, W = (moments.get(piece.name, {}).pop(key, None) for key in "DXW")
        if there == here and piece.local is not None:
            kept = state["told"][targets.workers.rank][piece.name]
            piece.local.base.copy_(state["base"][piece.name])
            piece.local.D = None if D is None else D.to(piece.local.base)
            piece.local.C, piece.local.fresh = kept["C"], kept["fresh"]
            piece.local.X, piece.exact = None if X is None else X.to(piece.local.base), W
        elif piece.local is not None:
            piece.local.restart(piece.p, piece.p.detach())
    if there != here and not state["at_merge"]:
        message = (
            f"LTE: the checkpoint lies between two merges of {there} workers; they were merged first, {here} go on from there"
        )
        targets.merges += 1
    return moments, message
