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
from lowrank_pretrain.galore.index import Entry, form_of_state
from lowrank_pretrain.galore.modes import second_form
from lowrank_pretrain.galore.requested import check_form, continued_settings, rate_share
from lowrank_pretrain.galore.subspace import project_left

_OURS = ("variant", "refresh", "stagger", "residual", "moments", "layerwise", "rotate_moments")  # no other optimizer's keys
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
    places, sources = _match_parameters(groups, groups_here, saved["state"])
    requested_there = saved.get("asked") or []
    ranks: dict[Tensor, int] = {}
    states: dict[Any, dict[str, Any]] = {}
    new_groups: list[dict[str, Any]] = []
    asked: list[dict[str, Any] | None] = [None] * len(groups)
    if len(requested_there) == len(groups):
        asked = [{**MODE_DEFAULTS, **settings} for settings in requested_there]
    shares = [1.0] * len(groups_here)
    for number, (group, source) in enumerate(zip(groups_here, sources, strict=True)):
        if source is None:  # an empty group that the file has not
            new_groups.append(dict(group))
            continue
        mine = [place for place in places if place.number == number]
        has_state = any(saved["state"].get(place.key) for place in mine)
        adopted = "ranks" in groups[source] or any(place.adopted for place in mine)
        shares[number] = rate_share(asked[source], requested[number])
        new_groups.append(continued_settings(group, groups[source], requested[number], asked[source], has_state, adopted))
    for place in places:
        if place.adopted:
            ranks[place.p] = place.adopted
        state, there, number = saved["state"].get(place.key), groups[place.source], place.number
        if state:
            check_form(groups_here[number], there, requested[number], asked[place.source], place.adopted, place.name)
            _check_shapes(state, place.p, there, place.adopted, place.name)
            states[place.p] = _own_tensors(state, place.p, new_groups[number])
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


def _match_parameters(
    old: list[dict[str, Any]], new: list[dict[str, Any]], states: Mapping[Any, Any]
) -> tuple[list[_Place], list[int | None]]:
    """Return each parameter with its place in the file, and for each group here the group in the file with its settings.

    An empty group has no such place among named ones; it may be the file's empty group in the same position.
    """
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
    sources: list[int | None] = []
    for number, group in enumerate(new):
        places = [(number, i) if by_name is None else by_name[number, i] for i in range(len(group["params"]))]
        for i, (p, (source, j)) in enumerate(zip(group["params"], places, strict=True)):
            key, name = old[source]["params"][j], parameter_name(group, number, i)
            adopted = old[source].get("ranks") or [0] * len(old[source]["params"])
            rank = adopted[j] or _rank_of_state(states.get(key), old[source], p)
            found.append(_Place(p, key, rank, source, number, name))
        empty = number < len(old) and not old[number]["params"]
        sources.append(places[0][0] if places else number if by_name is None or empty else None)
    return found, sources


def _rank_of_state(state: Any, group: dict[str, Any], p: Tensor) -> int:
    """Return an adopted parameter's rank where the file has lost ``ranks``, as a flattened distributed checkpoint does."""
    proj = state.get("proj") if state and group.get("rank") is None and "ranks" not in group else None
    found = proj.shape[1] if isinstance(proj, Tensor) and proj.ndim == 2 and p.ndim > 1 else 0
    return found if found <= largest_rank(p) else 0


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


def follow_rates(scheduler: Any) -> None:
    """Make a schedule that was loaded from a file continue from the learning rates in the code.

    A scheduler restores its base rates after the optimizer's state; without this they would replace the rates in the code.
    """
    shares = getattr(getattr(scheduler, "optimizer", None), "rate_shares", [])
    for one in (scheduler, *inner_schedulers(scheduler)):
        bases = getattr(one, "base_lrs", [])
        if bases and len(bases) == len(shares):
            one.base_lrs = [base * share for base, share in zip(bases, shares, strict=True)]


def _check_shapes(state: dict[str, Any], p: Tensor, group: dict[str, Any], adopted: int, name: str) -> None:
    """Refuse a state that this optimizer cannot have written for this parameter.

    Raises:
        ConfigError: naming the tensor.
    """
    if "exp_avg" not in state and not any(key in state for key in _SHAPES):
        return
    shapes = _basic_shapes(state, p, group, adopted)
    if "proj" in state and p.ndim > 1 and (adopted or group.get("rank")):  # its rank may have changed since its last step
        former = form_of_state(state, p.shape[0], p.numel() // max(p.shape[0], 1), group)
        sides = {} if former is None else {key: former[key] for key in ("rank", "proj_type")}
        others = _basic_shapes(state, p, {**group, **sides}, 0) if sides else {}
        if others and all(tuple(getattr(state.get(key), "shape", ())) == shape for key, shape in others.items()):
            shapes = others
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


def _basic_shapes(state: dict[str, Any], p: Tensor, group: dict[str, Any], adopted: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the moments and bases that these settings make, by key."""
    rank, rows = adopted or group.get("rank"), p.shape[0] if p.ndim else 1
    cols = p.numel() // max(rows, 1)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(p.shape))
    if not rank or (adopted and "proj" not in state):  # an adopted parameter has whole moments until its next step
        return shapes
    rank = min(rank, largest_rank(p))
    two_sided = group["proj_type"] == "full"
    d, k = (rows, cols) if project_left(rows, cols, group["proj_type"]) else (cols, rows)
    low = (rank, rank if two_sided else k)
    # until its first step in a group that was given a rank later, moments are whole as well
    whole = "proj" not in state and tuple(getattr(state.get("exp_avg"), "shape", ())) == tuple(p.shape)
    if group["variant"] == "galore" and whole:
        return shapes
    shapes = _low_shapes(second_form(group), low)
    if group["variant"] == "galore":
        shapes |= {"proj": (d, rank)} | ({"proj_right": (k, rank)} if two_sided else {})
    return shapes


def _low_shapes(second: str, low: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a projected matrix's moments by key."""
    if second == "full":
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), low)
    row, col = ((low[0],), (low[1],))
    return {"exp_avg": low} | ({"exp_avg_sq_row": row, "exp_avg_sq_col": col} if second == "factored" else {})


def _own_tensors(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return copies of the state's tensors in the mode's dtypes, on p's device, so that two optimizers do not share them."""
    narrow = getattr(p, "grad_dtype", p.dtype)  # that of the gradients to come; None: they may have any
    new = {}
    for key, value in state.items():
        if key == "step":
            new[key] = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        elif isinstance(value, Tensor):
            new[key] = value.detach().to(p.device, _mode_dtype(key, value, narrow or value.dtype, group), copy=True)
        else:
            new[key] = copy.deepcopy(value)
    return new


def _mode_dtype(key: str, value: Tensor, narrow: torch.dtype, group: dict[str, Any]) -> torch.dtype:
    """Return the dtype that the mode keeps a tensor of the state in, for gradients in ``narrow``."""
    if value.dtype == torch.uint8:
        return value.dtype
    if key in ("exp_avg", "exp_avg_sq"):
        return moment_dtype(group, narrow)
    if key in ("proj", "proj_right"):
        return at_least_32(narrow) if moment_kind(group) == "float32" else narrow
    return at_least_32(narrow) if key in ("exp_avg_sq_row", "exp_avg_sq_col") else value.dtype


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
        if group["proj_type"] == "full" and group["residual"]:
            raise ConfigError("proj_type", "full", "a residual needs a one-sided projection: use std")
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


def drop_whole_moments(adopted: Iterable[Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
    """Drop the moments of adopted parameters that have taken no step in a basis."""
    for p in adopted:
        kept = states.get(p, {})
        if kept and "proj" not in kept:
            for key in [key for key in kept if key.startswith("exp_avg")]:
                del kept[key]


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
