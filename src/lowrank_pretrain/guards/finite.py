"""Stop on a NaN or infinite loss or gradient, or on a loss spike. Never checkpoint a diverged model."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lowrank_pretrain.core.checks import number, whole
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.lightning_private import tensor_norms
from lowrank_pretrain.core.trainer import StepWatch, log_interval
from lowrank_pretrain.galore.layerwise import UsedGradient

PATIENCE_FP16 = 20  # a gradient scaler halves its scale 16 times before it is down to 1
DECAY = 0.98  # of the running mean that spikes are compared with: about the last 50 batches
SETTLED = 50  # batches before spikes are looked for


class Diverged(Exception):
    """Say that the training loss, a gradient or a weight is NaN or infinite, or that the loss has shot up.

    Args:
        what: ``"train/loss"``, a parameter's name, or ``"the gradient of"`` one.
        step: the optimizer step (counted from 1) at which it was first seen.
        how: description of the fault.
    """

    def __init__(self, what: str, step: int, how: str = "is not finite") -> None:
        super().__init__(what, step, how)
        self.what, self.step, self.how = what, step, how

    def __str__(self) -> str:
        return f"{self.what} {self.how} at step {self.step}"


class FiniteGuard(Callback):
    """Watch loss and gradients on the device, and read the result from time to time, so that no step waits for the device.

    It reads after each optimizer step with a single process on the CPU, else every `log_every_n_steps`, and
    before each checkpoint. All processes learn what one has seen. With a gradient scaler (16-mixed) non-finite numbers are
    normal, so only a long run of them counts.

    Args:
        loss_spike: the largest allowed loss, as a multiple of its running mean; None: no limit.
        patience: this many batches in a row must exceed that.

    Raises:
        ConfigError: a wrong value.
    """

    def __init__(self, loss_spike: float | None = None, patience: int = 5) -> None:
        if loss_spike is not None:
            allowed = "must be above 1, times the running mean of the loss, or null for off"
            number("loss_spike", loss_spike, above=1, allowed=allowed)
        whole("patience", patience, 1, allowed="must be 1 or more batches in a row")
        self.loss_spike, self.patience = loss_spike, patience
        self._seen: list[float] = [0.0, 0.0]  # from a checkpoint: the running sum and its weight
        self._bad = torch.zeros(0)  # (3,) once training has started
        self._steps = StepWatch()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = pl_module.device
        # (3,) int64 on the device: batches in a row with a non-finite loss, steps with a non-finite gradient, spikes in a row
        self._bad = torch.zeros(3, dtype=torch.int64, device=device)
        self._first = torch.zeros(3, dtype=torch.int64, device=device)  # the optimizer step of the first of each
        self._mean = torch.tensor(self._seen, dtype=torch.float32, device=device)  # (2,) running sum and its weight
        self._batches = 0
        self._sizes: tuple[list[str], Tensor] | None = None  # names, and gradient sizes at the first bad step
        self._steps.begin(trainer)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        if _scaled(trainer):
            return
        held = {
            name: p.grad
            for name, p in pl_module.named_parameters()
            if p.grad is not None and not p.grad.is_sparse and not hasattr(p.grad, "full_tensor")
            if not isinstance(p.grad, UsedGradient)  # its optimizer has checked it
        }
        if not held:
            return
        sizes = _sizes(list(held.values()))
        bad = torch.isfinite(sizes).all().logical_not()
        if self._sizes is None or self._sizes[0] != list(held):
            self._sizes = (list(held), sizes)
        else:
            self._sizes = (self._sizes[0], torch.where(self._bad[1] > 0, self._sizes[1], sizes))
        self._count(1, bad, torch.where(bad, self._bad[1] + 1, self._bad[1]), trainer.global_step + 1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        stepped = self._steps.stepped(trainer)
        if isinstance(loss, Tensor):
            step = trainer.global_step + (not stepped)
            loss = loss.detach().float().mean() * trainer.accumulate_grad_batches  # Lightning divides by it
            bad = torch.isfinite(loss).logical_not()
            before = 0 if _scaled(trainer) else self._bad[0]  # a scaler skips the step and continues; else one is fatal
            self._count(0, bad, torch.where(bad, self._bad[0] + 1, before), step)
            if self.loss_spike is not None:
                self._follow(loss, bad, step, self.loss_spike)
        # only between two optimizer steps, so that a run resumed from here begins with a whole one
        alone = pl_module.device.type == "cpu" and trainer.world_size == 1
        every = 1 if alone else max(1, log_interval(trainer))
        if (stepped and trainer.global_step % every == 0) or trainer.is_last_batch:
            self._look(trainer)

    def _count(self, which: int, bad: Tensor, count: Tensor, step: int) -> None:
        self._first[which] = torch.where(bad & (self._bad[which] == 0), step, self._first[which])
        self._bad[which] = count

    def _follow(self, loss: Tensor, bad: Tensor, step: int, limit: float) -> None:
        """Compare the loss with its running mean, then add it to the mean unless it is a spike."""
        total, weight = self._mean
        self._batches += 1
        if self._batches > SETTLED:
            mean = total / weight
            spike = loss > mean + (limit - 1) * mean.abs()  # false for NaN
            self._count(2, spike, torch.where(spike, self._bad[2] + 1, 0), step)
            bad = bad | spike
        share = 1 - DECAY
        self._mean = torch.where(bad, self._mean, DECAY * self._mean + share * torch.stack((loss, torch.ones_like(loss))))

    def _look(self, trainer: Trainer) -> None:
        if not len(self._bad):
            return
        here = torch.cat((self._bad, self._first))
        counts = here
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(here.clone(), reduce_op="max")
        *found, loss_at, gradient_at, spike_at = counts.tolist()
        patience = PATIENCE_FP16 * trainer.accumulate_grad_batches if _scaled(trainer) else 1
        elsewhere = "" if torch.equal(here[:3], counts[:3]) else " on another process"
        if found[0] >= patience:
            raise Diverged("train/loss", loss_at, f"is not finite{elsewhere}")
        if found[1]:
            raise Diverged(self._gradient(), gradient_at, f"is not finite{elsewhere}")
        if found[2] >= self.patience:
            raise Diverged("train/loss", spike_at, f"began to exceed {self.loss_spike:g} times its running mean{elsewhere}")

    def _gradient(self) -> str:
        names, sizes = self._sizes or ([], torch.zeros(0))
        wrong = [name for name, value in zip(names, sizes.tolist(), strict=True) if not math.isfinite(value)]
        return f"the gradient of {wrong[0]}" if wrong else "a gradient"

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer)
        floating = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if isinstance(tensor, Tensor) and tensor.is_floating_point()
        }
        if not floating:
            return
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in floating.values()])
        if not finite.all():
            raise Diverged(list(floating)[int(finite.logical_not().nonzero()[0])], trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"mean": self._mean.tolist() if len(self._bad) else self._seen}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seen = state_dict["mean"]


def _sizes(grads: list[Tensor]) -> Tensor:
    """Return one number for each gradient that is finite if all its entries are: one pass at memory speed, without a sync."""
    wide = {at_least_32(grad.dtype) for grad in grads}
    if grads[0].is_cuda and len(wide) == 1:  # one kernel; infinite for what cannot be squared too, as Adam's v is
        return torch.stack([norm.float() for norm in tensor_norms(grads, wide.pop())])
    return torch.stack([grad.sum(dtype=torch.float32) for grad in grads])


def _scaled(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
