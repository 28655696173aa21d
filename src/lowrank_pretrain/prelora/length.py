"""Refuse a run that ends before PreLoRA can switch, as far as its length is known."""

import math

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.trainer import run_length


def check_length(
    trainer: pl.Trainer,
    window: int,
    unit: str,
    limits: tuple[int, int, int | None],
    passed: tuple[int, int],
    every: int,
    has_data: bool,
) -> None:
    """Compare the windows that a switch needs with those that the run has; with ``max_time``, for example, nobody knows.

    Args:
        trainer: the running trainer.
        window: a window's length.
        unit: ``epoch`` or ``step``.
        limits: ``windows``, ``earliest`` and ``latest``.
        passed: windows that are over, and epochs or steps of the present one.
        every: steps between two moments at which all ranks hold the same weights: a window ends with the next of them.
        has_data: the data are there, so that their length counts.

    Raises:
        ConfigError: naming the limit.
    """
    tested, earliest, latest = limits
    windows = max(tested, earliest) if latest is None else min(max(tested, earliest), latest)
    length = -(-window // every) * every if unit == "step" else window
    needed = windows * length - passed[0] * length - passed[1]
    steps, per_epoch = run_length(trainer)
    max_epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    if unit == "step":
        key, allowed = "max_steps", min(steps, max_epochs * per_epoch)
        left = allowed - trainer.global_step
    else:
        key, allowed, left = "max_epochs", max_epochs, max_epochs - trainer.current_epoch
        if math.isfinite(steps) and not math.isfinite(per_epoch) and has_data:
            rank_zero_warn(
                f"PreLoRA: the training data have no known length, and a window ends with an epoch: with max_steps={steps} "
                'the run may never switch. Count windows in steps (window_unit="step")'
            )
        elif math.isfinite(steps) and math.isfinite(per_epoch):
            whole = (steps - trainer.global_step) / per_epoch
            whole = math.ceil(whole) if trainer.global_step else math.floor(whole)  # resumed inside of an epoch, perhaps
            if whole < left:
                key, allowed, left = "max_steps", steps, whole
    if left >= needed:
        return
    name = {latest: "latest", earliest: "earliest", tested: "windows"}[windows]
    more = "" if key == f"max_{unit}s" else f" epochs of {per_epoch} steps"
    more += "" if length == window else f" (a window ends with a merge, one every {every} steps)"
    done = f" ({windows * length - needed} of them are over)" if needed < windows * length else ""
    reached = (left + windows * length - needed) // length  # windows by the end of the run
    cure = f"; latest={int(reached)} would" if name == "windows" and reached >= 1 else ""
    raise ConfigError(
        key, int(allowed), f"must be at least {name} * window = {windows * length}{more}{done}, else the run can "
        f"never switch{cure}"
    )  # fmt: skip
