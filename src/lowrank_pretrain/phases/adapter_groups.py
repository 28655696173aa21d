"""Give adapters their own learning rate or weight decay, in optimizer groups that no scheduler sees.

A group added in mid-run makes most of torch's schedulers raise (their lists of base rates are too short) or drift silently.
So the adapters' group follows its source group: before each step its lr is ratio times the source's, and the schedulers are
handed the optimizer without the followers.
"""

from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lowrank_pretrain.core.lightning_private import inner_schedulers
from lowrank_pretrain.phases import layers

_FOLLOWED = ("betas", "momentum")  # what OneCycleLR and CyclicLR change besides lr


class ScheduledGroups:
    """Hide from a scheduler the optimizer groups that follow another group."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return groups that follow no other; looked up each time, as ``load_state_dict`` replaces the optimizer's list."""
        return [group for group in self._optimizer.param_groups if "follows" not in group]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copies and pickles, before there is an optimizer
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __eq__(self, other: object) -> bool:
        return other is self or other is self._optimizer  # Lightning looks schedulers' optimizers up among its own

    def __hash__(self) -> int:
        return hash(self._optimizer)


def separate_factors(trainer: pl.Trainer, module: pl.LightningModule, lr_ratio: float, weight_decay: float | None) -> None:
    """Apply ``separate`` to factors of weights, so that their product decays like the weight did.

    Both decay, and at ``lr_ratio`` times the rate: so each gets the share 1 / (2 · ``lr_ratio``) of the weight's decay.
    """
    separate(trainer, module, lr_ratio, weight_decay, 0.5 / lr_ratio)


def separate(
    trainer: pl.Trainer, module: pl.LightningModule, lr_ratio: float, weight_decay: float | None, decay_ratio: float = 1.0
) -> None:
    """Move adapters from their weights' groups into groups that follow those.

    Args:
        trainer: its optimizers and schedulers are changed.
        module: has adapters in the optimizers' groups.
        lr_ratio: the adapters' learning rate over their weight's.
        weight_decay: theirs; ``None``: their weight's, times
        decay_ratio: what it is multiplied with then.
    """
    adapters = {id(p) for _, p in layers.added_parameters(module)}
    for optimizer in trainer.optimizers:
        identities = _identities(optimizer)  # before the first follower joins
        for index, source in enumerate(list(optimizer.param_groups)):
            mine = [id(p) in adapters for p in source["params"]]
            if not any(mine):
                continue
            follower = {key: value for key, value in source.items() if key not in ("params", "param_names")}
            follower |= {key: f"{source[key]}/adapters" for key in identities if isinstance(source.get(key), str)}
            follower |= {"follows": index, "lr_ratio": lr_ratio, "lr": _times(source["lr"], lr_ratio)}
            if weight_decay is not None:
                follower["weight_decay"] = weight_decay
            elif "weight_decay" in source and decay_ratio != 1.0:
                follower["weight_decay"] = source["weight_decay"] * decay_ratio
            for key in ("params", "param_names"):
                if key in source:
                    follower[key] = [item for item, is_mine in zip(source[key], mine, strict=True) if is_mine]
                    source[key][:] = [item for item, is_mine in zip(source[key], mine, strict=True) if not is_mine]
            optimizer.param_groups.append(follower)
        optimizer.register_step_pre_hook(_follow)
        for config in trainer.lr_scheduler_configs:
            _hide(config.scheduler, optimizer)


def _identities(optimizer: Optimizer) -> set[str]:
    """Return the keys that distinguish groups: ``name``, and any text that is unique to each group."""
    groups = optimizer.param_groups
    found = {"name"}
    for key in {key for group in groups for key, value in group.items() if isinstance(value, str)}:
        values = [group[key] for group in groups if key in group]
        if 1 < len(values) == len(set(map(str, values))):
            found.add(key)
    return found


def _times(lr: Any, ratio: float) -> Any:
    """Return a rate times a ratio; ``None``, for an optimizer that chooses its own (a ratio other than 1 was refused)."""
    return None if lr is None else lr * ratio


def _follow(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if "follows" in group:
            source = optimizer.param_groups[group["follows"]]
            group["lr"] = _times(source["lr"], group["lr_ratio"])
            group.update({key: source[key] for key in _FOLLOWED if key in source})


def _hide(scheduler: Any, optimizer: Optimizer) -> None:
    if scheduler.optimizer is optimizer:
        scheduler.optimizer = ScheduledGroups(optimizer)
    for inner in inner_schedulers(scheduler):
        _hide(inner, optimizer)
