"""Choose each layer's rank by a fraction, by energy or by a budget, and factor its row blocks together or separately.

A fused layer (q, k and v in one matrix) can be one product U V of rank k, which shares V among the parts, or one product for
each part. Both are looked at, and the smaller one is taken *at equal error*: separate parts get the fewest columns, spread
where they keep most, that reach the error of the common rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_pretrain.core.targets import WHOLE
from lowrank_pretrain.factorize.cost import largest_rank, numbers_of
from lowrank_pretrain.factorize.decompose import Spectrum, factors, spectrum


class Block(NamedTuple):
    """Describe a row block with its own factors: rows [start, start+rows) of W, rows [at, at+rank) of V."""

    name: str
    start: int
    rows: int
    at: int
    rank: int


class Cut(NamedTuple):
    """Describe a factored layer.

    Attributes:
        blocks: one for the whole layer, or one for each part.
        U: by block's name, (O_p, k_p).
        V: (Σk, D), the blocks' V stacked by rows.
        kept: the share of E‖W x‖² that stays.
    """

    blocks: tuple[Block, ...]
    U: dict[str, Tensor]
    V: Tensor
    kept: float


def rank_of_fraction(fraction: float, rows: int, cols: int) -> int:
    """Return ``fraction`` of min(D, O) as a rank; from 16 on a multiple of 8, which is fastest on devices.

    Example:
        >>> rank_of_fraction(0.25, 1152, 384), rank_of_fraction(0.25, 16, 16)
        (96, 4)
    """
    rank = fraction * min(rows, cols)
    return max(1, round(rank / 8) * 8 if rank >= 16 else round(rank))


def ranks_of_budget(energies: Mapping[str, Spectrum], sizes: Mapping[str, tuple[int, int]], budget: float) -> dict[str, int]:
    """Spend a budget of FLOPs on the directions that add most of their layer's output energy per cost.

    Args:
        energies: by layer; a rank never exceeds the directions that a spectrum has.
        sizes: (O, D) by layer.
        budget: share of the layers' dense FLOPs.

    Returns:
        Rank by layer, at least 1.
    """
    gains, costs, owners = [], [], []
    for name, found in energies.items():
        cost = sum(sizes[name])
        gains.append(found.energies / max(found.total, 1e-300) / cost)
        costs.append(torch.full((len(found.energies),), float(cost), dtype=torch.float64))
        owners += [name] * len(found.energies)
    order = torch.argsort(torch.cat([gain.cpu() for gain in gains]), descending=True, stable=True)
    spent = torch.cat(costs)[order].cumsum(0)
    allowed = budget * sum(rows * cols for rows, cols in sizes.values())
    ranks = dict.fromkeys(energies, 0)
    for index in order[spent <= allowed].tolist():
        ranks[owners[index]] += 1
    return {name: max(1, rank) for name, rank in ranks.items()}


def best_cut(
    W: Tensor,
    C: Tensor,
    parts: Sequence[tuple[str, int, int]],
    share: float,
    generator: torch.Generator,
    rank: int | None = None,
    energy: float | None = None,
) -> Cut | None:
    """Decide how a layer is factored, and factor it.

    Args:
        W: (O, D).
        C: (D, D), the inputs' second moment, damped.
        parts: (name, first row, number of rows) of each row block; one if the layer is not fused.
        share: factors must cost less than this share of the matrix (``cost.largest_share``).
        generator: a private one.
        rank: of the whole layer; or
        energy: the share of E‖W x‖² that must stay.

    Returns:
        The smaller of the two forms; ``None`` if neither pays off, or the layer's output is always zero.
    """
    rows, cols = W.shape
    limit = min(largest_rank(rows, cols, share), rows, cols)
    if limit < 1 or (rank is not None and rank > limit):
        return None
    whole = spectrum(W, C, limit if rank is None else min(rank, limit), generator)
    if whole.total <= 0:
        return None
    k = whole.rank_for(energy) if energy is not None else rank
    assert k is not None
    together = k if k <= limit else None
    error = whole.total * (1 - (whole.kept(k) if energy is None else energy))
    apart = _separately(W, C, parts, share, generator, error) if len(parts) > 1 else None
    if apart is not None and (together is None or _cost(apart, parts, cols) < numbers_of(together, rows, cols)):
        return _cut(W, C, [(part, found.basis[:, :k_p]) for part, (found, k_p) in zip(parts, apart, strict=True)], whole.total)
    return _cut(W, C, [((WHOLE, 0, rows), whole.basis[:, :together])], whole.total) if together else None


def _separately(
    W: Tensor, C: Tensor, parts: Sequence[tuple[str, int, int]], share: float, generator: torch.Generator, error: float
) -> list[tuple[Spectrum, int]] | None:
    """Return each part's spectrum and the fewest columns that reach the error; ``None`` if that does not pay off."""
    cols, allowed = W.shape[1], share * W.numel()
    # more columns than this for one part alone would exceed the allowed cost
    found = [spectrum(W[at : at + rows], C, int(allowed / (rows + cols)), generator) for _, at, rows in parts]
    energies = torch.cat([one.energies for one in found])
    owners = torch.cat([torch.full((len(one.energies),), i) for i, one in enumerate(found)])
    order = torch.argsort(energies.cpu(), descending=True, stable=True)
    left = sum(one.total for one in found) - energies.cpu()[order].cumsum(0)
    needed = int((left > error * (1 + 1e-9)).sum()) + 1
    if needed > len(order):
        return None
    counts = torch.bincount(owners[order[:needed]], minlength=len(parts)).tolist()
    chosen = [(one, max(1, count)) for one, count in zip(found, counts, strict=True)]
    return chosen if _cost(chosen, parts, cols) < allowed else None


def _cost(chosen: list[tuple[Spectrum, int]], parts: Sequence[tuple[str, int, int]], cols: int) -> int:
    return sum(numbers_of(k, rows, cols) for (_, k), (_, _, rows) in zip(chosen, parts, strict=True))


def _cut(W: Tensor, C: Tensor, bases: list[tuple[tuple[str, int, int], Tensor]], total: float) -> Cut:
    blocks, U, V, at, lost = [], {}, [], 0, 0.0
    for (name, start, rows), basis in bases:
        part = W[start : start + rows]
        u, v = factors(part, basis)
        off = part - u @ v
        lost += float(((off @ C).double() * off.double()).sum())
        blocks.append(Block(name, start, rows, at, basis.shape[1]))
        U[name], at = u, at + basis.shape[1]
        V.append(v)
    return Cut(tuple(blocks), U, torch.cat(V), 1 - lost / total)
