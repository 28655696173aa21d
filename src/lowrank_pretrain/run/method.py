"""Build a method from the flat ``method`` group: callbacks, a strategy and an optimizer.

One flat group feeds up to three constructors. ``uses`` names them; every other key is an argument of one of them, under
the same name in YAML, on the command line and in Python. An unknown key is an error.
"""

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import ADAPTER_DEFAULTS, HEAD_SETTINGS, overruled


@dataclass
class Method:
    """Hold the parts that a method adds to a run.

    Attributes:
        callbacks: for ``Trainer(callbacks=…)``.
        strategy: for ``Trainer(strategy=…)``, or ``None``.
        optimizer: ``(module, optim) -> Optimizer`` instead of AdamW, or ``None``.
    """

    callbacks: list[Any] = field(default_factory=list)
    strategy: Any = None
    optimizer: Callable[[Any, Any], Any] | None = None


def build(config: Mapping[str, Any]) -> Method:
    """Build a method from its flat configuration.

    Args:
        config: ``{"uses": ["prelora"], "targets": "all", …}``; ``name`` is ignored. OmegaConf containers become plain.

    Raises:
        ConfigError: an unknown key or constructor, or a wrong value, with the key as ``method.<key>``.
    """
    config = _plain(config)
    uses = config.pop("uses", None)
    config.pop("name", None)
    if not isinstance(uses, list) or any(use not in _PARTS for use in uses):
        raise ConfigError("method.uses", uses, f"must be a list out of {', '.join(_PARTS)}")
    _check_targets(config.get("targets", "all"))
    parts = {use: _PARTS[use]() for use in uses}
    _settle_owners(parts, config)
    for key in config:
        if not any(key in part.keys for part in parts.values()):
            allowed = sorted(set().union(*(part.keys for part in parts.values())))
            near = difflib.get_close_matches(str(key), allowed, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            names = ", ".join(allowed) or "none"
            raise ConfigError(f"method.{key}", config[key], f"is no key of this method; {hint}allowed: {names}")
    method = Method()
    for part in parts.values():
        arguments = {part.keys[key]: value for key, value in config.items() if key in part.keys}
        try:
            part.add(method, arguments)
        except ConfigError as error:
            key = next((key for key, argument in part.keys.items() if argument == error.key), error.key)
            raise ConfigError(f"method.{key}", error.value, error.allowed) from None
    return method


def _check_targets(targets: Any) -> None:
    """Refuse targets that are neither a word nor a list of words, which every part takes."""
    words = [targets] if isinstance(targets, str) else targets
    if not isinstance(words, (list, tuple)) or not words or not all(isinstance(word, str) and word for word in words):
        allowed = "must be all, attention, mlp, head, a glob, or a list of these"
        raise ConfigError("method.targets", targets, allowed)


_PHASED = ("prelora", "lora")


def _settle_owners(parts: "dict[str, _Part]", config: Mapping[str, Any]) -> None:
    """Drop keys of a composed method that another part decides (ARCHITECTURE.md, "The protocol").

    Raises:
        ConfigError: LTE and GaLore together, but not as update=galore; settings of adapters without adapters.
    """
    phased = any(use in parts for use in _PHASED)
    decided = ADAPTER_DEFAULTS if "galore" in parts else HEAD_SETTINGS if "lte" in parts else {}  # LTE and callback share alpha
    key = overruled(config, decided) if phased else None
    if key is not None:
        raise ConfigError(
            f"method.{key}", config[key], "is for the callback's own adapters, and this method has none: leave it out"
        )
    taken = next((part for part in ("lte", "galore") if part in parts), None)
    if config.get("then") == "factorize" and phased and taken:
        raise ConfigError("method.then", "factorize", f"{taken} takes the plan over here: use method=prelora_factorize")
    if "galore" in parts and phased:
        parts["galore"] = _adopting()
    if "lte" in parts and phased:
        if config.get("update") == "full":
            raise ConfigError("method.update", "full", "has no low-rank phase for a callback to begin: use lora or galore")
        _drop(parts["lte"], "rank", "targets")
    if "lte" in parts and config.get("update") == "full":
        _drop(parts["lte"], "rank", "heads", "alpha", "mode", "reset", "route", "prune", "basis")
    elif "lte" in parts and "galore" in parts:
        if config.get("update") != "galore":
            raise ConfigError("method.update", config.get("update"), "must be galore where a method uses lte and galore")
        _drop(parts["lte"], "rank", "targets", "heads", "alpha", "mode", "reset", "overlap", "prune", "fragments")
        _drop(parts["galore"], "update_proj_gap", "stagger", "layerwise")  # a basis lives from merge to merge


def _drop(part: "_Part", *names: str) -> None:
    for name in names:
        part.keys.pop(name, None)


@dataclass
class _Part:
    """Map configuration keys to a constructor's arguments, and put the result into the method."""

    keys: dict[str, str]
    add: Callable[[Method, dict[str, Any]], None]


def _callback(constructor: Callable[..., Any], keys: dict[str, str] | None = None) -> _Part:
    """Return a part that is one callback; its keys are the constructor's arguments, unless the group needs longer names."""
    keys = keys or {name: name for name in _arguments(constructor)}
    return _Part(keys, lambda method, arguments: method.callbacks.append(constructor(**arguments)))


def _prelora() -> _Part:
    from lowrank_pretrain.prelora.callback import PreLoRA

    return _callback(PreLoRA)


def _lora() -> _Part:
    from lowrank_pretrain.phases.lora import LoRA

    return _callback(LoRA)


def _galore() -> _Part:
    def add(method: Method, arguments: dict[str, Any]) -> None:
        method.optimizer = galore_optimizer(**arguments)

    return _Part({name: name for name in _arguments(galore_optimizer)}, add)


def galore_optimizer(rank: int = 128, targets: str | Sequence[str] = "all", **settings: Any) -> Callable[[Any, Any], Any]:
    """Return a function that makes ``GaLoreAdamW`` of a module and an ``Optim``; ``settings`` are its own arguments.

    Raises:
        ConfigError: a wrong value, already here, not when the fit begins.
    """
    import torch
    from torch import nn

    from lowrank_pretrain.galore import GaLoreAdamW, galore_param_groups
    from lowrank_pretrain.galore.groups import check_rank_value

    check_rank_value(rank)
    GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(2, 2))], "rank": 1}], **settings)

    def make(module: Any, optim: Any) -> Any:
        groups = galore_param_groups(module, rank, targets, weight_decay=optim.weight_decay)
        for group in groups if optim.rest_lr is not None else ():
            if not group.get("rank"):
                group["lr"] = optim.rest_lr
        return GaLoreAdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, **settings)

    return make


def _adopting() -> _Part:
    """Return the part for GaLore from a switch on: AdamW until then; the callback's plan gives targets and ranks."""

    def add(method: Method, arguments: dict[str, Any]) -> None:
        from lowrank_pretrain.galore import GaLoreAdamW

        def make(module: Any, optim: Any) -> Any:
            betas = tuple(optim.betas)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "(?s).*no parameter group has a rank")  # the plan will give them
                return GaLoreAdamW(
                    optim.groups(module), lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay, **arguments
                )

        galore_optimizer(**arguments)  # a wrong value shows now
        method.optimizer = make

    return _Part({name: name for name in _arguments(galore_optimizer) if name not in ("rank", "targets", "scale")}, add)


def _baseline(name: str) -> Callable[[], _Part]:
    """Return the part for a baseline optimizer; its keys are the arguments of its factory."""

    def part() -> _Part:
        module = importlib.import_module(f"lowrank_pretrain.baselines.{name}")
        constructor: Callable[..., Any] = getattr(module, f"{name}_optimizer")

        def add(method: Method, arguments: dict[str, Any]) -> None:
            method.optimizer = constructor(**arguments)

        return _Part({key: key for key in _arguments(constructor)}, add)

    return part


def _lte() -> _Part:
    from lightning.pytorch.strategies import DDPStrategy

    from lowrank_pretrain.lte import LTEStrategy

    # of what Lightning's own strategy takes, only how processes start is the method's to say: a sweep needs it
    lightnings = set(inspect.signature(DDPStrategy).parameters)
    own = [name for name in _arguments(LTEStrategy) if name not in lightnings]

    def add(method: Method, arguments: dict[str, Any]) -> None:
        start = arguments.get("start_method", "popen")
        if start not in START_METHODS:
            raise ConfigError("start_method", start, f"must be one of {', '.join(START_METHODS)}")
        method.strategy = LTEStrategy(**arguments)

    return _Part({name: name for name in (*own, "start_method")}, add)


def _jagged() -> _Part:
    from lowrank_pretrain.lte.restarts import JaggedRestarts

    keys = {"merge_every": "every", "restart_warmup": "warmup", "restart_start": "start"}  # a restart is at each merge
    return _callback(JaggedRestarts, keys)


def _effective_rank() -> _Part:
    from lowrank_pretrain.observe.rank_analysis import EffectiveRank

    return _callback(EffectiveRank, {"targets": "targets", "gradient_every": "every", "rank_tol": "tol"})


def _orthogonality() -> _Part:
    from lowrank_pretrain.observe.rank_analysis import HeadOrthogonality

    return _callback(HeadOrthogonality, {"orthogonality_every": "every"})


START_METHODS = ("popen", "spawn", "fork", "forkserver")
_PARTS: dict[str, Callable[[], _Part]] = {
    "prelora": _prelora,
    "lora": _lora,
    "galore": _galore,
    "lte": _lte,
    "jagged": _jagged,
    "effective_rank": _effective_rank,
    "orthogonality": _orthogonality,
    "muon": _baseline("muon"),
    "sinkgd": _baseline("sinkgd"),
    "adamw8bit": _baseline("adamw8bit"),
}


def _arguments(constructor: Callable[..., Any]) -> list[str]:
    names = inspect.signature(constructor).parameters
    if "settings" in names:  # the optimizer's own keys; what `optim` sets stays there
        from lowrank_pretrain.galore import GaLoreAdamW

        own = inspect.signature(GaLoreAdamW).parameters.values()
        return [*(name for name in names if name != "settings"), *(p.name for p in own if p.kind is p.KEYWORD_ONLY)]
    return [name for name, parameter in names.items() if name != "self" and parameter.kind is not parameter.VAR_KEYWORD]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    return dict(found)
