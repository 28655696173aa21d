"""The merged weights, to be looked at: put in W's place for validation or a checkpoint, and taken away again.

Training storage is not touched, so looking never changes training.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_pretrain.lte.merge import Piece
from lowrank_pretrain.targets import is_conv1d

if TYPE_CHECKING:
    from lowrank_pretrain.lte.head_set import HeadSet


class MergedView:
    """W with every head's present update in it.

    Args:
        heads: whose.
    """

    def __init__(self, heads: "HeadSet") -> None:
        self._heads = heads
        self._kept: dict[str, Tensor] = {}  # by layer: W as training has it

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Per layer the merged W, a new tensor in the parameter's layout; changes nothing. All workers call it together."""
        heads = self._heads
        if heads.shared.viewing:
            return {name: layer.weight.data for name, layer in heads.layers.items()}
        before = heads.workers.sent, heads.workers.seconds
        exchange = heads.exchange()
        exchange.wait()
        heads.workers.sent, heads.workers.seconds = before  # looking is no merge
        result = {name: layer.weight.detach().clone() for name, layer in heads.layers.items()}
        names = {id(layer): name for name, layer in heads.layers.items()}
        for index, piece in enumerate(heads.pieces):
            _rows(piece, result[names[id(piece.layer)]]).copy_(exchange.updated(index))
        return result

    def look(self) -> None:
        """Put the merged weights in W's place. All workers must call it together."""
        if self._heads.shared.viewing:
            return
        # Lightning validates under inference_mode on NCCL: a tensor made there could not be trained on afterwards
        with torch.inference_mode(False), torch.no_grad():
            merged = self.merged()
            for name, layer in self._heads.layers.items():
                self._kept[name] = layer.weight.data
                layer.weight.data = merged[name]
        self._heads.shared.viewing = True

    def look_away(self) -> None:
        """Undo ``look``."""
        if self._heads.shared.viewing:
            for name, layer in self._heads.layers.items():
                layer.weight.data = self._kept[name]
            self.settle()

    def settle(self) -> None:
        """What is in place stays."""
        self._kept.clear()
        self._heads.shared.viewing = False

    def training_rows(self, piece: Piece) -> Tensor:
        """W's rows as of the last merge, (O, D), also while the merged weights are in place."""
        if not self._heads.shared.viewing:
            return piece.rows()
        name = next(name for name, layer in self._heads.layers.items() if layer is piece.layer)
        return _rows(piece, self._kept[name])


def _rows(piece: Piece, weight: Tensor) -> Tensor:
    """A piece's rows of its layer's weight, an (O, D) view."""
    rows = weight.t() if is_conv1d(piece.layer) else weight
    return rows[piece.part.start : piece.part.start + piece.part.rows]
