"""Compare the order of parameters in optimizers' groups: a resume restores state by position."""

from collections.abc import Iterable

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError


def group_names(optimizers: Iterable[Optimizer], module: nn.Module) -> list[list[list[str]]]:
    """Return parameter names by optimizer and group, in order: state is restored by position, so a resume compares them."""
    names = {id(p): name for name, p in nn.Module.named_parameters(module)}
    return [[[names.get(id(p), "?") for p in group["params"]] for group in opt.param_groups] for opt in optimizers]


def check_same(groups: list[list[list[str]]] | None, trainer: pl.Trainer, module: nn.Module) -> None:
    """Refuse a file whose optimizers had other groups; ``None``: it does not say.

    Raises:
        ConfigError: keyed ``ckpt_path``.
    """
    if groups is not None and groups != group_names(trainer.optimizers, module):
        raise ConfigError("ckpt_path", str(trainer.ckpt_path), "its optimizer groups hold other parameters, or another order")


def check_restored(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Refuse moments that landed on a parameter of another shape; loading by position does not notice.

    Raises:
        ConfigError: naming the parameter.
    """
    names = {id(p): name for name, p in nn.Module.named_parameters(module)}
    for optimizer in optimizers:
        if not type(optimizer).__module__.startswith("torch.optim"):
            continue  # projected moments have their own shapes: such an optimizer checks them itself
        for p, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0 and key.startswith("exp_avg") and value.shape != p.shape:
                    raise ConfigError(
                        "ckpt_path", names.get(id(p), "?"), f"its {key} has shape {tuple(value.shape)}, not {tuple(p.shape)}: "
                        "the checkpoint's optimizer belongs to another model or another grouping of parameters"
                    )  # fmt: skip
