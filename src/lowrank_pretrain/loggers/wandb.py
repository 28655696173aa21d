"""Log to Weights & Biases: metrics in sections with axes, phases as events, ranks as a map, one run across interruptions."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.interrupts import Interrupted
from lowrank_pretrain.core.metrics import METRICS, STEP, TIME
from lowrank_pretrain.core.protocols import LogsPhases
from lowrank_pretrain.core.text import one_line
from lowrank_pretrain.loggers.csv import is_float, read_rows

RANK = "lowrank/rank/"
Panel = tuple[str, str | list[str], str, str]  # title, metrics or a regular expression of them, axis, unit


def _panel(metric: str, axis: str = STEP, by: str = "") -> Panel:
    """Return the panel of one metric, with the lines of its families where it has them."""
    found = METRICS[metric]
    return found.title + by, f"{metric}.*" if found.by_family else [metric], axis, found.axis


# section -> its panels, in the order of a reader's questions
SECTIONS: dict[str, list[Panel]] = {
    "Loss": [
        *(
            _panel(loss, axis, by)
            for loss in ("train/loss", "val/loss")
            for axis, by in ((STEP, " by step"), (TIME, " by time"))
        ),
        ("Validation accuracy", ["val/acc1", "val/acc5"], STEP, "fraction"),
        _panel("val/ppl"),
    ],
    "Throughput": [_panel(f"throughput/{key}") for key in ("samples_per_sec", "tokens_per_sec", "flops_per_sec", "mfu")],
    "Memory and parameters": [
        _panel("memory/peak_gib"),
        _panel("memory/optimizer_gib"),
        ("Parameters", ["params/trainable", "params/adapters", "params/total"], STEP, "parameters"),
    ],
    "Low rank": [_panel(f"lowrank/{key}") for key in ("phase", "weight_norm", "adapter_norm", "weight_change")],
    "LTE": [
        _panel("lte/effective_rank/gradient"),
        _panel("lte/effective_rank/update"),
        ("Sent per merge", ["lte/merge_mib", "lte/rest_mib"], STEP, "MiB per worker"),
        _panel("lte/merge_ms"),
        _panel("lte/orthogonality"),
    ],
    "GaLore": [_panel("galore/refresh_ms"), _panel("galore/overlap")],
}
COUNTS = ("trainable", "adapters", "total")


class RunWandbLogger(LogsPhases, WandbLogger):
    """Log to Weights & Biases with defined axes, and add a run directory's plan and phases.

    Each row carries the seconds trained so far, so that any metric can be drawn over time. After a switch the plan is
    there as a table and as a map of layer by family; each phase is a row of ``events/phases``.

    An offline run that resumes begins with the rows of metrics.csv: wandb cannot continue an offline run, and syncing a
    second directory of the same run replaces the first. So the newest directory always holds the whole run.

    If the server does not answer, or refuses, the run continues offline, with one warning.

    Args:
        save_dir: the run directory.
        init_timeout: seconds that the server may take to answer; W&B's own 90 would delay a cluster job.
        **kwargs: see Lightning's logger.
    """

    def __init__(self, save_dir: str, init_timeout: float = 15, **kwargs: Any) -> None:
        number("init_timeout", init_timeout, above=0, allowed="must be a number of seconds above 0")
        if "settings" not in kwargs and "WANDB_INIT_TIMEOUT" not in os.environ:
            kwargs["settings"] = {"init_timeout": float(init_timeout)}
        if kwargs.get("offline"):
            kwargs["mode"] = "offline"
        super().__init__(save_dir=save_dir, **kwargs)
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # newer versions warn of it, even of None
        self._seconds: float | None = None
        self._events: list[list[Any]] = []

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        fresh = self._experiment is None and getattr(self, "_attach_id", None) is None
        run = self._begin() if fresh else super().experiment
        if fresh:
            define(run)
            if self._offline:
                self._repeat(Path(str(self.save_dir)) / "metrics.csv")
        return run

    def _begin(self) -> Any:
        """Begin W&B's run, offline if its server refuses."""
        try:
            return self._init()
        except Interrupted:
            raise
        except Exception as error:
            if self._offline:
                raise
            why = one_line(error, 200)
            later = f"upload it later with: wandb sync {os.path.relpath(Path(str(self.save_dir)) / 'wandb' / 'latest-run')}"
            warnings.warn(f"wandb: {type(error).__name__}: {why}; writing an offline run; {later}", stacklevel=1)
        import wandb

        wandb.teardown(exit_code=1)  # its service still holds the run under this id
        self._offline, self._wandb_init["mode"] = True, "offline"
        return self._init()

    def _init(self) -> Any:
        """Begin W&B's run as Lightning does, but without setting ``WANDB_MODE`` in the environment for all later runs."""
        offline, self._offline = self._offline, False
        try:
            return super().experiment
        finally:
            self._offline = offline

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if TIME in metrics:
            self._seconds = metrics[TIME]
        elif self._seconds is not None:
            metrics = {**metrics, TIME: self._seconds}
        super().log_metrics(metrics, step)
        ranks = {key[len(RANK) :]: int(value) for key, value in metrics.items() if key.startswith(RANK)}
        if ranks:
            self._log_ranks(ranks, step)

    @rank_zero_only
    def log_phase(self, phase: str, step: int, counts: Mapping[str, int]) -> None:
        """Log that a phase begins, or continues after a resume.

        Args:
            phase: its name.
            step: optimizer steps taken before it.
            counts: of parameters, by name.
        """
        import wandb

        self._events.append([step, phase, *(counts[key] for key in COUNTS)])
        self.experiment.log({"events/phases": wandb.Table(columns=["step", "phase", *COUNTS], data=self._events), STEP: step})

    def _log_ranks(self, ranks: dict[str, int], step: int | None) -> None:
        import wandb

        from lowrank_pretrain.report.page import page
        from lowrank_pretrain.report.sections import rank_map, split

        rows = [[*split(target), rank] for target, rank in ranks.items()]
        shown = page("Ranks", f"<figure>{rank_map(ranks, 'ranks')}</figure>")
        self.experiment.log(
            {
                "lowrank/ranks": wandb.Table(columns=["layer", "family", "rank"], data=rows),
                "lowrank/rank_map": wandb.Html(shown, inject=False, data_is_not_path=True),
                **({} if step is None else {STEP: step}),
            }
        )

    def _repeat(self, path: Path) -> None:
        if not path.is_file():
            return
        for row in read_rows(path)[1]:
            metrics = {key: float(text) for key, text in row.items() if is_float(text) and key not in ("step", "epoch")}
            self.log_metrics(metrics, int(row["step"]))


def define(run: Any) -> None:
    """Define the axis of every section's metrics, and which of their values is the best."""
    run.define_metric(TIME)
    for panels in SECTIONS.values():
        for _, metrics, _, _ in panels:
            for metric in [metrics.replace(".*", "*")] if isinstance(metrics, str) else metrics:
                run.define_metric(metric, step_metric=STEP, step_sync=True, summary=_best(metric))
    for pattern in ("events/*", "lowrank/*", "test/*"):
        run.define_metric(pattern, step_metric=STEP, step_sync=True)


def _best(metric: str) -> str | None:
    """Return the summary that W&B shows for a metric: the best in validation, else the last."""
    best = METRICS[metric].best if metric.startswith("val/") else None
    return best and best.__name__


def publish(run: Any, summary: dict[str, Any], run_dir: Path) -> None:
    """Publish a finished run: all its phases as events, the report's page, the exported weights and their card.

    Args:
        run: W&B's.
        summary: the contents of summary.json.
        run_dir: the run directory, with ``export/`` in it.
    """
    import wandb

    from lowrank_pretrain.report import find_runs, render

    events, step = [], 0
    for phase in summary["phases"]:
        events.append([step, phase["phase"], *(phase[key] for key in COUNTS)])
        step += phase["steps"]
    steps = {key: summary[key] for key in ("switch_step", "freeze_step") if summary[key] is not None}
    run.summary.update({**steps, "phases": summary["phases"]})
    page = render(find_runs([run_dir]), run_dir.name)
    run.log(
        {
            "events/phases": wandb.Table(columns=["step", "phase", *COUNTS], data=events),
            "report": wandb.Html(page, inject=False, data_is_not_path=True),
            STEP: step,
        }
    )
    artifact = wandb.Artifact(f"model-{run.id}", type="model", metadata={"final": summary["final"], **steps})
    artifact.add_dir(str(run_dir / "export"), policy="immutable")  # no second copy on this disk
    run.log_artifact(artifact)
