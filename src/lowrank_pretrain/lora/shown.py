"""Remember what a layer with adapters or factors has shown in state dicts, so that loading one back changes nothing.

A state dict shows the plain weight, W + scale · B A or U V. Many callbacks take one, load others (an average to validate with)
and load it back, or return to the best one. Of the plain weight alone the factors cannot be told, and the optimizer's moments
are theirs. So the layer keeps a copy of its factors for each of the last state dicts.

Why here, and not in the state dict: what comes back is most often a clone of its values, or a file, and neither keeps an
attribute of the dict nor its ``_metadata``; as keys, factors would make a file that no plain model loads.

Memory: a copy of the factors, of rank R, for each state dict, a quarter of W in all (but two at least). W itself is not copied
when it is shown. It is copied when other values are loaded over one that was shown, until training is seen to go on from those.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowrank_pretrain.lora.frozen import Stored
from lowrank_pretrain.lora.products import Part, RestPart, merged

FEWEST, MOST = 2, 8  # state dicts that a layer remembers; between them, as many as a quarter of W has room for
_SAMPLES = 1024


class Written:
    """Tell whether a tensor was written into since, without keeping its memory; a copy of this tells of none."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self._alias: Tensor | None = None
        if tensor is not None and not tensor.is_inference():
            self._alias = tensor.detach()  # shares the count of writes, and keeps it when its own numbers are gone
            self._alias.data = tensor.new_empty(0)
            self._count = self._alias._version

    def __bool__(self) -> bool:
        return self._alias is not None and self._alias._version != self._count

    def __deepcopy__(self, memo: dict) -> "Written":
        return Written()

    def __reduce__(self) -> tuple:
        return Written, ()


class Base(NamedTuple):
    """Hold a layer's W, and what belongs to one that is stored in a cheaper type."""

    weight: Tensor
    stored: Stored | None


class Entry(NamedTuple):
    """Hold what one state dict showed.

    Attributes:
        sample: some numbers of the weight, which tell it from others; that it is the same one, the factors' product proves.
        factors: copies, by their names on the layer.
        writes: how often the layer's parameters had been written into.
    """

    sample: Tensor
    factors: dict[str, Tensor]
    writes: tuple[int, ...]


class Memory:
    """Keep the factors of the last weights that a layer has shown. A copy of the layer has shown none.

    Attributes:
        displaced: the W over which other values were loaded after it was shown.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self.displaced: Base | None = None

    @torch.no_grad()
    def note(self, shown: Tensor, factors: Mapping[str, nn.Parameter], parameters: list[nn.Parameter]) -> None:
        """Note that a state dict shows a weight that these factors make.

        Args:
            shown: the plain weight.
            factors: by their names on the layer.
            parameters: all of the layer's.
        """
        writes = tuple(-1 if p.is_inference() else p._version for p in parameters)
        if self._entries and self._entries[-1].writes == writes:  # the same once more
            self._entries.pop()
        copies = {name: p.detach().clone() for name, p in factors.items()}
        self._entries.append(Entry(_sample(shown).clone(), copies, writes))
        size = sum(copy.numel() for copy in copies.values())
        room = shown.numel() // (4 * size) if size else FEWEST
        del self._entries[: -max(FEWEST, min(MOST, room))]

    def find(self, given: Tensor) -> list[dict[str, Tensor]]:
        """Return copies of the factors with which this weight may have been shown, the last ones first."""
        if given.is_meta:
            return []
        sample = _sample(given)
        return [
            {name: factor.to(given.device, copy=True) for name, factor in entry.factors.items()}
            for entry in reversed(self._entries)
            if entry.sample.dtype == sample.dtype and torch.equal(entry.sample.to(sample.device), sample)
        ]

    def displace(self, base: Base) -> None:
        """Keep a copy of a W that was shown and over which other values will be loaded."""
        if self._entries and self.displaced is None:
            self.displaced = base._replace(weight=base.weight.detach().clone())

    def __deepcopy__(self, memo: dict) -> "Memory":
        return Memory()

    def __reduce__(self) -> tuple:
        return Memory, ()


@torch.no_grad()
def consisted_of(
    memory: Memory, given: Tensor, now: Base, parts: tuple[Part, ...], rest: tuple[RestPart, ...], transposed: bool
) -> tuple[dict[str, Tensor], Base] | None:
    """Return the factors and the W that a weight with adapters consisted of when it was shown; ``None``: it was not.

    Args:
        memory: of the layer.
        given: the weight that is loaded, on W's device.
        now: the layer's W.
        parts: row blocks with adapters.
        rest: row blocks that train in full.
        transposed: W's layout.
    """
    found = memory.find(given)
    for factors in found:
        A, Bs = factors["lora_A"], [factors[f"lora_B.{part.name}"] for part in parts]
        for base in (now, memory.displaced):
            if base is None or base.weight.device != given.device:
                continue
            weight = merged(base.weight, A, Bs, parts, transposed, base.stored)
            if torch.equal(_with_rest_of(given, weight, rest, transposed), given):  # bit for bit: the same W
                if base is not now:
                    memory.displaced = None
                return factors, base._replace(weight=_with_rest_of(given, base.weight, rest, transposed))
    memory.displace(now)
    if not found or now.stored is not None:
        return None
    # W has trained since, in the joint phase. No copy of it was made, and W = shown - scale · B A is right to one rounding
    A, minus = found[0]["lora_A"], [-found[0][f"lora_B.{part.name}"] for part in parts]
    return found[0], Base(merged(given, A, minus, parts, transposed), None)


def _with_rest_of(given: Tensor, weight: Tensor, rest: tuple[RestPart, ...], transposed: bool) -> Tensor:
    """Return a weight with the rest blocks' rows of another one, which no factor takes part in."""
    if not rest:
        return weight
    weight, dim = weight.clone(), 1 if transposed else 0
    for part in rest:
        weight.narrow(dim, part.start, part.rows).copy_(given.narrow(dim, part.start, part.rows))
    return weight


def _sample(weight: Tensor) -> Tensor:
    numbers = weight.detach().reshape(-1)
    return numbers[:: numbers.numel() // _SAMPLES | 1]  # an odd step: not the same column of each row
