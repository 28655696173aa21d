"""Plain LoRA as a callback: adapters of one rank from the first step (also for fine-tuning from a checkpoint)."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from lowrank_pretrain import refusals
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.phases import PhaseCallback
from lowrank_pretrain.plan import Plan, check_rank
from lowrank_pretrain.targets import find_targets


class LoRA(PhaseCallback):
    r"""Train low-rank adapters from step 0 (LoRA, arXiv 2106.09685).

    Example::

        trainer = Trainer(callbacks=[LoRA(rank=8, targets="attention")])

    Args:
        rank: of every adapter.
        targets: presets (``all``, ``attention``, ``mlp``, ``head``) or globs.
        alpha: scale = alpha / rank; ``None``: scale 1.
        freeze_rest: freeze everything but the adapters (embeddings, norms, head too).
        train_A: ``False`` trains B alone (LoRA-FA).
        adapter_lr: the adapters' learning rate over that of their base weight.
        adapter_weight_decay: the adapters' weight decay; ``None``: that of their base weight.

    Raises:
        ConfigError: a wrong value; at the start of fit, a rank above min(D, O) of a target or a pattern without a match.
    """

    def __init__(
        self,
        rank: int = 8,
        targets: str | Sequence[str] = "all",
        alpha: float | None = None,
        freeze_rest: bool = False,
        train_A: bool = True,
        adapter_lr: float = 1.0,
        adapter_weight_decay: float | None = None,
    ) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError("rank", rank, "must be an integer of 1 or more")
        super().__init__(alpha, train_A, freeze_rest, adapter_lr=adapter_lr, adapter_weight_decay=adapter_weight_decay)
        self.rank = rank
        self.targets = targets if isinstance(targets, str) else [*targets]

    @property
    def state_key(self) -> str:
        """Pinned: a subclass must find this state too."""
        return "LoRA"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Resolve the targets, so that a mistake shows before anything runs."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            targets = find_targets(pl_module, self.targets)
            for name, target in targets.items():
                check_rank(name, self.rank, target)
            refusals.check_targets(self, trainer, pl_module, targets)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Switch and freeze at once, or replay them."""
        resumed = self.phase != "full"
        super().on_fit_start(trainer, pl_module)
        if not resumed:
            plan = Plan(dict.fromkeys(find_targets(pl_module, self.targets), self.rank))
            self._switch(trainer, pl_module, plan, replay=True)
            self._freeze(trainer, pl_module, replay=True)
            self.switch_step = self.freeze_step = 0
            self._unchecked = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another rank."""
        super().load_state_dict(state_dict)
        if self.plan and set(self.plan.values()) != {self.rank}:
            raise ConfigError("rank", self.rank, f"the checkpoint was trained with rank {next(iter(self.plan.values()))}")
