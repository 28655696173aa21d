"""Warn once about a logger that fails, and stop calling it; training continues, and metrics.csv holds everything."""

import functools
import inspect
import time
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import Logger

from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.lightning_private import NoExperiment
from lowrank_pretrain.core.text import one_line

TRIES = 5  # failed calls in a row, after which a logger is not called again
PATIENCE = 10.0  # seconds; a call that failed after longer than this is not tried again: training would wait each time


def guard(logger: Logger, name: str) -> Logger:
    """Keep a logger's errors from ending a run. Its class becomes a subclass of itself, so ``isinstance`` still holds.

    Args:
        logger: any logger; changed in place.
        name: what the warning calls it.

    Returns:
        `logger`.
    """
    logger.__class__ = _guarded(type(logger))
    logger.__dict__["_guard_name"] = name
    return logger


def give_up(logger: Logger, what: str, error: Exception) -> None:
    """Warn once that `logger` failed, and do not call it again."""
    _count(logger, what, error, final=True)


@functools.cache
def _guarded(base: type[Logger]) -> type[Logger]:
    members: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce__": _reduce}
    for key in dir(base):
        found = inspect.getattr_static(base, key)
        if key.startswith("_"):
            continue
        if isinstance(found, property) and found.fget is not None:
            members[key] = property(_tried(key, found.fget, NoExperiment() if key == "experiment" else None), found.fset)
        elif inspect.isfunction(found):
            members[key] = _tried(key, found)
    return type(base.__name__, (base,), members)


def _tried(key: str, inner: Callable, instead: Any = None) -> Callable:
    """Return the method with its errors turned into one warning; after an error it returns `instead`."""

    @functools.wraps(inner)
    def call(self: Logger, *args: Any, **kwargs: Any) -> Any:
        if self.__dict__.get("_guard_over"):
            return instead
        began = time.monotonic()
        try:
            found = inner(self, *args, **kwargs)
        except Interrupted:  # a signal that came while the logger worked
            raise
        except Exception as error:
            _count(self, key, error, final=key == "experiment" or time.monotonic() - began > PATIENCE)
            return instead
        if key.startswith("log_"):
            self.__dict__["_guard_failures"] = 0
        return found

    return call


def _count(logger: Logger, what: str, error: Exception, final: bool) -> None:
    state = logger.__dict__
    state["_guard_failures"] = TRIES if final else state.get("_guard_failures", 0) + 1
    state["_guard_over"] = state.get("_guard_over", False) or state["_guard_failures"] >= TRIES
    if not state.get("_guard_warned"):
        state["_guard_warned"] = True
        words = one_line(error, 300)
        after = "it is not used from here on" if final else f"it is not used any more after {TRIES} failures in a row"
        name = state.get("_guard_name", type(logger).__name__)
        warnings.warn(
            f"logger {name}: {what} failed ({type(error).__name__}: {words}); {after}; training goes on, with metrics.csv",
            stacklevel=1,
        )


def _reduce(self: Logger) -> tuple:
    """Pickle as the plain class and its state: a spawned process could not import the guarded class by name."""
    base = type(self).__mro__[1]
    try:
        state = self.__getstate__() if hasattr(base, "__getstate__") else self.__dict__.copy()
    except Exception as error:  # W&B's begins its run here
        give_up(self, "start", error)
        state = {**self.__dict__, "_experiment": None}
    return _restore, (base, state)


def _restore(base: type[Logger], state: dict[str, Any]) -> Logger:
    logger: Any = base.__new__(_guarded(base))
    if hasattr(base, "__setstate__"):
        logger.__setstate__(state)
    else:
        logger.__dict__.update(state)
    return logger
