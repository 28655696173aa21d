"""The optimizer's arithmetic is closed to what goes on around it: no autocast, no tracing by ``torch.compile``.

torch's own AdamW gives the same numbers inside ``torch.autocast`` as outside. Our products would run in bfloat16 there. The
step is written for eager mode: traced, its slots would be frozen into the graph.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import ParamSpec, TypeVar

import torch
from torch._subclasses.fake_tensor import FakeTensor

_P, _T = ParamSpec("_P"), TypeVar("_T")
_DEVICES = ("cpu", "cuda", "mps", "xpu")


def has_values(t: torch.Tensor) -> bool:
    """Return whether there are numbers to read: on the meta device and under FakeTensorMode there are only shapes."""
    return not t.is_meta and not isinstance(t, FakeTensor)


def closed(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap a function so that it always runs eagerly and with autocast off."""

    @functools.wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        on = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not on:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in on:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return eager(alone)


def eager(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap a function so that ``torch.compile`` calls it as it is."""
    return torch._disable_dynamo(function)  # as torch's optimizers do; the public name would import dynamo with this package
