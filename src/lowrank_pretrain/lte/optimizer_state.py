"""Optimizer states as a run without LTE would have them, and the heads' own apart.

LTE moves parameters about: W leaves its group, heads join it. A checkpoint says what the bare model's optimizer would: its
groups in their order, W among them without moments. Heads' moments are told by name, all N heads stacked.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.lora_layer import Inherit


@dataclass
class BareGroups:
    """What an optimizer's groups were before the model was converted.

    Attributes:
        optimizer: it.
        groups: its parameters, group by group.
        inherited: parameters that are row blocks of a converted layer's W and train in full beside heads.
    """

    optimizer: Optimizer
    groups: list[list[nn.Parameter]]
    inherited: list[Inherit]

    @classmethod
    def of(cls, optimizer: Optimizer, leave_out: Iterable[Tensor] = ()) -> "BareGroups":
        """As they are now, without ``leave_out``."""
        out = {id(p) for p in leave_out}
        return cls(optimizer, [[p for p in g["params"] if id(p) not in out] for g in optimizer.param_groups], [])

    def numbers(self, params: Iterable[Tensor]) -> set[int]:
        """The numbers that ``state_dict`` gives to those of these parameters that were there before."""
        position = {id(p): n for n, p in enumerate(p for group in self.groups for p in group)}
        return {position[id(p)] for p in params if id(p) in position}

    def put_back(self, weights: Mapping[int, Tensor], gone: Collection[int]) -> None:
        """Give the optimizer weights back where they were, in place of parameters that are gone.

        Args:
            weights: by id.
            gone: ids of what had taken their place.
        """
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
        for key, p in weights.items():  # a tied head that came untied was in no group: it joins where its heads were
            if key not in placed and spare is not None:
                spare["params"].append(p)
        for p in [p for p in self.optimizer.state if id(p) in gone]:
            del self.optimizer.state[p]
        self.inherited = [i for i in self.inherited if id(i.new) not in gone]

    def state_dict(self) -> dict[str, Any]:
        """What ``optimizer.state_dict()`` of the bare model would be."""
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
        return {**live, "state": state, "param_groups": groups}

    def load(self, saved: Mapping[str, Any], heads: Mapping[int, dict[str, Any]]) -> None:
        """Load a bare state and the heads' own.

        Args:
            saved: as ``state_dict`` gave it, or as the bare model's optimizer would.
            heads: id of a live head parameter -> its state here.

        Raises:
            ConfigError: its groups are not those of this model.
        """
        there = [len(group["params"]) for group in saved["param_groups"]]
        here = [len(group) for group in self.groups]
        if there != here:
            raise ConfigError("ckpt_path", f"groups of {there} parameters", f"this model's optimizer has groups of {here}")
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
        self.optimizer.load_state_dict({**saved, "state": {n: s for n, s in state.items() if s}, "param_groups": groups})


def _numbered(optimizer: Optimizer) -> Iterable[tuple[int, Tensor]]:
    """(number, parameter) in the order in which ``state_dict`` numbers them."""
    return enumerate(p for group in optimizer.param_groups for p in group["params"])
