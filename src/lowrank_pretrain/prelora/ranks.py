"""PreLoRA's rank assignment (arXiv 2509.21619, Algorithm 2), pure.

Within a family, x = min-max normalised relative change between the last two windows; rank = ranks[⌈x · |ranks|⌉ − 1]
(x = 0: the smallest). What still moves gets a high rank, what has converged a low one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan, is_integer
from lowrank_pretrain.prelora.convergence import relative_change

RANKS = [4, 8, 16, 32]  # by default


def assign_ranks(
    before: Mapping[str, float], after: Mapping[str, float], families: Mapping[str, str], ranks: Sequence[int]
) -> Plan:
    """Give every target a rank by how far it has converged.

    Args:
        before: target -> signal (norm of weight, or of gradient) at the end of the last window but one.
        after: the same at the end of the last window.
        families: target -> family; min and max are taken inside a family.
        ranks: increasing; the first may be 0.

    Returns:
        The plan. A family whose targets all changed equally (or has one member) gets the smallest rank: the authors' code
        divides 0 by 0 there. A change that is infinite or NaN counts as the largest.
    """
    change = {name: relative_change(before[name], after[name]) for name in families}
    plan = {}
    for family in dict.fromkeys(families.values()):
        members = [name for name in families if families[name] == family]
        finite = [change[name] for name in members if math.isfinite(change[name])]
        low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
        for name in members:
            if not math.isfinite(change[name]):
                x = 1.0
            else:
                x = (change[name] - low) / (high - low) if high > low else 0.0
            plan[name] = ranks[math.ceil(x * len(ranks)) - 1 if x > 0 else 0]
    return Plan(plan)


def check_ranks(ranks: Sequence[int]) -> list[int]:
    """The ranks to choose from, as a list.

    Raises:
        ConfigError: not a list of increasing powers of two (the first may be 0) with one above 0.
    """
    given = [] if isinstance(ranks, (str, bytes, Mapping)) or not isinstance(ranks, Iterable) else [*_items(ranks)]
    if not given:
        raise ConfigError("ranks", ranks, "must be a list of increasing powers of two, which may begin with 0")
    ranks = given
    for rank in ranks:
        if not is_integer(rank) or rank < 0 or int(rank) & (int(rank) - 1):
            raise ConfigError("ranks", rank, "every rank must be a power of two (the first may be 0)")
    ranks = [int(rank) for rank in ranks]
    if ranks != sorted(set(ranks)):
        raise ConfigError("ranks", ranks, "must increase")
    if not any(ranks):
        raise ConfigError("ranks", ranks, "needs a rank above 0")
    return ranks


def check_fractions(ranks: Sequence[float]) -> list[float]:
    """Return the fractions of min(D, O) to choose from, as a list.

    Raises:
        ConfigError: not a list of increasing fractions above 0 and below 1.
    """
    given = [] if isinstance(ranks, (str, bytes, Mapping)) or not isinstance(ranks, Iterable) else [*_items(ranks)]
    allowed = 'with then="factorize" ranks are increasing fractions of min(D, O) above 0 and below 1, such as [0.125, 0.25]'
    if not given:
        raise ConfigError("ranks", ranks, allowed)
    for fraction in given:
        number("ranks", fraction, above=0, below=1, allowed=allowed)
    if given != sorted(set(given)):
        raise ConfigError("ranks", given, "must increase")
    return [float(fraction) for fraction in given]


def _items(values: Iterable[Any]) -> Iterator[Any]:
    """The values one by one; a number alone that claims to be iterable (an array without dimensions) has none."""
    try:
        yield from values
    except TypeError:
        return
