"""Loading optimizer state: tensors keep their stored dtype, and a state of another rank or shape is refused.

torch casts floating state to the parameter's dtype, which turns float32 moments of a bfloat16 model, and 8-bit codes, into
something else without a word; and it takes the groups' settings from the file, so another rank would come in silently.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.galore.groups import largest_rank
from lowrank_pretrain.galore.index import parameter_name
from lowrank_pretrain.galore.subspace import project_left

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW

_FIXED = ("rank", "proj_type", "variant", "moments")  # settings that decide what the state's tensors look like


def load(optimizer: "GaLoreAdamW", saved: dict[str, Any], load_plain: Callable[[dict[str, Any]], None]) -> None:
    """Check and load; nothing is changed when something does not fit.

    Raises:
        ConfigError: naming the key or parameter that differs.
    """
    groups = saved["param_groups"]
    if any("variant" not in old for old in groups):
        raise ConfigError("ckpt_path", "optimizer state", "was written by another optimizer (galore_torch?): start afresh")
    if len(groups) != len(optimizer.param_groups):
        raise ConfigError("ckpt_path", f"{len(groups)} groups", f"the optimizer has {len(optimizer.param_groups)}")
    pairs: list[tuple[Any, Tensor, str]] = []
    for number, (old, new) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        if len(old["params"]) != len(new["params"]):
            raise ConfigError(
                "ckpt_path", f"{len(old['params'])} parameters", f"group {number} has {len(new['params'])}: another model?"
            )
        for key in _FIXED:
            if old.get(key) != new.get(key):
                raise ConfigError(
                    key, new.get(key), f"the checkpoint was written with {old.get(key)!r}: use that, or start afresh"
                )
        ranks = old.get("ranks", [0] * len(old["params"]))
        for i, (key, p) in enumerate(zip(old["params"], new["params"], strict=True)):
            name = parameter_name(new, number, i)
            _check_shapes(saved["state"].get(key, {}), p, old, ranks[i], name)
            if ranks[i]:
                optimizer._ranks[p] = ranks[i]
            pairs.append((key, p, name))
    stripped = [{key: value for key, value in old.items() if key != "ranks"} for old in groups]
    load_plain({**saved, "param_groups": stripped})
    optimizer._index = None
    for key, p, _ in pairs:
        for what, value in saved["state"].get(key, {}).items():
            if isinstance(value, Tensor):
                # copied, so that two optimizers loaded from one state do not share it
                device = torch.device("cpu") if what == "step" else p.device
                optimizer.state[p][what] = value.detach().to(device, copy=True)


def _check_shapes(state: dict[str, Any], p: Tensor, group: dict[str, Any], adopted: int, name: str) -> None:
    if "exp_avg" not in state:
        return
    rank, rows, cols = adopted or group.get("rank"), p.shape[0], p.numel() // max(p.shape[0], 1)
    shapes = {"exp_avg": tuple(p.shape)}
    if rank and ("proj" in state or not adopted):  # an adopted parameter has whole moments until its next step
        rank = min(rank, largest_rank(p))
        d, k = (rows, cols) if project_left(rows, cols, group["proj_type"]) else (cols, rows)
        shapes = {"exp_avg": (rank, rank if group["proj_type"] == "full" else k)}
        if group["variant"] == "galore":
            shapes["proj"] = (d, rank)
    for key, shape in shapes.items():
        if key not in state:
            raise ConfigError("ckpt_path", name, f"has no {key} there: written by another optimizer (galore_torch?)")
        if tuple(state[key].shape) != shape:
            raise ConfigError("ckpt_path", name, f"its {key} is {tuple(state[key].shape)} there, but must be {shape} here")
