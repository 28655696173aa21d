"""Parameter groups: which matrices are projected, and with which settings. Every wrong value is refused here."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import (
    PRESETS,
    Target,
    all_targets,
    check_patterns,
    find_targets,
    matches,
    parts,
    plain_name,
    tied_layers,
)
from lowrank_pretrain.galore.moments import MOMENTS, bitsandbytes
from lowrank_pretrain.galore.subspace import PROJ_TYPES, REFRESHES
from lowrank_pretrain.models.optim import undecayed_names

RESIDUALS = (None, "fira")
VARIANTS = ("galore", "apollo")
# settings that a group may have, and what else may stand in one: by torch, by its schedulers, by Lightning, by timm
KEYS = (
    "rank", "lr", "betas", "eps", "weight_decay", "correct_bias", "update_proj_gap", "scale", "proj_type", "refresh",
    "rotate_moments", "stagger", "layerwise", "moments", "residual", "variant", "seed",
)  # fmt: skip
_OTHERS = (
    "params", "param_names", "initial_lr", "max_lr", "min_lr", "base_lr", "max_momentum", "base_momentum", "swa_lr", "name",
    "group_name", "lr_scale", "lr_mult", "fix_lr", "layer_id",
)  # fmt: skip
# switches of torch's AdamW: which loop it runs makes no difference here
_HARMLESS = {
    "foreach": (None, False, True), "fused": (None, False, True), "capturable": (False,), "differentiable": (False,),
    "maximize": (False,), "amsgrad": (False,), "decoupled_weight_decay": (True,),
}  # fmt: skip
_NUMBERS = {"lr": float, "eps": float, "weight_decay": float, "scale": float, "update_proj_gap": int, "seed": int}
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STACKED = (*_CONV, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear)  # their weights are no stacks
FLAT = "a GaLore group takes matrices. FSDP1 and DeepSpeed flatten theirs: use FSDP2 (ModelParallelStrategy)"


def galore_param_groups(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str] = "all",
    weight_decay: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Groups for ``GaLoreAdamW``: the targets, projected; every other trainable parameter, plain AdamW.

    Args:
        model: the model, or LightningModule, whose names the patterns count from.
        rank: rank of the projection; above min(m, n) of a matrix it is clamped with one warning, or refused if ``targets``
            is a list of globs.
        targets: presets or globs. Globs may name convolutions too (``patch_embed.proj``): their weight is taken as a matrix
            of shape (out, in·kernel). A fused qkv matrix is projected whole.
        weight_decay: for matrices; norms, biases and embeddings get 0. By default the optimizer's own, for all of them.
        settings: any of the optimizer's GaLore keys, e.g. ``scale``, ``update_proj_gap``, ``refresh``; an ``lr`` here is
            that of the projected matrices, the others (``layerwise``, ``moments``) hold for every group.

    Returns:
        Up to three groups of (name, parameter) pairs: projected, other weights, and norms, biases and embeddings.

    Raises:
        ConfigError: a pattern matches nothing or only a part of a fused matrix; a rank that is too large for a named one;
            FSDP1 or DeepSpeed have flattened the weights.
    """
    check_rank_value(rank)
    check_keys(settings)
    _refuse_flat(model)
    layers = target_layers(model, targets)
    named = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    lazy = next((name for name, p in named.items() if is_lazy(p)), None)
    if lazy is not None:
        raise ConfigError("params", lazy, "is lazy and has no shape yet: call the model once before its optimizer is made")
    chosen = {f"{name}.weight": named[f"{name}.weight"] for name in layers}
    explicit = any(t not in PRESETS for t in ([targets] if isinstance(targets, str) else targets) if not t.startswith("!"))
    for name, p in chosen.items():
        if explicit and rank > largest_rank(p):
            raise ConfigError("rank", rank, f"{name} is {tuple(p.shape)}: at most {largest_rank(p)} is allowed")
    _say_stacks(model, {name: p for name, p in named.items() if name not in chosen})
    undecayed = {plain_name(name) for name in undecayed_names(model)}
    rest = {name: p for name, p in named.items() if name not in chosen}
    decayed = {name: p for name, p in rest.items() if p.ndim >= 2 and name not in undecayed}
    plain = {name: p for name, p in rest.items() if name not in decayed}
    decay, no_decay = ({}, {}) if weight_decay is None else ({"weight_decay": weight_decay}, {"weight_decay": 0.0})
    shared = {key: value for key, value in settings.items() if key != "lr"}
    groups: list[dict[str, Any]] = [
        {"params": list(chosen.items()), "rank": rank, **decay, **settings},
        {"params": list(decayed.items()), **shared, **decay},
        {"params": list(plain.items()), **shared, **no_decay},
    ]
    return [group for group in groups if group["params"]]


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Return the names of the layers whose whole weight the patterns choose, in the model's order.

    Raises:
        ConfigError: a pattern matches nothing, or only a part of a fused matrix, or names what cannot be projected.
    """
    patterns = check_patterns(targets)
    patterns = [patterns] if isinstance(patterns, str) else patterns
    convs = {plain_name(name): layer for name, layer in model.named_modules() if isinstance(layer, _CONV)}
    linear = {name for target in all_targets(model).values() for name in (target.name, target.layer_name)}
    without = {name for name in convs for t in patterns if t.startswith("!") and matches(t[1:], name)}
    chosen, rest = set(), []
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        hits = {name for name in convs if glob not in PRESETS and matches(glob, name)}
        if not pattern.startswith("!"):
            chosen |= hits - without
        if not hits or any(matches(glob, name) for name in linear):
            rest.append(pattern)
    for name in chosen:
        _check_conv(name, convs[name])
    names_some = any(not pattern.startswith("!") for pattern in rest)
    found = (
        find_targets(model, rest[0] if len(rest) == 1 else rest, unfit=_tied_head(model)) if names_some or not chosen else {}
    )
    by_layer: dict[str, list[str]] = {}
    for target in found.values():
        by_layer.setdefault(target.layer_name, []).append(target.part)
    for name, have in by_layer.items():
        whole = [part for part, _, _ in parts(name, model.get_submodule(name))]
        if sorted(have) != sorted(whole):
            raise ConfigError(
                "targets", f"{name}.{have[0]}", f"GaLore projects a fused matrix whole: name it as {name}, not by its parts"
            )
    chosen |= set(by_layer)
    return [plain_name(name) for name, _ in model.named_modules() if plain_name(name) in chosen]


def _tied_head(model: nn.Module) -> Callable[[Target], str | None]:
    """Return what says of an output head that it is the embedding too: its gradient is both's."""
    tied = tied_layers(model)

    def reason(target: Target) -> str | None:
        others = tied.get(target.layer_name)
        return f"shares its weight with {', '.join(others)}: GaLore projects no tied weight" if others else None

    return reason


def _check_conv(name: str, layer: nn.Module) -> None:
    weight = layer._parameters.get("weight")
    if weight is None:
        cure = "its weight is made anew at each call (weight_norm, spectral_norm, pruning or a parametrization): leave it out"
        raise ConfigError("targets", name, cure)
    if not weight.requires_grad:
        raise ConfigError("targets", name, "is frozen (requires_grad=False): leave it out, or set requires_grad before the fit")
    if is_lazy(weight):
        raise ConfigError("targets", name, "is lazy and has no shape yet: call the model once before its optimizer is made")
    if weight.is_complex():
        raise ConfigError("targets", name, f"is complex ({weight.dtype}): only real weights can be projected, so leave it out")


def _say_stacks(model: nn.Module, rest: dict[str, Tensor]) -> None:
    """Name matrices that are kept in stacks, such as experts' weights: they look like the model's bulk, but are no targets."""
    convs = {plain_name(name) for name, layer in model.named_modules() if isinstance(layer, _STACKED)}
    stacks = [
        f"{name} {tuple(p.shape)}"
        for name, p in rest.items()
        if p.ndim >= 3 and p.numel() and min(p.shape) > 1 and name.rpartition(".")[0] not in convs
    ]
    if stacks:
        warnings.warn(
            f"not projected, because they are stacks of matrices (plain AdamW): {', '.join(stacks)}. A stack in a group with "
            "a rank is taken as (first dimension) x (all others)",
            stacklevel=3,
        )


def _refuse_flat(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(layer, (nn.Linear, *_CONV)) or weight is None or is_lazy(weight):
            continue
        made = any(key.startswith("weight") for key in layer._parameters) or "parametrizations" in layer._modules
        if not made:  # FSDP1's view of a flat one; weight_norm, spectral_norm and pruning keep weight_g, weight_orig, ...
            raise ConfigError("params", plain_name(f"{name}.weight"), f"is a view of a flat parameter, but {FLAT}")
        if "weight" in layer._parameters and weight.ndim < 2:
            raise ConfigError("params", plain_name(f"{name}.weight"), f"has shape {tuple(weight.shape)}, but {FLAT}")


def check_group(group: dict[str, Any], names: Mapping[int, str], quiet: bool = False) -> None:
    """Refuse what the optimizer cannot do with this group; clamp ranks with one warning, unless it is to be ``quiet``.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_keys(group)
    check_values(group)
    group["betas"] = tuple(float(beta) for beta in group["betas"])
    for key, number in _NUMBERS.items():  # plain ones: a file with NumPy's in it is refused by torch.load
        if not (key == "lr" and isinstance(group[key], Tensor)):
            group[key] = number(group[key])
    if group["moments"] == "8bit":
        bitsandbytes()
    for p in group["params"]:
        if p.is_complex():
            raise ConfigError("params", names[id(p)], "is complex: GaLoreAdamW takes real parameters")
    if group.get("rank") is None:
        return
    check_rank_value(group["rank"])
    group["rank"] = int(group["rank"])
    if group["proj_type"] == "full" and (group["residual"] or group["variant"] == "apollo"):
        raise ConfigError("proj_type", "full", "Fira and APOLLO scale columns of a one-sided projection: use std")
    if group["variant"] == "apollo" and (group["residual"] or group["refresh"] == "track"):
        raise ConfigError("variant", "apollo", "has no basis to track and no residual: leave refresh and residual alone")
    clamped = []
    for p in group["params"]:
        if p.ndim < 2 or not p.numel():
            raise ConfigError(
                "params", names[id(p)],
                f"has shape {tuple(p.shape)}, but {FLAT}. Norms and biases belong in a group without `rank`",
            )  # fmt: skip
        if group["rank"] > largest_rank(p):
            flat = f", a matrix {p.shape[0]}x{p.numel() // p.shape[0]}" if p.ndim > 2 else ""
            clamped.append(f"{names[id(p)]} {tuple(p.shape)}{flat}")
    if clamped and not quiet:
        warnings.warn(f"rank={group['rank']} is clamped to min(m, n) for: {', '.join(clamped)}", stacklevel=4)


def known_key(key: Any) -> bool:
    """Return whether something reads this key of a group: here, or in torch, Lightning or timm."""
    return key in KEYS or key in _OTHERS or key in _HARMLESS


def check_keys(group: Mapping[str, Any]) -> None:
    """Refuse keys of a group that nothing reads: a wrong word would otherwise change nothing, in silence.

    Raises:
        ConfigError: naming the key and the closest known one.
    """
    for key, value in group.items():
        if not known_key(key):
            close = get_close_matches(str(key), KEYS, 1, 0.5)
            cure = f"did you mean {close[0]}?" if close else f"allowed are {', '.join(KEYS)}"
            raise ConfigError(str(key), value, f"is no key of a parameter group: {cure}")
        if key in _HARMLESS and value not in _HARMLESS[key]:
            raise ConfigError(key, value, "is torch's AdamW's and not done here: leave it out")


def asked(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's settings as plain numbers and words, to tell later what was changed."""
    found = {key: group[key] for key in KEYS if key in group}
    return {key: float(value) if isinstance(value, Tensor) else value for key, value in found.items()}


def check_values(group: Mapping[str, Any]) -> None:
    """Refuse values that are wrong whatever the parameters are.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for key, allowed in (
        ("proj_type", PROJ_TYPES),
        ("refresh", REFRESHES),
        ("moments", MOMENTS),
        ("residual", RESIDUALS),
        ("variant", VARIANTS),
    ):
        if group[key] not in allowed:
            raise ConfigError(key, group[key], f"must be one of {', '.join(str(a) for a in allowed)}")
    for key in ("rotate_moments", "stagger", "layerwise", "correct_bias"):
        if not isinstance(group[key], bool):
            raise ConfigError(key, group[key], "must be true or false")
    for key in ("lr", "eps", "weight_decay", "scale"):
        if not _is_number(group[key]) or not 0 <= group[key] < math.inf:
            raise ConfigError(key, group[key], "must be a number, 0 or more")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_number(b) and 0 <= b < 1 for b in betas):
        raise ConfigError("betas", betas, "must be two numbers in [0, 1)")
    gap, seed = group["update_proj_gap"], group["seed"]
    if not _is_integer(gap) or gap < 1:
        raise ConfigError("update_proj_gap", gap, "must be an integer of 1 or more steps")
    if not _is_integer(seed):
        raise ConfigError("seed", seed, "must be an integer, or null for the run's")


def check_rates(group: Mapping[str, Any]) -> None:
    """Refuse rates that a scheduler or a user has made unusable since the group was checked; asked at every step.

    Raises:
        ConfigError: naming the key and the value.
    """
    lr = float(group["lr"])
    if not math.isfinite(lr):
        raise ConfigError("lr", lr, "must be finite: look at the learning rate schedule")
    beta1, beta2 = group["betas"]
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ConfigError("betas", (beta1, beta2), "must be two numbers in [0, 1)")


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_rank_value(rank: Any) -> None:
    """Refuse a rank that is no positive integer."""
    if not _is_integer(rank) or rank < 1:
        raise ConfigError("rank", rank, "must be an integer of 1 or more")


def largest_rank(p: Tensor) -> int:
    """min(m, n) of a weight taken as a matrix (first dimension by all others)."""
    return min(p.shape[0], p.numel() // max(p.shape[0], 1))
