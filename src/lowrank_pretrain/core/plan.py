"""Represent a plan, {target: rank}. Nothing else is decided, saved and broadcast."""

import json
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import Target, families, first_named


class Plan(dict[str, int]):
    """Map target names to ranks, sorted by name. Rank 0: the target is frozen without an adapter.

    Args:
        ranks: target name -> rank.

    Raises:
        ConfigError: a rank that is not an integer of 0 or more.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None) -> None:
        ranks = ranks or {}
        for name, rank in ranks.items():
            if not isinstance(rank, Integral) or isinstance(rank, bool) or rank < 0:
                raise ConfigError("plan", {name: rank}, "a rank must be an integer of 0 or more")
        super().__init__((name, int(ranks[name])) for name in sorted(ranks))

    def to_json(self) -> str:
        """Return the plan as JSON text, the same text for equal plans."""
        return json.dumps(self, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back; raises ``ConfigError`` if the text is no JSON object of ranks."""
        try:
            ranks: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError("plan", text[:80], f"is not JSON ({error})") from None
        if not isinstance(ranks, dict):
            raise ConfigError("plan", text[:80], "must be a JSON object {target: rank}")
        return cls(ranks)

    def check(self, targets: Mapping[str, Target]) -> "Plan":
        """Check the plan against a module's targets, and return it.

        Raises:
            ConfigError: a target that the module does not have, or a rank above the target's min(D, O).
        """
        for name, rank in self.items():
            if name not in targets:
                raise ConfigError("plan", name, "is no target of this model: the plan belongs to another one")
            check_rank(name, rank, targets[name])
        return self

    def summary(self) -> dict[int, int]:
        """Return {rank: number of targets with it}."""
        ranks = sorted(self.values())
        return {rank: ranks.count(rank) for rank in dict.fromkeys(ranks)}


def check_rank(name: str, rank: int, target: Target, key: str = "rank") -> None:
    """Refuse a rank above min(D, O) of the target, naming both."""
    if rank > target.max_rank:
        raise ConfigError(
            key, rank, f"{name} is {target.rows} x {target.cols}: at most {target.max_rank} = min(D, O) is allowed"
        )


def fit_ranks(
    module: nn.Module, patterns: str | Sequence[str], targets: Mapping[str, Target], rank: int, key: str = "rank"
) -> tuple[dict[str, int], str | None]:
    """Cut a rank down to min(D, O) where a target is narrower.

    Args:
        module: the module that the targets' names start from.
        patterns: what chose the targets.
        targets: by name.
        rank: the largest rank wanted.
        key: the argument's name.

    Returns:
        The largest rank of each target, and one line that names those that were cut down, or ``None``.

    Raises:
        ConfigError: a target that the patterns name explicitly (``targets.select``) is narrower.
    """
    narrow = {name: target for name, target in targets.items() if target.max_rank < rank}
    named = first_named(module, patterns, narrow) if narrow else None
    if named is not None:
        check_rank(named, rank, targets[named], key)
    cut: dict[str, int] = {}
    family_of = families(module, narrow)
    for name, target in narrow.items():
        line = f"{family_of[name]} ({target.rows} x {target.cols})"
        cut[line] = target.max_rank
    said = ", ".join(f"{line} gets at most {most}" for line, most in cut.items())
    return {name: min(rank, target.max_rank) for name, target in targets.items()}, f"{key}={rank}: {said}" if cut else None
