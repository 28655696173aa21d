"""Encode tensors in few bits for the network, and average them over workers in that form.

    wire        bytes a number   block   levels
    float32     4                        exact
    bfloat16    2                        8 bits of mantissa
    int8        1 + 2/64         64      -127 … 127 times max|x| / 127
    int4        1/2 + 2/64       64      -7 … 7 times max|x| / 7
    int2        1/4 + 2/64       64      -3/2, -1/2, 1/2, 3/2 times the step that suits a normal distribution

Each block of 64 numbers has its own scale (bfloat16). A block of zeros stays zero, so unused rows of an embedding stay
where they are. :class:`Codec` is pure; :class:`DenseMean` sends with it.

Increments that are quantised anew at each merge would lose the same part each time. Error feedback keeps what a message left
out and adds it to the next one, so the sum of all messages follows the sum of all increments to one quantisation step
(1-bit SGD, Seide et al. 2014; MuLoCo, arXiv 2505.23725).

n numbers, w workers, c numbers in a worker's chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_pretrain.lte.storage import Storage
from lowrank_pretrain.lte.workers import Workers

BLOCK = 64
# The uniform quantiser with four levels and the least square error on a normal distribution (Max, 1960): step / deviation.
FOUR_LEVELS = 0.9957


@dataclass(frozen=True)
class Codec:
    """Write float32 numbers as bytes and read them back.

    Args:
        wire: a key of :data:`WIRES`.

    Example:
        >>> codec = Codec("int8")
        >>> x = torch.linspace(-1, 1, 64)
        >>> message = codec.encode(x)
        >>> message.dtype, message.numel(), bool((codec.decode(message) - x).abs().max() < 0.005)
        (torch.uint8, 66, True)
    """

    wire: str

    @property
    def bits(self) -> int:
        """Return the number of bits of one code."""
        return WIRES[self.wire]

    @property
    def exact(self) -> bool:
        """Return whether the message is lossless."""
        return self.wire == "float32"

    def bytes_of(self, n: int) -> int:
        """Return the length of a message of n numbers, a multiple of the block."""
        scales = 2 * (n // BLOCK) if self.bits <= 8 else 0
        return n * self.bits // 8 + scales

    def encode(self, x: Tensor) -> Tensor:
        """Write numbers as one message.

        Args:
            x: float32, (…, n) with n a multiple of 64.

        Returns:
            uint8, (…, bytes): scales first, then codes.
        """
        x = x.contiguous()
        if self.wire == "float32":
            return x.view(torch.uint8)
        if self.wire == "bfloat16":
            return x.to(torch.bfloat16).view(torch.uint8)
        blocks = x.unflatten(-1, (-1, BLOCK))  # (…, n/64, 64)
        step = _step(blocks, self.bits)  # (…, n/64, 1)
        levels = blocks / torch.where(step > 0, step, 1).float()
        if self.bits == 2:
            codes = levels.floor_().clamp_(-2, 1).add_(2)  # mid-rise: level = code - 3/2
        else:
            top = 2 ** (self.bits - 1) - 1
            codes = levels.round_().clamp_(-top, top).add_(top)
        packed = _pack(codes.to(torch.uint8).flatten(-2), self.bits)
        return torch.cat((step.squeeze(-1).contiguous().view(torch.uint8), packed), -1)

    def decode(self, message: Tensor) -> Tensor:
        """Read a message back, float32, (…, n)."""
        if self.wire == "float32":
            return message.contiguous().view(torch.float32)
        if self.wire == "bfloat16":
            return message.contiguous().view(torch.bfloat16).float()
        n = message.shape[-1] * BLOCK // (2 + BLOCK * self.bits // 8)
        scales, packed = message.split([2 * n // BLOCK, n * self.bits // 8], -1)
        step = scales.contiguous().view(torch.bfloat16).float().unsqueeze(-1)
        middle = 1.5 if self.bits == 2 else 2 ** (self.bits - 1) - 1
        levels = _unpack(packed, self.bits).unflatten(-1, (-1, BLOCK)).float().sub_(middle)
        return levels.mul_(step).flatten(-2)


WIRES: Mapping[str, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}


def _step(blocks: Tensor, bits: int) -> Tensor:
    """Return the distance between two levels of each block, rounded to what is sent: bfloat16, (…, 1)."""
    if bits == 2:
        return blocks.square().mean(-1, keepdim=True).sqrt_().mul_(FOUR_LEVELS).to(torch.bfloat16)
    return blocks.abs().amax(-1, keepdim=True).div_(2 ** (bits - 1) - 1).to(torch.bfloat16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Put 8/bits codes into each byte, the first in the lowest bits: (…, n) to (…, n·bits/8)."""
    if bits == 8:
        return codes
    groups = codes.unflatten(-1, (-1, 8 // bits))
    packed = groups[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= groups[..., place] << (bits * place)
    return packed


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.stack([(packed >> (bits * place)) & mask for place in range(8 // bits)], -1).flatten(-2)


def padded(n: int, workers: int) -> int:
    """Return n rounded up, so that each worker's chunk is whole blocks."""
    unit = BLOCK * workers
    return (n + unit - 1) // unit * unit


class DenseMean:
    """Average a flat buffer over all workers through a wire, with error feedback.

        1. each worker adds what its last message left out, and writes one message for each chunk of the buffer
        2. all-to-all: worker j gets everybody's messages for chunk j, reads and averages them in the order of the ranks
        3. it adds what its own last message left out, and writes the mean's message
        4. all-gather: everyone reads the same messages, the sender too, so the result has the same bits everywhere

    ``wire="float32"`` is a plain all-reduce in the buffer's own precision: nothing is left out, and nothing is kept.

    Args:
        workers: who takes part.
        wire: a key of :data:`WIRES`.
        n: the buffer's length.
        keep_on: where the error feedback is kept between merges, ``device`` or ``cpu`` (``storage.Storage``).

    Attributes:
        sent_error: what this worker's messages have left out so far, (padded n) float32.
        mean_error: what this worker's messages of the mean of its own chunk have left out, (c) float32.
    """

    def __init__(self, workers: Workers, wire: str, n: int, keep_on: str = "device") -> None:
        self.workers, self.codec, self.n, self.storage = workers, Codec(wire), n, Storage(keep_on)
        length = padded(n, workers.size)
        lossy = workers.size > 1 and not self.codec.exact
        self.sent_error = self.storage.put(torch.zeros(length if lossy else 0))
        self.mean_error = self.storage.put(torch.zeros(length // workers.size if lossy else 0))

    def mean(self, flat: Tensor) -> Tensor:
        """Return the workers' mean of `flat`, (n), the same bits on all of them. `flat` is not changed."""
        return MeanUnderway(self, flat.clone()).result()

    def sent_per_mean(self) -> float:
        """Return the bytes that this worker sends for one mean."""
        w = self.workers.size
        if w == 1 or self.codec.exact:
            return 2 * (w - 1) / w * 4 * self.n
        return 2 * (w - 1) * self.codec.bytes_of(padded(self.n, w) // w)

    # -- checkpoints: what W still lacks, from any worker's messages ----------------------------------------------------------

    @torch.no_grad()
    def pending(self) -> Tensor | None:
        """Return what all messages so far have left out of the mean, (n) float32. All workers call it together.

        It is the workers' mean of ``sent_error`` plus ``mean_error`` of each chunk, and does not depend on how many there are.
        """
        if not self.sent_error.numel():
            return None
        self.storage.wait()
        total = self.sent_error.clone()
        self.workers.average([total], counted=False)
        errors, _ = self.workers.gather(self.mean_error)
        return (total + errors.flatten())[: self.n]

    @torch.no_grad()
    def take_pending(self, pending: Tensor) -> None:
        """Resume from another number of workers' ``pending``: each worker takes on all of it, so the mean is the same."""
        self.storage.wait()
        if self.sent_error.numel():
            self.sent_error.zero_()[: self.n] = pending.to(self.sent_error)
            self.mean_error.zero_()


class MeanUnderway:
    """Carry one mean of :class:`DenseMean` through its steps; with ``overlap`` training goes on in between.

    All workers make the same calls at the same time of their clocks, so that messages meet.

    Args:
        of: the mean that this belongs to; its error feedback is used and renewed.
        flat: this worker's buffer, (n); it is overwritten.
        overlap: return before the others have answered.
    """

    @torch.no_grad()
    def __init__(self, of: DenseMean, flat: Tensor, overlap: bool = False) -> None:
        self._of, self._overlap = of, overlap
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
            self._summed, self._work = flat, workers.begin_mean(flat, overlap)
            return
        # what this worker's last message left out joins this one
        mine = of.storage.get(of.sent_error, flat.device)
        mine[: of.n] += flat
        messages = codec.encode(mine.view(workers.size, -1))  # (w, bytes)
        of.sent_error = of.storage.put(mine.sub_(codec.decode(messages).flatten()), of.sent_error)
        # everybody's messages for my chunk
        self._received, self._work = workers.swap(messages, overlap)

    @torch.no_grad()
    def advance(self) -> None:
        """Average what has arrived, and send it on; a second call does nothing."""
        if self._received is None:
            return
        of, workers = self._of, self._of.workers
        self._wait()
        # in one order
        received, self._received = of.codec.decode(self._received), None  # (w, c)
        mean = received[0].clone()
        for theirs in received[1:]:
            mean += theirs
        mean /= workers.size
        # the mean of my chunk, for everyone
        mean += of.storage.get(of.mean_error, mean.device)
        message = of.codec.encode(mean)
        of.mean_error = of.storage.put(mean.sub_(of.codec.decode(message)), of.mean_error)
        self._gathered, self._work = workers.gather(message, self._overlap)

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
