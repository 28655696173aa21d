"""What a step's refreshes took and how far they moved the bases: ``galore/refresh_ms`` and ``galore/overlap``."""

import time
from typing import Any

import torch
from torch import Tensor


class RefreshClock:
    """Keeps the record of the last step that refreshed; on a device nothing waits until somebody asks."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._spans: list[tuple[Any, Any]] = []
        self._overlaps: list[Tensor] = []

    def start(self, p: Tensor) -> Any:
        """The time before a refresh of ``p``'s basis."""
        if not p.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, p: Tensor, began: Any, step: int, overlap: Tensor | None) -> None:
        """Note a refresh that belongs to ``step``; the first basis has no overlap."""
        if self._step != step:
            self._step, self._spans, self._overlaps = step, [], []
        self._spans.append((began, self.start(p)))
        if overlap is not None:
            self._overlaps.append(overlap)

    def metrics(self) -> dict[str, float]:
        """Milliseconds in all, and the mean overlap; empty before the first refresh."""
        if not self._spans:
            return {}
        found = {"galore/refresh_ms": sum(_milliseconds(*span) for span in self._spans)}
        if self._overlaps:
            found["galore/overlap"] = sum(float(o) for o in self._overlaps) / len(self._overlaps)
        return found


def _milliseconds(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return 1e3 * (ended - began)
    ended.synchronize()
    return began.elapsed_time(ended)
