"""Add up the bytes that each worker of a run has sent: gradients at every step, or what LTE counted at its merges.

What LTE logs was counted while it was sent. For data-parallel training it is computed: an all-reduce of all gradients at each
step, as a ring sends it. Nothing is known of sharded models, which send parameters as well.
"""

from typing import Any

from lowrank_pretrain.core.checks import is_integer
from lowrank_pretrain.report.runs import Run, Series

MIB = 2**20
BYTES = {"bf16-true": 2, "16-true": 2, "64-true": 8}  # of a number in a gradient; 4 with any other precision


def sent(run: Run) -> Series:
    """Return [(optimizer steps taken, MiB sent by each worker until then), …]; [] if nothing is sent, or nothing is known."""
    merges, total, before = _per_step_of_merges(run), 0.0, 0.0
    interval = _setting(run, "merge_every") // _setting(run, "fragments", 1)
    merging_from = merges[0][0] - interval if merges else run.last_step
    found = []
    for until, rate in [*_per_step_of_gradients(run, merging_from), *merges]:
        if until > before:
            total += (until - before) * rate
            before = until
            found.append((before, total))
    return found if total else []


def _per_step_of_merges(run: Run) -> Series:
    """Return [(step, MiB per step until then), …] of LTE's merges, the rest's share included; [] for other methods."""
    window, fragments = _setting(run, "merge_every"), _setting(run, "fragments", 1)
    rest = dict(run.series.get("lte/rest_mib", []))
    # in a window each fragment of the targets merges once, and the rest once
    merges = run.series.get("lte/merge_mib", []) if window else []
    return [(step, (fragments * mib + rest.get(step, 0.0)) / window) for step, mib in merges]


def _setting(run: Run, key: str, default: int = 0) -> int:
    """Return a whole number of the run's method; the default where it has none."""
    method: dict[str, Any] = run.config.get("method") or {}
    return method[key] if is_integer(method.get(key)) else default


def _per_step_of_gradients(run: Run, last: float) -> Series:
    """Return [(step, MiB per step until then), …] of data-parallel training up to step `last`; [] if too little is known."""
    trainer = run.config.get("trainer") or {}
    workers = _workers(run, trainer)
    if workers is None or not str(trainer.get("strategy") or "auto").startswith(("auto", "ddp")):
        return []
    mib = 2 * (workers - 1) / workers * BYTES.get(str(trainer.get("precision")), 4) / MIB  # of one trainable number
    found = [(min(step, last), mib * trainable) for step, trainable in run.series.get("params/trainable", [])]
    return [*found, (last, found[-1][1])] if found else []


def _workers(run: Run, trainer: dict[str, Any]) -> int | None:
    """Return the number of processes: as the run has noted, else as its configuration asks; None if neither tells."""
    noted = [phase["world_size"] for phase in run.phases if "world_size" in phase]
    devices, nodes = trainer.get("devices"), trainer.get("num_nodes", 1)
    asked: Any = len(devices) if isinstance(devices, list) else devices
    known = is_integer(asked) and is_integer(nodes) and asked > 0 and nodes > 0
    return int(max(noted)) if noted else asked * nodes if known else None
