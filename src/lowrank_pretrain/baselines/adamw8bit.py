"""Keep both moments of AdamW in 8 bits, with bitsandbytes: a quarter of the bytes, on CPU and CUDA."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_words
from lowrank_pretrain.models.optim import Optim


def adamw8bit_optimizer() -> Callable[[nn.Module, Optim], torch.optim.Optimizer]:
    """Return a function (module, ``Optim``) -> bitsandbytes' ``AdamW8bit``. Tensors below 4,096 entries stay in float32.

    Raises:
        ConfigError: bitsandbytes is not installed, or its library cannot be loaded.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # the library's loader raises many kinds
        cure = f"{missing_words('bitsandbytes')} ({str(error).splitlines()[0]})"
        raise ConfigError("method", "adamw8bit", cure) from None

    def make(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
        made: Any = AdamW8bit(
            optim.groups(module), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        return made

    return make
