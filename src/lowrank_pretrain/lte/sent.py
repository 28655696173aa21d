"""Add up what a worker sends in a whole run, by phase: ``summary.json`` and the report show it.

    full, joint, lowrank   merges of the targets (before the freeze with ``before="merge"``: of everything), or DDP's averages
    rest                   what belongs to no target, at every step or at merges

Rings, as in ``merge``: what all-reduce, all-gather and all-to-all need per worker. Merges are counted as they are made; DDP's
averages are the size of the gradients that it has wrapped. Looking (validation, checkpoints) does not count.
"""

from collections.abc import Mapping

REST = "rest"


class BytesSent:
    """Add up bytes by phase.

    Args:
        before: what ``state`` of the resumed run gave.

    Example:
        >>> sent = BytesSent()
        >>> sent.up_to(2**20, "full")
        >>> sent.up_to(3 * 2**20, "rest")
        >>> sent.mebibytes()
        {'full': 1.0, 'rest': 2.0, 'all': 3.0}
    """

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._by = dict(before or {})
        self._counted = 0.0

    def up_to(self, total: float, what: str | None) -> None:
        """Put the bytes of a running count since the last call down to a phase, or to the rest.

        Args:
            total: ``Workers.sent``, which only grows during a fit.
            what: a phase, or ``rest``; ``None``: a resume has repeated what is counted already.
        """
        new, self._counted = total - self._counted, total
        if what is not None:
            self.add(new, what)

    def add(self, count: float, what: str) -> None:
        """Add bytes that no worker counts itself."""
        if count:
            self._by[what] = self._by.get(what, 0.0) + count

    def state(self) -> dict[str, float]:
        """Return bytes by phase, as plain numbers, for a checkpoint."""
        return dict(self._by)

    def mebibytes(self) -> dict[str, float]:
        """Return MiB by phase, and of ``all``; nothing if nothing was sent."""
        found = {what: count / 2**20 for what, count in self._by.items()}
        return {**found, "all": sum(found.values())} if found else {}
