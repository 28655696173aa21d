"""Read a checkpoint without executing anything in it, and without refusing harmless values.

``torch.load(weights_only=True)`` refuses a whole file for one hyper-parameter of a type that it does not know (a path, a
configuration, a numpy number). Here such a value becomes a stand-in, and the weights are read.
"""

import argparse
import collections
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import uuid
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from os import PathLike
from types import SimpleNamespace
from typing import Any

import torch

from lowrank_pretrain.core.lightning_private import loadable_names


class Unread:
    """Stand in for a value whose type is not read: nothing of that type is imported or called.

    Attributes:
        kind: its type, ``module.name``.
    """

    kind = "?"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take anything; keep nothing."""

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""

    def append(self, item: Any) -> None:
        """Keep nothing."""

    def extend(self, items: Any) -> None:
        """Keep nothing."""

    def add(self, item: Any) -> None:
        """Keep nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> "Unread":
        """Stand in for the result of the call."""
        return self

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"<a {self.kind}, not read>"


def _harmless() -> dict[str, Any]:
    """Return the types that may be created, by name: they hold data and do nothing when created."""
    kinds: list[Any] = [
        argparse.Namespace, collections.OrderedDict, collections.Counter, collections.deque, datetime.date, datetime.datetime,
        datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal, fractions.Fraction, uuid.UUID, SimpleNamespace,
        pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath, set, frozenset, complex, bytearray, slice, range,
        int, float, str, bool, bytes, list, dict, tuple,
    ]  # fmt: skip
    found = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in kinds}
    # the names on other systems and in newer Pythons: here a path is only text
    for module in ("pathlib", "pathlib._local"):
        found |= {f"{module}.{name}": pathlib.PurePosixPath for name in ("Path", "PosixPath", "PurePath", "PurePosixPath")}
        found |= {f"{module}.{name}": pathlib.PureWindowsPath for name in ("WindowsPath", "PureWindowsPath")}
    found |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    return found | _numpy() | loadable_names()


def _numpy() -> dict[str, Any]:
    try:
        import numpy as np
        from numpy._core.multiarray import _reconstruct, scalar  # the place that numpy's pickles name
    except ImportError:  # no numpy, or one before 2.0
        return {}
    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found |= {f"{module}._reconstruct": _reconstruct, f"{module}.scalar": scalar}
    found |= {f"numpy.dtypes.{kind.__name__}": kind for kind in vars(np.dtypes).values() if isinstance(kind, type)}
    return found


class _Reader:
    """Stand in for the module ``pickle`` in ``torch.load``."""

    __name__ = "pickle"

    def __init__(self) -> None:
        known = _harmless()

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                full = f"{module}.{name}"  # torch writes the names that Python 2 had
                if full in known:
                    return known[full]
                return type(name.rpartition(".")[2] or "Unread", (Unread,), {"kind": full})

        self.Unpickler = Unpickler

    def load(self, file: Any, **kwargs: Any) -> Any:
        """Read as ``pickle.load`` does."""
        return self.Unpickler(file, **kwargs).load()

    def loads(self, data: bytes, **kwargs: Any) -> Any:
        """Read as ``pickle.loads`` does."""
        return self.load(io.BytesIO(data), **kwargs)


def safe_load(path: str | PathLike, mmap: bool = False) -> Any:
    """Read a checkpoint onto the CPU. Nothing in it is executed.

    Args:
        path: the file.
        mmap: map its tensors instead of reading them.

    Returns:
        What was saved. Values that are not plain data are ``Unread``.

    Raises:
        Exception: one of the many kinds that torch raises for truncated files and other formats.
    """
    load: Callable[..., Any] = torch.load
    try:
        return load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:
        if not _is_archive(path):
            raise
        return load(path, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=_Reader())


def _is_archive(path: str | PathLike) -> bool:
    """Return whether it is a zip file, as torch writes. Torch reads older formats in other ways."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def unread(value: Any) -> str | None:
    """Return the type of the first ``Unread`` in a value made of dicts and lists, or ``None``."""
    if isinstance(value, Unread) or (isinstance(value, type) and issubclass(value, Unread)):
        return value.kind
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return next((found for item in items if (found := unread(item))), None)
