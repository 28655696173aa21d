"""Apply learning-rate ramps on top of any schedule of the user's.

Writing into ``group["lr"]`` for longer than a step would ruin torch's recursive schedulers, which compute the next value
from the present one. So a factor is in place only between the optimizer's own pre- and post-hook.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer


class LRFactor:
    """Multiply lr by ``factor()`` during each optimizer step, and restore the schedule's value afterwards.

    Args:
        optimizers: the optimizers; the hooks run after those registered before.
        factor: the multiplier of the next step; called once per optimizer step.
    """

    def __init__(self, optimizers: Iterable[Optimizer], factor: Callable[[], float]) -> None:
        self._factor = factor
        self._scheduled: dict[int, list[Any]] = {}
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._dim))
            self._handles.append(optimizer.register_step_post_hook(self._restore))
            self._handles.append(optimizer.register_state_dict_post_hook(self._show_scheduled))

    def remove(self) -> None:
        """Remove the hooks."""
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

    def _show_scheduled(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Save the schedule's value, also from inside of a step: Lightning's runs the model, which may raise."""
        for group, lr in zip(state_dict["param_groups"], self._scheduled.get(id(optimizer), ()), strict=False):
            group["lr"] = lr


class Rewarm(LRFactor):
    """Ramp lr up over the first steps after the freeze: times (t+1)/steps in step t.

    Args:
        trainer: gives optimizers and the step.
        phases: the phase callback; its ``freeze_step`` starts the ramp.
        steps: length of the ramp in optimizer steps (the PreLoRA authors: 100).
    """

    def __init__(self, trainer: pl.Trainer, phases: Any, steps: int) -> None:
        self.trainer, self.phases, self.steps = trainer, phases, steps
        super().__init__(trainer.optimizers, self.factor)

    def factor(self) -> float:
        """Return the multiplier of the next step."""
        if self.phases.freeze_step is None:
            return 1.0
        return min(1.0, (self.trainer.global_step - self.phases.freeze_step + 1) / self.steps)
