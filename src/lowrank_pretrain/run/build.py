"""Build an object from a configuration node, or report a wrong key or value in one line with what is allowed."""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_module, missing_words
from lowrank_pretrain.core.text import first_line

SIMPLE = (bool, int, float, str, type(None))
LISTS = (list, tuple, Sequence)
DICTS = (dict, Mapping)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain Python, all interpolations resolved.

    Raises:
        ConfigError: a value is missing (``???``) or refers to a key that is not there.
    """
    try:
        found: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return found
    except MissingMandatoryValue as error:
        raise ConfigError(error.full_key or "?", "???", "must be given") from error
    except OmegaConfBaseException as error:
        # e.g. an image model for text, which has no num_classes
        cure = "model= must be one for data=, images or text; begin with experiment=none and choose both"
        raise ConfigError(error.full_key or "?", "${...}", f"does not fit the rest: {first_line(error)}; {cure}") from error


def check_arguments(group: str, target: Callable, given: dict[str, Any], ours: Collection[str] = ()) -> None:
    """Refuse unknown keys (arguments of neither `target` nor `ours`), values of a wrong type, and non-finite numbers.

    Raises:
        ConfigError: there is one; the key is ``group.key``.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [name for name in parameters if name != "self" and name not in ours]
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key, value in given.items():
        if key not in allowed:
            near = [name for name in allowed if name.startswith(f"{key}_")] or difflib.get_close_matches(str(key), allowed, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{group}.{key}", value, f"unknown key; {hint}must be one of {', '.join(allowed)}")
        if not _matches(value, hints.get(key, Any)):
            raise ConfigError(f"{group}.{key}", value, f"must be {_words(hints[key])}")
    check_finite(group, given)


def check_finite(group: str, given: Mapping[str, Any]) -> None:
    """Refuse NaN and infinite numbers in `given`, at any depth: comparisons would let them through.

    Raises:
        ConfigError: one of them is; the key is ``group.key``.
    """
    for key, value in given.items():
        if any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in _leaves(value)):
            raise ConfigError(f"{group}.{key}", value, "must be finite, neither nan nor inf")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _matches(value: Any, hint: Any) -> bool:
    """Return whether a plain value fits an annotation. Annotations with other classes are left to the callee."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if hint is None:
        return value is None
    kind = origin or hint
    if isinstance(value, dict):
        return "_target_" in value or kind not in (*SIMPLE, *LISTS)
    if isinstance(value, list):
        if kind is tuple and parts and ... not in parts:
            return len(value) == len(parts) and all(map(_matches, value, parts))
        if kind in LISTS:
            return all(isinstance(item, dict) or _matches(item, parts[0]) for item in value) if parts else True
        return kind not in (*SIMPLE, *DICTS)
    if hint not in SIMPLE:
        # a number or a word is not a container; anything else may fit
        return kind not in (*LISTS, *DICTS)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, hint) or (hint is float and isinstance(value, int))


def _words(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    if origin is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a word", type(None): "null"}
    if (origin or hint) in LISTS:
        plural = {float: "numbers", int: "integers", str: "words"}
        kinds = dict.fromkeys(plural.get(part, "") for part in parts if part is not ...)
        count = f"{len(parts)} " if origin is tuple and ... not in parts and parts else ""
        return f"a list of {count}{'/'.join(kinds)}" if parts and all(kinds) else "a list"
    if (origin or hint) in DICTS:
        return "a group of keys"
    return names.get(hint, str(hint).removeprefix("typing."))


def build(group: str, values: dict[str, Any], target: Callable | None = None, base: type = object, **more: Any) -> Any:
    """Build the object that a plain node describes.

    Args:
        group: the group's name, for messages.
        values: keyword arguments; the class's dotted name is at ``_target_``. Nested nodes with one are built too.
        target: the class, instead of ``_target_``.
        base: what the class must be a kind of.
        more: further arguments, which are not in the configuration.

    Raises:
        ConfigError: an unknown key or a wrong value; the key is ``group.key``.
    """
    values = dict(values)
    name = values.pop("_target_", None)
    if target is None:
        target = find_class(group, name, base)
    check_arguments(group, target, values, more)
    try:
        return target(**build_nested(group, values) | more)
    except ConfigError as error:
        raise in_group(group, error) from error


def find_class(group: str, name: Any, base: type = object) -> type:
    """Return the class with a dotted name.

    Raises:
        ConfigError: there is none, or it is not a subclass of `base`; keyed ``group._target_``.
    """
    what = "a class" if base is object else f"a {base.__name__}"
    try:
        found = get_object(name) if isinstance(name, str) else None
    except (ImportError, ValueError, AttributeError) as error:
        module = missing_module(error)
        allowed = f"must be the dotted name of {what}" if module is None else missing_words(module)
        raise ConfigError(f"{group}._target_", name, allowed) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise ConfigError(f"{group}._target_", name, f"must be the dotted name of {what}")
    return found


def build_nested(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with each inner node that has a ``_target_`` built.

    Raises:
        ConfigError: one of them cannot be built; the key is ``group.key``.
    """
    values = dict(values)
    for key, value in values.items():
        if isinstance(value, (dict, list)) and "_target_" in str(value):
            try:
                values[key] = instantiate(value, _convert_="all")
            except InstantiationException as error:
                raise ConfigError(f"{group}.{key}", value, first_line(error.__cause__ or error)) from error
    return values


def blamed(text: str, values: dict[str, Any]) -> str | None:
    """Return the key that a message is about: the first one that it names, else one whose value it quotes."""
    named = [(text.index(key), -len(key), key) for key in values if key in text]
    if named:
        return min(named)[-1]
    return next((key for key, value in values.items() if isinstance(value, str) and value in text), None)


def in_group(group: str, error: ConfigError) -> ConfigError:
    """Return an error with ``group.`` before its key."""
    key = error.key if error.key.startswith(f"{group}.") else f"{group}.{error.key}"
    return ConfigError(key, error.value, error.allowed)
