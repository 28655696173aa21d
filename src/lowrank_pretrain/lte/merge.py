"""The merge: W ← W₀ + (s/N) Σ BₙAₙ over all workers' heads (LTE, arXiv 2402.16828, section 3.3), over a process group.

Two routes carry the same sum. ``factors``: every worker gets every head's A and B (all-gather) and forms the sum itself.
``dense``: every worker forms the sum over its own heads and the sums are added (all-reduce). Per worker and target, with N
heads on w workers, f = N/w · R(D+O) numbers of its own and b bytes a number, rings send (w−1)·f·b and 2(w−1)/w·DO·b bytes:
the fewer are taken. All targets of a route travel in one flat buffer.

Whatever route, every worker computes the same numbers in the same order, so W is equal on all of them bit for bit, and it is
computed from W₀ in float32 at least, so that storing W in half precision rounds once instead of at every merge.

O out, D in, R rank, H heads here, N in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.targets import WHOLE, is_conv1d
from lowrank_pretrain.lora.function import Part
from lowrank_pretrain.lte.workers import Workers
from lowrank_pretrain.lte.written import leaf

ROUTES = ("factors", "dense")


@dataclass
class Piece:
    """One target with heads.

    Attributes:
        name: the target's name.
        layer: the layer with heads.
        part: its row block.
        base: W₀, (O, D) in float32 at least; ``None``: W itself is what the next merge adds to.
        route: ``factors`` or ``dense``.
    """

    name: str
    layer: nn.Module
    part: Part
    base: Tensor | None = field(default=None, repr=False)
    route: str = "factors"

    @property
    def layer_name(self) -> str:
        """The name of the layer that it is a part of."""
        return self.name if self.part.name == WHOLE else self.name.rpartition(".")[0]

    def rows(self) -> Tensor:
        """W's rows, an (O, D) view."""
        return self.rows_of(leaf(self.layer).detach())

    def rows_of(self, weight: Tensor) -> Tensor:
        """The piece's rows of a tensor that lies as its layer's W does, an (O, D) view."""
        rows = weight.t() if is_conv1d(self.layer) else weight
        return rows[self.part.start : self.part.start + self.part.rows]

    def factors(self) -> "Factors":
        """The heads' live A (H, R, D), a view, and B (H, O, R)."""
        rows = slice(self.part.a, self.part.a + self.part.rank)
        return self.layer.lora_A.detach()[:, rows], self.layer.lora_B[self.part.name].detach()

    def choose_route(self, route: str | None, workers: int) -> None:
        """The route of fewer bytes, unless ``route`` says which."""
        self.route = cheaper_route(route, workers, *self.factors(), self.part.rows)


def cheaper_route(route: str | None, workers: int, A: Tensor, B: Tensor, rows: int) -> str:
    """The route of fewer bytes for factors A (H, R, D) and B (H, O, R), unless ``route`` says which."""
    own = A.numel() * A.itemsize + B.numel() * B.itemsize
    dense = rows * A.shape[2] * at_least_32(A.dtype).itemsize
    return route or ("factors" if (workers - 1) * own <= 2 * (workers - 1) / workers * dense else "dense")


Factors = tuple[Tensor, Tensor]


class Exchange:
    """One merge's traffic, perhaps still under way. ``updated`` gives what W becomes.

    Args:
        pieces: all targets, in one order on all workers.
        snapshot: per piece the factors to merge; all of a piece's layout.
        workers: who takes part.
        divisor: N of the mean.
        overlap: return before the others have answered.
    """

    def __init__(
        self, pieces: Sequence[Piece], snapshot: Sequence[Factors], workers: Workers, divisor: int, overlap: bool = False
    ) -> None:
        self.pieces, self.snapshot, self.workers, self.divisor = pieces, snapshot, workers, divisor
        self._at: list[tuple[torch.dtype, int]] = []  # per piece its buffer and its place there
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
        self._works = []
        for dtype, flat in factors.items():
            self._gathered[dtype], work = workers.gather(torch.cat(flat), async_op=overlap)
            self._works.append(work)
        for dtype, indices in dense.items():
            device = snapshot[indices[0]][0].device
            self._summed[dtype] = torch.empty(sizes["dense", dtype], dtype=dtype, device=device)
            for index in indices:
                self._sum(pieces[index], *snapshot[index], out=self._summed_of(index))
            self._works.append(workers.add(self._summed[dtype], async_op=overlap))

    def _summed_of(self, index: int) -> Tensor:
        """A piece's place in the dense buffer, (O, D)."""
        rows, cols = self.pieces[index].part.rows, self.snapshot[index][0].shape[2]
        dtype, at = self._at[index]
        return self._summed[dtype][at : at + rows * cols].view(rows, cols)

    def wait(self) -> None:
        """Until all have answered."""
        while self._works:
            work = self._works.pop()
            if not isinstance(work, Tensor):
                self.workers.wait(work)

    def updated(self, index: int, base: Tensor | None = None) -> Tensor:
        """W₀ + (s/N) Σ BₙAₙ of one piece, (O, D) in float32 at least. Ask once, and copy what is to be kept.

        Args:
            index: the piece's.
            base: another W₀ than the piece's own.
        """
        self.wait()
        piece, (A, B) = self.pieces[index], self.snapshot[index]
        base = piece.base if base is None else base
        if base is None:
            base = piece.rows().to(at_least_32(A.dtype))
        if piece.route == "dense" and self.workers.size > 1:
            return self._summed_of(index).add_(base)
        (dtype, at), n = self._at[index], A.numel()
        gathered = self._gathered[dtype]
        A = gathered[:, at : at + n].reshape(-1, *A.shape[1:])  # (N, R, D)
        B = gathered[:, at + n : at + n + B.numel()].reshape(-1, *B.shape[1:])  # (N, O, R)
        return self._sum(piece, A, B, base)

    def _sum(self, piece: Piece, A: Tensor, B: Tensor, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """(s / N) Σ BₙAₙ, one product of depth N·R, added to ``base``, or written to ``out``."""
        dtype = at_least_32(A.dtype)
        A, B = A.to(dtype).flatten(0, 1), B.to(dtype).permute(1, 0, 2).flatten(1)  # (N·R, D), (O, N·R)
        scale = piece.part.scale / self.divisor
        return torch.mm(B, A, out=out).mul_(scale) if base is None else torch.addmm(base, B, A, alpha=scale)
