"""Decide when PreLoRA switches, and with which ranks (arXiv 2509.21619, Algorithms 1 and 2); pure.

**When.** A window is a stretch of training. At its end: L, the mean training loss over the window, and n(target) = ‖W‖_F.
Training has partly converged when over the last k windows, for each of the k−1 consecutive pairs (a, b),

    |L_b − L_a| / L_a ≤ loss_tol      and, for every family f,      mean over f's layers of |n_b − n_a| / n_a < weight_tol.

Where the authors' code contradicts the paper, ours follows the paper: families are keyed by the full name (theirs loses one of
``attention.output`` and the MLP's ``output``), and windows are counted in optimizer steps or whole epochs.

**Ranks.** Within a family, x = min-max normalised relative change between the last two windows; rank = ranks[⌈x · |ranks|⌉ − 1]
(x = 0: the smallest). A target that still moves gets a high rank, one that has converged a low one.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch

from lowrank_pretrain.core.checks import is_integer, number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.targets import Target

_TINY = 1e-12


class Window(NamedTuple):
    """Hold a window's mean loss (in the run's unit), and each target's Frobenius norm at its end."""

    loss: float
    norms: dict[str, float]


class Verdict(NamedTuple):
    """Hold the test's outcome, with the figures of the last pair of windows."""

    converged: bool
    loss_change: float
    family_changes: dict[str, float]


def relative_change(a: float, b: float) -> float:
    """Return |b − a| / a; for a = 0: 0 if b = 0, else infinite.

    Example:
        >>> relative_change(2.0, 1.5), relative_change(0.0, 0.0), relative_change(0.0, 1.0)
        (0.25, 0.0, inf)
    """
    if abs(a) < _TINY:
        return 0.0 if abs(b - a) < _TINY else float("inf")
    return abs(b - a) / abs(a)


def family_changes(a: Mapping[str, float], b: Mapping[str, float], families: Mapping[str, str]) -> dict[str, float]:
    """Return by family the mean relative change of the norms from ``a`` to ``b``."""
    changes: dict[str, list[float]] = {}
    for name, family in families.items():
        changes.setdefault(family, []).append(relative_change(a[name], b[name]))
    return {family: sum(values) / len(values) for family, values in changes.items()}


def check_convergence(
    windows: Sequence[Window], families: Mapping[str, str], k: int, loss_tol: float, weight_tol: float
) -> Verdict:
    """Decide whether the last ``k`` windows show partial convergence.

    Args:
        windows: in order of time; fewer than ``k`` never converge.
        families: target -> family.
        k: number of windows looked at, so k−1 pairs; at least 2.
        loss_tol: fraction in (0, 1).
        weight_tol: fraction in (0, 1).

    Returns:
        The verdict; its figures are of the last pair (zeros before there is one).

    Example:
        >>> windows = [Window(1.0, {"fc": 5.0}), Window(0.99, {"fc": 5.01})]
        >>> check_convergence(windows, {"fc": "fc"}, 2, loss_tol=0.05, weight_tol=0.01).converged
        True
    """
    if len(windows) < 2:
        return Verdict(False, 0.0, {})
    converged = len(windows) >= k
    loss_change, changes = 0.0, {}
    for a, b in zip(windows[-k:], windows[-k:][1:], strict=False):
        loss_change = relative_change(a.loss, b.loss)
        changes = family_changes(a.norms, b.norms, families)
        # written so that a NaN fails
        converged = converged and loss_change <= loss_tol and all(change < weight_tol for change in changes.values())
    return Verdict(converged, loss_change, changes)


def still_flat(first: float | None, now: float) -> str:
    """Return what to say where the loss has hardly fallen since the first window; empty where it has.

    Example:
        >>> still_flat(4.5, 1.5)
        ''
    """
    if first is None or not first > 0 or now < 0.9 * first:
        return ""
    return (
        f"with a loss of {now:.4g} after {first:.4g} in the first window. A start that is flat (the learning rate's warm-up) "
        "looks converged, too: earliest=N waits for window N"
    )


RANKS = [4, 8, 16, 32]  # by default


def assign_ranks(
    before: Mapping[str, float], after: Mapping[str, float], families: Mapping[str, str], ranks: Sequence[int]
) -> Plan:
    """Give every target a rank by its convergence.

    Args:
        before: target -> signal (norm of weight, or of gradient) at the end of the last window but one.
        after: the same at the end of the last window.
        families: target -> family; min and max are taken inside a family.
        ranks: increasing; the first may be 0.

    Returns:
        The plan. A family whose targets all changed equally (or has one member) gets the smallest rank: the authors' code
        divides 0 by 0 there. A change that is infinite or NaN counts as the largest.

    Example:
        >>> before, after = {"a": 1.0, "b": 1.0}, {"a": 1.5, "b": 1.0}
        >>> dict(assign_ranks(before, after, {"a": "f", "b": "f"}, (4, 8)))
        {'a': 8, 'b': 4}
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


def check_ranks(ranks: Sequence[int] | Sequence[float]) -> list[int]:
    """Return the ranks to choose from, as a list.

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
    """Yield the values; a scalar that claims to be iterable (a 0-d array) has none."""
    try:
        yield from values
    except TypeError:
        return


def norms_of(targets: Mapping[str, Target], grad: bool = False) -> dict[str, float]:
    """Return ‖·‖_F of each target's weight or gradient, in float32 or wider; the device is read once."""
    if not targets:
        return {}
    blocks = [(t.rows_of_grad() if grad else t.matrix()).detach() for t in targets.values()]
    dtype = reduce(torch.promote_types, (block.dtype for block in blocks), torch.float32)
    norms = torch.stack([torch.linalg.vector_norm(block, dtype=dtype) for block in blocks])
    return dict(zip(targets, norms.tolist(), strict=True))
