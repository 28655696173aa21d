"""A loss that is no number ends the run, and no checkpoint is ever written of a model that is none."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

PATIENCE_FP16 = 20  # a gradient scaler halves its scale 16 times before it is down to 1


class Diverged(Exception):
    """The training loss or a weight is NaN or infinite.

    Args:
        what: ``"train/loss"`` or the parameter's name.
        step: the optimizer step (counted from 1) at which it was first seen.
    """

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, step)
        self.what, self.step = what, step

    def __str__(self) -> str:
        return f"{self.what} is not finite at step {self.step}"


class FiniteGuard(Callback):
    """Watches the loss on the device and looks at what it saw now and then, so no step waits for the device.

    It looks at each step on the CPU, else every `log_every_n_steps`, before each checkpoint and at each epoch's end.
    With a gradient scaler (16-mixed) a non-finite loss is part of the game, so only a long row of them counts.
    """

    def __init__(self) -> None:
        self._bad: torch.Tensor | None = None  # () int64 on the device: micro-batches in a row with a non-finite loss
        self._first: torch.Tensor | None = None  # () int64 on the device: step of the first of the row

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._bad = torch.zeros((), dtype=torch.int64, device=pl_module.device)
        self._first = torch.zeros((), dtype=torch.int64, device=pl_module.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, torch.Tensor):
            return
        finite = torch.isfinite(loss.detach()).all()
        self._first = torch.where(self._bad == 0, trainer.global_step, self._first)
        self._bad = torch.where(finite, 0, self._bad + 1)
        every = 1 if pl_module.device.type == "cpu" else max(1, trainer.log_every_n_steps)
        if trainer.global_step % every == 0 or trainer.is_last_batch:
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        patience = PATIENCE_FP16 * trainer.accumulate_grad_batches if scaled else 1
        if self._bad is not None and int(self._bad) >= patience:
            raise Diverged("train/loss", int(self._first))

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)
        floating = {name: tensor for name, tensor in checkpoint["state_dict"].items() if tensor.is_floating_point()}
        if not floating:
            return
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in floating.values()])
        if not finite.all():
            raise Diverged(list(floating)[int(finite.logical_not().nonzero()[0])], trainer.global_step)
