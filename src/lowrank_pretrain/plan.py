"""Plan = {target: rank}. The only thing that is decided, saved and broadcast."""

import json
from collections.abc import Mapping
from typing import Any

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.targets import Target


class Plan(dict[str, int]):
    """Ranks by target name, sorted by name. Rank 0: the target is frozen without an adapter.

    Args:
        ranks: target name -> rank.

    Raises:
        ConfigError: a rank that is not an integer of 0 or more.
    """

    def __init__(self, ranks: Mapping[str, int] | None = None) -> None:
        ranks = ranks or {}
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
                raise ConfigError("plan", {name: rank}, "a rank must be an integer of 0 or more")
        super().__init__(sorted(ranks.items()))

    def to_json(self) -> str:
        """The plan as JSON text, the same text for equal plans."""
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
        """Compare with a module's targets.

        Raises:
            ConfigError: a target that the module does not have, or a rank above the target's min(D, O).
        """
        for name, rank in self.items():
            if name not in targets:
                raise ConfigError("plan", name, "is no target of this model: the plan belongs to another one")
            check_rank(name, rank, targets[name])
        return self

    def summary(self) -> dict[int, int]:
        """How many targets have each rank, by rank."""
        ranks = sorted(self.values())
        return {rank: ranks.count(rank) for rank in dict.fromkeys(ranks)}


def check_rank(name: str, rank: int, target: Target, key: str = "rank") -> None:
    """Refuse a rank above min(D, O) of the target, naming both."""
    if rank > target.max_rank:
        raise ConfigError(
            key, rank, f"{name} is {target.rows} x {target.cols}: at most {target.max_rank} = min(D, O) is allowed"
        )
