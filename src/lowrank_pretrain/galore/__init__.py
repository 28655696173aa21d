"""GaLore: full weights, projected gradients."""

from lowrank_pretrain.galore.ddp_hook import galore_ddp_hook
from lowrank_pretrain.galore.groups import galore_param_groups
from lowrank_pretrain.galore.optimizer import GaLoreAdamW

__all__ = ["GaLoreAdamW", "galore_ddp_hook", "galore_param_groups"]
