"""``torch.compile`` and a model that changes: how many graphs one piece of code may have before dynamo gives up on it."""

import sys

from torch import nn


def allow_graphs(module: nn.Module) -> int:
    """Raise dynamo's ``recompile_limit`` to what layers that are compiled one by one need in three phases.

    Blocks compiled each by itself (``block.compile()``) share one piece of code. While all are alike they share a graph; with
    adapters of different ranks each needs its own, in each phase, for training and for evaluation. Beyond its limit (8) dynamo
    goes back to eager code with no more than a warning.

    Returns:
        How many of the module's layers are compiled (or hold compiled code); 0 leaves the limit as it is.
    """
    dynamo = sys.modules.get("torch._dynamo")  # where nothing was compiled nobody has imported it
    if dynamo is None:
        return 0
    count = sum(
        getattr(child, "_compiled_call_impl", None) is not None or isinstance(child, dynamo.OptimizedModule)
        for child in module.modules()
    )
    if count:
        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, 2 * (2 * count + 1))
        dynamo.config.accumulated_recompile_limit = max(
            dynamo.config.accumulated_recompile_limit, 8 * dynamo.config.recompile_limit
        )
    return count
