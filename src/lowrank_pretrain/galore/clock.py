"""Time a step's refreshes, and record how far they moved the bases: ``galore/refresh_ms`` and ``galore/overlap``."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_pretrain.core.lightning_private import FakeTensor


@dataclass
class _Record:
    """Keep the refreshes of one step."""

    step: int
    spans: list[tuple[Any, Any]] = field(default_factory=list)
    overlaps: list[Tensor] = field(default_factory=list)
    copied: Tensor | None = None  # the mean overlap, on the host once `arrived` has passed
    arrived: Any = None

    def send(self) -> None:
        """Send the mean overlap to the host, after the device's pending work."""
        if self.overlaps and self.copied is None:
            mean = torch.stack([overlap.to(self.overlaps[0].device) for overlap in self.overlaps]).mean()
            self.copied = mean.to("cpu", non_blocking=True) if mean.is_cuda else mean
            if mean.is_cuda:
                self.arrived = torch.cuda.Event()
                self.arrived.record()

    def ready(self) -> bool:
        """Return whether the record can be read without waiting."""
        end = self.spans[-1][1]
        return (isinstance(end, float) or end.query()) and (self.arrived is None or self.arrived.query())

    def metrics(self) -> dict[str, float]:
        """Return total milliseconds, and the mean overlap unless all bases were new."""
        found = {"galore/refresh_ms": sum(_milliseconds(*span) for span in self.spans)}
        if self.copied is not None:
            found["galore/overlap"] = float(self.copied)
        return found


class RefreshTimer:
    """Keep the record of the last step with a refresh, without waiting for a device."""

    def __init__(self) -> None:
        self._current: _Record | None = None  # of the newest step that refreshed
        self._sent: _Record | None = None  # on its way to the host
        self._known: dict[str, float] = {}

    def start(self, p: Tensor) -> Any:
        """Return the time before a refresh of ``p``'s basis."""
        if not p.is_cuda or isinstance(p, FakeTensor):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, p: Tensor, began: Any, step: int, overlap: Tensor | None) -> None:
        """Note a refresh that belongs to ``step``; the first basis has no overlap."""
        if self._current is None or self._current.step != step:
            self._current = _Record(step)
        self._current.spans.append((began, self.start(p)))
        if overlap is not None:
            self._current.overlaps.append(overlap)

    def metrics(self) -> dict[str, float]:
        """Return the figures of the newest step that has arrived (on the CPU the last one); empty before the first."""
        for _ in range(2):  # once one has arrived, the newest is sent
            if self._sent is not None and self._sent.ready():
                self._known, self._sent = self._sent.metrics(), None
            if self._sent is None and self._current is not None:
                self._sent, self._current = self._current, None
                self._sent.send()
        return dict(self._known)


def _milliseconds(began: Any, ended: Any) -> float:
    return 1e3 * (ended - began) if isinstance(began, float) else began.elapsed_time(ended)
