"""Swap merged weights in for evaluation and checkpoints, and back out; detect other code's writes into W.

Training storage is not touched, so looking never changes training. Others may write into W while the merged weights are in
(a best model is loaded, a callback clamps at a validation's end): what they added then joins the W that trains.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lowrank_pretrain.core import bits
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.galore.guard import closed
from lowrank_pretrain.lte.merge import Exchange, Factors

if TYPE_CHECKING:
    from lowrank_pretrain.lte.heads.head_set import HeadSet
    from lowrank_pretrain.lte.heads.layer import HeadTarget
    from lowrank_pretrain.lte.local_targets import LocalTarget, LocalTargets


@torch.no_grad()
def read_stamps(tensors: Sequence[Tensor]) -> list[int]:
    """Return a stamp of each tensor's bits, in one read of the device. It changes when anything writes into the tensor.

    Users may write in any way, also through ``.data``, which no version counter sees.
    """
    if not tensors or tensors[0].is_meta:  # tensors that have only shapes are never written to (``traffic``)
        return [0] * len(tensors)
    return bits.stamps(tensors).tolist()


class MergedView:
    """Replace W temporarily by the W with every worker's present update.

    Args:
        owner: the targets.
    """

    def __init__(self, owner: "LocalTargets") -> None:
        self._owner = owner
        self._kept: dict[str, Tensor] = {}  # by name: W as training has it
        self._stamps: list[int] = []  # of the merged weights, as they were swapped in

    @property
    def swapped_in(self) -> bool:
        """Return whether the merged weights are swapped in."""
        return self._owner.shared.viewing

    @closed
    @torch.no_grad()
    def merged_weights(self, piecemeal: bool = False) -> dict[str, Tensor]:
        """Return each merged W, a new tensor in the parameter's layout; change nothing. All workers call it together.

        Args:
            piecemeal: send a few pieces at a time, so that no more than those is held at once.
        """
        owner = self._owner
        if self.swapped_in:
            return {name: W.data for name, W in owner.weights().items()}
        result = {name: W.detach().clone() for name, W in owner.weights().items()}
        for piece, merged in owner.merged(piecemeal):
            piece.write(merged, result[piece.weight_name])
        return result

    @closed
    def swap_in(self, piecemeal: bool = False, writes: bool = True) -> None:
        """Swap the merged weights in for W. All workers call it together.

        Args:
            piecemeal: as for ``merged_weights``; nothing may write into the swapped-in weights.
            writes: ``False``: only help the worker that writes a checkpoint; here W is not changed.
        """
        owner = self._owner
        if self.swapped_in:
            return
        # Lightning validates under inference_mode on NCCL: a tensor made there could not be trained on afterwards
        with torch.inference_mode(False), torch.no_grad():
            if not writes:
                for _ in owner.merged(piecemeal, wanted=False):
                    pass
                return
            if owner.differs:
                merged = self.merged_weights(piecemeal)
                for name, W in owner.weights().items():
                    self._kept[name] = W.data
                    W.data = merged[name]
        owner.shared.viewing = True
        self._stamps = [] if piecemeal else self._read_stamps()

    def swap_out(self) -> None:
        """Swap the training weights back in."""
        if self.swapped_in:
            live = self._owner.weights()
            for name, W in self._kept.items():
                live[name].data = W
            self.keep()

    @closed
    @torch.no_grad()
    def swap_out_keeping_writes(self) -> None:
        """Swap out, and add to W what others wrote into the merged weights meanwhile. All workers call it together."""
        owner = self._owner
        if not (self.swapped_in and owner.differs):
            self.swap_out()
            return
        now = owner.workers.gather_numbers(self._read_stamps())
        written = [i for i, was in enumerate(self._stamps) if any(theirs[i] != was for theirs in now)]
        seen = {index: owner.pieces[index].live().clone() for index in written}
        self.swap_out()
        if not written:
            return
        with torch.inference_mode(False):
            added = {}
            for index, (piece, merged) in enumerate(owner.merged()):
                if index in seen:
                    added[index] = seen[index] - piece.as_live(merged).to(seen[index].dtype)
            for index, difference in added.items():
                owner.pieces[index].live().add_(difference)

    def keep(self) -> None:
        """Keep the weights that are now in place."""
        self._kept.clear()
        self._stamps = []
        self._owner.shared.viewing = False

    def kept_weight(self, piece: "LocalTarget") -> Tensor | None:
        """Return a piece's training W while the merged one replaces it; else ``None``."""
        return self._kept.get(piece.weight_name)

    def _read_stamps(self) -> list[int]:
        return read_stamps([piece.live() for piece in self._owner.pieces])


class Writes:
    """Detect writes into W by code other than the heads between two merges, and add them to the base of merges.

    Clamps, masks, re-initialisation, a teacher's average, ``load_state_dict``: users write into W where and how they like. So a
    merge leaves a stamp of what it wrote, and the next one compares. What was added joins W₀ on every worker alike: where
    workers wrote different things, their mean.

    Args:
        heads: the heads, whose pieces are watched.
    """

    def __init__(self, heads: "HeadSet") -> None:
        self._heads = heads
        self._stamps: list[int] = []  # of every piece's rows, as the last merge left them
        self._unequal: set[int] = set()  # pieces into which workers wrote different things
        self._kept: dict[str, Tensor] = {}  # after a fit

    def training_rows(self, piece: "HeadTarget") -> Tensor:
        """Return the rows of the W being trained, (O, D), also while the merged weights are in place."""
        return piece.rows_of(self._training_weight(piece))

    def _training_weight(self, piece: "HeadTarget") -> Tensor:
        kept = self._heads.view.kept_weight(piece)
        return piece.weight() if kept is None else kept

    def mark(self) -> None:
        """Record the present W: any difference at the next merge was written by others."""
        if self._heads.settings.mode != "joint":
            self._stamps = self._read_stamps()

    def _read_stamps(self) -> list[int]:
        """Return a stamp of W for each piece; row blocks of a layer share one if all of them are targets."""
        held: dict[tuple[int, int], Tensor] = {}
        keys = []
        for index, piece in enumerate(self._heads.pieces):
            whole = not piece.owner._rest
            keys.append((id(piece.layer), -1 if whole else index))
            if keys[-1] not in held:
                held[keys[-1]] = self._training_weight(piece) if whole else self.training_rows(piece)
        found = dict(zip(held, read_stamps(list(held.values())), strict=True))
        return [found[key] for key in keys]

    def touched(self) -> list[int]:
        """Return the pieces that anyone wrote into since the last merge, on any worker. All workers call it together."""
        if self._heads.settings.mode == "joint":
            return []
        everyone = self._heads.workers.gather_numbers(self._read_stamps())
        self._unequal = {i for i in range(len(self._stamps)) if any(theirs[i] != everyone[0][i] for theirs in everyone)}
        return [i for i, was in enumerate(self._stamps) if any(theirs[i] != was for theirs in everyone)]

    def rows(self) -> dict[str, Tensor]:
        """Return the present W, (O, D), of each target that others wrote into since the last merge. All call it together."""
        if not self._heads.attached:
            return self._kept
        return {piece.name: self.training_rows(piece) for piece in self._pieces(self.touched())}

    def keep(self, touched: Iterable[int]) -> None:
        """Keep the rows of pieces that were written into, for a checkpoint after the fit."""
        self._kept = {piece.name: self.training_rows(piece).clone() for piece in self._pieces(touched)}

    def _pieces(self, numbers: Iterable[int]) -> "list[HeadTarget]":
        return [self._heads.pieces[index] for index in numbers]

    @torch.no_grad()
    def bases(self, touched: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return, for pieces that were written into, the new W₀ and the present W. All call it together.

        W is the workers' mean where they wrote different things.
        """
        if not touched:
            return {}
        pieces, workers = self._heads.pieces, self._heads.workers
        now = {}
        for index in touched:
            rows = self.training_rows(pieces[index])
            now[index] = workers.mean_of(rows) if index in self._unequal else rows
        chosen = [index for index in touched if pieces[index].base is not None]
        then = dict(zip(chosen, self._as_merged(self._pieces(chosen)), strict=True))
        result = {}
        for index in touched:
            was, W = pieces[index].base, now[index]
            if was is None:
                base = W.to(at_least_32(W.dtype))
            else:
                base = was + (W.to(was) - then[index].to(W.dtype))  # what was added since, exactly 0 elsewhere
            result[index] = base, W
        return result

    def _as_merged(self, pieces: "Sequence[HeadTarget]") -> list[Tensor]:
        """Recompute the last merge's result for these pieces; W₀ if there was no merge."""
        heads = self._heads
        before = [piece.prev_factors() for piece in pieces]
        if heads.accumulates or not any(before):
            return [cast(Tensor, piece.base) for piece in pieces]
        sent = heads.workers.sent
        exchange = Exchange(pieces, [cast(Factors, factors) for factors in before], heads.workers, heads.total)
        heads.workers.sent = sent
        return [exchange.updated(index) for index in range(len(pieces))]

    def still(self, touched: Sequence[int]) -> set[int]:
        """Return which of these pieces no head of any worker has trained since the last merge. All workers call it together."""
        if not touched:
            return set()
        flags = []
        for piece in self._pieces(touched):
            (A, B), old = piece.factors(), piece.prev_factors()
            flags.append(int(not B.any() if old is None else torch.equal(A, old[0]) and torch.equal(B, old[1])))
        everyone = self._heads.workers.gather_numbers(flags)
        return {index for at, index in enumerate(touched) if all(theirs[at] for theirs in everyone)}
