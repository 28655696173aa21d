"""Check and fit the optimizer's state: loading, adopting targets in the middle of a fit, and counting bytes.

State loads as torch loads it: by name where both sides have names, each tensor checked. Two things differ from torch. Tensors
keep the dtype of the mode: torch casts floating state to the parameter's dtype, which would ruin float32 moments of a bfloat16
model, and 8-bit codes. And if a setting in the code has changed since the file was written, the code's value wins; a change of
one that the state's shapes depend on is refused with both values.

At a switch no group is added or removed, so schedulers are unchanged. Which parameters have their own rank is kept by
the optimizer, and is saved as ``ranks`` with its groups.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.checks import is_number
from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import inner_schedulers
from lowrank_pretrain.core.targets import all_targets, plain_name
from lowrank_pretrain.galore.adam import BLOCK, SMALLEST_8BIT, moment_dtype, moment_kind
from lowrank_pretrain.galore.dtensor import local_piece
from lowrank_pretrain.galore.groups import (
    KEYS,
    MODE_DEFAULTS,
    check_group,
    check_rank_value,
    known_key,
    largest_rank,
    parameter_name,
    parameter_names,
)
from lowrank_pretrain.galore.modes import second_form
from lowrank_pretrain.galore.projection import Entry
from lowrank_pretrain.galore.subspace import project_left

_FIXED = ("rank", "proj_type", "variant", "rule", "second_moment")  # settings that decide what the state's tensors look like
_OURS = ("variant", "refresh", "stagger", "residual", "moments", "layerwise", "rotate_moments")  # no other optimizer's keys
_RATES = ("lr", "betas", "weight_decay")  # schedules change these; they stay if a file does not tell the code's values
_SHAPES = ("exp_avg", "exp_avg_sq", "proj", "proj_right")
_WRAPPERS = ("module.", "model.", "_forward_module.")


# ---- loading ----------------------------------------------------------------------------------------------------------------


class LoadedState(NamedTuple):
    """Hold a file's state, fitted to an optimizer.

    Attributes:
        ranks: of adopted parameters.
        states: by parameter; entries without a parameter under their own keys.
        groups: the parameter groups to continue with.
        rate_shares: by group: the learning rate in the code now, over the one in the code that wrote the file.
    """

    ranks: dict[Tensor, int]
    states: dict[Any, dict[str, Any]]
    groups: list[dict[str, Any]]
    rate_shares: list[float]


def fit_saved_state(
    saved: Mapping[str, Any], groups_here: list[dict[str, Any]], defaults: Mapping[str, Any], requested: list[dict[str, Any]]
) -> LoadedState:
    """Check a saved state against the optimizer, and fit it to its parameters.

    Args:
        saved: a ``state_dict``.
        groups_here: the optimizer's groups; they are not changed.
        defaults: the optimizer's.
        requested: for each group, the settings in the code.

    Raises:
        ConfigError: naming the key or parameter that differs.
    """
    groups = [dict(group) for group in copy.deepcopy(saved["param_groups"])]
    ours = any(key in group for group in groups for key in _OURS) or all(len(group) == 1 for group in groups)
    if not ours and any(group.get("rank") for group in (*groups, *groups_here)):  # plain groups continue from AdamW's
        raise ConfigError("ckpt_path", "optimizer state", "was written by another optimizer than GaLore's here: start afresh")
    for group in groups:
        for key in KEYS:  # a version that did not have this key yet
            if key in defaults:
                group.setdefault(key, defaults[key])
    places, sources = _match_parameters(groups, groups_here)
    requested_there = saved.get("asked") or []
    ranks: dict[Tensor, int] = {}
    states: dict[Any, dict[str, Any]] = {}
    new_groups: list[dict[str, Any]] = []
    shares: list[float] = []
    for number, (group, source) in enumerate(zip(groups_here, sources, strict=True)):
        then = {**MODE_DEFAULTS, **requested_there[source]} if len(requested_there) == len(groups) else None
        shares.append(_rate_share(then, requested[number]))
        new_groups.append(_settings(group, groups[source], requested[number], then))
    for place in places:
        if place.adopted:
            ranks[place.p] = place.adopted
        state, there = saved["state"].get(place.key), groups[place.source]
        if state:
            _check_fixed_settings(groups_here[place.number], there, place.adopted, place.name)
            _check_shapes(state, place.p, there, place.adopted, place.name)
            states[place.p] = _own_tensors(state, place.p, new_groups[place.number])
    known = {place.key for place in places}
    states.update((key, value) for key, value in saved["state"].items() if key not in known)  # of no parameter: as torch does
    for number, group in enumerate(new_groups):
        check_group(group, parameter_names(group, number), quiet=True)
    _warn_about_unknown_keys(groups)
    return LoadedState(ranks, states, new_groups, shares)


class _Place(NamedTuple):
    """Locate a parameter's state in the file."""

    p: Tensor
    key: Any  # in the file
    adopted: int  # its rank, if a plan gave it one; else 0
    source: int  # number of its group in the file
    number: int  # number of its group here
    name: str


def _match_parameters(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[_Place], list[int]]:
    """Return each parameter with its place in the file, and for each group here the group in the file with its settings."""
    there, here = _places_by_name(old), _places_by_name(new)
    by_name = None if there is None or here is None else _match_names(there, here)
    if by_name is None:
        if len(old) != len(new):
            raise ConfigError("ckpt_path", f"{len(old)} groups", f"the optimizer has {len(new)}")
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            if len(a["params"]) != len(b["params"]):
                raise ConfigError(
                    "ckpt_path", f"{len(a['params'])} parameters", f"group {number} has {len(b['params'])}: another model?"
                )
    found: list[_Place] = []
    sources: list[int] = []
    for number, group in enumerate(new):
        places = [(number, i) if by_name is None else by_name[number, i] for i in range(len(group["params"]))]
        for i, (p, (source, j)) in enumerate(zip(group["params"], places, strict=True)):
            adopted = old[source].get("ranks") or [0] * len(old[source]["params"])
            name = parameter_name(group, number, i)
            found.append(_Place(p, old[source]["params"][j], adopted[j], source, number, name))
        sources.append(places[0][0] if places else min(number, len(old) - 1))
    return found, sources


def _places_by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[int, int]] | None:
    """Return name -> (group, position); None if some have no name."""
    found: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            return None
        found |= {plain_name(name): (number, i) for i, name in enumerate(names)}
    return found if len(found) == sum(len(group["params"]) for group in groups) else None


def _match_names(there: dict[str, tuple[int, int]], here: dict[str, tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
    """Return (group, position) here -> there.

    Raises:
        ConfigError: a name that only one side has.
    """
    for a, b in [("", ""), *(pair for wrapper in _WRAPPERS for pair in ((wrapper, ""), ("", wrapper)))]:
        if {a + name for name in there} == {b + name for name in here}:
            return {place: there[(b + name).removeprefix(a)] for name, place in here.items()}
    missing = next((name for name in here if name not in there), None)
    if missing is not None:
        raise ConfigError("ckpt_path", missing, "is not in the file's optimizer state: the same model and targets are needed")
    extra = next(name for name in there if name not in here)
    raise ConfigError("ckpt_path", extra, "is in the file's optimizer state, but not in this optimizer: another model?")


def _check_fixed_settings(here: dict[str, Any], there: dict[str, Any], adopted: int, name: str) -> None:
    """Refuse changed settings that the state depends on."""
    for key in _FIXED:
        if here.get(key) != there.get(key) and (key == "rank" or here.get("rank") or adopted):
            raise ConfigError(
                key, here.get(key), f"the checkpoint was written with {there.get(key)!r} ({name}): use that, or start afresh"
            )


def _settings(group: dict[str, Any], old: dict[str, Any], now: dict[str, Any], then: dict[str, Any] | None) -> dict[str, Any]:
    """Return the group to continue with: the file's, with settings that the code has changed since.

    Args:
        group: the group here.
        old: the group there.
        now: the settings in the code here.
        then: the settings in the code that wrote the file; None if the file does not say.
    """
    new = {key: value for key, value in old.items() if known_key(key)}
    new["params"] = group["params"]
    if "param_names" in group:
        new["param_names"] = group["param_names"]
    adopted = "ranks" in old
    projected = adopted or old.get("rank") or group.get("rank")
    kept = {"rank", "seed", *(_FIXED if projected else ()), *(["scale"] if adopted else ())}  # an adoption sets the scale
    for key in KEYS:
        if key not in now or key in kept:
            continue
        if then is None:
            if key not in _RATES:
                new[key] = group[key]
        elif key in then and then[key] != now[key]:
            new[key] = _scheduled_rate(group, old, now[key], then[key], new) if key == "lr" else group[key]
    if new["seed"] != now.get("seed", new["seed"]) and (old.get("rank") or adopted):
        warnings.warn(f"seed={now['seed']}: the optimizer goes on with the checkpoint's {new['seed']}", stacklevel=5)
    return new


def _rate_share(then: dict[str, Any] | None, now: dict[str, Any]) -> float:
    """Return the learning rate in the code over the one in the code that wrote the file."""
    return now["lr"] / then["lr"] if then is not None and then.get("lr") else 1.0


def follow_rates(scheduler: Any) -> None:
    """Make a schedule that was loaded from a file continue from the learning rates in the code.

    A scheduler restores its base rates after the optimizer's state; without this they would replace the rates in the code.
    """
    shares = getattr(getattr(scheduler, "optimizer", None), "rate_shares", [])
    for one in (scheduler, *inner_schedulers(scheduler)):
        bases = getattr(one, "base_lrs", [])
        if bases and len(bases) == len(shares):
            one.base_lrs = [base * share for base, share in zip(bases, shares, strict=True)]


def _scheduled_rate(group: dict[str, Any], old: dict[str, Any], now: float, then: float, new: dict[str, Any]) -> Any:
    """Return the code's rate, at the file's position in the schedule."""
    share = float(old["lr"]) / then if then else 1.0
    for key in ("initial_lr", "max_lr", "min_lr"):
        if key in group:
            new[key] = group[key]
        elif key in old and then:
            new[key] = old[key] * now / then
    rate = now * share
    return torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate


def _check_shapes(state: dict[str, Any], p: Tensor, group: dict[str, Any], adopted: int, name: str) -> None:
    """Refuse a state that this optimizer cannot have written for this parameter.

    Raises:
        ConfigError: naming the tensor.
    """
    if "exp_avg" not in state and not any(key in state for key in _SHAPES):
        return
    rank, rows = adopted or group.get("rank"), p.shape[0] if p.ndim else 1
    cols = p.numel() // max(rows, 1)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(p.shape))
    if rank and ("proj" in state or not adopted):  # an adopted parameter has whole moments until its next step
        rank = min(rank, largest_rank(p))
        two_sided = group["proj_type"] == "full"
        d, k = (rows, cols) if project_left(rows, cols, group["proj_type"]) else (cols, rows)
        low = (rank, rank if two_sided else k)
        # until its first step in a group that was given a rank later, moments are whole as well
        if (
            group["variant"] == "apollo"
            or "proj" in state
            or tuple(getattr(state.get("exp_avg"), "shape", ())) != tuple(p.shape)
        ):
            shapes = _low_shapes(second_form(group), low)
        if group["variant"] == "galore" and shapes["exp_avg"] == low:
            shapes |= {"proj": (d, rank)} | ({"proj_right": (k, rank)} if two_sided else {})
    if "exp_avg_scale" in state or "exp_avg_sq_scale" in state:
        blocks = -(-math.prod(shapes["exp_avg"]) // BLOCK)
        shapes |= {f"{key}_scale": (blocks,) for key in ("exp_avg", "exp_avg_sq") if key in shapes}
    if "residual_norm" in state:
        shapes["residual_norm"] = ()
    for key, shape in shapes.items():
        if not isinstance(state.get(key), Tensor):
            raise ConfigError("ckpt_path", name, f"has no {key} there: written by another optimizer (galore_torch?)")
        if tuple(state[key].shape) != shape:
            raise ConfigError("ckpt_path", name, f"its {key} is {tuple(state[key].shape)} there, but must be {shape} here")
        if (state[key].dtype == torch.uint8) != (f"{key}_scale" in shapes) or state[key].is_complex():
            raise ConfigError("ckpt_path", name, f"its {key} is {state[key].dtype} there: the file is damaged, or not ours")
    step = state.get("step", 0)
    if isinstance(step, Tensor):
        step = step.item() if step.numel() == 1 else tuple(step.shape)
    if not is_number(step) or step < 0 or step != int(step):
        raise ConfigError("ckpt_path", name, f"its step is {step!r} there, but must be a whole number, 0 or more")


def _low_shapes(second: str, low: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a projected matrix's moments by key."""
    if second == "full":
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), low)
    row, col = ((low[0],), (low[1],))
    return {"exp_avg": low} | ({"exp_avg_sq_row": row, "exp_avg_sq_col": col} if second == "factored" else {})


def _own_tensors(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the state's tensors in the mode's dtypes, on p's device, so that two optimizers do not share them."""
    narrow = getattr(p, "grad_dtype", None) or p.dtype  # that of the gradients to come
    wide, own = at_least_32(narrow), moment_dtype(group, narrow)
    kept = {"exp_avg": own, "exp_avg_sq": own, "exp_avg_sq_row": wide, "exp_avg_sq_col": wide}
    kept["proj"] = kept["proj_right"] = wide if moment_kind(group) == "float32" else narrow
    new = {}
    for key, value in state.items():
        if key == "step":
            new[key] = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        elif isinstance(value, Tensor):
            dtype = value.dtype if value.dtype == torch.uint8 else kept.get(key, value.dtype)
            new[key] = value.detach().to(p.device, dtype, copy=True)
        else:
            new[key] = copy.deepcopy(value)
    return new


def _warn_about_unknown_keys(groups: list[dict[str, Any]]) -> None:
    keys = {str(key) for group in groups for key in group if not known_key(key)} - {"ranks"}
    if keys:
        warnings.warn(
            f"the checkpoint's optimizer groups have keys that are unknown here: {', '.join(sorted(keys))}", stacklevel=4
        )


# ---- adoption: targets that are projected from the middle of a fit on -----------------------------------------------------


def planned_ranks(plan: Mapping[str, int], module: nn.Module) -> dict[str, int]:
    """Return the rank of each layer of a plan; a fused matrix takes the largest rank of its parts, rank 0 is left out.

    Raises:
        ConfigError: a name that is not a target of the model, or a wrong rank.

    Example:
        >>> planned_ranks({"0": 2, "1": 0}, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        {'0': 2}
    """
    targets, ranks = all_targets(module), dict[str, int]()
    for name, rank in plan.items():
        if name not in targets:
            raise ConfigError("plan", name, "is no target of this model")
        if rank:
            check_rank_value(rank)
            layer = targets[name].layer_name
            ranks[layer] = max(rank, ranks.get(layer, 0))
    return ranks


def adoptable_weights(names: Iterable[str], module: nn.Module, entries: Mapping[Tensor, Entry]) -> dict[str, Tensor]:
    """Return the weights of these targets by layer name, after checking that the optimizer can project each.

    Raises:
        ConfigError: a target in no group, or projected already; layer-wise updates; APOLLO.
    """
    targets = all_targets(module)
    named = {plain_name(name): p for name, p in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for layer in dict.fromkeys(targets[name].layer_name for name in names):
        p = named[f"{layer}.weight".removeprefix(".")]
        if p not in entries or entries[p].slot is not None:
            raise ConfigError("targets", layer, "must be in a group of this optimizer, and not projected already")
        group = entries[p].group
        if group["variant"] == "apollo":
            raise ConfigError("variant", "apollo", "has no subspace that moments could move into: use galore")
        if group["layerwise"]:
            raise ConfigError("layerwise", True, "has no step between two of which the model could switch: use layerwise=false")
        found[layer] = p
    return found


def adoptable_ranks(plan: Mapping[str, int], module: nn.Module, entries: Mapping[Tensor, Entry]) -> dict[Tensor, int]:
    """Return the rank of each weight of a plan.

    Raises:
        ConfigError: a target that is unknown, that the optimizer cannot project, or a rank that is too large.
    """
    ranks = planned_ranks(plan, module)
    weights = adoptable_weights([name for name, rank in plan.items() if rank], module, entries)
    for layer, rank in ranks.items():
        p = weights[layer]
        if rank > largest_rank(p):
            raise ConfigError("plan", {layer: rank}, f"the matrix is {tuple(p.shape)}: at most {largest_rank(p)}")
    return {weights[layer]: rank for layer, rank in ranks.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------------


def formula_bytes(entries: Mapping[Tensor, Entry]) -> int:
    """Return the paper's mr + 2nr for each projected m×n matrix (m the projected side) and 2mn for each other one, in bytes.

    A factored second moment is r + n of it instead of nr, and Muon's rule has mr + nr.
    8-bit moments count with one float32 scale per 256 elements; APOLLO's basis and the step counters count nothing. Under
    FSDP2 it is this rank's share: bases are whole everywhere, moments are cut unless the projection is from the left.
    """
    total = 0
    for p, (group, _, slot) in entries.items():
        kept = moment_kind(group)
        wide = at_least_32(p.dtype).itemsize
        narrow = wide if kept == "float32" else p.dtype.itemsize
        elements = local_piece(p).numel()
        if slot is not None:
            elements = slot.numel_low if slot.left else slot.numel_low * elements // p.numel()
            d, k = (slot.rows, slot.cols) if slot.left else (slot.cols, slot.rows)
            if group["variant"] == "galore":
                total += slot.rank * (d + (k if slot.two_sided else 0)) * narrow
            total += wide if group["residual"] == "fira" or group["variant"] == "apollo" else 0
        each = wide if kept == "8bit" else narrow
        second = "full" if slot is None else slot.second
        if slot is not None and second == "factored":
            total += (slot.rank + elements // slot.rank) * wide
        moments = 2 if second == "full" else 1
        if kept == "8bit" and elements >= SMALLEST_8BIT:
            total += moments * (elements + -(-elements // BLOCK) * 4)
        else:
            total += moments * elements * each
    return total
