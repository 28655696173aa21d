"""Read and write several tensors as one line of numbers, a part at a time, without a flat copy of them.

A merge goes through the model so: fresh memory of the model's size costs a CPU more than the arithmetic on it.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

IN_CACHE = 2**16  # numbers that a CPU keeps in its cache from one operation to the next


class Line:
    """Show several tensors as one line of n numbers.

    Args:
        tensors: each contiguous.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t.detach().view(-1) for t in tensors]
        self._ends = list(accumulate(map(len, self.tensors)))

    def parts(self, at: int, n: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield where numbers at … at + n lie: the tensor's index, the place in it, and the place among these numbers."""
        index, done = bisect_right(self._ends, at), 0
        while done < n:
            start = at + done - (self._ends[index] - len(self.tensors[index]))
            some = min(n - done, len(self.tensors[index]) - start)
            yield index, slice(start, start + some), slice(done, done + some)
            index, done = index + 1, done + some

    def add_to(self, at: int, out: Tensor) -> None:
        """Add the numbers from `at` on to `out`."""
        for index, there, here in self.parts(at, len(out)):
            out[here] += self.tensors[index][there]

    def put(self, at: int, numbers: Tensor) -> None:
        """Write numbers from `at` on."""
        for index, there, here in self.parts(at, len(numbers)):
            self.tensors[index][there].copy_(numbers[here])


class Addable(Protocol):
    """Describe numbers that ``DenseMean`` reads once."""

    def add_to(self, at: int, out: Tensor) -> None:
        """Add the numbers from `at` on to `out`."""


class Changes(Line):
    """Read Δ of several weights as one line of numbers, without forming it.

    Args:
        weights: W as training has them.
        bases: W_base of each, as kept.
    """

    def __init__(self, weights: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
        super().__init__([base.contiguous() for base in bases])
        self._weights = [W.reshape(-1) for W in weights]

    def add_to(self, at: int, out: Tensor) -> None:
        """Add the numbers from `at` on to `out`, in pieces that stay in a CPU's cache."""
        most = IN_CACHE if out.device.type == "cpu" else max(1, len(out))
        room = torch.empty(min(most, len(out)), dtype=out.dtype, device=out.device)
        for start in range(0, len(out), most):
            for index, there, here in self.parts(at + start, min(most, len(out) - start)):
                W = self._weights[index][there]
                base = self.tensors[index][there].to(W.device, non_blocking=True)
                if W.dtype == base.dtype == out.dtype:
                    since = torch.sub(W, base, out=room[: len(W)])
                else:
                    since = W.to(base.dtype) - base.to(W.dtype).to(base.dtype)
                out[start : start + most][here] += since
