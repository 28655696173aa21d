"""Carry a merge of dense increments through its steps while training goes on.

    begin     quantise, and send every worker its chunk       after the step that the clock says
    advance   average my chunk, and send it to everyone       half of ``overlap`` later
    result    read the mean                                   ``overlap`` steps after the beginning

All workers do each part at the same step of their clocks, whether the messages have arrived or not: so messages meet, and
nobody asks.

n numbers, w workers, c numbers in a worker's chunk.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_pretrain.lte.wire import DenseMean


class MeanUnderway:
    """Carry one mean of :class:`DenseMean` through its steps; training goes on in between.

    Args:
        of: the mean that this belongs to; its error feedback is used and renewed.
        flat: this worker's buffer, (n); it is overwritten.
    """

    @torch.no_grad()
    def __init__(self, of: DenseMean, flat: Tensor) -> None:
        self._of = of
        self._summed: Tensor | None = None  # of an exact wire
        self._received: Tensor | None = None  # everybody's messages for my chunk, (w, bytes)
        self._gathered: Tensor | None = None  # the mean's messages, (w, bytes)
        self._mean: Tensor | None = None
        self._work: Any = None
        workers, codec = of.workers, of.codec
        if workers.size == 1:
            self._mean = flat
            return
        if codec.exact:
            self._summed, self._work = flat, workers.begin_mean(flat, async_op=True)
            return
        # what this worker's last message left out joins this one
        mine = of.storage.get(of.sent_error, flat.device)
        mine[: of.n] += flat
        rows = mine.view(workers.size, -1)
        messages = codec.encode(rows, rows)  # (w, bytes)
        of.sent_error = of.storage.put(mine, of.sent_error)
        # everybody's messages for my chunk
        self._received, self._work = workers.swap(messages, async_op=True)

    @torch.no_grad()
    def advance(self) -> None:
        """Average what has arrived, and send it on; a second call does nothing."""
        if self._received is None:
            return
        of, workers = self._of, self._of.workers
        self._wait()
        mean, self._received = of.mean_of_rows(self._received), None
        # the mean of my chunk, for everyone
        mean += of.storage.get(of.mean_error, mean.device)
        message = of.codec.encode(mean, mean)
        of.mean_error = of.storage.put(mean, of.mean_error)
        self._gathered, self._work = workers.gather(message, async_op=True)

    @torch.no_grad()
    def result(self) -> Tensor:
        """Wait, and return the mean, (n), the same bits on all workers; any later call returns the same tensor."""
        self.advance()
        self._wait()
        of = self._of
        if self._gathered is not None:
            self._mean, self._gathered = of.codec.decode(self._gathered).flatten()[: of.n], None
        elif self._summed is not None:
            self._mean, self._summed = of.workers.end_mean(self._summed), None
        return cast(Tensor, self._mean)

    def _wait(self) -> None:
        work, self._work = self._work, None
        self._of.workers.wait(work)


@dataclass
class Pending:
    """Hold a merge of one fragment that is under way.

    Attributes:
        number: the fragment's.
        due: the step at whose end it is applied.
        sent: this worker's W by name, as it was sent.
        mean: the workers' mean of Δ, flat, once it has arrived.
    """

    number: int
    due: int
    sent: dict[str, Tensor]
    mean: MeanUnderway | Tensor

    def advance(self) -> None:
        """Read what has arrived, and send the mean on. All workers call it at the same step."""
        if isinstance(self.mean, MeanUnderway):
            self.mean.advance()

    def arrived(self) -> Tensor:
        """Wait, and return the mean, flat. All workers call it at the same step."""
        if isinstance(self.mean, MeanUnderway):
            self.mean = self.mean.result()
        return self.mean
