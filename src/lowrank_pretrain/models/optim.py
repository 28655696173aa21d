"""The optimizer and its schedule: AdamW in two groups, linear warm-up, then cosine or constant.

Everything is torch's own (AdamW, LinearLR, LambdaLR, SequentialLR); this file only chooses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.models.wording import plain

SCHEDULES = ("cosine", "constant")


def _number(key: str, value: Any, low: float, high: float, allowed: str, closed_low: bool = True) -> None:
    """Raises :class:`ConfigError` unless `value` is a real number in [low, high), or (low, high)."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value >= high or value < low or (value == low and not closed_low):
        raise ConfigError(key, value, allowed)


def undecayed_names(module: nn.Module) -> set[str]:
    """Full names of the tables in `module` that weight decay must leave alone.

    These are embedding tables, what a network lists itself (timm's ``no_weight_decay()``), and parameters
    that are positions or tokens by name: a table is looked up, not multiplied, so decay has nothing to regularise.
    """
    names = set()
    for prefix, sub in module.named_modules():
        dot = prefix + "." if prefix else ""
        own = getattr(sub, "no_weight_decay", None)
        if callable(own):
            names |= {dot + name for name in own()}
        for leaf, _ in sub.named_parameters(recurse=False):
            if isinstance(sub, nn.Embedding) or any(word in leaf for word in ("pos", "embed", "token")):
                names.add(dot + leaf)
    return names


@dataclass
class Cosine:
    """Half a cosine from 1 down to ``final`` over `steps` steps; ``final`` after that."""

    steps: int
    final: float

    def __call__(self, step: int) -> float:
        """The share of the peak learning rate at `step`, counted from 0."""
        share = min(step / self.steps, 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class Optim:
    """How a module is optimized; a module's ``configure_optimizers`` returns ``self.optim.configure(self)``.

    Args:
        lr: peak learning rate, > 0.
        weight_decay: AdamW's decoupled decay, >= 0; matrices only.
        betas: AdamW's two averages, each in [0, 1).
        eps: AdamW's epsilon, > 0.
        warmup: an integer counts optimizer steps, a float in [0, 1) is a share of all steps. The rate rises
            linearly from lr/(warmup+1), so no step is spent at rate 0.
        schedule: ``"cosine"`` (to ``final_lr`` at the last step) or ``"constant"``.
        final_lr: where the cosine ends, as a share of each group's peak in [0, 1); ``"constant"`` does not use it.
        build: makes the optimizer instead of AdamW, from (module, this setting); the schedule stays.

    Raises:
        ConfigError: a value outside its range.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int | float = 0
    schedule: str = "cosine"
    final_lr: float = 0.0
    build: Callable[[LightningModule, "Optim"], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        _number("lr", self.lr, 0, math.inf, "must be a number above 0", closed_low=False)
        _number("weight_decay", self.weight_decay, 0, math.inf, "must be a number, 0 or more")
        _number("eps", self.eps, 0, math.inf, "must be a number above 0", closed_low=False)
        betas = plain(self.betas)
        if not isinstance(betas, (list, tuple)) or len(betas) != 2:
            raise ConfigError("betas", betas, "must be two numbers in [0, 1), such as [0.9, 0.999]")
        for beta in betas:
            _number("betas", beta, 0, 1, "must be two numbers in [0, 1), such as [0.9, 0.999]")
        self.betas = (float(betas[0]), float(betas[1]))
        high = math.inf if isinstance(self.warmup, int) else 1
        _number("warmup", self.warmup, 0, high, "must be a whole number of steps, or a share of all steps in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise ConfigError("schedule", self.schedule, f"must be one of {', '.join(SCHEDULES)}")
        _number("final_lr", self.final_lr, 0, 1, "must be a share of the peak learning rate in [0, 1)")

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Two param groups of the trainable parameters: ``decay`` (matrices) and ``no_decay`` (the rest)."""
        undecayed = undecayed_names(module)
        decay, rest = [], []
        for name, param in module.named_parameters():
            if param.requires_grad:
                (decay if param.ndim >= 2 and name not in undecayed else rest).append(param)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay, "name": "decay"},
            {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
        ]
        return [group for group in groups if group["params"]]

    def configure(self, module: LightningModule) -> dict[str, Any]:
        """What ``configure_optimizers`` returns: the optimizer and its schedule, stepped per optimizer step.

        Raises:
            ConfigError: the warm-up does not fit into the run, or the run has no known end to anneal to.
        """
        if self.build is not None:
            optimizer = self.build(module, self)
        else:
            optimizer = torch.optim.AdamW(
                self.groups(module), lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
            )
        scheduler = self.scheduler(optimizer, module.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def scheduler(self, optimizer: torch.optim.Optimizer, steps: int | float) -> LRScheduler:
        """The schedule over `steps` optimizer steps (``inf``: no known end).

        Raises:
            ConfigError: as :meth:`configure`.
        """
        endless = math.isinf(steps)
        if endless and (self.schedule == "cosine" or isinstance(self.warmup, float)):
            key = "schedule" if self.schedule == "cosine" else "warmup"
            cure = "set trainer.max_epochs or trainer.max_steps, or use schedule=constant with a warmup in steps"
            raise ConfigError(key, getattr(self, key), f"needs a run of known length; {cure}")
        # a share is rounded down, so that a run of a few steps still has one after the warm-up
        warmup = self.warmup if isinstance(self.warmup, int) else int(self.warmup * steps)
        if warmup >= steps:
            raise ConfigError("warmup", self.warmup, f"must be fewer than the run's {steps} optimizer steps")
        if self.schedule == "cosine":
            # not CosineAnnealingLR: its floor is one number for all groups, whatever their own rates are
            after = LambdaLR(optimizer, Cosine(int(steps) - warmup, self.final_lr))
        else:
            after = ConstantLR(optimizer, factor=1.0, total_iters=0)
        if warmup == 0:
            return after
        rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        return SequentialLR(optimizer, [rise, after], milestones=[warmup])
