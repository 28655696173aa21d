"""Merge all workers' heads: W ← W₀ + (s/N) Σ BₙAₙ (LTE, arXiv 2402.16828, section 3.3), over a process group.

Two routes carry the same sum. ``factors``: every worker gets every head's A and B (all-gather) and forms the sum itself.
``dense``: every worker forms the sum over its own heads and the sums are added (all-reduce). Per worker and target, with N
heads on w workers, f = N/w · R(D+O) numbers of its own and b bytes a number, rings send (w−1)·f·b and 2(w−1)/w·DO·b bytes:
the fewer are taken. All targets of a route travel in one flat buffer.

On either route every worker computes the same numbers in the same order, so W is equal on all of them bit for bit, and it is
computed from W₀ in float32 at least, so that storing W in half precision rounds once instead of at every merge.

O out, D in, R rank, H heads here, N in all.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.lora.products import Part
from lowrank_pretrain.lte.wire import Codec, padded
from lowrank_pretrain.lte.workers import Workers

Factors = tuple[Tensor, Tensor]  # A (H, R, D), B (H, O, R)


class Mergeable(Protocol):
    """Describe one target, as ``Exchange`` sees it.

    Attributes:
        part: its row block; its scale is s.
        route: ``factors`` or ``dense``.
    """

    part: Part
    route: str

    def merge_base(self, dtype: torch.dtype) -> Tensor:
        """Return W₀, (O, D), which the merge adds to; in ``dtype`` if it is created here."""


class Exchange:
    """Send one merge's factors or sums, and form what W becomes (``updated``).

    Args:
        pieces: all targets, in one order on all workers.
        snapshot: per piece the factors to merge; all of a piece's layout.
        workers: who takes part.
        divisor: N of the mean.
        overlap: return before the others have answered.
        codec: writes the factors in few bits; ``None``: they are sent uncoded. ``snapshot`` then holds what was sent.
    """

    def __init__(
        self, pieces: Sequence[Mergeable], snapshot: Sequence[Factors], workers: Workers, divisor: int, overlap: bool = False,
        codec: Codec | None = None,
    ) -> None:  # fmt: skip
        self.pieces, self.snapshot, self.workers, self.divisor = pieces, list(snapshot), workers, divisor
        self._codec = codec if workers.size > 1 else None
        self._at: list[tuple[torch.dtype, int]] = []  # per piece its buffer and its offset there
        factors: dict[torch.dtype, list[Tensor]] = {}
        dense: dict[torch.dtype, list[int]] = {}
        sizes: dict[tuple[str, torch.dtype], int] = {}
        for index, (piece, (A, B)) in enumerate(zip(pieces, snapshot, strict=True)):
            route = piece.route if workers.size > 1 else "factors"
            dtype = A.dtype if route == "factors" else at_least_32(A.dtype)
            at = sizes.get((route, dtype), 0)
            self._at.append((dtype, at))
            if route == "factors":
                factors.setdefault(dtype, []).extend((A.reshape(-1), B.reshape(-1)))
                sizes[route, dtype] = at + A.numel() + B.numel()
            else:
                dense.setdefault(dtype, []).append(index)
                sizes[route, dtype] = at + piece.part.rows * A.shape[2]
        self._gathered: dict[torch.dtype, Tensor] = {}
        self._summed: dict[torch.dtype, Tensor] = {}
        self._works: list[Any] = []
        # factors: gather everyone's A and B
        for dtype, flat in factors.items():
            message = self._written(torch.cat(flat), dtype)
            self._gathered[dtype], work = workers.gather(message, async_op=overlap)
            self._works.append(work)
        # dense: form the sum over the heads here, and add everyone's
        for dtype, indices in dense.items():
            device = snapshot[indices[0]][0].device
            self._summed[dtype] = torch.empty(sizes["dense", dtype], dtype=dtype, device=device)
            for index in indices:
                self._sum(pieces[index], *snapshot[index], out=self._summed_of(index))
            self._works.append(workers.add(self._summed[dtype], async_op=overlap))

    def _summed_of(self, index: int) -> Tensor:
        """Return a piece's place in the dense buffer, (O, D)."""
        rows, cols = self.pieces[index].part.rows, self.snapshot[index][0].shape[2]
        dtype, at = self._at[index]
        return self._summed[dtype][at : at + rows * cols].view(rows, cols)

    def _written(self, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the message for one buffer of factors; its decoded content replaces the snapshot, on this worker too."""
        if self._codec is None:
            return flat
        message = self._codec.encode(torch.cat([flat.float(), flat.new_zeros(padded(len(flat), 1) - len(flat)).float()]))
        sent = self._codec.decode(message).to(dtype)
        for index, (A, B) in enumerate(self.snapshot):
            of, at = self._at[index]
            if of == dtype:
                between, end = at + A.numel(), at + A.numel() + B.numel()
                self.snapshot[index] = sent[at:between].view_as(A), sent[between:end].view_as(B)
        return message

    def wait(self) -> None:
        """Wait until all have answered, and read coded messages."""
        if not self._works:
            return
        while self._works:
            work = self._works.pop()
            if not isinstance(work, Tensor):
                self.workers.wait(work)
        if self._codec is not None:
            self._gathered = {dtype: self._codec.decode(got).to(dtype) for dtype, got in self._gathered.items()}

    def updated(self, index: int, base: Tensor | None = None) -> Tensor:
        """Return W₀ + (s/N) Σ BₙAₙ of one piece, (O, D) in float32 at least. Call it once, and copy what is to be kept.

        Args:
            index: number of the piece.
            base: another W₀ than the piece's own.
        """
        self.wait()
        piece, (A, B) = self.pieces[index], self.snapshot[index]
        if base is None:
            base = piece.merge_base(at_least_32(A.dtype))
        if piece.route == "dense" and self.workers.size > 1:
            return self._summed_of(index).add_(base)
        (dtype, at), n = self._at[index], A.numel()
        gathered = self._gathered[dtype]
        A = gathered[:, at : at + n].reshape(-1, *A.shape[1:])  # (N, R, D)
        B = gathered[:, at + n : at + n + B.numel()].reshape(-1, *B.shape[1:])  # (N, O, R)
        return self._sum(piece, A, B, base)

    def summed(self, index: int) -> Tensor:
        """Return (s/N) Σ BₙAₙ of one piece, (O, D). Call it or ``updated``, once, and copy what is to be kept."""
        A, B = self.snapshot[index]
        return self.updated(index, torch.zeros(B.shape[1], A.shape[2], dtype=at_least_32(A.dtype), device=A.device))

    def _sum(self, piece: Mergeable, A: Tensor, B: Tensor, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Return (s / N) Σ BₙAₙ, one product of depth N·R, added to ``base``, or written to ``out``."""
        dtype = at_least_32(A.dtype)
        A, B = A.to(dtype).flatten(0, 1), B.to(dtype).permute(1, 0, 2).flatten(1)  # (N·R, D), (O, N·R)
        scale = piece.part.scale / self.divisor
        return torch.mm(B, A, out=out).mul_(scale) if base is None else torch.addmm(base, B, A, alpha=scale)


PIECEMEAL = 2**18  # numbers of factors that travel at once where nothing has to be kept


def chunks(sizes: list[int], limit: int | None) -> Iterator[list[int]]:
    """Yield groups of consecutive positions, each group's size within the limit; at least one per group."""
    chunk: list[int] = []
    held = 0
    for index, size in enumerate(sizes):
        if chunk and limit is not None and held + size > limit:
            yield chunk
            chunk, held = [], 0
        chunk.append(index)
        held += size
    if chunk:
        yield chunk
