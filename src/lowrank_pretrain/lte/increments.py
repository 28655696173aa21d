"""Average the workers' changes to some weights since the last merge, through a wire.

    worker n:  Δₙ = Wₙ − W_base, all weights in one flat buffer
    together:  mean(Δ), the same bits everywhere (``wire.DenseMean``, which keeps what its messages left out)

W_base is kept in float32 at least. For weights in half precision, Δ is measured from W_base as rounded for training, so that
steps that are small compared with W add up in W_base.

n numbers in all.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError, NotFinite
from lowrank_pretrain.lte.line import Changes, Line
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.storage import Storage
from lowrank_pretrain.lte.underway import MeanUnderway
from lowrank_pretrain.lte.wire import DenseMean
from lowrank_pretrain.lte.workers import Workers

Weights = Mapping[str, Tensor]  # by name, as training has them now


class Increments:
    """Track workers' changes to some weights between two merges.

    It costs one float32 copy of the weights; a lossy wire costs another for what its messages left out. Both lie where
    ``keep_on`` says. A merge that overlaps training takes about two more while it is under way; others take little.

    Args:
        weights: the weights, now equal on all workers.
        workers: who merges with whom.
        wire: a key of ``wire.WIRES``.
        keep_on: where W_base and error feedback are kept between merges, ``device`` or ``cpu`` (``storage.Storage``).

    Raises:
        ConfigError: complex weights, and a wire that codes real numbers.

    Attributes:
        base: W_base by name, as kept.
        wire: averages the flat buffer, and keeps the error feedback.
    """

    def __init__(self, weights: Weights, workers: Workers, wire: str, keep_on: str = "device") -> None:
        complex_one = next((name for name, W in weights.items() if W.is_complex()), None)
        if complex_one is not None and wire != "float32" and workers.size > 1:
            raise ConfigError("wire", wire, f"codes real numbers, and {complex_one} is complex: use float32")
        self.workers, self.storage = workers, Storage(keep_on)
        self.base = {n: self.storage.put(W.detach().to(at_least_32(W.dtype), copy=True)) for n, W in weights.items()}
        self.wire = DenseMean(workers, wire, sum(W.numel() for W in weights.values()), keep_on)
        self._dtype = reduce(torch.promote_types, [W.dtype for W in self.base.values()], torch.float32)

    @torch.no_grad()
    def _since(self, weights: Weights) -> Tensor:
        """Return Δ of this worker, (n)."""
        device = weights[next(iter(self.base))].device
        flat = torch.empty(self.wire.n, dtype=self._dtype, device=device)
        for name, part in self.by_name(flat).items():
            W = weights[name].detach()
            base = self.storage.get(self.base[name], W.device)
            part.copy_(W.to(base.dtype) - base.to(W.dtype).to(base.dtype))
        return flat

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat buffer's parts in the weights' shapes, as views."""
        parts = flat.split([base.numel() for base in self.base.values()])
        return {name: part.view(base.shape) for (name, base), part in zip(self.base.items(), parts, strict=True)}

    def begin(self, weights: Weights) -> MeanUnderway:
        """Send Δ through the wire, and do not wait; the result is the workers' mean of it, flat. All workers call it together.

        Args:
            weights: by name.

        Raises:
            NotFinite: on every worker, if one's increment is NaN or infinite; nothing is then sent.
        """
        mine = self._since(weights)
        refuse_nonfinite(self.by_name(mine), self.workers)
        return MeanUnderway(self.wire, mine)

    @torch.no_grad()
    def mean(self, weights: Weights, overwrite: bool = False) -> dict[str, Tensor]:
        """Return the workers' mean of Δ by name, through the wire. All workers call it together.

        Args:
            weights: by name.
            overwrite: put the mean into the weights' own memory where it fits; ``weights`` are of no more use.

        Raises:
            NotFinite: on every worker, if one's weight is NaN or infinite; nothing is then sent.
        """
        mine = {name: weights[name].detach() for name in self.base}
        refuse_nonfinite(mine, self.workers)
        mean = {}
        for name, W in mine.items():
            fits = overwrite and weights[name] is not self.base[name] and W.dtype == self._dtype and W.is_contiguous()
            mean[name] = W if fits else torch.empty(W.shape, dtype=self._dtype, device=W.device)
        changes = Changes([*mine.values()], [*self.base.values()])
        self.wire.mean_of(changes, Line([*mean.values()]), next(iter(mean.values())).device, self._dtype)
        return mean

    def now(self, weights: Weights) -> dict[str, Tensor]:
        """Return the exact mean of Δ by name, for evaluation; change nothing. All workers call it together."""
        mean = self._since(weights)
        self.workers.average([mean], counted=False)
        return self.by_name(mean)

    @torch.no_grad()
    def moved(self, name: str, mean: Tensor, outer: OuterStep) -> Tensor:
        """Take the outer step of one weight; return its new W_base, on the device of `mean`.

        Args:
            name: the weight's.
            mean: the workers' mean of its Δ; overwritten.
            outer: the outer step.
        """
        kept = self.base[name]
        base = self.storage.get(kept, mean.device)
        outer.step(name, base, mean.to(base.dtype))
        self.base[name] = self.storage.put(base, kept)
        return base

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def saved_base(self) -> dict[str, Tensor]:
        """Return copies of W_base by name, in main memory."""
        self.storage.wait()
        return {name: base.cpu().clone() for name, base in self.base.items()}

    def errors(self) -> dict[str, list[Tensor]] | None:
        """Return every worker's error feedback on the worker that writes, ``None`` on the others. All call it together."""
        if not self.wire.sent_error.numel():
            return {}
        self.storage.wait()
        found = self.workers.to_first({"sent": self.wire.sent_error, "mean": self.wire.mean_error})
        return (
            None
            if found is None
            else {key: [t.cpu().clone() for t in values if t is not None] for key, values in found.items()}
        )

    @torch.no_grad()
    def load(self, base: Weights, errors: Mapping[str, list[Tensor]]) -> None:
        """Restore W_base and error feedback; for another number of workers, each takes on all that was pending.

        Args:
            base: W_base by name.
            errors: as ``errors`` gave them.
        """
        self.storage.wait()
        for name, mine in self.base.items():
            mine.copy_(base[name])
        if not errors:
            return
        if len(errors["sent"]) == self.workers.size:
            self.wire.sent_error = errors["sent"][self.workers.rank].clone()
            self.wire.mean_error = errors["mean"][self.workers.rank].clone()
            return
        if self.workers.size > 1:
            self.wire.take_pending(_pending(errors, self.wire.n))
        else:  # no other worker to send it to
            add_pending(self.base, self.base, errors)


def _pending(errors: Mapping[str, list[Tensor]], n: int) -> Tensor:
    """Return what all messages have left out of the mean (``DenseMean.pending``), (n), from a checkpoint's errors."""
    return (torch.stack(errors["sent"]).mean(0) + torch.cat(errors["mean"]))[:n]


@torch.no_grad()
def add_pending(weights: Weights, base: Weights, errors: Mapping[str, list[Tensor]]) -> None:
    """Add to weights what all messages have left out of the mean.

    Args:
        weights: by name; those not in ``base`` are skipped.
        base: a checkpoint's W_base by name, whose order is that of the flat buffer.
        errors: as ``Increments.errors`` gave them.
    """
    sizes = [W.numel() for W in base.values()]
    for (name, W), part in zip(base.items(), _pending(errors, sum(sizes)).split(sizes), strict=True):
        if name in weights:
            weights[name].add_(part.view(W.shape).to(weights[name]))


@torch.no_grad()
def refuse_nonfinite(mine: Mapping[str, Tensor], workers: Workers) -> None:
    """End the run if one worker is about to send NaN or infinity. All workers call it together.

    Args:
        mine: what this worker is about to send, by target, in the same order on all workers.
        workers: who merges with whom.

    Raises:
        NotFinite: on every worker, naming the worker and the target.
    """
    first = 0  # number of the first target that is not finite, from 1 on
    if mine:
        device = next(iter(mine.values())).device
        if device.type == "meta":  # ``traffic`` only counts
            return
        if not torch.stack([t.sum().to(device) for t in mine.values()]).isfinite().all():  # quick; but a sum may overflow
            fine = torch.stack([torch.isfinite(t).all().to(device) for t in mine.values()]).tolist()
            first = fine.index(False) + 1 if False in fine else 0
    for rank, (found,) in enumerate(workers.gather_numbers([first])):
        if found:
            raise NotFinite(
                f"LTE: what worker {rank} has learnt of {list(mine)[found - 1]} is NaN or infinite; nothing was merged; a "
                "lower learning rate or gradient_clip_val may help"
            )


def saved_by_all(mine: Mapping[str, Tensor], workers: Workers) -> dict[str, list[Tensor | None]] | None:
    """Return every worker's tensors by key, copies, on the worker that writes; ``None`` on the others. All call it together."""
    everyone: Any = workers.to_first(mine)
    if everyone is None:
        return None
    return {key: [None if value is None else value.clone() for value in values] for key, values in everyone.items()}
