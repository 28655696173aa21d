"""Record the cost of one phase of a run: steps, seconds, memory, parameters, operations, and the rates from them."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank_pretrain.observe.step_clock import Thinned


@dataclass
class PhaseRecord:
    """Hold the cost of one phase so far, over all processes.

    Args:
        phase: its name.
        steps: optimizer steps.
        seconds: their time, without validation, checkpoints and the switch itself.
        tokens_per_sample: tokens in a sample; 0 except for text.
        peak_gib: peak memory of process 0.
        optimizer_gib: the optimizer states of process 0.
        formula_gib: the same by the method's formula, if its optimizer has one.
        trainable: trainable parameters.
        adapters: parameters of adapters.
        total: all parameters.
        seconds_per_sample: of each step, on one process; thinned out evenly once there are many.
        flops_per_sample: of forward and backward, counted at the phase's first batch; None if they cannot be counted.
        peak_flops: operations per second of one process's device; None if unknown.
    """

    phase: str
    steps: int = 0
    seconds: float = 0.0
    tokens_per_sample: float = 0.0
    peak_gib: float = 0.0
    optimizer_gib: float = 0.0
    trainable: int = 0
    adapters: int = 0
    total: int = 0
    world_size: int = 1
    seconds_per_sample: Thinned = field(default_factory=Thinned)
    formula_gib: float | None = None
    flops_per_sample: float | None = None
    peak_flops: int | None = None

    def samples_per_sec(self, last: int | None = None) -> float | None:
        """Return the rate by the median step time: of all steps, or of the `last` ones; None before the first is known."""
        seconds = self.seconds_per_sample.median(last)
        return self.world_size / seconds if seconds else None

    def flops_per_sec(self, last: int | None = None) -> float | None:
        """Return the rate of all processes; None if the operations of a sample or the time of a step are unknown."""
        rate = self.samples_per_sec(last)
        return None if rate is None or self.flops_per_sample is None else rate * self.flops_per_sample

    def mfu(self, last: int | None = None) -> float | None:
        """Return the model FLOPs utilisation: the share of the devices' peak rate; None if unknown."""
        done = self.flops_per_sec(last)
        return None if done is None or not self.peak_flops else done / (self.peak_flops * self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the record in plain types."""
        return {**asdict(self), "seconds_per_sample": dict(vars(self.seconds_per_sample))}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "PhaseRecord":
        """Rebuild a record from its `state_dict`."""
        return cls(**{**state, "seconds_per_sample": Thinned(**state["seconds_per_sample"])})
