"""Pre-training large models with low-rank updates, as PyTorch Lightning plugins."""

__version__ = "0.1.0"  # the one place: pyproject.toml reads it

from lowrank_pretrain.checkpoint_io import WholeCheckpointIO
from lowrank_pretrain.divergence import DivergenceGuard
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.galore import GaLoreAdamW, galore_ddp_hook, galore_param_groups
from lowrank_pretrain.lora_callback import LoRA
from lowrank_pretrain.lora_layer import LoRALinear
from lowrank_pretrain.lte import EffectiveRank, HeadOrthogonality, JaggedRestarts, LTEStrategy
from lowrank_pretrain.phases import PhaseCallback
from lowrank_pretrain.plain_checkpoint import merge
from lowrank_pretrain.plan import Plan
from lowrank_pretrain.prelora.callback import PreLoRA
from lowrank_pretrain.rank_check import RanksAgree
from lowrank_pretrain.stall import StallGuard

__all__ = [
    "ConfigError",
    "DivergenceGuard",
    "EffectiveRank",
    "GaLoreAdamW",
    "HeadOrthogonality",
    "JaggedRestarts",
    "LTEStrategy",
    "LoRA",
    "LoRALinear",
    "PhaseCallback",
    "Plan",
    "PreLoRA",
    "RanksAgree",
    "StallGuard",
    "WholeCheckpointIO",
    "galore_ddp_hook",
    "galore_param_groups",
    "merge",
]
