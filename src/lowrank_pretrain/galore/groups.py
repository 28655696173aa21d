"""Make and check parameter groups: which matrices are projected, and with which settings. Every wrong value is refused here."""

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.checks import choice, flag, is_integer, is_number, number, whole
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
from lowrank_pretrain.galore.adam import MOMENTS, load_bitsandbytes
from lowrank_pretrain.galore.modes import RULES, SECOND_MOMENTS
from lowrank_pretrain.galore.subspace import PROJ_TYPES, REFRESHES
from lowrank_pretrain.models.optim import undecayed_names

MODE_DEFAULTS = {"second_moment": "full", "nesterov": False, "rule": "adam", "track_every": 1}
FORM_KEYS = ("rank", "proj_type", "variant", "rule", "second_moment")  # they decide what a state's tensors look like
# settings of projected groups alone
_PROJECTED = ("update_proj_gap", "scale", "proj_type", "refresh", "residual", "variant", *MODE_DEFAULTS)
RESIDUALS = (None, "fira", "muon")
VARIANTS = ("galore", "apollo")
# settings that a group may have, and other keys that torch, its schedulers, Lightning and timm put into one
KEYS = (
    "rank", "lr", "betas", "eps", "weight_decay", "correct_bias", "update_proj_gap", "scale", "proj_type", "refresh",
    "rotate_moments", "stagger", "layerwise", "moments", "residual", "variant", "second_moment", "nesterov", "rule",
    "track_every", "seed",
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
_REALS, _INTEGERS = ("lr", "eps", "weight_decay", "scale"), ("update_proj_gap", "track_every", "seed")
_CHOICES = {
    "proj_type": PROJ_TYPES, "refresh": REFRESHES, "moments": MOMENTS, "residual": RESIDUALS, "variant": VARIANTS,
    "second_moment": SECOND_MOMENTS, "rule": RULES,
}  # fmt: skip
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_STACKED = (*_CONV, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Bilinear)  # their weights are no stacks
_NO_MOMENTUM = "needs momentum: betas[0] must be above 0"
_FLAT = "a GaLore group takes matrices. FSDP1 and DeepSpeed flatten theirs: use FSDP2 (ModelParallelStrategy)"


def galore_param_groups(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str] = "all",
    weight_decay: float | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return groups for ``GaLoreAdamW``: the targets are projected, every other trainable parameter has plain AdamW.

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

    Example:
        >>> groups = galore_param_groups(nn.Sequential(nn.Linear(8, 6)), rank=2, scale=1.0)
        >>> [(group.get("rank"), [name for name, _ in group["params"]]) for group in groups]
        [(2, ['0.weight']), (None, ['0.bias'])]
    """
    check_rank_value(rank)
    check_keys(settings)
    _refuse_flat(model)
    layers = target_layers(model, targets)
    named = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    lazy = next((name for name, p in named.items() if is_lazy(p)), None)
    if lazy is not None:
        raise ConfigError("params", lazy, "is lazy and has no shape yet: call the model once before its optimizer is made")
    weights = [f"{name}.weight".removeprefix(".") for name in layers]  # no name: the model is the layer itself
    chosen = {name: named[name] for name in weights}
    explicit = any(t not in PRESETS for t in ([targets] if isinstance(targets, str) else targets) if not t.startswith("!"))
    for name, p in chosen.items():
        if explicit and rank > largest_rank(p):
            raise ConfigError("rank", rank, f"{name} is {tuple(p.shape)}: at most {largest_rank(p)} is allowed")
    _warn_about_stacks(model, {name: p for name, p in named.items() if name not in chosen})
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
    """Return a function that says why a tied output head cannot be a target: the embedding shares its gradient."""
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


def _warn_about_stacks(model: nn.Module, rest: dict[str, Tensor]) -> None:
    """Warn of stacked matrices, such as experts' weights: they are large but cannot be targets."""
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
        weight: Any = getattr(layer, "weight", None)
        if not isinstance(layer, (nn.Linear, *_CONV)) or weight is None or is_lazy(weight):
            continue
        made = any(key.startswith("weight") for key in layer._parameters) or "parametrizations" in layer._modules
        if not made:  # FSDP1's view of a flat one; weight_norm, spectral_norm and pruning keep weight_g, weight_orig, ...
            raise ConfigError("params", plain_name(f"{name}.weight"), f"is a view of a flat parameter, but {_FLAT}")
        if "weight" in layer._parameters and weight.ndim < 2:
            raise ConfigError("params", plain_name(f"{name}.weight"), f"has shape {tuple(weight.shape)}, but {_FLAT}")


def check_group(group: dict[str, Any], names: Mapping[int, str], quiet: bool = False) -> None:
    """Refuse a group that the optimizer cannot handle; warn once of clamped ranks, unless ``quiet``.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_keys(group)
    check_values(group, scheduled=quiet)
    group["betas"] = tuple(float(beta) for beta in group["betas"])
    for key in _REALS + _INTEGERS:  # plain ones: a file with NumPy's in it is refused by torch.load
        if not (key == "lr" and isinstance(group[key], Tensor)):
            group[key] = (float if key in _REALS else int)(group[key])
    if group["moments"] == "8bit":
        load_bitsandbytes()
    for p in group["params"]:
        if p.is_complex():
            raise ConfigError("params", names[id(p)], "is complex: GaLoreAdamW takes real parameters")
    if group.get("rank") is None:
        return
    check_rank_value(group["rank"])
    group["rank"] = int(group["rank"])
    if group["proj_type"] == "full" and (group["residual"] or group["variant"] == "apollo"):
        raise ConfigError("proj_type", "full", "a residual and APOLLO need a one-sided projection: use std")
    if group["variant"] == "apollo" and (group["residual"] or group["refresh"] == "track"):
        raise ConfigError("variant", "apollo", "has no basis to track and no residual: leave refresh and residual alone")
    if group["track_every"] != 1 and group["refresh"] != "track":
        cure = f"refresh={group['refresh']} renews its bases every update_proj_gap steps: set that, or refresh=track"
        raise ConfigError("track_every", group["track_every"], cure)
    clamped = []
    for p in group["params"]:
        if p.ndim < 2 or not p.numel():
            raise ConfigError(
                "params", names[id(p)],
                f"has shape {tuple(p.shape)}, but {_FLAT}. Norms and biases belong in a group without `rank`",
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
    """Refuse unknown keys of a group: a misspelt one would otherwise be ignored silently.

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


def check_values(group: Mapping[str, Any], scheduled: bool = False) -> None:
    """Refuse values that are wrong for all parameters; a scheduled rate may have gone below 0, as in torch.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for key, allowed in _CHOICES.items():
        choice(key, group[key], allowed)
    for key in ("rotate_moments", "stagger", "layerwise", "correct_bias", "nesterov"):
        flag(key, group[key])
    for key in _REALS:
        least = -math.inf if scheduled and key == "lr" else 0
        number(key, _plain_number(group[key]), least=least, allowed="must be a number, 0 or more")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(_is_decay(_plain_number(beta)) for beta in betas):
        raise ConfigError("betas", betas, "must be two numbers in [0, 1)")
    if group["rule"] == "muon" and group["second_moment"] == "factored":
        raise ConfigError("second_moment", "factored", "rule=muon keeps no second moment: leave second_moment at full")
    if group["rule"] == "muon" and group["variant"] == "apollo":
        raise ConfigError("rule", "muon", "orthogonalises the momentum in a basis, which variant=apollo has not: use galore")
    if group["nesterov"] and not _plain_number(betas[0]):
        raise ConfigError("nesterov", True, _NO_MOMENTUM)
    for key in ("update_proj_gap", "track_every"):
        whole(key, group[key], 1, "steps")
    if not is_integer(group["seed"]):
        raise ConfigError("seed", group["seed"], "must be an integer, or null for the run's")


def check_rates(group: Mapping[str, Any]) -> None:
    """Refuse rates that a scheduler or a user has made unusable since the group was checked; called at every step.

    Raises:
        ConfigError: naming the key and the value.
    """
    lr = float(group["lr"])
    if not math.isfinite(lr):
        raise ConfigError("lr", lr, "must be finite: look at the learning rate schedule")
    decay = group["weight_decay"]
    if decay is None or not -1e-9 < float(decay) < math.inf:  # a schedule may end at a rounding error below 0
        raise ConfigError("weight_decay", decay, "must be a number, 0 or more: look at its schedule")
    betas = group["betas"]
    if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
        raise ConfigError("betas", tuple(betas), "must be two numbers in [0, 1)")
    if group["nesterov"] and not betas[0]:
        raise ConfigError("nesterov", True, _NO_MOMENTUM)


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _is_decay(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def check_rank_value(rank: Any) -> None:
    """Refuse a rank that is not a positive integer.

    Example:
        >>> check_rank_value(0)
        Traceback (most recent call last):
        lowrank_pretrain.core.errors.ConfigError: rank=0: must be an integer of 1 or more
    """
    whole("rank", rank, 1)


def largest_rank(p: Tensor) -> int:
    """Return min(m, n) of a weight taken as a matrix (first dimension by all others).

    Example:
        >>> largest_rank(nn.Conv2d(4, 6, 3).weight)
        6
    """
    return min(p.shape[0], p.numel() // max(p.shape[0], 1))


# ---- names, groups from a model, and changes in the middle of a fit ----------------------------------------------------------


def parameter_name(group: dict[str, Any], number: int, i: int) -> str:
    """Return the name of the i-th parameter of a group, by position if it was given none.

    Example:
        >>> parameter_name({"params": [nn.Linear(2, 2).weight]}, number=1, i=0)
        'parameter 0 of group 1'
    """
    names = group.get("param_names", ())
    return names[i] if len(names) == len(group["params"]) else f"parameter {i} of group {number}"


def parameter_names(group: dict[str, Any], number: int) -> dict[int, str]:
    """Return the names of a group's parameters by their identity."""
    return {id(p): parameter_name(group, number, i) for i, p in enumerate(group["params"])}


def name_late_group(param_group: dict[str, Any], number: int) -> None:
    """Name the parameters of a late group by position: Lightning's BaseFinetuning unfreezes without names."""
    given = param_group["params"]
    given = [given] if isinstance(given, Tensor) else given
    if "param_names" in param_group or isinstance(given, set) or any(isinstance(p, tuple) for p in given):
        return  # a set is refused by torch
    param_group["params"] = [(f"parameter {i} of group {number}", p) for i, p in enumerate(given)]
    if not given:  # torch takes names from the parameters
        param_group["param_names"] = []


def groups_of_model(
    params: Iterable[Any] | nn.Module, rank: int | None, targets: str | Sequence[str], weight_decay: float
) -> Iterable[Any]:
    """Return the groups of a model that was passed instead of parameters; else the parameters unchanged.

    Raises:
        ConfigError: a model without a rank, or a rank or targets without a model.
    """
    if isinstance(params, nn.Module):
        if rank is None:
            raise ConfigError("rank", None, "is needed with a model: GaLoreAdamW(model, rank=128)")
        return galore_param_groups(params, rank, targets, weight_decay=weight_decay)
    if rank is not None or targets != "all":
        key, value = ("targets", targets) if rank is None else ("rank", rank)
        raise ConfigError(
            key, value,
            "needs the model: GaLoreAdamW(model, rank=…, targets=…), or groups of galore_param_groups(model, rank, targets); "
            "in a HF Trainer optimizer_cls_and_kwargs=(GaLoreAdamW, {'model': model, …})",
        )  # fmt: skip
    return params


def warn_of_unused(usual: inspect.Signature, groups: list[dict[str, Any]]) -> None:
    """Warn of settings for projected groups when no group is projected."""
    changed = [(key, group[key]) for key in _PROJECTED for group in groups if group[key] != usual.parameters[key].default]
    if changed and not any(group.get("rank") for group in groups):
        where = "no parameter group has a rank, so all are plain AdamW (until a plan projects some: PreLoRA with then=galore)"
        warnings.warn(f"{changed[0][0]}={changed[0][1]!r} has no effect yet: {where}", stacklevel=3)


# A change of any of these in the middle of a fit makes the index anew; lr, betas and decay are read at each step.
_INDEXED = tuple(key for key in KEYS if key not in ("lr", "betas", "weight_decay"))


class GroupsSnapshot:
    """Keep a snapshot of the groups, to detect later changes by the user."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = list(groups)
        self._lists = [group["params"] for group in groups]  # kept, so that no other list takes their identity
        self._params = [list(group["params"]) for group in groups]
        self._settings = [tuple(map(group.get, _INDEXED)) for group in groups]
        self._forms = [tuple(map(group.get, FORM_KEYS)) for group in groups]

    def has_same_lists(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the groups hold the same lists, as long, and project alike: quick, for use within a step."""
        if len(groups) != len(self._lists):
            return False
        for group, known, params, form in zip(groups, self._lists, self._params, self._forms, strict=True):
            if group["params"] is not known or len(known) != len(params) or tuple(map(group.get, FORM_KEYS)) != form:
                return False
        return True

    def is_current(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the groups, their parameters and their settings are the same."""
        same = self.has_same_lists(groups) and all(map(operator.is_, groups, self._groups))
        return same and all(
            all(map(operator.is_, group["params"], params)) and tuple(map(group.get, _INDEXED)) == settings
            for group, params, settings in zip(groups, self._params, self._settings, strict=True)
        )

    def changed_groups(self, groups: list[dict[str, Any]]) -> list[int]:
        """Return the numbers of groups that are new or whose settings have changed."""
        return [
            number for number, group in enumerate(groups)
            if number >= len(self._settings) or tuple(map(group.get, _INDEXED)) != self._settings[number]
        ]  # fmt: skip
