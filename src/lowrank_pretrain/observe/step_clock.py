"""Time optimizer steps without validation, checkpoints and phase changes, and without stalling a device."""

import time
from collections import deque
from dataclasses import dataclass
from statistics import median

import torch

KEPT = 4096  # steps remembered per phase; a longer phase is thinned out evenly


@dataclass(frozen=True)
class Step:
    """Hold one optimizer step: its phase, the samples and tokens it saw on this device, and its seconds."""

    phase: str
    samples: int
    tokens: int
    seconds: float


class StepClock:
    """Time the stretches between marks; a stretch that `interrupt` fell into starts again at the next `start`.

    A step lasts from the end of the one before it to its own end, so waiting for data counts. After something that is
    no part of training (`interrupt`) it lasts from its own start. On CUDA the marks are events on the stream and are
    read once the device has passed them: a mark never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._from: float | torch.cuda.Event | None = None  # where the running stretch began
        self._stretches: list[tuple] = []  # of the optimizer step in the making: (from, to)
        self._pending: deque[tuple[str, int, int, list[tuple]]] = deque()  # finished, perhaps not yet read

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin a batch; it sets a mark only after `interrupt`."""
        if self._from is None:
            self._from = self._mark()

    def interrupt(self) -> None:
        """Stop timing until the next `start`."""
        self._from = None

    def end_batch(self) -> None:
        """End a batch."""
        if self._from is None:
            return
        now = self._mark()
        self._stretches.append((self._from, now))
        self._from = now

    def end_step(self, phase: str, samples: int, tokens: int) -> None:
        """Note that the batch which just ended made an optimizer step over `samples` samples and `tokens` tokens."""
        if self._stretches:
            self._pending.append((phase, samples, tokens, self._stretches))
        self._stretches = []

    def drain(self, wait: bool = False) -> list[Step]:
        """Return the steps whose times are available, oldest first; with `wait`, all of them."""
        if wait and self._cuda and self._pending:
            torch.cuda.synchronize()
        steps = []
        while self._pending:
            phase, samples, tokens, stretches = self._pending[0]
            if self._cuda and not stretches[-1][1].query():
                break
            self._pending.popleft()
            if self._cuda:
                seconds = sum(begin.elapsed_time(end) for begin, end in stretches) / 1e3  # elapsed_time is in ms
            else:
                seconds = sum(end - begin for begin, end in stretches)
            steps.append(Step(phase, samples, tokens, seconds))
        return steps


class Thinned:
    """Keep a list that forgets every second entry when it is full: its median stays that of the whole, its size is bounded."""

    def __init__(self, values: list[float] | None = None, stride: int = 1, skipped: int = 0) -> None:
        self.values, self.stride, self.skipped = list(values or []), stride, skipped

    def append(self, value: float) -> None:
        """Keep the value, if it is not thinned out."""
        self.skipped += 1
        if self.skipped < self.stride:
            return
        self.skipped = 0
        self.values.append(value)
        if len(self.values) >= KEPT:
            self.values, self.stride = self.values[::2], self.stride * 2

    def median(self, last: int | None = None) -> float | None:
        """Return the median of all values kept, or of the `last` ones; None if there are none."""
        values = self.values[-last:] if last else self.values
        return median(values) if values else None
