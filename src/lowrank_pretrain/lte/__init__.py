"""LTE (LoRA-the-Explorer, arXiv 2402.16828): workers train low-rank heads separately and merge them periodically."""

from lightning.pytorch.strategies import StrategyRegistry

from lowrank_pretrain.lte.restarts import JaggedRestarts
from lowrank_pretrain.lte.strategy import LTEStrategy
from lowrank_pretrain.observe.rank_analysis import EffectiveRank, HeadOrthogonality

__all__ = ["EffectiveRank", "HeadOrthogonality", "JaggedRestarts", "LTEStrategy"]

if "lte" not in StrategyRegistry:  # a second registration raises
    StrategyRegistry.register("lte", LTEStrategy, description="LoRA-the-Explorer: heads train separately, then merge")
