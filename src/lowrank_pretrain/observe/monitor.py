"""Measure what a run costs, phase by phase: throughput, memory, parameters; in microseconds a step, without a device sync.

The words are the package's: a run is in phase ``full``, ``joint`` or ``lowrank``; a callback that is a ``HasPhase`` says
which.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lowrank_pretrain.core.memory import GIB, PeakMemory, formula_bytes, optimizer_bytes
from lowrank_pretrain.core.protocols import PHASES, LogsPhases, Reports, phase_of
from lowrank_pretrain.core.trainer import StepWatch, log_interval
from lowrank_pretrain.observe.flops import FlopCount, peak_flops
from lowrank_pretrain.observe.phase_record import PhaseRecord
from lowrank_pretrain.observe.step_clock import StepClock

_HERE = torch.device("cpu")
RECENT = 50  # steps whose median is the throughput shown while training


def count_parameters(module: torch.nn.Module) -> dict[str, int]:
    """Count parameters: ``trainable``, ``adapters`` (part of ``total``, trainable or not) and ``total``."""
    counts = {"trainable": 0, "adapters": 0, "total": 0}
    for name, parameter in module.named_parameters():
        # a row block that trains on next to adapters is a view of a weight that is counted already
        counts["total"] += parameter.numel() * {"rest_weight", "rest_bias"}.isdisjoint(name.split("."))
        counts["trainable"] += parameter.numel() * parameter.requires_grad
        counts["adapters"] += parameter.numel() * (not _ADDED.isdisjoint(name.split(".")))
    return counts


def optimizer_metrics(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
    """Return what the optimizers report (``Reports``); the second with a metric's name gets ``<name>-1``, and so on."""
    found: dict[str, float] = {}
    for optimizer in optimizers:
        for key, value in optimizer.metrics().items() if isinstance(optimizer, Reports) else ():
            taken = sum(name == key or name.startswith(f"{key}-") for name in found)
            found[f"{key}-{taken}" if taken else key] = value
    return found


def batch_size_of(batch: Any) -> tuple[int, int]:
    """Return (samples, tokens) of a batch; tokens is 0 except for text, ``{"input_ids": (B, T)}``."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), torch.Tensor):
        samples, length = batch["input_ids"].shape[:2]
        return samples, samples * length
    if isinstance(batch, torch.Tensor):
        return (len(batch) if batch.ndim else 1), 0
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((found for found in map(batch_size_of, parts) if found[0]), (0, 0))


_ADDED = frozenset(("lora_A", "lora_B", "factor_U", "factor_V"))  # names of adapters and factors on their layers


class Monitor(Callback):
    """Log what training costs and keep one record per phase, across interruptions too.

    Logged at every `log_every_n_steps`: ``throughput/samples_per_sec`` and, for text, ``throughput/tokens_per_sec``
    (median of the last steps of this phase, all processes), ``throughput/flops_per_sec`` and ``throughput/mfu`` where they can
    be known (FLOPs are counted anew at each phase's first batch), ``time/train_seconds`` (of optimizer steps so far, without
    validation and checkpoints), ``memory/peak_gib`` (of this phase), ``memory/optimizer_gib`` (live storages),
    ``params/trainable``, ``params/adapters``, ``params/total`` and ``lowrank/phase`` (0, 1, 2); and what an optimizer with a
    method ``metrics()`` reports, such as ``galore/overlap``.
    """

    def __init__(self) -> None:
        self.records: list[PhaseRecord] = []
        self._clock, self._memory = StepClock(_HERE), PeakMemory(_HERE)  # of another device once training starts
        self._live = False  # whether the last record belongs to this process and not only to a restored one
        self._look = False  # whether this phase's optimizer is still to be measured
        self._samples = self._tokens = 0
        self._steps = StepWatch()
        self._kept_step = -1  # the step of the last checkpoint
        self._said: dict[str, float] = {}  # the optimizers' last reports; they are lost with the process
        self._flops = FlopCount()

    @property
    @override
    def state_key(self) -> str:
        return "Monitor"

    @property
    def record(self) -> PhaseRecord:
        """Return the record of the running phase; before the first, an empty one of no phase."""
        return self.records[-1] if self.records else PhaseRecord("")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock = StepClock(pl_module.device)
        self._memory = PeakMemory(pl_module.device)
        self._steps.begin(trainer)
        self._live, self._kept_step = False, -1

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        phase = phase_of(trainer)
        if not self._live or self.record.phase != phase:
            self._begin(phase, trainer, pl_module)
            if self.record.flops_per_sample is None:  # else counted before an interruption
                self._flops.begin(pl_module)
        samples, tokens = batch_size_of(batch)
        self._samples, self._tokens = self._samples + samples, self._tokens + tokens
        self._clock.start()

    def _begin(self, phase: str, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a phase, or continue it after a resume: memory is the new process's, steps are added up."""
        self._collect()
        if self.record.phase != phase:
            self.records.append(PhaseRecord(phase))
        self._live = self._look = True
        self.record.world_size = trainer.world_size
        counts = count_parameters(pl_module)
        vars(self.record).update(counts)
        for logger in trainer.loggers:
            if isinstance(logger, LogsPhases):
                logger.log_phase(phase, trainer.global_step, counts)
        self.record.peak_flops = peak_flops(pl_module.device, trainer.precision)
        self._memory.restart()
        self._clock.interrupt()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._count()  # what the optimizer does is not the model's

    def _count(self) -> None:
        counted = self._flops.end()
        if counted and self._samples:
            self.record.flops_per_sample = counted / self._samples

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._flops.end()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._count()  # gradients accumulate: there was no optimizer step
        self._clock.end_batch()
        if not self._steps.stepped(trainer):
            return
        self._clock.end_step(self.record.phase, self._samples, self._tokens)
        self._samples = self._tokens = 0
        self._memory.sample()
        if self._look and phase_of(trainer) == self.record.phase:  # early in the phase: a short one may see no other look
            self._look = False
            self._collect(trainer)
        every = log_interval(trainer)
        if every and trainer.global_step % every == 0:
            self._collect(trainer)
            self._said |= optimizer_metrics(trainer.optimizers)
            metrics = self._metrics() | self._said
            pl_module.log_dict({key: float(value) for key, value in metrics.items()}, on_step=True, on_epoch=False)

    def _collect(self, trainer: Trainer | None = None, wait: bool = False, memory: bool = True) -> None:
        """Bring the records up to date: available step times, and memory of the running phase unless `memory` is false."""
        by_name = {record.phase: record for record in self.records}
        for step in self._clock.drain(wait):
            record = by_name[step.phase]
            record.steps += 1
            record.seconds += step.seconds
            if step.samples:
                record.seconds_per_sample.append(step.seconds / step.samples)
                record.tokens_per_sample = step.tokens / step.samples
        if self._live and memory:
            self.record.peak_gib = max(self.record.peak_gib, self._memory.peak() / GIB)
            if trainer is not None:
                held = optimizer_bytes(trainer.optimizers) / GIB
                if held >= self.record.optimizer_gib:  # a phase's last look comes after the freeze has released what it held
                    said = formula_bytes(trainer.optimizers)
                    self.record.optimizer_gib, self.record.formula_gib = held, said if said is None else said / GIB

    def _metrics(self) -> dict[str, float]:
        record = self.record
        rate = record.samples_per_sec(last=RECENT)
        rates = {
            "throughput/samples_per_sec": rate,
            "throughput/tokens_per_sec": rate * record.tokens_per_sample if rate and record.tokens_per_sample else None,
            "throughput/flops_per_sec": record.flops_per_sec(last=RECENT),
            "throughput/mfu": record.mfu(last=RECENT),
        }
        return {key: value for key, value in rates.items() if value is not None} | {
            "time/train_seconds": sum(record.seconds for record in self.records),
            "memory/peak_gib": record.peak_gib,
            "memory/optimizer_gib": record.optimizer_gib,
            "params/trainable": record.trainable,
            "params/adapters": record.adapters,
            "params/total": record.total,
            "lowrank/phase": PHASES.index(record.phase),
        }

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._pause(trainer)
        self._said |= optimizer_metrics(trainer.optimizers)
        # Lightning has asked for the state before this hook, which has measured once more
        records = [record.state_dict() for record in self.records]
        checkpoint["callbacks"][self.state_key] = {"records": records, "said": dict(self._said)}
        self._kept_step = self._steps.step

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after the last checkpoint only the writing of it could raise the peak: a run that is over keeps the record
        # that its checkpoint holds, and says the same whenever it is reported again
        self._collect(trainer, wait=True, memory=self._kept_step != self._steps.step)
        self._live = False

    def _pause(self, trainer: Trainer) -> None:
        if self._live:  # what follows is not part of a step
            self._collect(trainer)
            self._clock.interrupt()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._live:
            self._collect(wait=True)  # a checkpoint waits for the device anyway
        return {"records": [record.state_dict() for record in self.records]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.records = [PhaseRecord.from_state(state) for state in state_dict["records"]]
        self._said = dict(state_dict.get("said", {}))
