"""Write metrics.csv into the run directory by Lightning's CSV logger; a resumed run continues the same file."""

import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from typing_extensions import override

from lowrank_pretrain.core.files import read_table, write_table

SHOWN = ("train/", "val/", "test/")


class _Appending(ExperimentWriter):
    """Append to an existing file and never lose its rows; Lightning's own writer deletes it."""

    @override
    def _check_log_dir_exists(self) -> None:
        if os.path.isfile(self.metrics_file_path):
            self.metrics_keys, _ = read_table(self.metrics_file_path)

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns. Lightning's writer empties the file first, and a kill then loses the whole run's rows."""
        _, rows = read_table(self.metrics_file_path)
        write_table(self.metrics_file_path, fieldnames, rows)


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


def forget_after(path: Path, step: int) -> None:
    """Drop the rows from a step on: a run resumed at that step writes them again."""
    if step == 0:
        path.unlink(missing_ok=True)
    if not path.is_file():
        return
    columns, rows = read_table(path)
    if not columns:  # not even the header was written
        path.unlink()
        return
    write_table(path, columns, [row for row in rows if int(row["step"]) < step])


def final_metrics(path: Path) -> dict[str, float]:
    """Return the last value of each ``train/``, ``val/`` and ``test/`` column of a CSV file; {} if there is no file."""
    final: dict[str, float] = {}
    for row in read_table(path)[1] if path.is_file() else ():
        final |= {key: float(value) for key, value in row.items() if key.startswith(SHOWN) and value}
    return final
