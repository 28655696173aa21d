"""Name all metrics, with title and unit: one table for the report, the model card, W&B and its dashboard."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

STEP, TIME = "trainer/global_step", "time/train_seconds"  # the x axes of metrics
AXES = {STEP: "optimizer steps", TIME: "seconds of training"}


class Metric(NamedTuple):
    """Describe one metric for people.

    Attributes:
        title: of a chart.
        axis: what its numbers are, with their unit.
        best: ``min`` or ``max``, if one end of the scale is better.
        word: its name in a table of results.
        by_family: also logged for each family of targets, as ``NAME/FAMILY``.
    """

    title: str
    axis: str
    best: Callable[[Iterable[float]], float] | None = None
    word: str = ""
    by_family: bool = False


LOWEST, HIGHEST = min, max
METRICS = {
    "train/loss": Metric("Training loss", "loss, nats", LOWEST),
    "val/loss": Metric("Validation loss", "loss, nats", LOWEST, "loss, nats"),
    "val/acc1": Metric("Validation accuracy", "top-1 accuracy, fraction", HIGHEST, "top-1 accuracy"),
    "val/acc5": Metric("Validation accuracy, top 5", "top-5 accuracy, fraction", HIGHEST, "top-5 accuracy"),
    "val/ppl": Metric("Validation perplexity", "perplexity per token", LOWEST, "perplexity"),
    "test/loss": Metric("Test loss", "loss, nats", LOWEST),
    "test/acc1": Metric("Test accuracy", "top-1 accuracy, fraction", HIGHEST),
    "test/acc5": Metric("Test accuracy, top 5", "top-5 accuracy, fraction", HIGHEST),
    "test/ppl": Metric("Test perplexity", "perplexity per token", LOWEST),
    "throughput/samples_per_sec": Metric("Throughput", "samples / s"),
    "throughput/tokens_per_sec": Metric("Throughput in tokens", "tokens / s"),
    "throughput/flops_per_sec": Metric("Operations per second", "FLOP / s"),
    "throughput/mfu": Metric("Model FLOPs utilisation", "share of the chip's peak"),
    "memory/peak_gib": Metric("Peak memory of the phase so far", "GiB"),
    "memory/optimizer_gib": Metric("Optimizer states", "GiB"),
    "params/trainable": Metric("Trainable parameters", "parameters"),
    "params/adapters": Metric("Parameters of adapters", "parameters"),
    "params/total": Metric("Parameters", "parameters"),
    "lowrank/phase": Metric("Phase", "0 full, 1 joint, 2 lowrank"),
    "lowrank/weight_norm": Metric("Weight norms", "mean ‖W‖ of the family (Frobenius)", by_family=True),
    "lowrank/adapter_norm": Metric("Adapter norms", "mean ‖s·BA‖ of the family (Frobenius)", by_family=True),
    "lowrank/weight_change": Metric("Change of weight norms per window", "mean |Δ‖W‖| / ‖W‖, fraction", by_family=True),
    "lte/effective_rank/gradient": Metric("Effective rank of gradients", "effective rank", by_family=True),
    "lte/effective_rank/update": Metric("Effective rank of W − W₀", "effective rank", by_family=True),
    "lte/rank/gradient": Metric("Rank of gradients, at the tolerance", "rank", by_family=True),
    "lte/rank/update": Metric("Rank of W − W₀, at the tolerance", "rank", by_family=True),
    "lte/orthogonality": Metric("Heads' updates: orthogonality", "mean |cosine|", by_family=True),
    "lte/row_space_overlap": Metric("Heads' row spaces: overlap", "mean cos² of principal angles", by_family=True),
    "lte/merge_mib": Metric("Sent per merge", "MiB per worker"),
    "lte/rest_mib": Metric("Sent for the rest, per window", "MiB per worker"),
    "lte/merge_ms": Metric("Waited for a merge", "ms"),
    "galore/refresh_ms": Metric("Refresh of the subspace", "ms"),
    "galore/overlap": Metric("Overlap of old and new subspace", "fraction"),
}
