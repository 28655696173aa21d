"""Check a user's arguments: whole numbers, numbers, choices and flags. Each check returns the value or raises.

Every refusal reads ``key=value: what is allowed``. Pass ``allowed`` where the cure depends on the argument.
"""

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

from lowrank_pretrain.core.errors import ConfigError


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer, NumPy's included, but not a bool.

    Example:
        >>> is_integer(3), is_integer(True), is_integer(3.0)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite real number, but not a bool.

    Example:
        >>> is_number(0.5), is_number(float("nan")), is_number("0.5")
        (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(key: str, value: Any, least: int, unit: str = "", most: int | None = None, allowed: str | None = None) -> int:
    """Return an integer argument, or refuse it.

    Args:
        key: the argument's name.
        value: what was given.
        least: the smallest value that is allowed.
        unit: what is counted, e.g. ``"steps"``; ends the sentence.
        most: the largest value that is allowed, if there is a limit.
        allowed: the end of the error line, instead of the one made here.

    Raises:
        ConfigError: not an integer, or out of range.

    Example:
        >>> whole("warmup", 2, 0, "windows")
        2
        >>> whole("warmup", -1, 0, "windows")
        Traceback (most recent call last):
        lowrank_pretrain.core.errors.ConfigError: warmup=-1: must be an integer of 0 or more windows
    """
    if not is_integer(value) or value < least or (most is not None and value > most):
        limit = f"{least} or more" if most is None else f"{least} to {most:,}"
        raise ConfigError(key, value, allowed or f"must be an integer of {limit} {unit}".rstrip())
    return int(value)


def number(
    key: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    allowed: str | None = None,
) -> float:
    """Return a finite number within bounds, or refuse it.

    Args:
        key: the argument's name.
        value: what was given.
        least: the smallest value that is allowed.
        most: the largest value that is allowed.
        above: what the value must exceed.
        below: what the value must stay under.
        allowed: the end of the error line, instead of the one made here.

    Raises:
        ConfigError: not a number, NaN or infinite, or out of range.

    Example:
        >>> number("alpha", 16.0, above=0)
        16.0
        >>> number("beta", 1.0, least=0, below=1)
        Traceback (most recent call last):
        lowrank_pretrain.core.errors.ConfigError: beta=1.0: must be a number of 0 or more, below 1
    """
    if not is_number(value) or not (least <= value <= most and above < value < below):
        raise ConfigError(key, value, allowed or f"must be a number{_range(least, most, above, below)}")
    return value


def _range(least: float, most: float, above: float, below: float) -> str:
    words = [f"of {least:g} or more"] if math.isfinite(least) else []
    words += [f"above {above:g}"] if math.isfinite(above) else []
    words += [f"of {most:g} or less"] if math.isfinite(most) else []
    words += [f"below {below:g}"] if math.isfinite(below) else []
    return " " + ", ".join(words) if words else ""


def choice(key: str, value: Any, allowed: Collection[Any]) -> Any:
    """Return one of the allowed values, or refuse it; ``None`` among them reads ``null``.

    Raises:
        ConfigError: none of them.

    Example:
        >>> choice("route", None, (None, "factors", "dense"))
        >>> choice("route", "x", (None, "factors", "dense"))
        Traceback (most recent call last):
        lowrank_pretrain.core.errors.ConfigError: route='x': must be one of null, factors, dense
    """
    if not any(type(value) is type(one) and value == one for one in allowed):
        words = ", ".join("null" if one is None else str(one) for one in allowed)
        raise ConfigError(key, value, f"must be one of {words}")
    return value


def flag(key: str, value: Any) -> bool:
    """Return a bool, or refuse it.

    Raises:
        ConfigError: anything but True and False.

    Example:
        >>> flag("reset", True)
        True
    """
    if not isinstance(value, bool):
        raise ConfigError(key, value, "must be true or false")
    return value
