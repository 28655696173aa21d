"""Hold ``LTEStrategy``'s arguments, and refuse wrong ones in one line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from difflib import get_close_matches
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lowrank_pretrain.core import checks
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.lte.outer import OuterStep
from lowrank_pretrain.lte.storage import KEEP_ON
from lowrank_pretrain.lte.wire import WIRES, Codec

MODES = ("parallel", "joint", "sequential")
ROUTES = ("factors", "dense")
SYNC = ("step", "merge")
UPDATES = ("lora", "galore", "full")
BASES = ("own", "shared")
MOST_HEADS = 65_536


@dataclass(frozen=True)
class Settings:
    """Hold how workers train and merge; ``LTEStrategy`` explains each setting."""

    heads: int = 4
    merge_every: int = 10
    alpha: float | None = None
    mode: str = MODES[0]
    reset: bool = False
    route: str | None = None
    overlap: int = 0
    prune: float | None = None
    seed: int | None = None
    rank: int = 16
    targets: str | Sequence[str] = "all"
    basis: str = BASES[0]
    wire: str = "float32"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    fragments: int = 1
    keep_on: str = KEEP_ON[0]

    @property
    def interval(self) -> int:
        """Return the optimizer steps between two merges, each of one fragment."""
        return self.merge_every // self.fragments

    @property
    def codec(self) -> Codec | None:
        """Return the codec for factors; ``None``: they are sent uncoded."""
        return None if self.wire == "float32" else Codec(self.wire)

    @property
    def checks_finite(self) -> bool:
        """Return whether NaN must not be sent: a wire cannot encode it, or an outer step would keep it."""
        return (self.wire, self.outer_lr, self.outer_momentum) != ("float32", 1, 0)

    @property
    def starts_anew(self) -> bool:
        """Return whether each merge's factors are entirely new, and do not include earlier merges."""
        return self.reset or self.mode == "sequential"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        """Return the settings from a strategy's checked arguments."""
        found = {one.name: given[one.name] for one in fields(cls) if one.name in given}
        return cls(**{**found, "heads": given["heads"] if given["update"] == "lora" else 1})

    @property
    def shares_batch(self) -> bool:
        """Return whether the heads of a worker divide its batch among them."""
        return self.heads > 1 and self.mode == "parallel"


def check_settings(given: Mapping[str, Any]) -> None:
    """Check every argument, and their combinations.

    Raises:
        ConfigError: naming the first that is wrong.
    """
    for key in ("rank", "heads", "merge_every"):
        checks.whole(key, given[key], 1)
    if given["heads"] > MOST_HEADS:
        most = f"must be at most {MOST_HEADS} on a device: each needs a sample of the batch"
        raise ConfigError("heads", given["heads"], most)
    checks.whole("overlap", given["overlap"], 0)
    checks.whole("fragments", given["fragments"], 1)
    choices = (("mode", MODES), ("sync_rest", SYNC), ("route", (None, *ROUTES)), ("update", UPDATES), ("basis", BASES),
               ("wire", tuple(WIRES)), ("keep_on", KEEP_ON))  # fmt: skip
    for key, one_of in choices:
        checks.choice(key, given[key], one_of)
    checks.flag("reset", given["reset"])
    OuterStep(given["outer_lr"], given["outer_momentum"])
    if given["alpha"] is not None:
        checks.number("alpha", given["alpha"], above=0, allowed="must be a number above 0, or null for alpha = rank")
    if given["merge_timeout"] is not None:
        allowed_timeout = "must be a number of seconds above 0, or null for timeout, else 600"
        checks.number("merge_timeout", given["merge_timeout"], above=0, allowed=allowed_timeout)
    if given["prune"] is not None:
        allowed_prune = "must be a share from 0 to 1, or null to delete the optimizer state"
        checks.number("prune", given["prune"], least=0, most=1, allowed=allowed_prune)
    _check_together(given)


def _check_together(given: Mapping[str, Any]) -> None:
    """Refuse arguments that contradict each other."""
    if given["prune"] is not None and not given["reset"]:
        raise ConfigError("prune", given["prune"], "belongs to reset=true: without it heads keep their optimizer state")
    if given["update"] == "galore":
        _check_galore(given)
    elif given["update"] == "full":
        _check_full(given)
    elif given["basis"] != "own":
        raise ConfigError("basis", given["basis"], "belongs to update=galore: heads have no basis")
    if given["fragments"] > 1 and given["update"] != "full":
        raise ConfigError("fragments", given["fragments"], "belongs to update=full: factors of all targets merge together")
    _check_wire(given)
    every, parts = given["merge_every"], given["fragments"]
    if every % parts:
        raise ConfigError("fragments", parts, f"must divide merge_every={every}: each part merges once in so many steps")
    if given["overlap"] >= every // parts:
        window = f"merge_every={every}" if parts == 1 else f"merge_every / fragments = {every // parts}"
        raise ConfigError("overlap", given["overlap"], f"must be below {window}: one merge at a time")
    if given["overlap"] and (given["reset"] or given["mode"] != "parallel"):
        raise ConfigError("overlap", given["overlap"], "needs reset=false and mode=parallel: else steps would be lost")
    if given["mode"] == "joint" and (given["reset"] or given["sync_rest"] == "merge"):
        key = "reset" if given["reset"] else "sync_rest"
        raise ConfigError(key, given[key], "has no meaning in mode=joint, which never merges")


def _check_galore(given: Mapping[str, Any]) -> None:
    """Refuse settings that GaLoreAdamW's groups decide, and more than one head per device."""
    defaults: dict[str, tuple] = {"rank": (16,), "targets": ("all",), "heads": (4, 1), "mode": ("parallel",), "reset": (False,)}
    for key, allowed in {**defaults, "overlap": (0,), "alpha": (None,), "prune": (None,)}.items():
        if given[key] not in allowed:
            where = "belongs to GaLoreAdamW's groups" if key in ("rank", "targets") else "has no meaning"
            raise ConfigError(key, given[key], f"{where} with update=galore: leave it out")
    if given["basis"] == "shared" and given["route"] is not None:
        raise ConfigError("route", given["route"], "has no meaning with basis=shared, where D alone is sent: leave it out")


def _check_full(given: Mapping[str, Any]) -> None:
    """Refuse settings of heads or projections: a worker sends the difference of its weights."""
    defaults: dict[str, tuple] = {"rank": (16,), "heads": (4, 1), "mode": ("parallel",), "reset": (False,), "basis": ("own",)}
    for key, allowed in {**defaults, "alpha": (None,), "prune": (None,), "route": (None,)}.items():
        if given[key] not in allowed:
            raise ConfigError(key, given[key], "has no meaning with update=full, which trains whole weights: leave it out")


def _check_wire(given: Mapping[str, Any]) -> None:
    """Refuse wires and outer steps if nothing merges, and coarse codes without error feedback."""
    wire, mode = given["wire"], given["mode"]
    outer = {"outer_lr": 1, "outer_momentum": 0, "wire": "float32"}
    changed = next((key for key, plain in outer.items() if given[key] != plain), None)
    if mode == "joint" and changed is not None:
        raise ConfigError(changed, given[changed], "has no meaning in mode=joint, which never merges")
    if wire == "float32" or given["update"] == "full":
        return
    if wire == "int2":
        raise ConfigError("wire", wire, "needs error feedback, and factors have none: use int4 or more, or update=full")
    if mode == "sequential":
        raise ConfigError("wire", wire, "needs mode=parallel: a head's next turn would lose what its message left out")
    if given["route"] == "dense":
        raise ConfigError("route", "dense", f"cannot go with wire={wire}, which writes factors: leave route out")


def check_ddp(given: Mapping[str, Any], own: Iterable[str]) -> None:
    """Check the arguments that are meant for DDP, which is not even built on one device.

    Args:
        given: the arguments by name.
        own: names of ``LTEStrategy``'s arguments, for a hint.

    Raises:
        ConfigError: ``DDPStrategy`` and ``DistributedDataParallel`` have no such argument; or ``timeout`` is not a time.
    """
    own = list(own)
    known = [signature(DDPStrategy.__init__), signature(DistributedDataParallel.__init__)]
    taken = {name for one in known for name in one.parameters}
    # Lightning passes these itself
    taken -= {"self", "kwargs", "module", "device_ids", "output_device", "dim"}
    for key, value in given.items():
        if key not in taken:
            near = get_close_matches(key, [*own, *taken], 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"its own are {', '.join(own)}"
            raise ConfigError(key, value, f"is no argument of LTEStrategy, nor of DDP: {hint}")
    timeout = given.get("timeout")
    if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta(0)):
        raise ConfigError("timeout", timeout, "must be a datetime.timedelta above 0")
