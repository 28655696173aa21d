"""Let the processes that train together send each other tensors, start from the same weights, and clip alike.

Clipping: one norm over everything would differ from worker to worker, and with it the factor that scales the rest's (equal)
gradients: the rest would drift for ever. So the rest is clipped by its own norm and each head by its own. That needs no
communication and does not depend on which heads share a worker. For the same reason, when fp16 skips a step on one worker, all
skip it, where the rest is kept equal at every step.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.lightning_private import LEFT_OUT_OF_DDP, found_infinities, send_module, set_timeout


class Workers:
    """Represent the workers that merge: their process group, and this worker's traffic over it.

    Args:
        group: their process group; ``None``: this process is alone.
        timeout: seconds after which the group gives up on a worker (for the message).

    Attributes:
        size: number of workers.
        rank: number of this worker.
        sent: bytes that this worker has sent; a collective call is taken as a ring (see ``merge``).
        seconds: time spent waiting for the others.
        hint: another reason why they might not answer (for the message).
    """

    def __init__(self, group: Any = None, timeout: float | None = None) -> None:
        self.group, self.timeout = group, timeout
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.sent, self.seconds, self.hint = 0.0, 0.0, ""
        # NCCL cannot read from the CPU, where Adam's `step` lies
        self._device = torch.device("cuda") if group is not None and "nccl" in dist.get_backend(group) else None

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave ``sent`` and ``seconds`` unchanged: traffic in this block is not a merge."""
        before = self.sent, self.seconds
        try:
            yield
        finally:
            self.sent, self.seconds = before

    def gather(self, flat: Tensor, async_op: bool = False, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """Return all workers' ``flat``, (w, n), n being equal everywhere, in ``out`` if given, and the handle to wait for."""
        if self.size == 1:
            return flat[None], None
        # gloo takes a flat output only
        out = flat.new_empty(self.size * flat.numel()) if out is None else out.view(-1)
        self.sent += (self.size - 1) * flat.numel() * flat.itemsize
        work = self._call(lambda: dist.all_gather_into_tensor(out, flat, group=self.group, async_op=async_op))
        return out.view(self.size, -1), work

    def add(self, flat: Tensor, async_op: bool = False) -> Any:
        """Sum all workers' ``flat``, in place; return the handle to wait for."""
        if self.size == 1:
            return None
        self.sent += 2 * (self.size - 1) / self.size * flat.numel() * flat.itemsize
        return self._call(lambda: dist.all_reduce(flat, group=self.group, async_op=async_op))

    def swap(self, messages: Tensor, async_op: bool = False, out: Tensor | None = None) -> tuple[Tensor, Any]:
        """Send row j of ``messages`` (w, n) to worker j.

        Returns:
            The rows that all workers send here, (w, n), in ``out`` if given, and the handle to wait for.
        """
        if self.size == 1:
            return messages, None
        out = torch.empty_like(messages) if out is None else out
        self.sent += (self.size - 1) / self.size * messages.numel() * messages.itemsize
        return out, self._call(lambda: dist.all_to_all_single(out, messages, group=self.group, async_op=async_op))

    def wait(self, work: Any) -> None:
        """Wait until an asynchronous call is done."""
        if work is not None:
            self._call(work.wait)

    def together(self, call: Callable[[], Any]) -> Any:
        """Return what a function gives that all workers call together, on any group.

        Raises:
            RuntimeError: another worker died or did not answer.
        """
        return self._call(call)

    def _call(self, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return call()
        except RuntimeError as error:
            if not lost(error):
                raise
            within = "" if self.timeout is None else f" within {self.timeout:g} s"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RuntimeError(
                f"LTE: another worker died or did not answer{within} ({reason}); resume from the last checkpoint{self.hint}"
            ) from error
        finally:
            self.seconds += time.perf_counter() - began

    def _flat(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return all tensors as one flat tensor, on a device that the group can read."""
        device = self._device or tensors[0].device
        return torch.cat([t.reshape(-1).to(device, dtype) for t in tensors])

    def gather_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each (H, …) tensor as (N, …) over all workers, heads in the order of their ids; not counted as traffic."""
        result: dict[int, Tensor] = {}
        with self.uncounted():
            for dtype in dict.fromkeys(t.dtype for t in tensors):
                chosen = [i for i, t in enumerate(tensors) if t.dtype == dtype]
                gathered, _ = self.gather(self._flat([tensors[i] for i in chosen], dtype))
                at = 0
                for i in chosen:
                    n = tensors[i].numel()
                    mine = gathered[:, at : at + n].reshape(-1, *tensors[i].shape[1:])
                    result[i] = mine.to(tensors[i].device, copy=True)
                    at += n
        return [result[i] for i in range(len(tensors))]

    def gather_numbers(self, mine: Sequence[int]) -> list[list[int]]:
        """Return all workers' integers, (w, n), n being equal everywhere; not counted as traffic."""
        if self.size == 1 or not mine:
            return [list(mine)] * self.size
        with self.uncounted():
            gathered, _ = self.gather(torch.tensor(mine, dtype=torch.int64, device=self._device or "cpu"))
        return gathered.tolist()

    def to_first(self, mine: Mapping[Any, Tensor]) -> dict[Any, list[Tensor | None]] | None:
        """Bring every worker's tensors to worker 0's main memory, a few at a time; not counted as traffic.

        Workers may hold different sets of tensors, of different shapes: sizes travel before data.

        Returns:
            By key one tensor per worker, ``None`` where a worker has none of it; ``None`` on the other workers.
        """
        if self.size == 1:
            return {key: [t.detach()] for key, t in mine.items()}
        kinds: list[Any] = [None] * self.size
        own = {key: (tuple(t.shape), t.dtype) for key, t in mine.items()}
        self._call(lambda: dist.all_gather_object(kinds, own, group=self.group))
        device = self._device or torch.device("cpu")
        first = dist.get_global_rank(self.group, 0)
        result: dict[Any, list[Tensor | None]] = {}
        if self.rank == 0:
            result = {key: [None] * self.size for kind in kinds for key in kind}
            for key, t in mine.items():
                result[key][0] = t.detach().cpu()
        for sender in range(1, self.size):
            for keys, dtype, count in _parcels(kinds[sender]):
                if self.rank == sender:
                    held = [mine[key].detach().reshape(-1).to(device) for key in keys]
                    flat = held[0].contiguous() if len(held) == 1 else torch.cat(held)
                    self._call(partial(dist.send, flat, first, group=self.group))
                elif self.rank == 0:
                    flat, source = torch.empty(count, dtype=dtype, device=device), dist.get_global_rank(self.group, sender)
                    self._call(partial(dist.recv, flat, source, group=self.group))
                    shapes = [kinds[sender][key][0] for key in keys]
                    for key, shape, piece in zip(keys, shapes, flat.cpu().split([math.prod(s) for s in shapes]), strict=True):
                        result[key][sender] = piece.view(shape) if len(keys) == 1 else piece.view(shape).clone()
            for key, (shape, dtype) in kinds[sender].items() if self.rank == 0 else ():
                if not math.prod(shape):
                    result[key][sender] = torch.empty(shape, dtype=dtype)
        return result if self.rank == 0 else None

    def average(self, tensors: Sequence[Tensor], counted: bool = True) -> None:
        """Average each tensor over the workers, in place; float32 at least, one flat buffer for each width of number.

        Args:
            tensors: the same shapes on all workers.
            counted: whether the bytes belong to the method's traffic.
        """
        if self.size == 1 or not tensors:
            return
        before = self.sent
        for dtype in dict.fromkeys(at_least_32(t.dtype) for t in tensors):
            chosen = [t for t in tensors if at_least_32(t.dtype) == dtype]
            flat = self._flat(chosen, dtype)
            self.begin_mean(flat)
            _unflatten(self.end_mean(flat), chosen)
        if not counted:
            self.sent = before  # but the time was spent

    def begin_mean(self, flat: Tensor, async_op: bool = False) -> Any:
        """Begin to average a buffer over the workers, in place; return the handle to wait for before ``end_mean``."""
        # by a power of two, which rounds nothing: the sum of huge numbers stays finite
        return self.add(flat.div_(self._power), async_op)

    def end_mean(self, flat: Tensor) -> Tensor:
        """Return the mean, in place, of a buffer that was summed by ``begin_mean``."""
        return flat if self._power == self.size else flat.div_(self.size).mul_(self._power)

    @property
    def _power(self) -> float:
        """Return the smallest power of two that is not below the number of workers."""
        return 2.0 ** (self.size - 1).bit_length()

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Give worker 0's tensors to all workers, in place."""
        if self.size == 1 or not tensors:
            return
        flat = self._flat(tensors, tensors[0].dtype)
        self.sent += (self.size - 1) / self.size * flat.numel() * flat.itemsize
        self._call(lambda: dist.broadcast(flat, dist.get_global_rank(self.group, 0), group=self.group))
        _unflatten(flat, tensors)

    def cheaper_route(self, A: Tensor, B: Tensor, rows: int) -> str:
        """Return the route of fewer bytes for a target with factors A (H, R, D) and B (H, O, R): ``factors`` or ``dense``."""
        own = A.numel() * A.itemsize + B.numel() * B.itemsize
        dense = rows * A.shape[2] * at_least_32(A.dtype).itemsize
        return "factors" if (self.size - 1) * own <= 2 * (self.size - 1) / self.size * dense else "dense"

    @torch.no_grad()
    def mean_of(self, mine: Tensor) -> Tensor:
        """Return the workers' mean of a tensor, a new tensor; exact where all hold the same number. All call it together."""
        first = mine.clone()
        self.spread([first])
        difference = mine - first
        self.average([difference], counted=False)
        return first.add_(difference)


def _parcels(kinds: Mapping[Any, tuple[tuple[int, ...], torch.dtype]], most: int = 2**20) -> Iterator[tuple[list, Any, int]]:
    """Yield keys that travel together, their dtype and their size: one tensor, or several of ``most`` numbers in all."""
    for dtype in dict.fromkeys(dtype for _, dtype in kinds.values()):
        keys: list[Any] = []
        count = 0
        for key, (shape, of) in kinds.items():
            size = math.prod(shape)
            if of != dtype or not size:
                continue
            if keys and count + size > most:
                yield keys, dtype, count
                keys, count = [], 0
            keys.append(key)
            count += size
        if keys:
            yield keys, dtype, count


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write a flat tensor back into the tensors that it was made of."""
    for t, piece in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(piece.view_as(t))


def make_group(timeout: float) -> Any:
    """Make a process group for merges alone: they must not queue before DDP's buckets."""
    return dist.new_group(timeout=timedelta(seconds=timeout))


def set_patience(limit: timedelta) -> None:
    """Set how long calls on the default group wait from now on (DDP's averages, Lightning's broadcast at each batch).

    Call it after the rendezvous, which a short limit would bound too.
    """
    set_timeout(limit)


# What gloo and NCCL say when a worker is gone or too late; other errors (sizes that do not fit, a full device) say other things
LOST = re.compile(
    r"gloo/transport|pair closure|Connection (closed|reset|refused|timed out)|Broken pipe|[Tt]imed? ?out|Socket|"
    r"remote process exited|unhandled (system|nccl) error|NCCL communicator was aborted|store->"
)


def lost(error: BaseException) -> bool:
    """Return whether a failed collective call means that another process died or did not answer."""
    mismatch = "EnforceNotMet" in str(error) or "enforce fail" in str(error)  # gloo: sizes that do not fit
    full = isinstance(error, torch.OutOfMemoryError)
    return isinstance(error, RuntimeError) and not (mismatch or full) and LOST.search(str(error)) is not None


def same_weights(module: nn.Module, workers: Workers) -> None:
    """Give all workers rank 0's weights, with a warning if they differed.

    Raises:
        RuntimeError: they still differ.
    """
    if workers.size == 1:
        return
    if len(set(_checksums(module, workers))) > 1:
        rank_zero_warn("workers start with different weights: rank 0's are taken (seed_everything gives all the same)")
    send_module(module)
    if len(set(_checksums(module, workers))) > 1:
        raise RuntimeError("LTE: workers still hold different weights after rank 0's were broadcast")


def _checksums(module: nn.Module, workers: Workers) -> list[float]:
    ignored = set(getattr(module, LEFT_OUT_OF_DDP, ()))
    shared = [p.detach() for name, p in nn.Module.named_parameters(module) if name not in ignored]
    mine = sum(p.double().nan_to_num().abs().sum().item() for p in shared)
    sums: list[Any] = [None] * workers.size
    dist.all_gather_object(sums, mine, group=workers.group)
    return sums


SHARED = "_shares_overflow"  # the mark of an ``unscale_`` that is wrapped already


def clip_norms(rest: Iterable[Tensor], heads: Sequence[Tensor], max_norm: float, stacked: bool = True) -> None:
    """Clip the gradients of the rest to ``max_norm``, and those of each head to ``max_norm``, in place.

    Args:
        rest: parameters that no head owns.
        heads: the heads' factors, each (H, …); or the weights that this worker trains on its own.
        max_norm: largest 2-norm allowed.
        stacked: whether ``heads`` are factors of H heads.
    """
    torch.nn.utils.clip_grad_norm_(list(rest), max_norm)
    if not stacked:
        torch.nn.utils.clip_grad_norm_(list(heads), max_norm)
        return
    grads = [p.grad for p in heads if p.grad is not None]
    if not grads:
        return
    squares = torch.stack([g.detach().flatten(1).float().square().sum(1).to(grads[0].device) for g in grads])  # (factors, H)
    factor = (max_norm / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)  # (H,), as torch's own does
    for grad in grads:
        grad.mul_(factor.to(grad).view(-1, *[1] * (grad.ndim - 1)))


def share_overflow(scaler: Any, group: Any) -> None:
    """Make every worker skip a step in which one worker's gradients overflowed (fp16).

    Args:
        scaler: a ``GradScaler``; its ``unscale_`` is wrapped, once.
        group: the workers' process group.
    """
    if getattr(scaler.unscale_, SHARED, False):
        return
    unscale = scaler.unscale_

    def unscale_together(optimizer: Any) -> None:
        unscale(optimizer)
        for found in found_infinities(scaler, optimizer):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)

    setattr(unscale_together, SHARED, True)
    scaler.unscale_ = unscale_together
