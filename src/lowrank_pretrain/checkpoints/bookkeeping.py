"""Group the callbacks that write a run's checkpoints and restore them exactly, and order them around all others."""

from pathlib import Path

from lightning.pytorch import Callback

from lowrank_pretrain.checkpoints.files import BestCheckpoint, LastCheckpoint
from lowrank_pretrain.checkpoints.longer_run import LongerRun
from lowrank_pretrain.checkpoints.loop_state import LoopState
from lowrank_pretrain.checkpoints.random_state import RandomState
from lowrank_pretrain.core.interrupts import Interrupts


class Bookkeeping:
    """Hold the callbacks of a run directory's checkpoints.

    Args:
        directory: where ``last.ckpt`` and ``best.ckpt`` lie.
        every_n_steps: see :class:`LastCheckpoint`.
        resumed: the checkpoint that the run resumes from.

    Raises:
        ConfigError: a wrong value.
    """

    def __init__(self, directory: Path, every_n_steps: int, resumed: Path | None) -> None:
        self._last = LastCheckpoint(directory, every_n_steps)
        self._directory, self._resumed = directory, resumed

    def before_all(self) -> list[Callback]:
        """Return the callbacks that come before everything that asks how long the run is."""
        return [LoopState(), LongerRun()]

    def after_all(self, interrupts: Interrupts) -> list[Callback]:
        """Return the callbacks that come after everything that might draw random numbers or change the model."""
        self._last.interrupts = interrupts
        return [RandomState(), BestCheckpoint(self._directory, self._resumed), self._last]
