"""Pre-training large models with low-rank updates, as PyTorch Lightning plugins."""

__version__ = "0.1.0"  # the one place: pyproject.toml reads it

from lowrank_pretrain.checkpoints.io import WholeCheckpointIO
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.plan import Plan
from lowrank_pretrain.core.protocols import Adopter
from lowrank_pretrain.galore import GaLoreAdamW, galore_ddp_hook, galore_param_groups
from lowrank_pretrain.guards.divergence import DivergenceGuard
from lowrank_pretrain.guards.ranks import RanksAgree
from lowrank_pretrain.guards.stall import StallGuard
from lowrank_pretrain.lora.layer import LoRALinear
from lowrank_pretrain.lte import EffectiveRank, HeadOrthogonality, JaggedRestarts, LTEStrategy
from lowrank_pretrain.phases.callback import PhaseCallback
from lowrank_pretrain.phases.lora import LoRA
from lowrank_pretrain.phases.plain_checkpoint import merge
from lowrank_pretrain.prelora.callback import PreLoRA

__all__ = [
    "Adopter",
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
