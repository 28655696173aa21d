"""The rule by which the pocket Exp1, Exp2 and Exp3 get their tolerances: from full training's own record, training data only.

A window is an epoch, L its mean training loss, c the largest of the families' mean relative norm changes since the window
before. Of the full run of seed 0, in E windows:

1. (w, l) are the least tolerances at which PreLoRA's test passes at window E/4;
2. while it would not pass with (w/4, l/4) by window 3E/4, both are loosened by a tenth;
3. Exp1, Exp2, Exp3 are (w, l) times 1, 1/2, 1/4: the source's ratios.

No run looks at validation or test data for this, and nothing is changed afterwards.
"""

from collections.abc import Sequence

RATIOS = {"exp1": 1.0, "exp2": 0.5, "exp3": 0.25}
LOOSEN, ABOVE = 1.1, 1.001  # the test for weights is strict, so a hair above


def pairs(losses: Sequence[float]) -> list[float]:
    """|ΔL|/L of each window against the one before; the first has none."""
    return [abs(b - a) / a for a, b in zip(losses, losses[1:], strict=False)]


def switch_window(dl: Sequence[float], dn: Sequence[float], loss_tol: float, weight_tol: float, k: int) -> int | None:
    """The first window, counted from 1, whose last k−1 pairs pass; dl[i], dn[i] compare windows i+1 and i+2."""
    for last in range(k - 1, len(dl) + 1):
        some = slice(last - k + 1, last)
        if max(dl[some]) <= loss_tol and max(dn[some]) < weight_tol:
            return last + 1
    return None


def tolerances(losses: Sequence[float], changes: Sequence[float], k: int = 3) -> dict[str, tuple[float, float]]:
    """(weight_tol, loss_tol) of Exp1, Exp2, Exp3.

    Args:
        losses: mean training loss of each of E windows.
        changes: largest family change between each two, E−1 of them.
        k: windows that the test looks at.

    Raises:
        ValueError: too few windows, or not one change less than losses.
    """
    dl, count = pairs(losses), len(losses)
    if len(changes) != count - 1 or count < 4 * k:
        raise ValueError(f"{count} losses, {len(changes)} changes: there must be {4 * k} or more, and one change less")
    last = count // 4 - 1  # pairs up to the window E/4
    some = slice(last - k + 1, last)
    w, l = max(changes[some]) * ABOVE, max(dl[some]) * ABOVE  # noqa: E741  the loss's
    while (switch_window(dl, changes, l / 4, w / 4, k) or count + 1) > 3 * count // 4:
        w, l = w * LOOSEN, l * LOOSEN  # noqa: E741
    return {name: (w * ratio, l * ratio) for name, ratio in RATIOS.items()}
