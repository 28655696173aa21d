"""Build the guards of a command-line run that watch more than its numbers."""

from lightning.pytorch import Callback

from lowrank_pretrain.guards.ranks import RanksAgree
from lowrank_pretrain.guards.stall import StallGuard


def watchers(stall_timeout: float | None, agree_every: int) -> list[Callback]:
    """Return the callbacks that watch the loaders and compare the ranks.

    Args:
        stall_timeout: seconds, see :class:`~lowrank_pretrain.guards.stall.StallGuard`.
        agree_every: optimizer steps, see :class:`~lowrank_pretrain.guards.ranks.RanksAgree`.

    Raises:
        ConfigError: a wrong value.
    """
    return [StallGuard(stall_timeout), RanksAgree(agree_every)]
