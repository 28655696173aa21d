"""metrics.csv in the run directory: Lightning's CSV logger, but a resumed run goes on in the same file."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

SHOWN = ("train/", "val/", "test/")


class _Appending(ExperimentWriter):
    """Lightning's writer deletes the file it finds; this one goes on in it, and never leaves less than there was."""

    @override
    def _check_log_dir_exists(self) -> None:
        if os.path.isfile(self.metrics_file_path):
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """New columns: Lightning's writer empties the file first, and a kill then loses the whole run's rows."""
        with open(self.metrics_file_path, newline="") as file:
            _write_whole(Path(self.metrics_file_path), fieldnames, list(csv.DictReader(file)))


class RunCSVLogger(CSVLogger):
    """Writes ``metrics.csv`` directly into `directory` and appends to the one that lies there.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        # every row at once: one that waits in memory would be lacking beside a checkpoint of a later moment
        super().__init__(save_dir=directory, name="", version="", flush_logs_every_n_steps=1)

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
        return self._experiment

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``.hydra/config.yaml`` holds them all."""


def forget_after(path: Path, step: int) -> None:
    """Drop from the CSV at `path` the rows from `step` on: a run that resumes behind `step` steps writes them again."""
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        del lines[-1]  # half a row: the process was killed while it wrote
    reader = csv.DictReader(lines)
    kept = [row for row in reader if int(row["step"]) < step]
    if not reader.fieldnames:  # not even the header was written
        path.unlink()
        return
    _write_whole(path, reader.fieldnames, kept)


def _write_whole(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def final_metrics(path: Path) -> dict[str, float]:
    """The last value of each ``train/``, ``val/`` and ``test/`` column of the CSV at `path`; {} where there is none."""
    if not path.is_file():
        return {}
    final = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            final |= {key: float(value) for key, value in row.items() if key.startswith(SHOWN) and value}
    return final
