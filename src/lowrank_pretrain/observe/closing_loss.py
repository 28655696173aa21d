"""The training loss that a run ends with: a mean over its last batches, in a run of any length."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

LAST = 100  # batches


class ClosingLoss(Callback):
    """Keeps the losses of the last batches on the device; their mean over all processes is known at each epoch's end.

    What is logged is one batch of every few, and nothing at all in a run that is shorter than that.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self._losses: Tensor | None = None  # (LAST,) float32, a ring
        self._seen = 0
        self._restored: list[float] = []

    @property
    @override
    def state_key(self) -> str:
        return "ClosingLoss"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = torch.zeros(LAST, device=pl_module.device)
        self._seen = len(self._restored)
        self._losses[: self._seen] = torch.tensor(self._restored)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and not hasattr(loss, "full_tensor"):  # not one that is cut over ranks
            # Lightning has divided it by the batches that make a step
            torch.mul(loss.detach(), trainer.accumulate_grad_batches, out=self._losses[self._seen % LAST])
            self._seen += 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._seen:
            mean = self._losses[: min(self._seen, LAST)].mean()
            self.mean = float(trainer.strategy.reduce(mean, reduce_op="mean") if trainer.world_size > 1 else mean)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._losses is None:
            return {"mean": self.mean, "losses": self._restored}
        kept, start = min(self._seen, LAST), self._seen % LAST if self._seen > LAST else 0
        return {"mean": self.mean, "losses": self._losses[:kept].roll(-start).tolist()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mean, self._restored = state_dict["mean"], list(state_dict["losses"])
