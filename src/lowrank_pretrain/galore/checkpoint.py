"""Loading optimizer state as torch does: hooks first, by name where both sides have names, each tensor checked.

Two things are not torch's. Tensors keep the dtype of the mode: torch casts floating state to the parameter's, which turns
float32 moments of a bfloat16 model, and 8-bit codes, into something else. And a setting that the code asks for, other than
the code that wrote the file did, wins over the file's; one that the state's shapes depend on is refused with both values.
"""

import copy
import math
import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.targets import plain_name
from lowrank_pretrain.galore import moments
from lowrank_pretrain.galore.groups import KEYS, check_group, known_key, largest_rank
from lowrank_pretrain.galore.index import parameter_name
from lowrank_pretrain.galore.subspace import project_left

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW

_FIXED = ("rank", "proj_type", "variant")  # settings that decide what the state's tensors look like
_OURS = ("variant", "refresh", "stagger", "residual", "moments", "layerwise", "rotate_moments")  # no other optimizer's keys
_RATES = ("lr", "betas", "weight_decay")  # what schedules change; in a file that does not tell what was asked they stay
_SHAPES = ("exp_avg", "exp_avg_sq", "proj", "proj_right")
_WRAPPERS = ("module.", "model.", "_forward_module.")


def load(optimizer: "GaLoreAdamW", saved: dict[str, Any]) -> None:
    """Check and load; nothing is changed when something does not fit.

    Raises:
        ConfigError: naming the key or parameter that differs.
    """
    saved = dict(saved)
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, saved)
        saved = saved if changed is None else changed
    groups = [dict(group) for group in copy.deepcopy(saved["param_groups"])]
    ours = any(key in group for group in groups for key in _OURS) or all(len(group) == 1 for group in groups)
    if not ours and any(group.get("rank") for group in (*groups, *optimizer.param_groups)):  # plain groups go on from AdamW's
        raise ConfigError("ckpt_path", "optimizer state", "was written by another optimizer (galore_torch?): start afresh")
    for group in groups:
        for key in KEYS:  # a version that did not have this key yet
            if key in optimizer.defaults:
                group.setdefault(key, optimizer.defaults[key])
    pairs, sources = _pair(groups, optimizer.param_groups)
    asked = saved.get("asked") or []
    ranks, states, new_groups, shares = {}, {}, [], []
    for number, (group, source) in enumerate(zip(optimizer.param_groups, sources, strict=True)):
        then = asked[source] if len(asked) == len(groups) else None
        shares.append(_asked_anew(then, optimizer._asked[number]))
        new_groups.append(_settings(group, groups[source], optimizer._asked[number], then))
    for p, key, adopted, source, number, name in pairs:
        if adopted:
            ranks[p] = adopted
        state = saved["state"].get(key)
        if state:
            _compare(optimizer.param_groups[number], groups[source], name)
            _check_shapes(state, p, groups[source], adopted, name)
            states[p] = _tensors(state, p, new_groups[number])
    loose = {key: value for key, value in saved["state"].items() if key not in {pair[1] for pair in pairs}}
    state = type(optimizer.state)(dict)
    state.update(states)
    state.update(loose)  # of no parameter; kept, as torch does
    for number, group in enumerate(new_groups):
        check_group(group, {id(p): parameter_name(group, number, i) for i, p in enumerate(group["params"])}, quiet=True)
    _say_unknown(groups, states)
    optimizer._ranks = ranks
    optimizer.__setstate__({"state": state, "param_groups": new_groups})
    optimizer._rates = shares
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


_Pair = tuple[Tensor, Any, int, int, int, str]  # parameter, key in the file, adopted rank, group there, group here, name


def _pair(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> tuple[list[_Pair], list[int]]:
    """Return each parameter with its place in the file, and for each group here the one there that has its settings."""
    there, here = _names(old), _names(new)
    by_name = None if there is None or here is None else _by_name(there, here)
    if by_name is None:
        if len(old) != len(new):
            raise ConfigError("ckpt_path", f"{len(old)} groups", f"the optimizer has {len(new)}")
        for number, (a, b) in enumerate(zip(old, new, strict=True)):
            if len(a["params"]) != len(b["params"]):
                raise ConfigError(
                    "ckpt_path", f"{len(a['params'])} parameters", f"group {number} has {len(b['params'])}: another model?"
                )
    pairs, sources = [], []
    for number, group in enumerate(new):
        places = [(number, i) if by_name is None else by_name[number, i] for i in range(len(group["params"]))]
        for i, (p, (source, j)) in enumerate(zip(group["params"], places, strict=True)):
            adopted = old[source].get("ranks") or [0] * len(old[source]["params"])
            pairs.append((p, old[source]["params"][j], adopted[j], source, number, parameter_name(group, number, i)))
        sources.append(places[0][0] if places else min(number, len(old) - 1))
    return pairs, sources


def _names(groups: list[dict[str, Any]]) -> dict[str, tuple[int, int]] | None:
    """Return name -> (group, position); None where some have no name."""
    found: dict[str, tuple[int, int]] = {}
    for number, group in enumerate(groups):
        names = group.get("param_names", ())
        if len(names) != len(group["params"]):
            return None
        found |= {plain_name(name): (number, i) for i, name in enumerate(names)}
    return found if len(found) == sum(len(group["params"]) for group in groups) else None


def _by_name(there: dict[str, tuple[int, int]], here: dict[str, tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
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


def _compare(here: dict[str, Any], there: dict[str, Any], name: str) -> None:
    """Refuse other settings where a state hangs on them."""
    for key in _FIXED:
        if here.get(key) != there.get(key) and (key == "rank" or here.get("rank")):
            raise ConfigError(
                key, here.get(key), f"the checkpoint was written with {there.get(key)!r} ({name}): use that, or start afresh"
            )


def _settings(group: dict[str, Any], old: dict[str, Any], now: dict[str, Any], then: dict[str, Any] | None) -> dict[str, Any]:
    """Return the group to go on with: the file's, but what the code asks for anew.

    Args:
        group: the group here.
        old: the group there.
        now: what the code has asked for here.
        then: what the code had asked for there; None where the file does not tell.
    """
    new = {key: value for key, value in old.items() if known_key(key)}
    new["params"] = group["params"]
    if "param_names" in group:
        new["param_names"] = group["param_names"]
    adopted = "ranks" in old
    for key in KEYS:
        if key not in now or key in (*_FIXED, "seed") or (key == "scale" and adopted):  # an adoption sets the scale itself
            continue
        if then is None:
            if key not in _RATES:
                new[key] = group[key]
        elif key in then and then[key] != now[key]:
            new[key] = _rate(group, old, now[key], then[key], new) if key == "lr" else group[key]
    if new["seed"] != now.get("seed", new["seed"]) and (old.get("rank") or adopted):
        warnings.warn(f"seed={now['seed']}: the optimizer goes on with the checkpoint's {new['seed']}", stacklevel=5)
    return new


def _asked_anew(then: dict[str, Any] | None, now: dict[str, Any]) -> float:
    """Return by how much the rate that the code asks for differs from what it asked for when the file was written."""
    return now["lr"] / then["lr"] if then is not None and then.get("lr") else 1.0


def follow_rates(scheduler: Any) -> None:
    """Let a schedule whose own state came from a file go on from the rates that the code asks for.

    A scheduler restores its base rates after the optimizer's state; without this they would undo what was asked.
    """
    shares = getattr(getattr(scheduler, "optimizer", None), "_rates", [])
    for one in (scheduler, *getattr(scheduler, "_schedulers", ())):
        bases = getattr(one, "base_lrs", [])
        if bases and len(bases) == len(shares):
            one.base_lrs = [base * share for base, share in zip(bases, shares, strict=True)]


def _rate(group: dict[str, Any], old: dict[str, Any], now: float, then: float, new: dict[str, Any]) -> Any:
    """Return the rate that the code asks for, as far along its schedule as the file's is."""
    share = float(old["lr"]) / then if then else 1.0
    for key in ("initial_lr", "max_lr", "min_lr"):
        if key in group:
            new[key] = group[key]
        elif key in old and then:
            new[key] = old[key] * now / then
    rate = now * share
    return torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate


def _check_shapes(state: dict[str, Any], p: Tensor, group: dict[str, Any], adopted: int, name: str) -> None:
    """Refuse a state that is not one of ours, of this shape.

    Raises:
        ConfigError: naming the tensor.
    """
    if "exp_avg" not in state and not any(key in state for key in _SHAPES):
        return
    rank, rows, cols = (
        adopted or group.get("rank"),
        p.shape[0] if p.ndim else 1,
        p.numel() // max(p.shape[0] if p.ndim else 1, 1),
    )
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
            shapes = dict.fromkeys(("exp_avg", "exp_avg_sq"), low)
        if group["variant"] == "galore" and shapes["exp_avg"] == low:
            shapes |= {"proj": (d, rank)} | ({"proj_right": (k, rank)} if two_sided else {})
    if "exp_avg_scale" in state or "exp_avg_sq_scale" in state:
        elements = 1
        for size in shapes["exp_avg"]:
            elements *= size
        shapes |= {f"{key}_scale": (-(-elements // moments.BLOCK),) for key in ("exp_avg", "exp_avg_sq")}
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
    if not isinstance(step, Real) or not 0 <= step < math.inf or step != int(step):
        raise ConfigError("ckpt_path", name, f"its step is {step!r} there, but must be a whole number, 0 or more")


def _tensors(state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state's tensors in the mode's dtypes, on p's device; copied, so that two optimizers do not share them."""
    narrow = getattr(p, "grad_dtype", None) or p.dtype  # that of the gradients to come
    wide, own = at_least_32(narrow), moments.moment_dtype(group, narrow)
    kept = {"exp_avg": own, "exp_avg_sq": own}
    kept["proj"] = kept["proj_right"] = wide if moments.kind(group) == "float32" else narrow
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


def _say_unknown(groups: list[dict[str, Any]], states: dict[Tensor, dict[str, Any]]) -> None:
    keys = {str(key) for group in groups for key in group if not known_key(key)} - {"ranks"}
    if keys:
        warnings.warn(
            f"the checkpoint's optimizer groups have keys that are unknown here: {', '.join(sorted(keys))}", stacklevel=4
        )
