"""Write metrics.csv into the run directory by Lightning's CSV logger; a resumed run continues the same file.

Another program may have changed the file meanwhile: rows that cannot be read are left out, and a copy of the file is kept.
"""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lowrank_pretrain.core.files import read_table, whole_step, write_table

SHOWN = ("train/", "val/", "test/")
TORN = re.compile(rb"[-+.,\w/]*")  # what a process that was killed may leave of its last row, or of the first


class _Appending(ExperimentWriter):
    """Append to an existing file and never lose its rows; Lightning's own writer deletes it."""

    @override
    def _check_log_dir_exists(self) -> None:
        if os.path.isfile(self.metrics_file_path):
            self.metrics_keys, _ = read_rows(Path(self.metrics_file_path))

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns. Lightning's writer empties the file first, and a kill then loses the whole run's rows."""
        columns, rows = read_rows(Path(self.metrics_file_path))
        self.metrics_keys = [*fieldnames, *(column for column in columns if column not in fieldnames)]
        write_table(self.metrics_file_path, self.metrics_keys, rows)


class RunCSVLogger(CSVLogger):
    """Write ``metrics.csv`` directly into `directory` and append to an existing one.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        # every row at once: a row still in memory would be missing when a later checkpoint is resumed
        super().__init__(save_dir=os.fspath(directory), name="", version="", flush_logs_every_n_steps=1)

    @property
    @override
    def log_dir(self) -> str:
        return self.save_dir

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _Appending(log_dir=self.log_dir)
        writer: Any = self._experiment
        return writer

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: ``.hydra/config.yaml`` holds all hyper-parameters."""


def read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a ``metrics.csv``; if some of it cannot be read, leave that out and keep a copy.

    A row has a whole step. There are no columns where the first row is missing or does not name the step. A warning says how
    much was left out, and where the copy is.
    """
    content = path.read_bytes()
    columns, found = read_table(path, errors="replace")
    known = "step" in columns
    rows = [{**row, "step": str(step)} for row in found if known and (step := whole_step(row["step"])) is not None]
    lost = len(found) - len(rows) + (bool(columns) and not known)
    if lost or not TORN.fullmatch(content.rpartition(b"\n")[2]) or not _is_text(content):
        copy = next(file for file in _copies(path) if not file.exists())
        shutil.copyfile(path, copy)
        what = f"{lost} row(s)" if lost else "some letters"
        warnings.warn(
            f"{what} of {path.name} could not be read and are left out; as it was: {os.path.relpath(copy)}", stacklevel=2
        )
    return (columns, rows) if known else ([], [])


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _copies(path: Path) -> Iterator[Path]:
    """Yield the names for copies of a file, so that no earlier copy is overwritten."""
    yield path.with_name(f"{path.name}.damaged")
    for number in count(2):
        yield path.with_name(f"{path.name}.damaged-{number}")


def is_float(text: str) -> bool:
    """Return whether a cell is a number, or NaN or infinite."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def forget_after(path: Path, step: int) -> None:
    """Drop the rows from a step on: a run resumed at that step writes them again."""
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.is_file():
        return
    columns, rows = read_rows(path)
    if not columns:  # not even the header was written, or another program lost it
        path.unlink()
        return
    write_table(path, columns, [row for row in rows if int(row["step"]) < step])


def final_metrics(path: Path) -> dict[str, float]:
    """Return the last value of each ``train/``, ``val/`` and ``test/`` column of a CSV file; {} if there is no file."""
    final: dict[str, float] = {}
    for row in read_table(path, errors="replace")[1] if path.is_file() else ():
        final |= {key: float(value) for key, value in row.items() if key.startswith(SHOWN) and is_float(value)}
    return final
