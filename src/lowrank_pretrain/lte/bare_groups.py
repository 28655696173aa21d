"""Keep optimizer states as a run without LTE would have them, separately from the heads' own.

LTE moves parameters: W leaves its group, heads join it. A checkpoint holds what the bare model's optimizer would: its groups in
their order, W among them without moments. The heads' moments are saved by name, all N heads stacked.
"""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Inherit
from lowrank_pretrain.core.wrapped import several_hold_state, state_holder, with_wrapped
from lowrank_pretrain.galore import GaLoreAdamW


@dataclass
class BareGroups:
    """Remember an optimizer's groups from before the model was converted.

    Attributes:
        optimizer: the optimizer.
        groups: its parameters, group by group.
        inherited: parameters that are row blocks of a converted layer's W and train in full next to heads.
    """

    optimizer: Optimizer
    groups: list[list[nn.Parameter]]
    inherited: list[Inherit]

    @classmethod
    def of(cls, optimizer: Optimizer, leave_out: Iterable[Tensor] = ()) -> "BareGroups":
        """Return the groups as of now, without ``leave_out``."""
        out = {id(p) for p in leave_out}
        return cls(optimizer, [[p for p in g["params"] if id(p) not in out] for g in optimizer.param_groups], [])

    def _follow(self) -> None:
        """Add groups that joined during the fit: those that an unfreezing callback adds belong to the bare model too."""
        self.groups += [list(group["params"]) for group in self.optimizer.param_groups[len(self.groups) :]]

    def numbers(self, params: Iterable[Tensor]) -> set[int]:
        """Return the numbers that ``state_dict`` gives to those of these parameters that existed before."""
        position = {id(p): n for n, p in enumerate(p for group in self.groups for p in group)}
        return {position[id(p)] for p in params if id(p) in position}

    def put_back(self, weights: Mapping[int, Tensor], gone: Collection[int]) -> None:
        """Return weights to their places in the optimizer, replacing parameters that are gone.

        Args:
            weights: the weights by id.
            gone: ids of the parameters that had replaced them.
        """
        self._follow()
        spare = next((g for g in self.optimizer.param_groups if any(id(p) in gone for p in g["params"])), None)
        for group, was in zip(self.optimizer.param_groups, self.groups, strict=True):
            names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
            stays = [p for p in group["params"] if id(p) not in gone]
            held = {id(p) for p in stays}
            old = [p for p in was if id(p) in held or id(p) in weights]
            known = {id(p) for p in old}
            group["params"][:] = [*old, *(p for p in stays if id(p) not in known)]
            if "param_names" in group:
                group["param_names"][:] = [names.get(id(p), f"param_{n}") for n, p in enumerate(group["params"])]
        placed = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for key, p in weights.items():  # an untied output head was in no group: it joins the group of its heads
            if key not in placed and spare is not None:
                spare["params"].append(p)
        for each in with_wrapped(self.optimizer):
            for p in [p for p in each.state if id(p) in gone]:
                del each.state[p]
        self.inherited = [i for i in self.inherited if id(i.new) not in gone]

    def state_dict(self) -> dict[str, Any]:
        """Return what ``optimizer.state_dict()`` of the bare model would be."""
        self._follow()
        order = [p for group in self.groups for p in group]
        live = self.optimizer.state_dict()
        numbers = {id(p): n for n, p in _numbered(self.optimizer)}
        state = {n: live["state"][numbers[id(p)]] for n, p in enumerate(order) if numbers.get(id(p)) in live["state"]}
        position = {id(p): n for n, p in enumerate(order)}
        for new, old, dim, start, rows in self.inherited:
            if numbers.get(id(new)) in live["state"] and id(old) in position:
                whole = state.setdefault(position[id(old)], {})
                for key, value in live["state"][numbers[id(new)]].items():
                    if isinstance(value, Tensor) and value.shape == new.shape:
                        whole.setdefault(key, value.new_zeros(old.shape)).narrow(dim, start, rows).copy_(value)
                    else:
                        whole[key] = value
        groups, at = [], 0
        for group, params in zip(live["param_groups"], self.groups, strict=True):
            groups.append({**group, "params": list(range(at, at + len(params)))})
            at += len(params)
        return {**live, "state": {**_of_no_parameter(live), **state}, "param_groups": groups}

    def load(self, saved: Mapping[str, Any], heads: Mapping[int, dict[str, Any]]) -> None:
        """Load a bare state and the heads' own.

        Args:
            saved: as ``state_dict`` gave it, or as the bare model's optimizer would.
            heads: id of a live head parameter -> its state here.

        Raises:
            ConfigError: its groups do not match this model's.
        """
        self._follow()
        there = [len(group["params"]) for group in saved["param_groups"]]
        here = [len(group) for group in self.groups]
        if there != here:
            cure = "to go on from its weights alone (those of a low-rank run are merged), load_from_checkpoint, then fit"
            raise ConfigError("ckpt_path", f"groups of {there} parameters", f"this optimizer has groups of {here}: {cure}")
        order = [p for group in self.groups for p in group]
        position = {id(p): n for n, p in enumerate(order)}
        inherited = {id(i.new): i for i in self.inherited}
        state: dict[int, Any] = {}
        for number, p in _numbered(self.optimizer):
            if id(p) in heads:
                state[number] = heads[id(p)]
            elif id(p) in inherited:
                _, old, dim, start, rows = inherited[id(p)]
                whole = saved["state"].get(position.get(id(old)))
                if whole:
                    state[number] = {
                        k: v.narrow(dim, start, rows).clone() if isinstance(v, Tensor) and v.shape == old.shape else v
                        for k, v in whole.items()
                    }
            elif position.get(id(p)) in saved["state"]:
                state[number] = saved["state"][position[id(p)]]
        live = self.optimizer.state_dict()["param_groups"]
        groups = [{**g, "params": mine["params"]} for g, mine in zip(saved["param_groups"], live, strict=True)]
        kept = {**_of_no_parameter(saved), **{n: s for n, s in state.items() if s}}
        self.optimizer.load_state_dict({**saved, "state": kept, "param_groups": groups})


_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_PLAIN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # known to be elementwise


def check_stacked(optimizer: Optimizer, held: Iterable[Tensor]) -> None:
    """Check by steps on toy parameters that an optimizer can train stacked heads (H, R, D).

    Afterwards the optimizer has its own parameters and states again.

    Args:
        optimizer: the optimizer.
        held: the heads' factors, or the weights in whose place heads will be: each group that holds some is tried.

    Raises:
        ConfigError: it takes matrices only, or keeps state in which heads cannot be distinguished.
    """
    if type(optimizer) in (*_PLAIN, GaLoreAdamW):
        return
    mine = {id(p) for p in held}
    for group in optimizer.param_groups:
        likes = [p for p in group["params"] if id(p) in mine]
        if likes:
            _check_group(optimizer, group, max(likes, key=Tensor.numel))


def check_wrapped(optimizer: Optimizer) -> None:
    """Check, by steps on a toy parameter, that an optimizer which wraps others keeps its state in one of them.

    Afterwards it has its own parameters and states again.

    Raises:
        ConfigError: it keeps state in several; or one inside it steps only some of its parameters.
    """
    holder = state_holder(optimizer)
    if holder is optimizer:
        return
    for group in optimizer.param_groups:
        if group["params"]:
            like, toy = group["params"][0], torch.eye(8)
            for closure in (False, True):  # some step by a closure only
                if not isinstance(_trial(optimizer, group, toy, like, closure), Exception):
                    break


def _check_group(optimizer: Optimizer, group: Mapping[str, Any], like: Tensor) -> None:
    """Check it with one group's settings, in the dtype and on the device of ``like``."""
    kind = type(optimizer).__name__
    side = 64 if like.numel() >= 4096 else 8  # optimizers with few bits keep small tensors in float32
    both = torch.linspace(-1, 1, 2 * side**2).square().view(2, side, side) - torch.eye(side)
    tried = [_trial(optimizer, group, matrix, like) for matrix in both]
    alone = [found[0] for found in tried if not isinstance(found, Exception)]
    if len(alone) < len(tried):
        return  # it needs more than gradients (a closure, a mode): no verdict here
    found = _trial(optimizer, group, both, like)
    if isinstance(found, Exception):
        first = str(found).strip().splitlines()[0] if str(found).strip() else type(found).__name__
        raise ConfigError("optimizer", kind, f"cannot train heads, which are stacked in three dimensions ({first}): use AdamW")
    p, state = found
    for key, value in state.items():
        check_moment(kind, key, value, p)
    if not all(torch.allclose(p[k], alone[k], rtol=1e-3, atol=1e-5) for k in range(2)):
        rank_zero_warn(
            f"LTE: {kind} takes all heads of a matrix together (a norm over the whole parameter?), so a head depends "
            "on which heads share its device: AdamW keeps them independent"
        )


def check_moment(kind: str, key: str, value: Any, p: Tensor) -> None:
    """Refuse optimizer state that cannot be cut into heads.

    Raises:
        ConfigError: it has neither the parameter's shape nor one number.
    """
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and (value.shape == p.shape or value.ndim == 0)):
        return
    raise ConfigError("optimizer", kind, f"keeps {key}, in which heads cannot be told apart: use AdamW or SGD")


def _trial(
    optimizer: Optimizer, settings: Mapping[str, Any], value: Tensor, like: Tensor, closure: bool = False
) -> tuple[Tensor, dict[str, Any]] | Exception:
    """Return one parameter after the optimizer's step, and the optimizer state that it leaves.

    The optimizers that it wraps step the same parameter, and get their own back too.

    Raises:
        ConfigError: several of them keep state.
    """
    p = nn.Parameter(value.to(like).clone())
    p.grad = value.flip(-1).to(like)
    steppers = with_wrapped(optimizer)
    kept = [dict(each.__dict__) for each in steppers]
    states: dict[int, Any] = {id(each.state): defaultdict(dict) for each in steppers}
    now = [states[id(each.state)] for each in steppers]

    def again() -> Any:
        p.grad = value.flip(-1).to(like)
        return p.new_zeros(())

    group = {key: copy.copy(held) for key, held in settings.items() if key != "param_names"}
    devices = [p.device] if p.device.type == "cuda" else []
    step = type(optimizer).step
    try:
        groups = [{**group, "params": [p]}]
        for each, state in zip(steppers, now, strict=True):
            each.__dict__ |= {"param_groups": groups, "state": state, **{key: OrderedDict() for key in _HOOKS}}
        with torch.random.fork_rng(devices=devices):
            # without hooks: no step was taken
            getattr(step, "__wrapped__", step)(optimizer, *([again] if closure else []))
        found = [dict(state[p]) for state in states.values() if state.get(p)]
    except Exception as error:
        return error
    finally:
        for each, was in zip(steppers, kept, strict=True):
            each.__dict__.clear()
            each.__dict__ |= was
    if len(found) > 1:
        raise several_hold_state([e for e, state in zip(steppers, now, strict=True) if state.get(p)])
    return p.detach().clone(), found[0] if found else {}


def _of_no_parameter(saved: Mapping[str, Any]) -> dict[Any, Any]:
    """Return the entries of a saved state that belong to no parameter, such as a count of steps: torch keeps them unchanged."""
    return {key: value for key, value in saved["state"].items() if not isinstance(key, int)}


def _numbered(optimizer: Optimizer) -> Iterable[tuple[int, Tensor]]:
    """Yield (number, parameter) in the order in which ``state_dict`` numbers them."""
    return enumerate(p for group in optimizer.param_groups for p in group["params"])
