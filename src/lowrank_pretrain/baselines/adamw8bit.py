"""Keep both moments of AdamW in 8 bits, with bitsandbytes: a quarter of the bytes, on CPU and CUDA."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_words
from lowrank_pretrain.models.optim import Optim, refuse_foreign_state

WRAPPED = "__bnb_optimizer_quant_state__"  # the key under which newer versions of the library put a parameter's codes


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

    adamw8bit = _hooked(AdamW8bit)

    def make(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
        made: Any = adamw8bit(
            optim.groups(module), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        return made

    return make


@functools.cache
def _hooked(library: Any) -> Any:
    """Return the library's class with torch's hooks of ``load_state_dict``, by which a run's own settings win over a file's."""

    class AdamW8bit(library):
        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            saved = dict(state_dict)
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                changed = before(self, saved)
                saved = saved if changed is None else changed
            refuse_foreign_state(self, saved, lambda _, p, state: any(key in state for key in ("state1", WRAPPED)))
            super().load_state_dict(saved, move_to_device)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)

    return AdamW8bit
