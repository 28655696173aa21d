"""Give linear layers adapters in pure torch: the layer, its function, and operations on a whole model."""

from lowrank_pretrain.lora.layer import LoRALinear
from lowrank_pretrain.lora.model import eject, freeze, inject, merge

__all__ = ["LoRALinear", "eject", "freeze", "inject", "merge"]
