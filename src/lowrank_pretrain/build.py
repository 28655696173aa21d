"""A configuration node becomes an object; a wrong key or value becomes one line that says what is allowed."""

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .errors import ConfigError

SIMPLE = (bool, int, float, str, type(None))


def plain(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain Python, all interpolations resolved.

    Raises:
        ConfigError: a value is missing (``???``) or refers to a key that is not there.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(error.full_key, "???", "must be given") from error
    except OmegaConfBaseException as error:
        # e.g. an image model beside text, which has no num_classes
        raise ConfigError(error.full_key, "${...}", f"does not fit the rest: {str(error).splitlines()[0]}") from error


def check_arguments(group: str, target: Callable, given: dict[str, Any]) -> None:
    """Every key must be an argument of `target`, and a value of a simple type must be of the annotated one.

    Raises:
        ConfigError: otherwise; the key is ``group.key``.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [name for name in parameters if name != "self"]
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for key, value in given.items():
        if key not in parameters:
            raise ConfigError(f"{group}.{key}", value, f"unknown key; must be one of {', '.join(allowed)}")
        if isinstance(value, SIMPLE) and not _matches(value, hints.get(key, Any)):
            raise ConfigError(f"{group}.{key}", value, f"must be {_words(hints[key])}")


def _matches(value: Any, hint: Any) -> bool:
    """Whether a simple `value` can be a `hint`; anything that is not spelled in simple types is left to the callee."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None:
        return value is None
    if hint not in SIMPLE:
        # a container is not met by a number or a word, anything else may well be
        return not (origin in (list, tuple, dict) or hint in (list, tuple, dict))
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
    return names.get(hint, "a list" if origin in (list, tuple) else str(hint).removeprefix("typing."))


def build(group: str, values: dict[str, Any], target: Callable | None = None, **more: Any) -> Any:
    """The object that the plain node `values` of group `group` describes.

    Args:
        group: the group's name, for messages.
        values: keyword arguments; the class's dotted name is at ``_target_``. Nested nodes with one are built too.
        target: the class, instead of ``_target_``.
        more: further arguments that are no part of the configuration.

    Raises:
        ConfigError: an unknown key or a wrong value; the key is ``group.key``.
    """
    values = dict(values)
    name = values.pop("_target_", None)
    if target is None:
        try:
            target = get_object(name)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigError(f"{group}._target_", name, "must be the dotted name of a class") from error
    check_arguments(group, target, values)
    try:
        return target(**build_nested(group, values) | more)
    except ConfigError as error:
        raise in_group(group, error) from error


def build_nested(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with every node inside that has a ``_target_`` built.

    Raises:
        ConfigError: one of them cannot be built; the key is ``group.key``.
    """
    values = dict(values)
    for key, value in values.items():
        if isinstance(value, (dict, list)) and "_target_" in str(value):
            try:
                values[key] = instantiate(value, _convert_="all")
            except InstantiationException as error:
                raise ConfigError(f"{group}.{key}", value, str(error.__cause__ or error).splitlines()[0]) from error
    return values


def blamed(text: str, values: dict[str, Any]) -> str | None:
    """The key of `values` that the message `text` is about: the one it names first, else one whose value it quotes."""
    named = [(text.index(key), -len(key), key) for key in values if key in text]
    if named:
        return min(named)[-1]
    return next((key for key, value in values.items() if isinstance(value, str) and value in text), None)


def in_group(group: str, error: ConfigError) -> ConfigError:
    """`error` with ``group.`` before its key."""
    key = error.key if error.key.startswith(f"{group}.") else f"{group}.{error.key}"
    return ConfigError(key, error.value, error.allowed)
