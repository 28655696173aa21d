"""Watch the first training step with heads: each target must be called, and its weight must be used nowhere else.

W is frozen where heads are, so a layer that is never called would not train at all. For the first backward pass W takes
gradients once more (a layer with heads gives it none): what arrives there comes from another use of it. A target that proves
unfit before the first optimizer step trains on in full and loses no gradient. A layer that has not been called yet (an
expert) is watched further, at merges.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lowrank_pretrain.core.targets import Target
from lowrank_pretrain.lte.workers import Workers
from lowrank_pretrain.phases.first_step import FirstStepWatch


class Unwatched:
    """Stand in for ``FirstStep`` if targets get no heads, or a phase callback has already watched.

    Attributes:
        unfit: layers whose input cannot be shared out among heads, and why.
        waits: the first backward pass is still to come.
    """

    def __init__(self) -> None:
        self.unfit: dict[str, str] = {}
        self.waits = False

    def forward(self) -> AbstractContextManager:
        """Watch a training step's forward pass."""
        return nullcontext()

    def finish(self) -> dict[str, str]:
        """Return why a target cannot have heads, by name, after a backward pass. All workers call it together."""
        return {}

    @property
    def watches(self) -> bool:
        """Return whether any layer has not been called yet, on any worker (the same answer on all)."""
        return False

    def stop(self) -> None:
        """Stop watching: the fit is over."""


class FirstStep(FirstStepWatch, Unwatched):
    """Watch a model with heads.

    Args:
        module: the LightningModule.
        targets: those with heads, by name.
        workers: who trains together; all find the same.
        trained: ids of the parameters that an optimizer trains.
    """

    def __init__(self, module: nn.Module, targets: Mapping[str, Target], workers: Workers, trained: set[int]) -> None:
        Unwatched.__init__(self)
        FirstStepWatch.__init__(self, module, targets, trained, adapters=False)
        self._module, self._workers = module, workers
        self._started = False
        self.waits = True

    def _start(self) -> None:
        """Begin at the first step, when DDP has wrapped what it averages and the model's summary is printed."""
        self._started = True
        # heads change number and order of the parameters: the first step detects averaging by position
        self._begin(self._module).watch_whole()
        for name, layer in self._rehearsal.layers.items():
            if name not in self._rehearsal.called:
                layer.weight.requires_grad_(True)

    def forward(self) -> AbstractContextManager:
        """Watch a training step's forward pass."""
        if self._started and not self.waits:
            self._unpair()
        if self.waits and not self._started:
            self._start()
        return self._rehearsal.forward() if self.waits else nullcontext()

    @torch.no_grad()
    def finish(self) -> dict[str, str]:
        """Return why a target cannot have heads, by name, after a backward pass. All workers call it together."""
        rehearsal = self._rehearsal
        rehearsal.after_backward()
        penalised = [n for n, layer in rehearsal.layers.items() if n in rehearsal.touched and layer.weight.grad is not None]
        mine = [[*flags, int(name in self.unfit)] for name, flags in zip(rehearsal.layers, rehearsal.evidence(), strict=True)]
        width = len(mine[0])
        flat = self._workers.gather_numbers([flag for flags in mine for flag in flags])
        most = [max(flags) for flags in zip(*flat, strict=True)]
        found = dict(zip(rehearsal.layers, (most[at : at + width] for at in range(0, len(most), width)), strict=True))
        reasons = rehearsal.finish([flags[:-1] for flags in found.values()])
        for target in rehearsal.targets.values():
            if found[target.layer_name][-1]:
                other = "has an input on another worker that cannot be shared out among its heads: leave it out"
                reasons.setdefault(target.name, self.unfit.get(target.layer_name, other))
        named = {target.layer_name for name, target in rehearsal.targets.items() if name in reasons}
        for name, layer in rehearsal.layers.items():
            if name in rehearsal.called and name not in named:
                layer.weight.requires_grad_(False)
                layer.weight.grad = None
        if self.waits and [name for name in penalised if name not in named]:
            rank_zero_warn(
                f"LTE: the loss uses the weight of {penalised[0]} outside of its layer, as a penalty does; W is frozen and its "
                "heads do not feel that: use the optimizer's weight_decay, or leave the layer out of the targets"
            )
        self.waits = False
        rehearsal.targets = {name: target for name, target in rehearsal.targets.items() if name not in reasons}
        rehearsal.layers = {target.layer_name: target.layer for target in rehearsal.targets.values()}
        return reasons

    @property
    def watches(self) -> bool:
        """Return whether any layer has not been called yet, on any worker (the same answer on all)."""
        return not self.waits and bool(self._rehearsal.unseen())
