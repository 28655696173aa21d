"""Start new parameters in optimizers that want state or attributes for each of them from the beginning.

Most optimizers make a parameter's state in its first step. Some make it when they are built (torch's Adagrad), and fail on a
parameter that joins later. So what they made is noted when a fit starts, and made alike for each that joins. Others read an
attribute of each parameter (``p.lr_mult``): one that joins has that of its base weight.
"""

import copy
import inspect
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Optimizer

from lowrank_pretrain.core.errors import ConfigError

_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_NOT_THEIRS = ("__", "_dynamo")  # how attributes begin that torch keeps on parameters


class _CopyOfParameter:
    """Mark a value that begins as a copy of its parameter."""


@dataclass
class _Start:
    """Remember what an optimizer's parameters had when a fit started.

    Args:
        state: by key: what each began with: a number for a tensor like the parameter, or the value itself.
        alike: keys of tensors that are like the parameter; with their dtype where it is not the parameter's.
        attributes: plain ones, by the parameter's id.
    """

    state: dict[str, Any] = field(default_factory=dict)
    alike: dict[str, torch.dtype | None] = field(default_factory=dict)
    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)


STARTS: MutableMapping[Optimizer, _Start] = WeakKeyDictionary()


def note_start(optimizer: Optimizer) -> None:
    """Note what the optimizer's parameters have at the start of a fit; of one that an earlier fit noted, new attributes only.

    Raises:
        ConfigError: keyed ``optimizer``: it made state when it was built that cannot be made alike for another parameter, or
            reads an attribute that is a tensor.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if isinstance(p, Tensor) and not is_lazy(p)]
    known = STARTS.get(optimizer)
    start = STARTS[optimizer] = _Start() if known is None else known
    start.attributes |= {id(p): found for p in parameters if (found := _attributes(p))}
    tensors = {
        name for p in parameters for name, value in vars(p).items() if isinstance(value, Tensor) and not _is_plain(value)
    }
    if tensors and (read := sorted(tensors & _names_in_code(type(optimizer)))):
        raise ConfigError(
            "optimizer", type(optimizer).__name__, f"reads {read[0]} of each parameter, a tensor that adapters would not have: "
            "keep it in the optimizer's state, made in step() where a parameter has none"
        )  # fmt: skip
    states = [(p, optimizer.state[p]) for p in parameters if optimizer.state.get(p)]
    if known is not None or not states or _has_stepped([state for _, state in states]):
        return
    for key in {key: None for _, state in states for key in state}:
        if _note_key(start, key, [(p, state.get(key)) for p, state in states]):
            continue
        start.state.clear()
        if _makes_state_when_built(type(optimizer)):  # else it was loaded, or is of a fit before
            raise ConfigError(
                "optimizer", type(optimizer).__name__, f"made {key} for each parameter when it was built, which one that joins "
                "later would not have: make it in step(), where the state of a parameter is empty"
            )  # fmt: skip
        return


def _has_stepped(states: Sequence[dict]) -> bool:
    """Return whether a parameter's state has counted steps."""
    counts = [state["step"] for state in states if isinstance(state.get("step"), (int, float, Tensor))]
    return any(bool(torch.as_tensor(count).max() > 0) for count in counts)


def _makes_state_when_built(kind: type) -> bool:
    """Return whether an ``__init__`` of the class, or of what it inherits from, speaks of ``state``."""
    written = [vars(each).get("__init__") for each in kind.__mro__ if each not in Optimizer.__mro__]
    return "state" in _names([function for function in written if isinstance(function, FunctionType)])


@torch.no_grad()
def _note_key(start: _Start, key: str, values: Sequence[tuple[Tensor, Any]]) -> bool:
    """Note with what each parameter's value began; return whether that is the same for all, so that others can have it."""
    first_p, first = values[0]
    if all(isinstance(value, Tensor) and value.shape == p.shape for p, value in values):
        start.alike[key] = None if first.dtype == first_p.dtype else first.dtype
        number = first.flatten()[0].item() if first.numel() else 0.0
        if all(bool((value == number).all()) for _, value in values):
            start.state[key] = number
            return True
        start.state[key] = _CopyOfParameter
        return all(bool((value == p.to(value.dtype)).all()) for p, value in values)
    start.state[key] = copy.deepcopy(first)
    return _is_plain(first) and all(_is_plain(value) and type(value) is type(first) and value == first for _, value in values)


@torch.no_grad()
def begin(optimizer: Optimizer, group: dict[str, Any], new: nn.Parameter, base: Tensor | None) -> None:
    """Give a parameter that joins a group what the optimizer wants for each.

    Args:
        optimizer: has the group.
        group: the parameter is in it.
        new: the parameter.
        base: the weight whose attributes it takes.
    """
    start = STARTS.get(optimizer)
    if start is not None and base is not None:
        then = start.attributes.get(id(base), {})
        for name, value in {**then, **_attributes(base)}.items():
            if name not in vars(new):
                setattr(new, name, copy.deepcopy(value))
        start.attributes.setdefault(id(new), {name: copy.deepcopy(value) for name, value in _attributes(new).items()})
    _begin_state(optimizer, new)
    _begin_momentum(optimizer, group, new)


def begin_again(optimizer: Optimizer) -> None:
    """Give every parameter the state that it had when the optimizer was built; after it was cleared."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            _begin_state(optimizer, p)


@torch.no_grad()
def _begin_state(optimizer: Optimizer, p: Tensor) -> None:
    start = STARTS.get(optimizer)
    if start is None or not start.state or optimizer.state.get(p):
        return
    state = optimizer.state[p]
    for key, value in start.state.items():
        if key not in start.alike:
            state[key] = copy.deepcopy(value)
        elif value is _CopyOfParameter:
            state[key] = p.detach().clone().to(start.alike[key] or p.dtype)
        else:
            state[key] = torch.full_like(p, value, dtype=start.alike[key], memory_format=torch.preserve_format)


def _begin_momentum(optimizer: Optimizer, group: dict[str, Any], p: nn.Parameter) -> None:
    """Let torch's fused SGD take a new parameter: it wants momentum for all parameters of a group, or for none."""
    if not isinstance(optimizer, SGD) or not group.get("fused") or p in optimizer.state:
        return
    if all(optimizer.state[old].get("momentum_buffer") is None for old in group["params"] if old in optimizer.state):
        return
    if group["dampening"]:  # a first step from zero would be damped, which SGD does not do
        group["fused"] = False
    else:
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)


# -- attributes of parameters -----------------------------------------------------------------------------------------


def _attributes(p: Tensor) -> dict[str, Any]:
    """Return the attributes that a user or an optimizer set on a parameter, if they are plain."""
    return {name: value for name, value in vars(p).items() if not name.startswith(_NOT_THEIRS) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return isinstance(value, _PLAIN) or (isinstance(value, Tensor) and not is_lazy(value) and value.ndim == 0)


def _names_in_code(kind: type) -> set[str]:
    """Return the names, and the texts (of ``getattr``), in the methods of a class and of what it inherits from, but torch's."""
    theirs = [each for each in kind.__mro__ if not each.__module__.startswith(("torch.optim", "builtins"))]
    return _names([function for each in theirs for function in vars(each).values() if isinstance(function, FunctionType)])


def _names(functions: Sequence[FunctionType]) -> set[str]:
    """Return the names and texts in the code of functions, and of those inside of them."""
    found: set[str] = set()
    inner = [inspect.unwrap(function) for function in functions]
    stack = [function.__code__ for function in inner if isinstance(function, FunctionType)]
    while stack:
        code = stack.pop()
        found |= set(code.co_names) | {const for const in _flat(code.co_consts) if isinstance(const, str)}
        stack += [const for const in code.co_consts if isinstance(const, CodeType)]
    return found


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        else:
            yield value
