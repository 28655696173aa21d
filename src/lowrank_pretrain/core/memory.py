"""Measure memory: the peak over a stretch of training, and the bytes an optimizer holds."""

import os
import sys
from collections.abc import Iterable

import torch

from lowrank_pretrain.core.protocols import Reports

GIB = 2**30


def optimizer_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Return the bytes of the tensors in the optimizers' states; a storage that several tensors view counts once.

    For a tensor sharded over ranks (FSDP2), only this rank's piece counts.
    """
    storages = {}
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    here = value.to_local() if hasattr(value, "to_local") else value
                    storage = here.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def formula_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int | None:
    """Return the bytes that the method's paper gives for the states; None if no optimizer reports any (``Reports``)."""
    said = [optimizer.formula_bytes() for optimizer in optimizers if isinstance(optimizer, Reports)]
    known = [promised for promised in said if promised is not None]
    return sum(known) if known else None


class PeakMemory:
    """Track peak bytes since the last `restart`: the allocator's on CUDA, the process's resident set on the CPU.

    Linux keeps the resident set's high-water mark and can reset it; where that is not allowed, the peak is the largest
    of the samples that `sample` took.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sampled = 0
        self._marked = False

    def restart(self) -> None:
        """Reset the peak."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        self._sampled = 0
        self._marked = _reset_high_water_mark()
        self.sample()

    def sample(self) -> None:
        """Take one sample: microseconds, and nothing on CUDA or where the kernel keeps the mark."""
        if self._device.type != "cuda" and not self._marked:
            self._sampled = max(self._sampled, _resident_bytes())

    def peak(self) -> int:
        """Return the peak bytes since `restart`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._marked:
            return _high_water_mark()
        self.sample()
        return self._sampled


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return _high_water_mark() > 0
    except (OSError, StopIteration):
        return False


def _high_water_mark() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024  # "VmHWM:   123456 kB"


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc: use the process's peak so far
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
