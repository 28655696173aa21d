"""The rest: every trainable parameter that belongs to no head (norms, embeddings, biases, the output head).

``step``: DDP averages its gradients at every step. ``merge``: nothing is sent in between, every worker's rest goes its own
way and is averaged when heads merge, floating buffers (BatchNorm's) too. Then its optimizer state differs between workers as
well; it is never averaged in training, and a checkpoint keeps each worker's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.dtypes import at_least_32
from lowrank_pretrain.lte.optimizer_state import BareGroups
from lowrank_pretrain.lte.workers import Workers

SYNC = ("step", "merge")


class Rest:
    """The rest of a converted module.

    Args:
        module: it.
        heads: ids of the heads' parameters.
        left_out: names of the heads' buffers.
        workers: who merges with whom.
        sync: one of ``SYNC``.
    """

    def __init__(self, module: nn.Module, heads: set[int], left_out: set[str], workers: Workers, sync: str) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) not in heads}
        self.workers, self.apart = workers, sync == "merge" and workers.size > 1
        self._tensors = {n: p.data for n, p in self.parameters.items()}
        self._tensors |= {n: b for n, b in module.named_buffers() if b.is_floating_point() and n not in left_out}
        self._module = module
        self._kept: list[Tensor] | None = None
        self._own: list[Tensor] | None = None  # behind a fit

    def _live(self) -> list[Tensor]:
        """What differs between workers: looked up by name, because moving a module replaces storages."""
        parameters, buffers = dict(self._module.named_parameters()), dict(self._module.named_buffers())
        return [parameters[n].data if n in parameters else buffers[n] for n in self._tensors]

    def bytes(self) -> int:
        """Size of the trainable rest."""
        return sum(p.numel() * p.itemsize for p in self.parameters.values())

    def sent_per_window(self, steps: int) -> float:
        """Bytes that a worker sends for the rest in a window of so many steps (rings)."""
        share = 2 * (self.workers.size - 1) / self.workers.size
        if self.apart:
            return share * sum(t.numel() * at_least_32(t.dtype).itemsize for t in self._tensors.values())
        return share * self.bytes() * steps

    @torch.no_grad()
    def merge(self) -> None:
        """Average it, if it goes its own way."""
        if self.apart:
            self.workers.average(self._live())

    @torch.no_grad()
    def look(self) -> None:
        """Put the average in its place, to be looked at."""
        if self.apart and self._kept is None:
            self._kept = [t.clone() for t in self._live()]
            sent = self.workers.sent
            self.workers.average(self._live())
            self.workers.sent = sent  # looking is no merge

    @torch.no_grad()
    def look_away(self) -> None:
        """Undo ``look``."""
        if self._kept is not None:
            for t, kept in zip(self._live(), self._kept, strict=True):
                t.copy_(kept)
            self._kept = None

    def settle(self) -> None:
        """What is in place stays; a checkpoint that is written later has each worker's own all the same."""
        self._own, self._kept = self._kept, None

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def collect(self, bare: Sequence[BareGroups]) -> dict[str, Any] | None:
        """Every worker's rest, {name: (w, …)}, and its moments; ``None`` where they are equal. All workers together."""
        if not self.apart:
            return None
        mine = dict(zip(self._tensors, self._own or self._kept or self._live(), strict=True))
        moments = {(n, key): v for n, key, v in self._moments(bare)}
        stacked = self.workers.all_heads([t[None] for t in (*mine.values(), *moments.values())])
        tensors = dict(zip(mine, stacked, strict=False))
        entry: dict[str, Any] = {"tensors": tensors, "moments": {}}
        for (name, key), value in zip(moments, stacked[len(mine) :], strict=True):
            entry["moments"].setdefault(name, {})[key] = value
        return entry

    def _moments(self, bare: Sequence[BareGroups]) -> list[tuple[str, str, Tensor]]:
        return [
            (name, key, value)
            for name, p in self.parameters.items()
            for groups in bare
            for key, value in groups.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor)
        ]

    @torch.no_grad()
    def averaged_moments(self, saved: dict[str, Any], own: set[int]) -> dict[str, Any]:
        """An optimizer's state dict with the workers' mean of every tensor, for a run of another make. All together.

        Args:
            saved: the state dict.
            own: numbers of the parameters that are no rest, whose state stays this worker's.
        """
        if not self.apart:
            return saved
        state = {n: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for n, s in saved["state"].items()}
        values = [v for n, s in state.items() if n not in own for v in s.values()]
        self.workers.average([v for v in values if isinstance(v, Tensor) and v.is_floating_point()], counted=False)
        return {**saved, "state": state}

    @torch.no_grad()
    def restore(self, entry: Mapping[str, Any] | None) -> None:
        """This worker's own rest, if the checkpoint is of as many; else it goes on from their average, as loaded."""
        if self._fits(entry):
            for name, t in zip(self._tensors, self._live(), strict=True):
                t.copy_(entry["tensors"][name][self.workers.rank])

    @torch.no_grad()
    def restore_moments(self, entry: Mapping[str, Any] | None, bare: Sequence[BareGroups]) -> None:
        """Likewise its moments, once the optimizers hold some."""
        if self._fits(entry):
            for name, key, value in self._moments(bare):
                value.copy_(entry["moments"][name][key][self.workers.rank])

    def _fits(self, entry: Mapping[str, Any] | None) -> bool:
        return self.apart and entry is not None and len(next(iter(entry["tensors"].values()), ())) == self.workers.size
