"""PreLoRA's partial-convergence test (arXiv 2509.21619, Algorithm 1), pure.

A window is a stretch of training. At its end: L, the mean training loss over the window, and n(target) = ‖W‖_F. Training
has partly converged when over the last k windows, for each of the k−1 consecutive pairs (a, b),

    |L_b − L_a| / L_a ≤ loss_tol      and, for every family f,      mean over f's layers of |n_b − n_a| / n_a < weight_tol.

Where the authors' code differs from sense, ours does not follow: families are keyed by the full name (theirs loses one of
``attention.output`` and the MLP's ``output``), and windows are counted in optimizer steps or whole epochs.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_TINY = 1e-12


class Window(NamedTuple):
    """What is kept of a window: mean loss (of the run's loss unit) and the Frobenius norm of each target at its end."""

    loss: float
    norms: dict[str, float]


class Verdict(NamedTuple):
    """The test's outcome, with the figures it was taken from (of the last pair of windows)."""

    converged: bool
    loss_change: float
    family_changes: dict[str, float]


def relative_change(a: float, b: float) -> float:
    """|b − a| / a; 0 where nothing moved away from zero, infinite where something did."""
    if abs(a) < _TINY:
        return 0.0 if abs(b - a) < _TINY else float("inf")
    return abs(b - a) / abs(a)


def family_changes(a: Mapping[str, float], b: Mapping[str, float], families: Mapping[str, str]) -> dict[str, float]:
    """Mean relative change of the norms from ``a`` to ``b`` by family."""
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
