"""Where a run is: written, at every change, to a small shared file that outlives the process; and death at a chosen place.

Only in the killed process, only in tests: the functions that make up a place are wrapped. ``log`` is a line of metrics.csv,
``bytes`` the writing of a checkpoint's file, ``replace`` the moment when a finished file takes the old one's place.
"""

import mmap
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

SIZE = 96  # bytes of a place's name


@dataclass(frozen=True)
class Aim:
    """Die at the `nth` arrival at `place`: at its ``begin``, in the ``middle`` (of a file's bytes) or at its ``end``."""

    place: str
    nth: int
    moment: str = "begin"


class Here:
    """The stack of places that this process is in.

    Args:
        path: the shared file.
        aim: where to die; None: nowhere.
    """

    def __init__(self, path: Path, aim: Aim | None = None) -> None:
        path.write_bytes(b" " * SIZE)
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), SIZE)
        self._stack: list[str] = []
        self._aim, self._arrivals = aim, Counter()
        self.enter("start")

    def enter(self, place: str) -> None:
        """Arrive; the outermost place is replaced with ``goto``."""
        self._stack.append(place)
        self._show()
        self._arrivals[place] += 1
        self.die_at(place, "begin")

    def leave(self) -> None:
        """Back to where we came from."""
        self.die_at(self._stack[-1], "end")
        self._stack.pop()
        self._show()

    def goto(self, place: str) -> None:
        """The outermost place changes: start, meeting (of workers), training, trained, end (test and what follows)."""
        self._stack[0] = place
        self._show()

    def die_at(self, place: str, moment: str) -> None:
        """SIGKILL, if this is where it was to come."""
        aim = self._aim
        if aim and (aim.place, aim.nth, aim.moment) == (place, self._arrivals[place], moment):
            self.die()

    def die(self) -> None:
        """Nothing is flushed, nobody is told."""
        os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """`place`, for a while."""
        self.enter(place)
        try:
            yield
        finally:
            self.leave()

    def aims_at_middle_of(self, place: str) -> bool:
        """Whether death waits in the middle of this very arrival."""
        aim = self._aim
        return aim is not None and (aim.place, aim.nth, aim.moment) == (place, self._arrivals[place], "middle")

    def _show(self) -> None:
        self._shared[:] = "/".join(self._stack).encode()[:SIZE].ljust(SIZE)


def last_seen(path: Path) -> str:
    """Where the process with this shared file was when it ended."""
    return path.read_bytes().decode().strip() if path.is_file() else "start"


class HalfFile:
    """A file that takes so many bytes, and then the process dies."""

    def __init__(self, file: Any, room: int, here: Here) -> None:
        self._file, self._room, self._here = file, room, here

    def write(self, data: Any) -> int:
        """Passed on until there is no more room."""
        data = memoryview(data).cast("B") if not isinstance(data, str) else data
        if len(data) >= self._room:
            self._file.write(data[: self._room])
            self._file.flush()
            self._here.die()
        self._room -= len(data)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _file(path: Any) -> str:
    """``last.ckpt`` waits under another name until its step is logged."""
    return os.path.basename(path).lstrip(".").removesuffix(".part")


def watch(here: Here) -> None:
    """Wrap what a run consists of, so that `here` knows its place."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.loops import _FitLoop
    from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
    from lightning.pytorch.strategies import Strategy

    from lowrank_pretrain.checkpoints import files as checkpoints
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW
    from lowrank_pretrain.galore.projection import Projected
    from lowrank_pretrain.loggers import csv as csv_log
    from lowrank_pretrain.lte.heads.head_set import HeadSet
    from lowrank_pretrain.phases import transition
    from lowrank_pretrain.phases.callback import PhaseCallback
    from lowrank_pretrain.run import attempt, finish, summary

    def place(owner: Any, name: str, word: str | Callable[..., str | None]) -> None:
        inner = getattr(owner, name)

        @wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            found = word(*args, **kwargs) if callable(word) else word
            if found is None:
                return inner(*args, **kwargs)
            with here.at(found):
                return inner(*args, **kwargs)

        setattr(owner, name, outer)

    def unless_replayed(word: str) -> Callable[..., str]:
        return lambda *args, replay=False, **kwargs: "replay" if replay else word

    place(PhaseCallback, "_switch", unless_replayed("switch"))
    place(PhaseCallback, "_freeze", unless_replayed("freeze"))
    place(transition, "_leave", "groups")  # inside either: the model has changed, the optimizer not yet
    place(Strategy, "optimizer_step", "step")
    place(_EvaluationLoop, "run", lambda loop: "test" if loop.trainer.testing else "validation")
    place(Trainer, "save_checkpoint", lambda trainer, path, *args, **kwargs: f"save {_file(path)}")
    place(attempt, "forget_after", "forget")
    place(HeadSet, "exchange", "exchange")
    place(HeadSet, "_apply", "merge")
    place(Projected, "refresh", "refresh")
    place(GaLoreAdamW, "step", "galore step")
    place(finish, "export_module", "export")
    place(summary, "write", "summary")
    place(os, "replace", "replace")
    place(os, "fsync", "fsync")
    place(attempt, "finish_run", "finish")

    save, write_rows, fit, train_steps = torch.save, csv_log._Appending.save, Trainer.fit, _FitLoop.run

    def saving(what: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        with here.at("bytes"):
            if here.aims_at_middle_of("bytes"):
                file = HalfFile(file, 40_000, here)
            save(what, file, *args, **kwargs)

    def logging(writer: Any) -> None:
        with here.at("log"):
            if here.aims_at_middle_of("log"):
                with open(writer.metrics_file_path, "a") as file:
                    file.write("0.123,4.56")  # half a row, as a block of a buffered file would leave it
                here.die()
            write_rows(writer)

    def fitting(*args: Any, **kwargs: Any) -> Any:
        here.goto("meeting")
        result = fit(*args, **kwargs)
        here.goto("end")
        return result

    def training(loop: Any) -> None:
        here.goto("training")
        train_steps(loop)
        here.goto("trained")

    torch.save, csv_log._Appending.save, Trainer.fit, _FitLoop.run = saving, logging, fitting, training
    assert checkpoints.torch.save is saving
