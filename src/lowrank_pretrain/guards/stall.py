"""End the run when a data loader hangs, instead of holding the devices until somebody notices."""

import math
import os
import signal
import sys
import sysconfig
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.trainer import profiler_of

GRACE = 30.0  # seconds that the main thread has to react, before the process is killed
ASKED = "_next"  # suffix of Lightning's profiler actions that fetch a batch
STDLIB = sysconfig.get_paths()["stdlib"]


class Stalled(BaseException):
    """Say that a loader has not handed out a batch for too long. No Exception: code that swallows those must not swallow this.

    Args:
        loader: which, e.g. ``"the training loader"``.
        seconds: for how long.
        place: where the process waits, ``file:line in function``.
    """

    def __init__(self, loader: str, seconds: float, place: str) -> None:
        super().__init__(loader, seconds, place)
        self.loader, self.seconds, self.place = loader, seconds, place

    def __str__(self) -> str:
        return f"{self.loader} has handed out nothing for {self.seconds:g} s (stall_timeout); it waits at {self.place}"


class StallGuard(Callback):
    """Watch the time between asking a loader for a batch and getting it, from a separate thread: a step costs nothing.

    That time is what Lightning measures for its profiler: time in hooks, validation or writing a checkpoint does not
    count.

    It interrupts the main thread by SIGALRM, from any wait of Python's: for a worker process, a file, a lock. Where
    the signal is not handled, inside a library's own loop, the process ends with exit code 1 after half a minute.

    Args:
        timeout: seconds; None: no limit.

    Raises:
        ConfigError: `timeout` is not a number above 0.
    """

    def __init__(self, timeout: float | None = 1800.0) -> None:
        if timeout is not None:
            number("stall_timeout", timeout, above=0, allowed="must be a number of seconds above 0, or null for any time")
        self.timeout = timeout
        self._waiting: tuple[str, float] | None = None  # which loader, since when
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._before: Any = None
        self._profiler: Any = None
        self._stalled: Stalled | None = None

    def __getstate__(self) -> dict[str, Any]:
        nothing = dict.fromkeys(("_waiting", "_thread", "_before", "_profiler", "_stalled"))
        return {"timeout": self.timeout, **nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._over = threading.Event()

    # -- the watch --------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        main = threading.main_thread()
        if self.timeout is None or threading.current_thread() is not main or not hasattr(signal, "pthread_kill"):
            return
        self._end()
        self._over.clear()
        self._before = signal.signal(signal.SIGALRM, self._hear)
        self._thread = threading.Thread(target=self._watch, args=(main.ident,), name="stall guard", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._waiting = None
        if self._profiler is not None:
            del self._profiler.start, self._profiler.stop
            self._profiler = None
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None
            signal.signal(signal.SIGALRM, self._before)

    def _watch(self, main: int) -> None:
        timeout = math.inf if self.timeout is None else self.timeout
        pause = min(5.0, timeout / 4)
        for_whom, waited, last = None, 0.0, time.monotonic()
        while not self._over.wait(pause):
            waiting, now = self._waiting, time.monotonic()
            if waiting is not for_whom:
                for_whom, waited = waiting, 0.0
            # a process that was stopped (SIGSTOP, a suspended job) finds a long pause here: its loader was not asked meanwhile
            elif waiting is not None:
                waited += min(now - last, 2 * pause)
            last = now
            if waiting is None or waited < timeout:
                continue
            self._stalled = Stalled(waiting[0], timeout, _place(main))
            signal.pthread_kill(main, signal.SIGALRM)
            if self._over.wait(min(GRACE, 10 * timeout)):
                return
            if self._waiting is waiting:
                print(f"error: {self._stalled}; it does not answer", file=sys.stderr, flush=True)
                os._exit(1)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        stalled, self._stalled = self._stalled, None
        if stalled is not None and self._waiting is not None:
            self._waiting = None
            raise stalled
        if callable(self._before):  # somebody else's alarm
            self._before(number, frame)

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()
        if self._thread is not None:
            self._listen(profiler_of(trainer))

    def _listen(self, profiler: Any) -> None:
        """Hook into Lightning's profiler, even a disabled one, to see when a batch is requested and delivered."""
        start, stop = profiler.start, profiler.stop

        def asked(action_name: str) -> None:
            start(action_name)
            if action_name.endswith(ASKED):
                kind = "training" if ".train" in action_name else "validation"
                self._waiting = (f"the {kind} loader", time.monotonic())

        def answered(action_name: str) -> None:
            if action_name.endswith(ASKED):
                self._waiting = None
            stop(action_name)

        profiler.start, profiler.stop = asked, answered
        self._profiler = profiler

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()


def _place(thread: int) -> str:
    """Return where a thread is, by the innermost frame that is not Python's own library."""
    frame = sys._current_frames().get(thread)
    innermost = frame
    while frame is not None and frame.f_code.co_filename.startswith(STDLIB) and "site-packages" not in frame.f_code.co_filename:
        frame = frame.f_back
    frame = frame or innermost
    return "?" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
