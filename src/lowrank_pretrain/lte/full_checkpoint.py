"""Save the state of local training of whole weights in a checkpoint, and resume on any number of workers.

    checkpoint["lte_state"] = {format, update: "full", wire, outer_lr, outer_momentum, fragments, merge_every,
        targets {name: shape}, workers, clock, merges, at_merge, record {"name|key": [w tensors]},
        plain [{name: {key: number}} by worker], base {name: W_base}, outer {name: buffer}, errors {sent: [w], mean: [w]},
        pending {fragment, due, mean {name: Δ}, cost}, …}

``record`` holds every worker's optimizer state, between merges its W, and of a merge under way its W as sent.
``optimizer_states`` of the file have worker 0's, so that a run without LTE can continue from there. ``errors`` is what a lossy
wire's messages have left out, with ``fragments`` a list by fragment. A merge under way is completed for the file, and applied
in its time here and there.

Another number of workers continues from the mean of the weights, and W_base stays: what was done since the last merge is
merged with what comes. What the wire left out is kept as its sum over workers; one worker alone adds it to W at once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_pretrain.checkpoints.format import FORMAT
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.wrapped import state_of
from lowrank_pretrain.lte.checkpoint import check_saved, how_merged
from lowrank_pretrain.lte.increments import add_pending, saved_by_all
from lowrank_pretrain.lte.underway import Pending

if TYPE_CHECKING:
    from lowrank_pretrain.lte.full import FullSet


def saved_targets(targets: "FullSet") -> dict[str, Any] | None:
    """Return the targets' part of ``lte_state``, plain types and tensors, on the worker that writes; ``None`` on the others.

    All workers call it together.
    """
    workers, pending = targets.workers, targets.pending
    # each worker's weights, where they differ, and optimizer state
    mine: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    if targets.fragments and not targets.all_merged:
        mine |= {f"{name}|W": W for name, W in (targets.own or targets.training_weights()).items()}
    if pending is not None:
        pending.arrived()
        mine |= {f"{name}|sent": W for name, W in pending.sent.items()}
    if workers.size > 1:
        for piece in targets.pieces:
            for optimizer in targets.optimizers:
                for key, value in state_of(optimizer, piece.p).items():
                    if isinstance(value, Tensor):
                        mine[f"{piece.name}|state.{key}"] = value
                    else:
                        plain.setdefault(piece.name, {})[key] = value
    told: list[Any] = [plain]
    if workers.size > 1:
        told = [None] * workers.size
        dist.all_gather_object(told, plain, group=workers.group)
    record = saved_by_all(mine, workers)
    errors = [increments.errors() for increments in targets.fragments]
    if record is None or None in errors:
        return None
    return _entry(targets, record, told) | {"errors": errors if len(errors) > 1 else errors[0] if errors else {}}


def _entry(targets: "FullSet", record: Mapping[str, Any], told: list[Any]) -> dict[str, Any]:
    """Return the entry of the worker that writes, but for the error feedback."""
    settings, pending = targets.settings, targets.pending
    entry = {
        "format": FORMAT, "update": "full", "merge_every": settings.merge_every,
        "targets": {piece.name: list(piece.p.shape) for piece in targets.pieces}, "workers": targets.workers.size,
        "clock": targets.clock, "merges": targets.merges, "sent": targets.last_cost[0], "at_merge": targets.all_merged,
        "record": record, "plain": told,
        "base": {name: base for increments in targets.fragments for name, base in increments.saved_base().items()},
        "outer": {name: buffer.cpu().clone() for name, buffer in targets.outer.state_dict().items()}, **how_merged(settings),
    }  # fmt: skip
    if pending is not None:
        mean = targets.fragments[pending.number].by_name(pending.arrived())
        entry["pending"] = {
            "fragment": pending.number, "due": pending.due, "cost": targets.cost[0],
            "mean": {name: part.cpu().clone() for name, part in mean.items()},
        }  # fmt: skip
    return entry


def check_targets(state: Mapping[str, Any], targets: "FullSet") -> None:
    """Refuse a checkpoint of other targets.

    Raises:
        ConfigError: another update, wire, outer step or number of fragments; other targets or shapes; or a newer format.
    """
    check_saved(state, "full", targets.settings)
    here = {piece.name: list(piece.p.shape) for piece in targets.pieces}
    for name in sorted(here.keys() | state["targets"].keys()):
        there = state["targets"].get(name)
        if here.get(name) != there:
            raise ConfigError("targets", name, f"has shape {there} in the checkpoint and {here.get(name)} here (null: is none)")


@torch.no_grad()
def load_targets(state: Mapping[str, Any], targets: "FullSet") -> tuple[dict[str, dict[str, Any]], str | None]:
    """Restore clock, weights, outer buffers and error feedback.

    The module's W is the checkpoint's merged one on entry, and stays so on another number of workers.

    Returns:
        By target the optimizer state of this worker (of a worker that was alone, the file's ``optimizer_states`` have it), and
        what to tell the user, if anything.
    """
    there, workers = state["workers"], targets.workers
    targets.clock, targets.merges = state["clock"], state["merges"]
    targets.last_cost = state["sent"], 0.0
    weights = targets.parameters()
    # W: this worker's own, or all workers' mean with what the wire still owes
    if there == workers.size:
        for name, p in weights.items():
            own = state["record"].get(f"{name}|W")
            if own is not None:
                p.copy_(own[workers.rank])
    # W_base and error feedback; a worker that was alone without an outer step had neither
    pending = load_pending(state, targets)
    for number, names in enumerate(targets.divided if state["base"] else ()):
        base = {name: state["base"][name] for name in names}
        errors = state["errors"][number] if isinstance(state["errors"], list) else state["errors"]
        if targets.fragments:
            targets.fragments[number].load(base, errors)
        if there > workers.size == 1 and errors:  # no other worker to send the wire's pending part to
            add_pending(weights, base, errors)
            add_pending({} if pending is None else pending.sent, base, errors)
    targets.pending = pending
    targets.outer.load_state_dict(state["outer"], weights)
    message = None
    if there != workers.size and not state["at_merge"]:
        message = (
            f"LTE: the checkpoint lies between two merges of {there} workers; {workers.size} go on from the mean of weights"
        )
    return _moments(state, targets) if there > 1 else {}, message


def load_pending(state: Mapping[str, Any], targets: "FullSet") -> Pending | None:
    """Return the merge that was under way; of another number of workers' W as sent, the mean.

    One worker that merges with nobody has W moved by it at once.
    """
    saved, weights = state.get("pending"), targets.parameters()
    if saved is None:
        return None
    sent = {}
    for name in saved["mean"]:
        everyone = state["record"][f"{name}|sent"]
        same = len(everyone) == targets.workers.size
        W = everyone[targets.workers.rank] if same else torch.stack([W.to(at_least_32(W.dtype)) for W in everyone]).mean(0)
        sent[name] = W.to(weights[name], copy=True)
    if not targets.fragments:
        for name, mean in saved["mean"].items():
            W = weights[name]
            W.add_((state["base"][name] + mean).to(W) - sent[name])
        return None
    targets.cost = saved["cost"], 0.0
    mean = torch.cat([part.to(weights[name].device).flatten() for name, part in saved["mean"].items()])
    return Pending(saved["fragment"], saved["due"], sent, mean)


def _moments(state: Mapping[str, Any], targets: "FullSet") -> dict[str, dict[str, Any]]:
    """Return the optimizer state of one worker of several, by target."""
    of = targets.workers.rank % state["workers"]
    found: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state["plain"][of].items()}
    for text, values in state["record"].items():
        name, _, key = text.partition("|state.")
        if key and values[of] is not None:
            found.setdefault(name, {})[key] = values[of].clone()
    return found
