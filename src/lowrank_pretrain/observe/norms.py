"""Log the size of weights by family during a run: the switch to low rank is decided from it and visible in it."""

from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lowrank_pretrain.core.targets import all_targets, is_conv1d
from lowrank_pretrain.core.trainer import log_row
from lowrank_pretrain.observe.rank_analysis import by_family, present_matrices


class WeightNorms(Callback):
    """Log ``lowrank/weight_norm/<family>`` and, if adapters add to W, ``lowrank/{base,adapter}_norm/<family>``.

    The first is the mean Frobenius norm of the family's matrices as validation sees them (W + s·BA; with heads, merged), the
    others those of W and of s·BA alone. Measured after each validation inside a fit, by process 0. Sharded weights are left
    out.
    """

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        targets = {n: t for n, t in all_targets(pl_module).items() if not hasattr(t.layer.weight, "to_local")}
        norms, base, added = {}, {}, {}
        with torch.no_grad():
            for name, present in present_matrices(targets):
                norms[name] = _norm(present)
                if getattr(targets[name].layer, "lora_A", None) is not None and targets[name].layer.lora_A.ndim == 2:
                    target, layer = targets[name], cast(Any, targets[name].layer)
                    W = layer.base_weight()  # a frozen one may be stored in a cheaper type
                    W = (W.t() if is_conv1d(layer) else W)[target.start : target.start + target.rows]
                    base[name] = _norm(W)
                    added[name] = _norm(present - W)
        metrics: dict[str, float] = {}
        for key, found in (("lowrank/weight_norm", norms), ("lowrank/base_norm", base), ("lowrank/adapter_norm", added)):
            if found:
                values = dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))  # read from the device at once
                metrics |= {k: v for k, v in by_family(pl_module, key, values).items() if k != key}
        if metrics:
            log_row(trainer, metrics)


def _norm(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(matrix.detach(), dtype=torch.promote_types(matrix.dtype, torch.float32))
