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

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_pretrain.lte.line import IN_CACHE, Addable, Line
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

    @torch.no_grad()
    def encode(self, x: Tensor, left_out: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Write numbers as one message.

        Args:
            x: float32, (…, n) with n a multiple of 64.
            left_out: of x's shape; gets x minus what will be read. It may be x itself.
            out: uint8 memory for the message, if it is given and the wire has eight bits or fewer.

        Returns:
            uint8, (…, bytes): scales first, then codes.
        """
        n = x.shape[-1]
        if self.exact:
            message = x.contiguous().view(torch.uint8)
            if left_out is not None:
                message = message.clone()
                left_out.zero_()
            return message
        if self.bits == 16:
            coded = x.to(torch.bfloat16)
            if left_out is not None:
                torch.sub(x, coded, out=left_out)
            return coded.view(torch.uint8)
        shape = (*x.shape[:-1], self.bytes_of(n))
        message = torch.empty(shape, dtype=torch.uint8, device=x.device) if out is None else _shaped(out, shape)
        left = x.reshape(-1, n) if left_out is None else left_out.view(-1, n)
        room = torch.empty(min(n, IN_CACHE) if x.device.type == "cpu" else n, dtype=torch.float32, device=x.device)
        for row, written, rest in zip(x.reshape(-1, n), message.view(-1, self.bytes_of(n)), left, strict=True):
            for at, scales, codes in self._pieces(written, n):
                some = slice(at, at + BLOCK * len(scales))
                to = None if left_out is None else rest[some].view(-1, BLOCK)
                self._encode_blocks(row[some].view(-1, BLOCK), scales, codes, to, room)
        return message

    def _pieces(self, message: Tensor, n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield views of one message: the first number's place, some blocks' scales in bfloat16, their packed codes."""
        scales, codes = message.split([2 * n // BLOCK, n * self.bits // 8])
        scales = scales.view(torch.bfloat16)
        # a CPU keeps so many in its cache from one operation to the next
        some = IN_CACHE if message.device.type == "cpu" else max(n, BLOCK)
        for at in range(0, n, some):
            yield at, scales[at // BLOCK : (at + some) // BLOCK], codes[at * self.bits // 8 : (at + some) * self.bits // 8]

    def _encode_blocks(self, x: Tensor, scales: Tensor, packed: Tensor, left: Tensor | None, room: Tensor) -> None:
        """Write blocks (b, 64): their scales (b), their packed codes (b·8·bits), and what is left out."""
        levels, top = room[: x.numel()].view(x.shape), 2 ** (self.bits - 1) - 1
        # the distance between two levels, rounded to what is sent
        if self.bits == 2:
            step = torch.mul(x, x, out=levels).mean(-1, keepdim=True).sqrt_().mul_(FOUR_LEVELS)
        else:
            step = torch.abs(x, out=levels).amax(-1, keepdim=True).div_(top)
        scales.copy_(step.squeeze(-1))
        step = scales.float().unsqueeze(-1)  # (b, 1)
        # the levels; codes count them from the lowest
        torch.div(x, torch.where(step > 0, step, 1), out=levels)
        if self.bits == 2:
            lowest = 2
            levels.floor_().clamp_(-2, 1)
        else:
            lowest = top
            levels.round_().clamp_(-top, top)
        # bytes: the sum wraps around from -127 … 127 to 0 … 254
        if self.bits == 8:
            packed.view(torch.int8).copy_(levels.view(-1))
            packed.add_(lowest)
        else:
            packed.copy_(_pack(levels.view(-1).to(torch.int8).view(torch.uint8).add_(lowest), self.bits))
        if left is not None:
            levels = levels.add_(0.5) if self.bits == 2 else levels  # mid-rise: level = code - 3/2
            torch.addcmul(x, levels, step, value=-1, out=left)

    @torch.no_grad()
    def decode(self, message: Tensor, out: Tensor | None = None) -> Tensor:
        """Read a message back, float32, (…, n).

        Args:
            message: (…, bytes).
            out: written to and returned, if given.
        """
        n = message.shape[-1] * BLOCK // self.bytes_of(BLOCK)
        if out is None:
            out = torch.empty((*message.shape[:-1], n), dtype=torch.float32, device=message.device)
        message = message.contiguous()
        if self.bits >= 16:
            return out.copy_(message.view(torch.float32 if self.exact else torch.bfloat16))
        middle = 1.5 if self.bits == 2 else 2 ** (self.bits - 1) - 1
        for row, numbers in zip(message.view(-1, message.shape[-1]), out.view(-1, n), strict=True):
            for at, scales, codes in self._pieces(row, n):
                levels = numbers[at : at + BLOCK * len(scales)].view(-1, BLOCK)
                levels.copy_(_unpack(codes, self.bits).view(-1, BLOCK)).sub_(middle).mul_(scales.float().unsqueeze(-1))
        return out


WIRES: Mapping[str, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}
AT_ONCE = {"cpu": 2**22, "cuda": 2**26}  # numbers that a worker sends at a time: they bound a merge's memory


def _shaped(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the beginning of a flat tensor's memory in a shape."""
    return memory[: math.prod(shape)].view(*shape)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Put 8/bits codes into each byte, the first in the lowest bits: (n), one a byte, to (n·bits/8)."""
    if bits == 8:
        return codes
    if bits == 4:  # two bytes as one integer, the first in its lower half: shift the second's code down to the first's
        pairs = codes.view(torch.int16)
        return (pairs | pairs >> 4).to(torch.uint8)  # the lowest byte
    fours = codes.view(torch.int32)
    fours = fours | fours >> 6
    return (fours | fours >> 12).to(torch.uint8)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`: (n·bits/8) to (n)."""
    if bits == 8:
        return packed
    if bits == 4:
        pairs = packed.to(torch.int16)
        return (pairs | pairs << 4).bitwise_and_(0x0F0F).view(torch.uint8)
    fours = packed.to(torch.int32)
    fours = (fours | fours << 12).bitwise_and_(0x000F000F)
    return (fours | fours << 6).bitwise_and_(0x03030303).view(torch.uint8)


def padded(n: int, workers: int) -> int:
    """Return n rounded up, so that each worker's chunk is whole blocks."""
    unit = BLOCK * workers
    return (n + unit - 1) // unit * unit


class Room(NamedTuple):
    """Hold memory for one part of a mean after another.

    Attributes:
        numbers: (2, c) float32.
        messages: (3, at least w messages of c numbers) uint8.
    """

    numbers: Tensor
    messages: Tensor


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
        sizes = (length, length // workers.size) if lossy else (0, 0)
        errors = (self.storage.put(torch.zeros(size, dtype=torch.float32)) for size in sizes)
        self.sent_error, self.mean_error = errors

    @torch.no_grad()
    def mean(self, flat: Tensor) -> Tensor:
        """Return the workers' mean of `flat`, (n), the same bits on all of them. `flat` is not changed."""
        mean = torch.empty_like(flat, dtype=flat.dtype if self._plain else torch.float32)
        self.mean_of(Line([flat]), Line([mean]), flat.device, flat.dtype)
        return mean

    @property
    def _plain(self) -> bool:
        """Return whether nothing is coded."""
        return self.workers.size == 1 or self.codec.exact

    @torch.no_grad()
    def mean_of(self, mine: Addable, result: Line, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Write the workers' mean of `mine` to `result`, a part at a time, so that little memory is used.

        A number of `mine` is read before its place in `result` is written, so both may be the same memory.

        Args:
            mine: this worker's numbers, n.
            result: gets the mean, n; the same bits on all workers.
            device: of both.
            dtype: of numbers that are not coded.
        """
        w, at_once = self.workers.size, AT_ONCE.get(device.type, self.n + BLOCK)
        if self._plain:
            for at in range(0, self.n, at_once):
                part = torch.zeros(min(at_once, self.n - at), dtype=dtype, device=device)
                mine.add_to(at, part)
                self.workers.wait(self.workers.begin_mean(part))
                result.put(at, self.workers.end_mean(part))
            return
        # at first, and after a checkpoint, they are in main memory
        self.sent_error, self.mean_error = (self.storage.place(kept, device) for kept in (self.sent_error, self.mean_error))
        c = len(self.mean_error)
        width = min(c, max(BLOCK, at_once // w // BLOCK * BLOCK))
        # memory for all parts: fresh memory costs a CPU more than the arithmetic
        room = Room(
            torch.empty(2, width, dtype=torch.float32, device=device),
            torch.empty(3, w * self.codec.bytes_of(width), dtype=torch.uint8, device=device),
        )
        for at in range(0, c, width):
            self._mean_of_columns(mine, result, slice(at, min(c, at + width)), room)

    def _mean_of_columns(self, mine: Addable, result: Line, columns: slice, room: Room) -> None:
        """Do the same for some columns of all numbers as (w, c): worker j forms the mean of row j."""
        w, c = self.workers.size, len(self.mean_error)
        device = room.numbers.device
        starts = [row * c + columns.start for row in range(w)]
        # what this worker's last message left out joins this one
        kept = self.sent_error.view(w, c)[:, columns]
        whole = self.storage.get(kept, device)
        for start, row in zip(starts, whole, strict=True):
            mine.add_to(start, row[: max(0, self.n - start)])
        messages = self.codec.encode(whole, whole, room.messages[0])  # (w, bytes)
        if whole is not kept:
            for old, new in zip(kept, whole, strict=True):  # contiguous, so that a copy to pinned memory need not wait
                old.copy_(new, non_blocking=True)
        # everybody's messages for my row
        received, _ = self.workers.swap(messages, out=_shaped(room.messages[1], messages.shape))
        mean = self.mean_of_rows(received, room.numbers)
        # the mean of my row, for everyone
        left = self.mean_error[columns]
        mean += self.storage.get(left, device)
        message = self.codec.encode(mean, mean, room.messages[2])
        left.copy_(mean, non_blocking=True)
        gathered, _ = self.workers.gather(message, out=_shaped(room.messages[1], messages.shape))
        for start, written in zip(starts, gathered, strict=True):
            result.put(start, self.codec.decode(written, mean)[: max(0, self.n - start)])

    def mean_of_rows(self, messages: Tensor, room: Tensor | None = None) -> Tensor:
        """Return the mean of what the workers' messages (w, bytes) say, added in the order of the ranks.

        Args:
            messages: one a worker.
            room: (2, at least n) float32 memory to use; the mean is in the first row.
        """
        n = messages.shape[1] * BLOCK // self.codec.bytes_of(BLOCK)
        if room is None:  # each in memory of its own: the mean may be kept
            mean, theirs = (torch.empty(n, dtype=torch.float32, device=messages.device) for _ in range(2))
        else:
            mean, theirs = room[:, :n]
        self.codec.decode(messages[0], mean)
        for message in messages[1:]:
            mean += self.codec.decode(message, theirs)
        return mean.div_(self.workers.size)

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
