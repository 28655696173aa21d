"""Measure what LTE's authors measured, by callbacks that any run can use (arXiv 2402.16828, sections 3 and 4).

``EffectiveRank``: gradients and the sum of all updates have a rank that grows during training. ``HeadOrthogonality``: heads
keep to separate directions. Both only observe: they draw no random numbers and write nothing that training reads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lowrank_pretrain.core.checks import number, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.protocols import Merges
from lowrank_pretrain.core.targets import WHOLE, Target, families, find_targets, is_conv1d, plain_name
from lowrank_pretrain.core.trainer import log_row
from lowrank_pretrain.lora.products import Part
from lowrank_pretrain.observe.spectra import (
    entropy_rank,
    mean_of_pairs,
    row_space_overlaps,
    singular_values,
    tolerance_rank,
    update_cosines,
)

EVERY = "must be 1 or more optimizer steps"
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
Heads = tuple[str, Tensor, dict[str, Tensor], tuple[Part, ...]]  # layer name, A (N, ΣR, D), B per part (N, O, R), parts


class EffectiveRank(Callback):
    """Log the effective rank (Roy & Vetterli) of the targets' gradients and of W − W₀, and their rank at a tolerance.

    Logged as ``lte/effective_rank/{gradient,update}`` and ``lte/rank/{gradient,update}``, means over the targets, and with
    ``/<family>`` appended for each family. Gradients are measured every so many optimizer steps, the update at the end of each
    validation inside a fit, when low-rank parts that are kept separately are merged. Where adapters train and W does not, W has
    no gradient: then only the update is logged, and it is said once.

    Costs: W₀ of the targets in host memory of process 0 and in checkpoints; an eigenvalue problem per target and look.

    Args:
        targets: presets (``all``, ``attention``, ``mlp``, ``head``) or globs.
        every: optimizer steps between two looks at gradients; ``None``: never.
        tol: singular values above `tol` times the largest count for ``lte/rank``.

    Raises:
        ConfigError: a wrong value; at the start of fit, a pattern without a match, a sharding strategy, or a checkpoint that
            holds W₀ of other targets.
    """

    def __init__(self, targets: str | Sequence[str] = "all", every: int | None = 100, tol: float = 1e-2) -> None:
        if every is not None:
            whole("every", every, 1, allowed=EVERY)
        number("tol", tol, above=0, below=1, allowed="must be a share of the largest singular value, above 0 and below 1")
        self.targets = targets if isinstance(targets, str) else [*map(str, targets)]
        self.every, self.tol = every, float(tol)
        self._start: dict[str, Tensor] | None = None  # W₀ by target
        self._taken_now = self._said = False

    @property
    def state_key(self) -> str:
        """Return a pinned key: a subclass must find this state too."""
        return "EffectiveRank"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset: the starting weights of this fit are not known yet."""
        if stage == "fit":
            if type(trainer.strategy).__name__ in _SHARDED:
                name = type(trainer.strategy).__name__
                raise ConfigError("strategy", name, "EffectiveRank needs whole matrices on one device: use ddp")
            self._start, self._said = None, False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep W₀, unless a checkpoint brought it."""
        found = find_targets(pl_module, self.targets, warn=False, frozen=True)
        self._taken_now = self._start is None
        if self._start is not None:
            shapes = {name: (target.rows, target.cols) for name, target in found.items()}
            if shapes != {name: tuple(start.shape) for name, start in self._start.items()}:
                raise ConfigError("targets", self.targets, "the checkpoint holds the start of other matrices")
            self._start = self._start if trainer.is_global_zero else None  # process 0 does the work
        elif trainer.is_global_zero:
            self._start = {name: target.matrix().detach().to("cpu", copy=True) for name, target in found.items()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if W₀ is not the model's first state."""
        if self._taken_now and trainer.global_step:
            step = trainer.global_step
            rank_zero_info(f"EffectiveRank: the checkpoint does not hold the start; updates count from step {step}")

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Measure the gradients, which are already reduced over processes."""
        if self.every is None or (trainer.global_step + 1) % self.every or not trainer.is_global_zero:
            return
        found = find_targets(pl_module, self.targets, warn=False, frozen=True)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with_grad = {n: t for n, t in found.items() if id(t.layer.weight) in owned and t.layer.weight.grad is not None}
        if with_grad:
            values = {name: self._ranks(target.rows_of_grad()) for name, target in with_grad.items()}
            self._log(trainer, pl_module, "gradient", values, trainer.global_step)
        elif not self._said and not any(t.layer.weight.requires_grad for t in found.values()):
            self._said = True
            rank_zero_warn("EffectiveRank: the targets' W is frozen and has no gradient: only the update W - W0 is logged")
        elif not self._said and len(trainer.optimizers) == 1:
            self._said = True
            rank_zero_warn("EffectiveRank: no target has a gradient at the optimizer step: only the update W - W0 is logged")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure W − W₀, low-rank parts included."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        values, starts = {}, self._start or {}
        for name, present in present_matrices(find_targets(pl_module, self.targets, warn=False, frozen=True)):
            start = starts[name].to(present.device)
            values[name] = self._ranks(present.double() - start.double() if present.device.type != "mps" else present - start)
        self._log(trainer, pl_module, "update", values, None)

    def state_dict(self) -> dict[str, Any]:
        """Return W₀."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore W₀ of the resumed run."""
        self._start = state_dict["start"]

    def _ranks(self, matrix: Tensor) -> Tensor:
        values = singular_values(matrix)
        return torch.stack([entropy_rank(values), tolerance_rank(values, self.tol)])

    def _log(self, trainer: pl.Trainer, module: nn.Module, kind: str, values: dict[str, Tensor], row: int | None) -> None:
        table = torch.stack([*values.values()]).tolist()  # read from the device at once
        metrics: dict[str, float] = {}
        for column, key in enumerate(("lte/effective_rank", "lte/rank")):
            per_target = {name: row[column] for name, row in zip(values, table, strict=True)}
            metrics |= by_family(module, f"{key}/{kind}", per_target)
        log_row(trainer, metrics, row)


class HeadOrthogonality(Callback):
    """Log how far the heads of multi-head low-rank training point in the same direction.

    ``lte/orthogonality``: mean |cosine| between two heads' updates s·BₙAₙ; ``lte/row_space_overlap``: mean cos² of the
    principal angles between their A's row spaces (random ones: R/D). Both 0 for orthogonal heads, means over pairs and targets,
    and with ``/<family>`` appended for each family. Measured before the optimizer step, so that heads which a merge of the same
    step resets are seen while they still hold something. Gathers every worker's heads where the strategy offers it.

    Args:
        every: optimizer steps between two looks.

    Raises:
        ConfigError: a wrong value.
    """

    def __init__(self, every: int = 100) -> None:
        self.every = whole("every", every, 1, allowed=EVERY)
        self._said = False

    @property
    def state_key(self) -> str:
        """Return a pinned key: a subclass must find this state too."""
        return "HeadOrthogonality"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the record of warnings."""
        self._said = False

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Measure the heads on every process: gathering them is a collective."""
        if (trainer.global_step + 1) % self.every:
            return
        heads = trainer.strategy.all_heads() if isinstance(trainer.strategy, Merges) else local_heads(pl_module)
        cosines, overlaps = {}, {}
        for layer_name, A, B, parts in heads:  # to the end on every process, because gathering them is a collective
            if A.shape[0] < 2 or not trainer.is_global_zero:
                continue
            for part in parts:
                name = layer_name if part.name == WHOLE else f"{layer_name}.{part.name}"
                rows = A[:, part.a : part.a + part.rank]
                cosines[name] = mean_of_pairs(update_cosines(rows, B[part.name]))
                overlaps[name] = mean_of_pairs(row_space_overlaps(rows))
        if not cosines:
            if trainer.is_global_zero and not self._said:
                self._said = True
                rank_zero_warn("HeadOrthogonality: no target has two heads: nothing is logged")
            return
        metrics: dict[str, float] = {}
        for key, found in (("lte/orthogonality", cosines), ("lte/row_space_overlap", overlaps)):
            values = torch.stack([*found.values()]).tolist()
            kept = {name: value for name, value in zip(found, values, strict=True) if value == value}  # NaN: all B are zero
            if kept:
                metrics |= by_family(pl_module, key, kept)
        log_row(trainer, metrics, trainer.global_step)


def present_matrices(targets: dict[str, Target]) -> Iterator[tuple[str, Tensor]]:
    """Yield each target's (O, D) matrix with its plain adapters added; the strategy merges heads for evaluation."""
    layer: Any = None
    for name, target in targets.items():
        own = getattr(target.layer, "lora_A", None)
        if not isinstance(own, Tensor) or own.ndim != 2:
            yield name, target.matrix().detach()
            continue
        if target.layer is not layer:  # the parts of a fused layer come one after the other
            layer = target.layer
            weight = layer.merged_weight(check=False)
            weight = weight.t() if is_conv1d(layer) else weight
        yield name, weight[target.start : target.start + target.rows]


def local_heads(module: nn.Module) -> Iterator[Heads]:
    """Yield the layers with heads, and their heads on this device."""
    for name, layer in module.named_modules():
        A = getattr(layer, "lora_A", None)
        if isinstance(A, Tensor) and A.ndim == 3:
            yield plain_name(name), A, {part.name: layer.lora_B[part.name] for part in layer._parts}, layer._parts


def by_family(module: nn.Module, key: str, values: dict[str, float]) -> dict[str, float]:
    """Return {key: mean over targets, key/<family>: mean over the family's targets}."""
    grouped: dict[str, list[float]] = {}
    for name, family in families(module, values).items():
        grouped.setdefault(f"{key}/{family}", []).append(values[name])
    return {key: sum(values.values()) / len(values)} | {name: sum(v) / len(v) for name, v in grouped.items()}
