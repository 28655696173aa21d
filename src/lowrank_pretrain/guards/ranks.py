"""Compare the weights of all ranks periodically: replicas that drift apart do not crash by themselves."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.core.agreement import agreed_hash
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.core.trainer import StepWatch


class RanksAgree(Callback):
    """Compare the ranks' weights every `every_n_steps` and before each checkpoint, in one pass and one wait.

    LTE's heads are left out, and its rest if averaged only at merges. Weights sharded over
    the ranks (FSDP2) have no copies to compare.

    Args:
        every_n_steps: optimizer steps between two comparisons; 0: only before checkpoints.

    Raises:
        ConfigError: `every_n_steps` is not a whole number of 0 or more.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        allowed = "must be 0 (only before checkpoints) or more optimizer steps"
        self.every_n_steps = whole("agree_every", every_n_steps, 0, allowed=allowed)
        self._steps = StepWatch()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.begin(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._steps.stepped(trainer) and self.every_n_steps and self._steps.step % self.every_n_steps == 0:
            self._look(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if trainer.world_size == 1 or (isinstance(strategy, Merges) and strategy.workers_differ):
            return
        if any(hasattr(p, "full_tensor") for p in pl_module.parameters()):
            return
        agreed_hash(strategy, pl_module, f"at step {trainer.global_step}")
