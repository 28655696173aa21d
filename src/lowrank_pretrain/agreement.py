"""Whether all processes hold the same weights: a checksum that costs one pass over them, and one comparison of 8 bytes.

Replicas that drift apart do not crash: the loss goes on falling on every one of them and the checkpoint is rank 0's alone.
So what must be equal is compared now and then, to the bit.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from .errors import ConfigError

WIDTH = 1021  # columns of the checksum; a prime, so that swapped rows of a matrix land in other columns
ROUND = -0x61C8864680B583EB  # 64-bit golden ratio, as a signed number
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by their bytes


class RanksDisagree(RuntimeError):
    """Processes that should hold the same weights do not.

    Args:
        ranks: the global ranks whose weights differ from those of the others.
        step: the optimizer step behind which it was seen.
        where: what had just happened, e.g. ``"the switch"``; empty: one of the regular looks.
    """

    def __init__(self, ranks: list[int], step: int, where: str = "") -> None:
        super().__init__(ranks, step, where)
        self.ranks, self.step, self.where = ranks, step, where

    def __str__(self) -> str:
        after = f"behind {self.where}, after step {self.step}" if self.where else f"at step {self.step}"
        who = ", ".join(map(str, self.ranks))
        return f"the weights of rank {who} differ from the other ranks' {after}"


def checksum(named: Iterable[tuple[str, Tensor]]) -> Tensor:
    """A hash of names, order and every bit of the tensors, computed where they lie; no device is waited for.

    Integer arithmetic modulo 2^64: the same on every device and in whatever order a kernel adds.

    Args:
        named: (name, tensor) pairs in an order that all processes share; all on one device.

    Returns:
        A scalar int64 tensor on that device (on the CPU where there is no tensor).
    """
    total: Tensor | None = None
    weights: dict[torch.device, Tensor] = {}
    for name, tensor in named:
        tensor = tensor.detach()
        if tensor.device not in weights:
            weights[tensor.device] = _weights().to(tensor.device, non_blocking=True)
        word = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
        found = _bits(tensor, weights[tensor.device])
        total = found + word if total is None else total * ROUND + found + word
    return torch.zeros((), dtype=torch.int64) if total is None else total


def _weights() -> Tensor:
    """(WIDTH,) int64, odd: no bit of a column's sum is lost by the product."""
    return torch.arange(1, WIDTH + 1) * ROUND | 1


def _bits(tensor: Tensor, weights: Tensor) -> Tensor:
    flat = tensor.contiguous().reshape(-1)  # a copy only where the memory is not in one piece
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    flat = flat.view(WORDS[flat.element_size()])
    whole = flat.numel() // WIDTH * WIDTH
    columns = flat[:whole].view(-1, WIDTH).sum(0, dtype=torch.int64)  # (WIDTH,); no copy in 64 bits is made
    rest = flat[whole:]
    return (columns * weights).sum() + (rest.long() * weights[: rest.numel()]).sum()


def dissenters(value: Tensor, group: Any = None) -> list[int]:
    """The ranks whose `value` is not that of the majority, or of rank 0 where there is none; [] if all agree.

    All processes of the group must call it together, and it waits for them.

    Args:
        value: a scalar int64, this process's `checksum`.
        group: the process group; None: all processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    found = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(found, value.contiguous(), group=group)
    values = torch.stack(found).tolist()
    most = max(values, key=values.count)  # the first of those that are equally frequent
    return [rank for rank, theirs in enumerate(values) if theirs != most]


def all_agree(trainer: pl.Trainer, value: Tensor) -> bool:
    """Whether `value`, e.g. a `checksum`, is the same on every process; all must call it together."""
    return trainer.world_size == 1 or not dissenters(value)


def shared_parameters(trainer: pl.Trainer, module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """The parameters that should be equal on all ranks: not LTE's heads, not its rest where that goes its own way.

    A parameter that is cut over the ranks (FSDP2) has nothing to compare and is left out.
    """
    apart = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    rest = getattr(trainer.strategy, "rest", None)
    if getattr(rest, "apart", False):
        apart |= set(rest.parameters)
    for name, parameter in module.named_parameters():
        if name not in apart and not hasattr(parameter, "full_tensor"):
            yield name, parameter


def check(trainer: pl.Trainer, module: LightningModule, where: str = "") -> int | None:
    """Compare the shared parameters over all ranks, which must all call it; returns their checksum, None on one process.

    Raises:
        RanksDisagree: they differ; raised on every rank.
    """
    if trainer.world_size == 1:
        return None
    value = checksum(shared_parameters(trainer, module))
    ranks = dissenters(value)
    if ranks:
        raise RanksDisagree(ranks, trainer.global_step, where)
    return int(value)


class RanksAgree(Callback):
    """Compares the ranks' weights every so many optimizer steps and before each checkpoint.

    Args:
        every_n_steps: optimizer steps between two looks; 0: only before checkpoints.

    Raises:
        ConfigError: `every_n_steps` is not a whole number of 0 or more.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 0:
            raise ConfigError("agree_every", every_n_steps, "must be 0 (only before checkpoints) or more optimizer steps")
        self.every_n_steps = every_n_steps
        self._seen_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # gradients still accumulate
            return
        self._seen_step = step
        if self.every_n_steps and step % self.every_n_steps == 0:
            check(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        check(trainer, pl_module)
