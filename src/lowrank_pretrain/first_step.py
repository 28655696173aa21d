"""The rehearsal of a Lightning fit: from its first batch to its first optimizer step, agreed on by all processes."""

import functools
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from lowrank_pretrain.rehearsal import Rehearsal
from lowrank_pretrain.targets import Target


class FirstStep:
    """Wraps ``training_step`` until the first optimizer step, and asks a ``Rehearsal`` what it saw.

    Args:
        trainer: its strategy gathers what every process saw.
        pl_module: the module, whose ``training_step`` is watched.
        targets: by name.
        adapters: as for ``Rehearsal``.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: Mapping[str, Target], adapters: bool = True
    ) -> None:
        self._trainer, self._module = trainer, pl_module
        self._rehearsal = Rehearsal(pl_module, targets, adapters)
        self._before: Any = None  # a training_step that the module itself holds, not its class
        self.looking = False
        self.steps = 0  # optimizer steps over which layers that nobody calls were watched

    def start(self) -> None:
        """Begin to watch."""
        self._rehearsal.start()
        step = self._module.training_step
        self._before = self._module.__dict__.get("training_step")
        self.looking = True

        @functools.wraps(step)  # Lightning reads the step's arguments
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._rehearsal.forward():
                return step(*args, **kwargs)

        self._module.__dict__["training_step"] = watched

    def look(self) -> dict[str, str] | None:
        """After the backward pass of the first optimizer step: why targets cannot have an adapter. Later: ``None``.

        All processes must call it, and get the same.
        """
        self.steps += 1
        if not self.looking:
            return None
        self._rehearsal.after_backward()
        self._unwrap()
        return self._rehearsal.finish(self._agreed())

    def late(self) -> tuple[dict[str, str], list[str]]:
        """At any later step: reasons against layers that were called only after the first step, and targets never called.

        All processes must call it, and get the same.
        """
        return self._rehearsal.finish(self._agreed()), self._rehearsal.unseen()

    def stop(self) -> None:
        """Stop watching."""
        self._unwrap()
        self._rehearsal.stop()

    def _agreed(self) -> list[list[int]]:
        seen = torch.tensor(self._rehearsal.evidence(), device=self._module.device)
        if self._trainer.world_size > 1 and seen.numel():
            seen = self._trainer.strategy.all_gather(seen).amax(0)
        return seen.tolist()

    def _unwrap(self) -> None:
        if self.looking:
            self.looking = False
            del self._module.__dict__["training_step"]
            if self._before is not None:
                self._module.__dict__["training_step"] = self._before
