"""``LTEStrategy``'s arguments: what is allowed, said in one line."""

import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.heads.layer import MODES
from lowrank_pretrain.lte.merge import ROUTES
from lowrank_pretrain.lte.projected import BASES
from lowrank_pretrain.lte.rest import SYNC

UPDATES = ("lora", "galore")


def check(given: Mapping[str, Any]) -> None:
    """Look at every argument, and at how they go together.

    Raises:
        ConfigError: naming the first that is wrong.
    """
    for key in ("rank", "heads", "merge_every"):
        _whole(key, given[key], 1)
    if given["heads"] > 65_536:
        raise ConfigError("heads", given["heads"], "must be at most 65536 on a device: each wants a sample of the batch")
    _whole("overlap", given["overlap"], 0)
    choices = (("mode", MODES), ("sync_rest", SYNC), ("route", (None, *ROUTES)), ("update", UPDATES), ("basis", BASES))
    for key, allowed in choices:
        if given[key] not in allowed:
            raise ConfigError(key, given[key], f"must be one of {', '.join(str(a) if a else 'null' for a in allowed)}")
    if not isinstance(given["reset"], bool):
        raise ConfigError("reset", given["reset"], "must be true or false")
    alpha, timeout, prune = given["alpha"], given["merge_timeout"], given["prune"]
    if alpha is not None and not (_number(alpha) and alpha > 0):
        raise ConfigError("alpha", alpha, "must be a number above 0, or null for alpha = rank")
    if timeout is not None and not (_number(timeout) and timeout > 0):
        raise ConfigError("merge_timeout", timeout, "must be a number of seconds above 0, or null for timeout, else 600")
    if prune is not None and not (_number(prune) and 0 <= prune <= 1):
        raise ConfigError("prune", prune, "must be a share from 0 to 1, or null to delete the optimizer state")
    if prune is not None and not given["reset"]:
        raise ConfigError("prune", prune, "belongs to reset=true: without it heads keep their optimizer state")
    if given["update"] == "galore":
        _check_galore(given)
    elif given["basis"] != "own":
        raise ConfigError("basis", given["basis"], "belongs to update=galore: heads have no basis")
    if given["overlap"] >= given["merge_every"]:
        raise ConfigError("overlap", given["overlap"], f"must be below merge_every={given['merge_every']}: one merge at a time")
    if given["overlap"] and (given["reset"] or given["mode"] != "parallel"):
        raise ConfigError("overlap", given["overlap"], "needs reset=false and mode=parallel: else steps would be lost")
    if given["mode"] == "joint" and (given["reset"] or given["sync_rest"] == "merge"):
        key = "reset" if given["reset"] else "sync_rest"
        raise ConfigError(key, given[key], "has no meaning in mode=joint, which never merges")


def check_ddp(given: Mapping[str, Any], own: Iterable[str]) -> None:
    """Look at the arguments that are meant for DDP, which is not even built on one device.

    Args:
        given: them.
        own: names of ``LTEStrategy``'s arguments, for a hint.

    Raises:
        ConfigError: one is an argument of neither ``DDPStrategy`` nor ``DistributedDataParallel``; or ``timeout`` is no time.
    """
    taken = {name for kind in (DDPStrategy, DistributedDataParallel) for name in signature(kind.__init__).parameters}
    # what Lightning hands over itself
    taken -= {"self", "kwargs", "module", "device_ids", "output_device", "dim"}
    for key, value in given.items():
        if key not in taken:
            near = get_close_matches(key, [*own, *taken], 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its own are {', '.join(own)}"
            raise ConfigError(key, value, f"is no argument of LTEStrategy, nor of DDP: {hint}")
    timeout = given.get("timeout")
    if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta(0)):
        raise ConfigError("timeout", timeout, "must be a datetime.timedelta above 0")


def _check_galore(given: Mapping[str, Any]) -> None:
    """The optimizer says which matrices and which rank; a worker has its own weights, so there is one head to a device."""
    defaults = {"rank": (16,), "targets": ("all",), "heads": (4, 1), "mode": ("parallel",), "reset": (False,)}
    for key, allowed in {**defaults, "overlap": (0,), "alpha": (None,), "prune": (None,)}.items():
        if given[key] not in allowed:
            where = "belongs to GaLoreAdamW's groups" if key in ("rank", "targets") else "has no meaning"
            raise ConfigError(key, given[key], f"{where} with update=galore: leave it out")
    if given["basis"] == "shared" and given["route"] is not None:
        raise ConfigError("route", given["route"], "has no meaning with basis=shared, where D alone travels: leave it out")


def _whole(key: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(key, value, f"must be a whole number of {least} or more")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
