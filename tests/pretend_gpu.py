"""Pretend that there is a GPU: torch's FakeTensorMode knows devices and shapes, and computes nothing.

Operations on mixed devices raise there by themselves. ``no_waiting`` also raises ``Waits`` for what would make the host wait
for the device: reading a number, moving a tensor without ``non_blocking``, and factorizations that look at their error codes.
Code that goes another way for fake tensors is led the way that it takes on a real device.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {
    "_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "bincount",
    "_linalg_svd", "_linalg_eigh", "linalg_eig", "_linalg_check_errors", "_linalg_solve_ex", "allclose",
}  # fmt: skip


class Waits(AssertionError):
    """Say which operation would wait for the device."""


class NoFake:
    """Stand where a module of ours asks for ``FakeTensor``: no tensor is one."""


class Event:
    """A CUDA event that the device never gets to: who goes on only after it has passed waits."""

    def __init__(self, **_: Any) -> None:
        self.recorded = False

    def record(self) -> None:
        """Note that it was recorded."""
        self.recorded = True

    def query(self) -> bool:
        """Say that it has not passed."""
        return False

    def synchronize(self) -> None:
        """Refuse to wait."""
        raise Waits("event.synchronize()")

    def elapsed_time(self, _: "Event") -> float:
        """Refuse: it would be read before it has passed."""
        raise Waits("event.elapsed_time()")


class DeviceGenerator(torch.Generator):
    """A generator of the device's, whose numbers nobody asks for."""

    def __new__(cls, device: Any = "cpu") -> "DeviceGenerator":
        """Make one of the CPU, and remember the device."""
        made = super().__new__(cls)
        made.__dict__["at"] = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        """The device that it was asked for."""
        return self.__dict__["at"]


class NoWaiting(TorchDispatchMode):
    """Raise for each operation that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []  # memory of the host that the device can write to by itself
        self.operations = 0

    def is_pinned(self, t: Tensor) -> bool:
        """Return whether the device can write to the tensor's memory by itself."""
        return any(t.untyped_storage()._cdata == other.untyped_storage()._cdata for other in self.pinned)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at an operation, and pass it on."""
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.device.type == "cuda" for t in tensors)
        self.operations += on_device
        if on_device and name in READS:
            raise Waits(str(func))
        if name == "_to_copy" and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type:
            if not kwargs.get("non_blocking"):
                raise Waits(f"{func} from {args[0].device} to {kwargs['device']}")
        if name == "copy_" and args[0].device.type != args[1].device.type and args[1].ndim:
            later = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            to_pinned = args[0].device.type != "cpu" or self.is_pinned(args[0])
            if not (later and to_pinned):
                raise Waits(f"{func} from {args[1].device} to {args[0].device}")
        if name == "is_pinned":
            return self.is_pinned(args[0])
        if name == "_pin_memory":
            self.pinned.append(args[0].clone())
            return self.pinned[-1]
        result = func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned.append(result)
        return result


@contextmanager
def pretend_gpu() -> Iterator[FakeTensorMode]:
    """Make tensors fake. Here a first step is taken, and models are made and changed: this may wait."""
    with FakeTensorMode() as mode:
        yield mode


@contextmanager
def real_paths() -> Iterator[pytest.MonkeyPatch]:
    """Lead our code where a real device leads it, and not where fake tensors would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch, "Generator", DeviceGenerator)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        for name, module in list(sys.modules.items()):
            if name.startswith("lowrank_pretrain"):
                if "FakeTensor" in vars(module):
                    patch.setattr(module, "FakeTensor", NoFake)
                if "is_ordinary" in vars(module):  # it asks for the exact type, to keep tracers away from our functions
                    patch.setattr(module, "is_ordinary", lambda x: True)
        yield patch


@contextmanager
def no_waiting() -> Iterator[NoWaiting]:
    """Raise for what waits, on the paths of a real device."""
    with real_paths(), NoWaiting() as mode:
        yield mode


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Switch on autocast of the device. ``torch.autocast`` itself switches it off where there is none."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    if dtype is not None:
        torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
        torch.clear_autocast_cache()


class Call:
    """One call of an ``autograd.Function``, without autograd, whose engine asks the device."""

    def __init__(self, function: type[torch.autograd.Function], args: tuple[Any, ...]) -> None:
        self.function, self.saved_tensors = function, ()
        self.needs_input_grad = tuple(isinstance(t, Tensor) and t.requires_grad for t in args)
        with torch.no_grad():
            self.y = function.forward(self, *args)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, as autograd's context does."""
        self.saved_tensors = tensors

    def backward(self) -> tuple[Any, ...]:
        """Return the gradients for a gradient of ones."""
        with torch.no_grad():
            return self.function.backward(self, torch.ones_like(self.y))


@contextmanager
def by_hand(function: type[torch.autograd.Function]) -> Iterator[list[Call]]:
    """Run a function's forward as it is, and yield its calls."""
    calls: list[Call] = []

    def apply(*args: Any) -> Tensor:
        calls.append(Call(function, args))
        return calls[-1].y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "apply", apply)
        yield calls
