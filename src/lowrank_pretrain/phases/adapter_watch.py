"""Does the optimizer train what it was given? New parameters were put into its groups; not every optimizer looks there.

Some keep books of their own: over a partition of the parameters, over one flat copy of them, over a list made when they were
built. What such an optimizer cannot follow is refused before training where it can be told, and found in the first steps
after the switch where it cannot: an adapter that has a gradient and a learning rate, and does not move while others do.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lora import model as lora

# by the names of their classes, so that none need be installed
KNOWN = {
    "LBFGS": "keeps directions over all parameters laid end to end, which new parameters break: use a first-order optimizer",
    "ZeroRedundancyOptimizer": "steps its own partition of the parameters and would never train adapters: use the optimizer "
    "that it wraps",
    "DistributedOptimizer": "steps parameters that other processes hold: use the optimizer that it wraps",
}
STEPS = 3  # that an adapter may stand still while others move
PATIENCE = 50  # optimizer steps after which no one is watched any more


def check_optimizers(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers of which it is known before training that parameters added later do not reach them.

    Raises:
        ConfigError: keyed ``optimizer``, with the optimizer's name.
    """
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for kind in type(optimizer).__mro__:
            if kind.__name__ in KNOWN:
                raise ConfigError("optimizer", name, KNOWN[kind.__name__])
        books = next((found for each in (optimizer, *_inside(optimizer)) if (found := _books(each))), None)
        if books is not None:
            raise ConfigError(
                "optimizer", name, f"keeps copies of its parameters by position ({books}), which parameters that join and "
                "leave would put out of step: use one that keeps them in its state, by parameter"
            )  # fmt: skip
        for inner in _inside(optimizer):
            outside = {id(group) for group in optimizer.param_groups}
            if any(id(group) not in outside for group in inner.param_groups):
                raise ConfigError(
                    "optimizer", name, f"steps a {type(inner).__name__} with parameter groups of its own, which adapters would "
                    f"never join: use {type(inner).__name__} itself, or share its param_groups"
                )  # fmt: skip


def _books(optimizer: Optimizer) -> str | None:
    """Return the attribute in which an optimizer keeps copies of its parameters by position, or one flat copy."""
    groups = [[p for p in group["params"] if isinstance(p, Tensor)] for group in optimizer.param_groups]
    every = [p for group in groups for p in group]
    owned = {id(p) for p in every}
    shapes = [[p.shape for p in group] for group in (*groups, every) if len(group) > 1]
    for name, value in vars(optimizer).items():
        if isinstance(value, Tensor):
            total = sum(p.numel() for p in every)
            if len(every) > 1 and value.ndim == 1 and value.numel() == total and id(value) not in owned:
                return name
            continue
        lists = [value, *value] if isinstance(value, (list, tuple)) else []
        for items in lists:
            if not isinstance(items, (list, tuple)) or not all(isinstance(item, Tensor) for item in items):
                continue
            if [item.shape for item in items] in shapes and not any(id(item) in owned for item in items):
                return name
    return None


def _inside(optimizer: Optimizer) -> list[Optimizer]:
    """Optimizers that an optimizer holds as attributes, one within another."""
    found: list[Optimizer] = []
    stack: list[Any] = list(vars(optimizer).values())
    while stack:
        value = stack.pop()
        if isinstance(value, Optimizer) and value is not optimizer and not any(value is other for other in found):
            found.append(value)
            stack += list(vars(value).values())
        elif isinstance(value, (list, tuple)) and len(value) < 16:
            stack += [item for item in value if isinstance(item, Optimizer)]
    return found


class AdapterWatch:
    """Watches fresh adapters (B = 0, so that any update shows) until each has moved once, or for a few steps at most.

    Args:
        module: has adapters.
    """

    def __init__(self, module: nn.Module) -> None:
        self.waiting = {name: p for name, p in lora.adapter_parameters(module) if ".lora_B" in name and p.requires_grad}
        self.still = dict.fromkeys(self.waiting, 0)
        self.steps = 0
        self._asked: list[str] = []  # adapters that the step under way should move
        self._other: tuple[Tensor, Tensor] | None = None  # another parameter that it should move, and a copy from before

    @property
    def over(self) -> bool:
        """Whether there is nothing left to watch."""
        return not self.waiting

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Judge the step before, then note what this one should move.

        Raises:
            ConfigError: an adapter stood still for too long; keyed ``optimizer``.
        """
        self.after_step(optimizer)
        self.steps += 1
        if self.steps > PATIENCE:
            self.waiting = {}
        fresh = {id(p): name for name, p in self.waiting.items()}
        self._asked, self._other = [], None
        for group in optimizer.param_groups:
            if not group.get("lr", 0.0) > 0:
                continue
            for p in group["params"]:
                if p.grad is None or p.grad.is_sparse:
                    continue
                if id(p) in fresh:
                    if bool(torch.isfinite(p.grad).all()) and bool(p.grad.any()):
                        self._asked.append(fresh[id(p)])
                elif self._other is None and bool(p.grad.any()):
                    self._other = (p, p.detach().clone())

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """Judge the last step that was noted.

        Raises:
            ConfigError: see ``before_step``.
        """
        asked, other, self._asked, self._other = self._asked, self._other, [], None
        moved = {name for name, p in self.waiting.items() if bool(p.any())}
        self.waiting = {name: p for name, p in self.waiting.items() if name not in moved}
        # where nothing else moved either the step was skipped (a gradient scaler, an optimizer that gathers gradients)
        if other is not None and torch.equal(*other):
            return
        for name in asked:
            if name in self.waiting:
                self.still[name] += 1 if other is not None else 1 / 4
        stuck = [name for name in self.waiting if self.still[name] >= STEPS]
        if stuck:
            who = stuck[0].partition(".lora_")[0] + (f" and {len(stuck) - 1} more" if len(stuck) > 1 else "")
            raise ConfigError(
                "optimizer", type(optimizer).__name__, f"does not train the adapters of {who}: they had a gradient and a "
                "learning rate and did not move; it keeps books of its own on its parameters, use one that steps param_groups"
            )  # fmt: skip
