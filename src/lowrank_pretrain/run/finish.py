"""End a run that has trained: export the merged weights, write summary.json, print the closing table."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lowrank_pretrain.checkpoints.files import take_states
from lowrank_pretrain.core.trainer import callbacks_of
from lowrank_pretrain.export import card
from lowrank_pretrain.export.facts import Facts, facts_of_checkpoint
from lowrank_pretrain.export.weights import export_module
from lowrank_pretrain.loggers.csv import final_metrics
from lowrank_pretrain.observe.closing_loss import ClosingLoss
from lowrank_pretrain.observe.monitor import Monitor
from lowrank_pretrain.run import summary
from lowrank_pretrain.run.parts import Parts


def finish_run(trainer: pl.Trainer, monitor: Monitor, parts: Parts, config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Export, summarize and print the result.

    Args:
        trainer: after fit and test.
        monitor: its phase records.
        parts: what was trained, on which data.
        config: the run's plain configuration.
        run_dir: where all of it is written.

    Returns:
        The contents of summary.json.
    """
    facts = Facts.of(parts.data)
    if not monitor.records:  # a spawning strategy trained in other processes, whose callbacks are gone
        last = run_dir / "checkpoints" / "last.ckpt"
        take_states(callbacks_of(trainer), last)
        facts = facts_of_checkpoint(last)
    final = final_metrics(run_dir / "metrics.csv")
    closing = next((callback.mean for callback in callbacks_of(trainer) if isinstance(callback, ClosingLoss)), None)
    if closing is not None:
        final = {"train/loss": closing, **{key: value for key, value in final.items() if key != "train/loss"}}
    found = summary.summarize(trainer, monitor, final)
    if trainer.is_global_zero:
        export_module(parts.module, run_dir / "export", facts)
        card.write(run_dir / "export", config, found, facts)
        summary.write(found, run_dir / "summary.json")
        where = {"checkpoints": run_dir / "checkpoints", "merged weights": run_dir / "export", "all metrics": run_dir}
        summary.show(monitor.records, final, where)
    return found
