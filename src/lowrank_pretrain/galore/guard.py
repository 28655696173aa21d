"""Guard the step: against gradients that are NaN or infinite, and against autocast and ``torch.compile`` around it.

If a gradient is not finite, nothing of the step is applied, and an error names the parameter. On the CPU the check is read at
once. On a device one flag per step masks the update there. It is read a step or more later, when its copy has arrived, so
training never waits for it.

torch's own AdamW gives the same numbers inside ``torch.autocast`` as outside; our products would run in bfloat16 there. The
step is written for eager mode: traced, its slots would be frozen into the graph.
"""

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import FakeTensor, foreach_norm, keep_out_of_graphs
from lowrank_pretrain.galore.dtensor import agree_on_flags, local_piece

P = ParamSpec("P")
T = TypeVar("T")
_LAG = 8  # steps that the device may lag before the host waits for an answer
_LARGE = 2.0**40  # no real gradient is as large: checked again, exactly
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")

wide_dtype = functools.cache(at_least_32)  # asked for at every step


def has_values(t: Tensor) -> bool:
    """Return whether there are numbers to read: on the meta device and under FakeTensorMode there are only shapes.

    Example:
        >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta"))
        (True, False)
    """
    return not t.is_meta and not isinstance(t, FakeTensor)


def closed(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that it always runs eagerly and with autocast off."""

    @functools.wraps(function)
    def without_autocast(*args: P.args, **kwargs: P.kwargs) -> T:
        if not any(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES)):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in filter(torch.is_autocast_enabled, _AUTOCAST_DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return eager(without_autocast)


def eager(function: Callable[P, T]) -> Callable[P, T]:
    """Wrap a function so that ``torch.compile`` calls it without compiling it."""
    return keep_out_of_graphs(function)


def check_dense_and_real(grad: Tensor, name: str) -> None:
    """Refuse a sparse or complex gradient.

    Raises:
        ConfigError: a sparse or complex gradient.
    """
    if grad.layout != torch.strided or grad.is_complex():
        kind = "complex" if grad.is_complex() else "sparse"
        raise ConfigError("params", name, f"has a {kind} gradient: GaLoreAdamW takes dense real ones (Embedding(sparse=False))")


class HasSecondMoment(Protocol):
    """Describe a parameter with a second moment, by which an overlarge gradient is scaled down."""

    name: str

    def second_moment(self) -> Tensor | None:
        """Return v; None before the first step."""


@dataclass
class _Pending:
    flags: Tensor  # on the host, one per gradient: is it finite?
    names: list[str]
    event: "torch.cuda.Event"
    step: int


@dataclass
class Guard:
    """Check the gradients of each step."""

    pending: list[_Pending] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)  # gradients of this check that are finite, but whose square is not
    norms: Tensor | None = None  # of the last check's gradients
    warned: bool = False
    steps: int = 0

    def begin_step(self) -> None:
        """Count a step, and raise if an answer that has arrived is bad."""
        self.steps += 1
        self.raise_arrived()

    def check(
        self, grads: list[Tensor], names: list[str], params: list[Tensor], wait: bool, alone: bool = False, matrices: int = 0
    ) -> Tensor | None:
        """Check all gradients of a step before anything is changed.

        Args:
            grads: gradients (or their projections) on one device.
            names: their parameters' names.
            params: the parameters of this step if some are cut over ranks, so that the ranks agree; else empty.
            wait: read the answer now; needed where the update cannot be masked on the device.
            alone: other parameters have taken the step already (layer-wise updates).
            matrices: how many of the gradients, the first ones, are projected.

        Returns:
            None if the answer is known to be good; else a device scalar: 1.0 if a gradient is not finite.

        Raises:
            FloatingPointError: a gradient is not finite (of this step, or of an earlier one whose answer has arrived).
        """
        self.raise_arrived()
        if not has_values(grads[0]):
            self.spikes, self.norms = [], _norms(grads)
            return None  # nothing can be read, and nothing is lost
        self.spikes, self.norms = [], _sizes(grads, len(grads) if alone else matrices)
        finite = self.norms.square().isfinite()  # the norm of a single number is that number: its square may still overflow
        now = wait or not finite.is_cuda
        if now and not bool((self.norms.abs() < _LARGE).all()):
            norms, exact = _norms(grads).tolist(), [bool(g.isfinite().all()) for g in grads]
            largest = [math.sqrt(torch.finfo(wide_dtype(g.dtype)).max) for g in grads]
            self.spikes = [i for i, norm in enumerate(norms) if exact[i] and not norm < largest[i]]
            finite = torch.tensor(exact, dtype=torch.bool, device=finite.device)
        if params:
            finite = agree_on_flags(finite, params)
        if now:
            applied = (
                "its layer did not take this step; the layers after it have" if alone else "nothing of this step was applied"
            )
            _raise_unless_finite(finite, names, applied)
            return None
        flags = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append(_Pending(flags, names, event, self.steps))
        return 1.0 - finite.all().float()

    def raise_arrived(self) -> None:
        """Raise if an answer that has arrived is bad; wait only for those more than ``_LAG`` steps old.

        Layer-wise updates ask for an answer per parameter, so the number of answers does not count steps.
        """
        while self.pending and (self.pending[0].event.query() or self.steps - self.pending[0].step > _LAG):
            first = self.pending.pop(0)
            first.event.synchronize()
            _raise_unless_finite(
                first.flags,
                first.names,
                "its step was skipped: no weight, moment or basis took it in",
                "is not finite, or its square is not",
            )

    def limited(self, grad: Tensor, owner: HasSecondMoment) -> Tensor:
        """Return a gradient whose square would overflow, scaled down; warn once.

        Its norm becomes ten times what the second moment expects, so that the entries train on after a single such
        gradient; before there is one, a size whose square the dtype can hold.
        """
        wide = wide_dtype(grad.dtype)
        most = math.sqrt(torch.finfo(wide).max) / 16
        v = owner.second_moment()
        if v is not None:
            expected = 10 * float(v.sum(dtype=torch.float64)) ** 0.5
            most = min(most, expected) if expected > 0 else most
        peak = grad.abs().max()
        unit = grad / peak
        norm = float(torch.linalg.vector_norm(local_piece(unit), dtype=torch.float64))
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the gradient of {owner.name} has the norm {float(peak) * norm:.1e}, whose square overflows: it is "
                f"taken as {most:.1e}. "
                "Clip gradients, or check the batch",
                stacklevel=2,
            )
        return unit.mul_(most / norm)


def _sizes(grads: list[Tensor], matrices: int) -> Tensor:
    """Return one number for each gradient that shows every NaN and infinity, in one pass at memory speed.

    It is the norm, which is infinite where a square overflows. On the CPU a sum is enough for parameters that are not
    projected, and quicker: there an infinite second moment does no more harm than in torch's AdamW.
    """
    if grads[0].is_cuda or matrices == len(grads):
        return _norms(grads)
    sums = torch.stack([g.sum(dtype=wide_dtype(g.dtype)).to(torch.float32) for g in grads[matrices:]])
    return sums if not matrices else torch.cat([_norms(grads[:matrices]), sums])


def _norms(grads: list[Tensor]) -> Tensor:
    wide = {wide_dtype(dtype) for dtype in {g.dtype for g in grads}}
    if len(wide) == 1:
        return torch.stack(foreach_norm(grads, 2, dtype=wide.pop()))  # on CUDA one kernel for all of them
    return torch.stack([torch.linalg.vector_norm(g, dtype=wide_dtype(g.dtype)).double() for g in grads])


def _raise_unless_finite(finite: Tensor, names: list[str], consequence: str, what: str = "is not finite") -> None:
    finite = finite.cpu()
    if bool(finite.all()):
        return
    bad = [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    raise FloatingPointError(
        f"the gradient of {bad[0]}{more} {what}; {consequence}. "
        "Lower the learning rate, lengthen the warm-up, clip gradients, or check the batch"
    )
