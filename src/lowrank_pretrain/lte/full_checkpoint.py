"""Save the state of local training of whole weights in a checkpoint, and resume on any number of workers.

    checkpoint["lte_state"] = {format, update: "full", wire, outer_lr, outer_momentum, merge_every, targets {name: shape},
        workers, clock, merges, at_merge, record {"name|key": [w tensors]}, plain [{name: {key: number}} by worker],
        base {name: W_base}, outer {name: buffer}, errors {sent: [w], mean: [w]}, …}

``record`` holds every worker's optimizer state, and between merges its W. ``optimizer_states`` of the file have worker 0's, so
that a run without LTE can continue from there. ``errors`` is what a lossy wire's messages have left out.

Another number of workers continues from the mean of the weights, and W_base stays: what was done since the last merge is
merged with what comes. What the wire left out is kept as its sum over workers; one worker alone adds it to W at once.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_pretrain.checkpoints.format import FORMAT
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.checkpoint import check_saved, how_merged
from lowrank_pretrain.lte.increments import add_pending, saved_by_all

if TYPE_CHECKING:
    from lowrank_pretrain.lte.full import FullSet


def saved_targets(targets: "FullSet") -> dict[str, Any] | None:
    """Return the targets' part of ``lte_state``, plain types and tensors, on the worker that writes; ``None`` on the others.

    All workers call it together.
    """
    workers, settings, increments = targets.workers, targets.settings, targets.increments
    at_merge = targets.clock % settings.merge_every == 0
    # each worker's weights, where they differ, and optimizer state
    mine: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    if increments is not None and not at_merge:
        mine |= {f"{name}|W": W for name, W in (targets.own or targets.training_weights()).items()}
    if workers.size > 1:
        for piece in targets.pieces:
            for optimizer in targets.optimizers:
                for key, value in optimizer.state.get(piece.p, {}).items():
                    if isinstance(value, Tensor):
                        mine[f"{piece.name}|state.{key}"] = value
                    else:
                        plain.setdefault(piece.name, {})[key] = value
    told: list[Any] = [plain]
    if workers.size > 1:
        told = [None] * workers.size
        dist.all_gather_object(told, plain, group=workers.group)
    record = saved_by_all(mine, workers)
    errors = {} if increments is None else increments.errors()
    if record is None or errors is None:
        return None
    return {
        "format": FORMAT, "update": "full", "merge_every": settings.merge_every,
        "targets": {piece.name: list(piece.p.shape) for piece in targets.pieces}, "workers": workers.size,
        "clock": targets.clock, "merges": targets.merges, "sent": targets.last_cost[0], "at_merge": at_merge,
        "record": record, "plain": told, "errors": errors,
        "base": {} if increments is None else {name: base.cpu().clone() for name, base in increments.base.items()},
        "outer": {name: buffer.cpu().clone() for name, buffer in targets.outer.state_dict().items()}, **how_merged(settings),
    }  # fmt: skip


def check_targets(state: Mapping[str, Any], targets: "FullSet") -> None:
    """Refuse a checkpoint of other targets.

    Raises:
        ConfigError: another update, wire or outer step; other targets or shapes; or a newer format.
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
    elif workers.size == 1 and state["errors"]:
        add_pending(weights, state["base"], state["errors"])
    # W_base and error feedback; a worker that was alone without an outer step had neither
    if targets.increments is not None and state["base"]:
        targets.increments.load(state["base"], state["errors"])
    targets.outer.load_state_dict(state["outer"], weights)
    message = None
    if there != workers.size and not state["at_merge"]:
        message = (
            f"LTE: the checkpoint lies between two merges of {there} workers; {workers.size} go on from the mean of weights"
        )
    return _moments(state, targets) if there > 1 else {}, message


def _moments(state: Mapping[str, Any], targets: "FullSet") -> dict[str, dict[str, Any]]:
    """Return the optimizer state of one worker of several, by target."""
    of = targets.workers.rank % state["workers"]
    found: dict[str, dict[str, Any]] = {name: dict(values) for name, values in state["plain"][of].items()}
    for text, values in state["record"].items():
        name, _, key = text.partition("|state.")
        if key and values[of] is not None:
            found.setdefault(name, {})[key] = values[of].clone()
    return found
