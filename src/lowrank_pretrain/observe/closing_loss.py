"""Keep the final training loss: a mean over the last batches of a run of any length."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

LAST = 100  # batches


class ClosingLoss(Callback):
    """Keep the losses of the last batches on the device; their mean over all processes is known at each epoch's end.

    Logging covers only one batch in every few, and none in a very short run.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self._losses = torch.zeros(0)  # (LAST,) float32 once training has started, a ring
        self._seen = 0
        self._restored: list[list[float]] = []  # of every process

    @property
    @override
    def state_key(self) -> str:
        return "ClosingLoss"

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = torch.zeros(LAST, dtype=torch.float32, device=pl_module.device)
        every = self._restored
        if len(every) == trainer.world_size:
            mine = every[trainer.global_rank]
        else:  # from another number of processes: continue from their mean
            mine = [sum(losses) / len(losses) for losses in zip(*every, strict=False)]
        self._seen = len(mine)
        self._losses[: self._seen] = torch.tensor(mine, dtype=torch.float32)

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
            mean = self._in_order().mean()  # in the order of a resumed run, which adds up alike
            self.mean = float(trainer.strategy.reduce(mean, reduce_op="mean") if trainer.world_size > 1 else mean)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gather the losses of all processes, because one of them writes the file. All processes save together."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if trainer.world_size > 1 and state is not None and len(self._losses):
            kept = self._in_order()
            padded = torch.cat([kept, self._losses.new_zeros(LAST - len(kept)), kept.new_tensor([len(kept)])])
            everyone = trainer.strategy.all_gather(padded).reshape(-1, LAST + 1).tolist()
            state["losses"] = [losses[: int(losses[LAST])] for losses in everyone]

    @override
    def state_dict(self) -> dict[str, Any]:
        if not len(self._losses):
            return {"mean": self.mean, "losses": self._restored}
        return {"mean": self.mean, "losses": [self._in_order().tolist()]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        losses = list(state_dict["losses"])
        self.mean, self._restored = state_dict["mean"], losses if losses and isinstance(losses[0], list) else [losses]

    def _in_order(self) -> Tensor:
        """Return the losses that are kept, the oldest first."""
        kept, start = min(self._seen, LAST), self._seen % LAST if self._seen > LAST else 0
        return self._losses[:kept].roll(-start)
