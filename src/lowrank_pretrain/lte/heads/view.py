"""The merged weights, to be looked at: put in W's place for validation or a checkpoint, and taken away again.

Training storage is not touched, so looking never changes training. Who writes into W while it is looked at (a best model that
is loaded, a clamp at a validation's end) is heard all the same: what was added joins the training's W.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_pretrain.lte.merge import Exchange, Piece
from lowrank_pretrain.lte.written import everyones, leaf, stamps

if TYPE_CHECKING:
    from lowrank_pretrain.lte.heads.head_set import HeadSet

PIECEMEAL = 2**18  # numbers of factors that travel at once where nothing has to be kept


class MergedView:
    """W with every head's present update in it.

    Args:
        heads: whose.
    """

    def __init__(self, heads: "HeadSet") -> None:
        self._heads = heads
        self._kept: dict[str, Tensor] = {}  # by layer: W as training has it
        self._stamps: list[int] = []  # of the merged rows, as put in place
        self.touched: list[int] = []  # pieces that others had written into when the view was put in place

    @torch.no_grad()
    def merged_rows(self, piecemeal: bool = False, wanted: bool = True) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece's merged rows, (O, D), one after the other; changes nothing. All workers call it together.

        Args:
            piecemeal: send a few pieces at a time, so that no more than those is held at once.
            wanted: form them here too; else this worker only sends its part, and nothing is yielded.
        """
        heads = self._heads
        before = heads.workers.sent, heads.workers.seconds
        touched = self.touched = heads.touched()
        bases = heads.bases(touched)
        still = heads.still(touched)
        snapshot = heads.snapshot()
        for chunk in _chunks([A.numel() + B.numel() for A, B in snapshot], PIECEMEAL if piecemeal else None):
            pieces = [heads.pieces[index] for index in chunk]
            exchange = Exchange(pieces, [snapshot[index] for index in chunk], heads.workers, heads.total)
            exchange.wait()
            for at, index in enumerate(chunk if wanted else ()):
                rows = exchange.updated(at, bases[index][0] if index in bases else None)
                # where nothing was learnt since, what was written is what is seen, bit for bit
                yield pieces[at], bases[index][1] if index in still else rows
        heads.workers.sent, heads.workers.seconds = before  # looking is no merge

    @torch.no_grad()
    def merged(self, piecemeal: bool = False) -> dict[str, Tensor]:
        """Per layer the merged W, a new tensor in the parameter's layout; changes nothing. All workers call it together."""
        heads = self._heads
        if heads.shared.viewing:
            return {name: leaf(layer).data for name, layer in heads.layers.items()}
        result = {name: leaf(layer).detach().clone() for name, layer in heads.layers.items()}
        names = {id(layer): name for name, layer in heads.layers.items()}
        for piece, rows in self.merged_rows(piecemeal):
            piece.rows_of(result[names[id(piece.layer)]]).copy_(rows)
        return result

    def look(self, piecemeal: bool = False, writes: bool = True) -> None:
        """Put the merged weights in W's place. All workers must call it together.

        Args:
            piecemeal: see ``merged_rows``.
            writes: ``False``: only help the worker that writes a checkpoint; here W stays what it is.
        """
        if self._heads.shared.viewing:
            return
        if not writes:
            for _ in self.merged_rows(piecemeal, wanted=False):
                pass
            return
        # Lightning validates under inference_mode on NCCL: a tensor made there could not be trained on afterwards
        with torch.inference_mode(False), torch.no_grad():
            merged = self.merged(piecemeal)
            for name, layer in self._heads.layers.items():
                self._kept[name] = leaf(layer).data
                leaf(layer).data = merged[name]
        self._heads.shared.viewing = True
        self._stamps = [] if piecemeal else stamps([piece.rows() for piece in self._heads.pieces])

    def look_away(self) -> None:
        """Undo ``look``."""
        if self._heads.shared.viewing:
            for name, layer in self._heads.layers.items():
                leaf(layer).data = self._kept[name]
            self.settle()

    @torch.no_grad()
    def look_away_with_care(self) -> None:
        """Undo ``look``, and keep what anyone wrote into the weights meanwhile. All workers must call it together."""
        heads = self._heads
        if not heads.shared.viewing:
            return
        now = everyones(stamps([piece.rows() for piece in heads.pieces]), heads.workers)
        touched = [i for i, was in enumerate(self._stamps) if any(theirs[i] != was for theirs in now)]
        seen = {index: heads.pieces[index].rows().clone() for index in touched}
        self.look_away()
        if touched:
            with torch.inference_mode(False):
                added = {}
                for index, (_, rows) in enumerate(self.merged_rows()):
                    if index in seen:
                        added[index] = seen[index] - rows.to(seen[index].dtype)
                for index, what in added.items():
                    heads.pieces[index].rows().add_(what)

    def settle(self) -> None:
        """What is in place stays."""
        self._kept.clear()
        self._stamps = []
        self._heads.shared.viewing = False

    def training_weight(self, piece: Piece) -> Tensor:
        """A piece's whole layer's W as training has it, also while the merged weights are in place."""
        if not self._heads.shared.viewing:
            return leaf(piece.layer).detach()
        return self._kept[next(name for name, layer in self._heads.layers.items() if layer is piece.layer)]

    def training_rows(self, piece: Piece) -> Tensor:
        """W's rows as training has them, (O, D), also while the merged weights are in place."""
        return piece.rows_of(self.training_weight(piece))


def _chunks(sizes: list[int], limit: int | None) -> Iterator[list[int]]:
    """Positions in order, together no larger than the limit, one at least."""
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
