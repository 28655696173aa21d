"""Summarize a finished run: summary.json, and one small table with a column for each phase."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import write_whole
from lowrank_pretrain.core.protocols import HasPhase, Reports, phase_callback
from lowrank_pretrain.core.text import format_number, wide_enough
from lowrank_pretrain.core.trainer import RANKS, process_rank
from lowrank_pretrain.core.versions import versions
from lowrank_pretrain.observe.monitor import Monitor
from lowrank_pretrain.observe.phase_record import PhaseRecord

FAILURE = "failure.txt"  # in the run directory: why the last attempt ended


def summarize(trainer: Trainer, monitor: Monitor, final: dict[str, float]) -> dict[str, Any]:
    """Return the contents of summary.json.

    Args:
        trainer: after fit and test.
        monitor: its phase records.
        final: the last metrics by name.
    """
    method = phase_callback(trainer) or HasPhase()
    reports = trainer.strategy if isinstance(trainer.strategy, Reports) else Reports()
    traffic, sent = reports.metrics(), reports.sent_mebibytes()
    return {
        "phases": [
            {
                "phase": record.phase,
                "steps": record.steps,
                "seconds": record.seconds,
                "samples_per_sec": record.samples_per_sec(),
                "peak_gib": record.peak_gib,
                "trainable": record.trainable,
                "total": record.total,
                **_known(record),
            }
            for record in monitor.records
        ],
        "switch_step": method.switch_step,
        "freeze_step": method.freeze_step,
        "plan": None if method.plan is None else dict(method.plan),
        "final": final,
        "versions": versions(),
        **({"traffic": traffic} if traffic else {}),
        **({"sent_mib": sent} if sent else {}),
    }


def _known(record: PhaseRecord) -> dict[str, float]:
    """Return the figures that not every run has: several processes, memory by formula, operations, use of the chip."""
    optional = {
        "world_size": record.world_size if record.world_size > 1 else None,
        "adapters": record.adapters,
        "optimizer_gib": record.optimizer_gib,
        "optimizer_formula_gib": record.formula_gib,
        "flops_per_sample": record.flops_per_sample,
        "mfu": record.mfu(),
    }
    return {key: value for key, value in optional.items() if value is not None}


def note_failure(run_dir: Path, error: BaseException, line: str | None) -> None:
    """Write the one line that says why the run ended into the run directory.

    Args:
        run_dir: the run directory.
        error: what ended it; a run refused because of another one's files, or before it could look at them, leaves that one
            alone.
        line: the message; None: the error's own.
    """
    if isinstance(error, ConfigError) and error.key in ("hydra.run.dir", "hydra.sweep.dir", *RANKS):
        return
    line = line or f"{type(error).__name__}: {error}".strip().splitlines()[0]
    with suppress(OSError):  # a full disk, perhaps: then it is that which must be told, not this
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / FAILURE).write_text(line + "\n")


def forget_failure(run_dir: Path) -> None:
    """Remove the line of an earlier failure, because the run begins or resumes."""
    if process_rank() == 0:
        (run_dir / FAILURE).unlink(missing_ok=True)


def write(summary: dict[str, Any], path: Path) -> None:
    """Write a summary as JSON, whole or not at all."""
    write_whole(path, json.dumps(summary, indent=2) + "\n")


def show(records: list[PhaseRecord], final: dict[str, float], where: dict[str, Path], console: Console | None = None) -> None:
    """Print the closing table.

    Args:
        records: the phases; ratios are to the one called ``full``, if there is one.
        final: the last metrics by name.
        where: paths of the outputs, by label.
        console: where to print; stdout by default.
    """
    console = console or wide_enough(Console(highlight=False))
    if records:
        console.print(phase_table(records))
    if final:
        console.print(" · ".join(f"{key} {format_number(value)}" for key, value in final.items()))
    for name, path in where.items():
        console.print(f"{name}: {os.path.relpath(path)}", soft_wrap=True)


def phase_table(records: list[PhaseRecord]) -> Table:
    """Return a table with a column for each phase; throughput and memory with their ratio to the full phase."""
    full = next((record for record in records if record.phase == "full"), None)
    table = Table()
    table.add_column("")
    for record in records:
        table.add_column(record.phase, justify="right")

    def row(name: str, *cells: str) -> None:
        table.add_row(name, *cells)

    row("optimizer steps", *(f"{r.steps:,}" for r in records))
    row("seconds", *(f"{r.seconds:.1f}" for r in records))
    row("samples/s", *(_against(r, full, lambda r: r.samples_per_sec(), format_number) for r in records))
    row("peak memory, GiB", *(_against(r, full, lambda r: r.peak_gib, "{:.2f}".format) for r in records))
    row("optimizer, MiB", *(_against(r, full, lambda r: r.optimizer_gib * 1024, format_number) for r in records))
    if any(r.formula_gib is not None for r in records):
        row("by formula, MiB", *("-" if r.formula_gib is None else format_number(r.formula_gib * 1024) for r in records))
    if any(r.flops_per_sample for r in records):
        row("MFLOP per sample", *(_against(r, full, _mega_flops, format_number) for r in records))
    if any(r.mfu() is not None for r in records):
        row("MFU", *("-" if r.mfu() is None else f"{r.mfu():.1%}" for r in records))
    row("adapters", *(_share(r.adapters, r.total) for r in records))
    row("trainable", *(_share(r.trainable, r.total) for r in records))
    return table


def _mega_flops(record: PhaseRecord) -> float | None:
    return None if record.flops_per_sample is None else record.flops_per_sample / 1e6


def _against(record: PhaseRecord, full: PhaseRecord | None, value: Any, form: Callable[[float], str]) -> str:
    mine = value(record)
    if mine is None:
        return "-"
    base = value(full) if full is not None and full is not record else None
    return form(mine) + (f" ({mine / base:.2f}x)" if base else "")


def _share(part: int, total: int) -> str:
    number = f"{format_number(part / 1e6)} M" if part >= 1e6 else f"{part:,}"
    return f"{number} ({part / max(total, 1):.1%})"
