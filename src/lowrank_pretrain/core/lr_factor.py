"""Learning-rate ramps laid over whatever schedule the user has.

Writing into ``group["lr"]`` for longer than a step would ruin torch's recursive schedulers, which compute the next value
from the present one. So a factor is in place only between the optimizer's own pre- and post-hook.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer


class LRFactor:
    """Multiply lr by ``factor()`` during each optimizer step, and put the schedule's value back after it.

    Args:
        optimizers: whose steps; the hooks come behind those registered before.
        factor: the multiplier of the step that comes next; asked once per optimizer step.
    """

    def __init__(self, optimizers: Iterable[Optimizer], factor: Callable[[], float]) -> None:
        self._factor = factor
        self._scheduled: dict[int, list[Any]] = {}
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._dim))
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _dim(self, optimizer: Optimizer, *_: Any) -> None:
        factor = self._factor()
        if factor < 1.0:
            self._scheduled[id(optimizer)] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        scheduled = self._scheduled.pop(id(optimizer), None)
        if scheduled is not None:
            for group, lr in zip(optimizer.param_groups, scheduled, strict=True):
                group["lr"] = lr


class Rewarm(LRFactor):
    """A ramp over the first steps after the freeze: lr times (t+1)/steps in step t after it.

    Args:
        trainer: gives optimizers and the step.
        phases: the phase callback; its ``freeze_step`` starts the ramp.
        steps: length of the ramp in optimizer steps (the PreLoRA authors: 100).
    """

    def __init__(self, trainer: pl.Trainer, phases: Any, steps: int) -> None:
        self.trainer, self.phases, self.steps = trainer, phases, steps
        super().__init__(trainer.optimizers, self.factor)

    def factor(self) -> float:
        """The multiplier of the step that comes next."""
        if self.phases.freeze_step is None:
            return 1.0
        return min(1.0, (self.trainer.global_step - self.phases.freeze_step + 1) / self.steps)
