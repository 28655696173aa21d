"""Keep both moments of AdamW in 8 bits, with bitsandbytes: a quarter of the bytes, on CPU and CUDA."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_words
from lowrank_pretrain.models.optim import Optim, refuse_foreign_state

WRAPPED = "__bnb_optimizer_quant_state__"  # the key under which newer versions of the library put a parameter's codes
BLOCK = 256  # entries with one scale; also the number of values that a code of 8 bits can mean


def adamw8bit_optimizer() -> Callable[[nn.Module, Optim], torch.optim.Optimizer]:
    """Return a function (module, ``Optim``) -> bitsandbytes' ``AdamW8bit``. Tensors below 4,096 entries stay in float32.

    Raises:
        ConfigError: bitsandbytes is not installed, or its library cannot be loaded.
    """
    adamw8bit = _hooked(_library())

    def make(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
        made: Any = adamw8bit(
            optim.groups(module), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        return made

    return make


def _library() -> Any:
    """Return the library's class.

    Raises:
        ConfigError: bitsandbytes is not installed, or its library cannot be loaded.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except Exception as error:  # the library's loader raises many kinds
        cure = f"{missing_words('bitsandbytes')} ({str(error).splitlines()[0]})"
        raise ConfigError("method", "adamw8bit", cure) from None
    return AdamW8bit


def __getattr__(name: str) -> Any:
    """Return the class below by its name: a pickled optimizer looks for it here."""
    if name == "AdamW8bit":
        return _hooked(_library())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _hooked(library: Any) -> Any:
    """Return the library's class with torch's hooks of ``load_state_dict``, and such that it can be copied and pickled.

    By the hooks a run's own settings win over a file's.
    """

    class AdamW8bit(library):
        __qualname__ = "AdamW8bit"  # as the module gives it

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            saved = dict(state_dict)
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                changed = before(self, saved)
                saved = saved if changed is None else changed
            refuse_foreign_state(self, saved, _takes)
            super().load_state_dict(saved, move_to_device)
            for after in self._optimizer_load_state_dict_post_hooks.values():
                after(self)

        def __getstate__(self) -> dict[str, Any]:
            # torch leaves out the library's own settings. Hooks and a scheduler's wrapper around `step` stay out, as in torch;
            # the managers are one for the whole process
            left = ("mng", "page_mng", "step")
            return {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in left}

        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            if not hasattr(self, "mng"):
                from bitsandbytes.functional import GlobalPageManager
                from bitsandbytes.optim import GlobalOptimManager

                self.mng, self.page_mng = GlobalOptimManager.get_instance(), GlobalPageManager.get_instance()

    return AdamW8bit


def _takes(_: Mapping[str, Any], p: Tensor, state: Mapping[str, Any]) -> bool:
    """Return whether a parameter's state from a file is the library's, in the parameter's shape."""
    held = {**state, **state.get(WRAPPED, {})}
    shapes = {"state1": p.shape, "state2": p.shape}
    if getattr(held.get("state1"), "dtype", None) == torch.uint8:
        shapes |= dict.fromkeys(("qmap1", "qmap2"), torch.Size([BLOCK]))
        shapes |= dict.fromkeys(("absmax1", "absmax2"), torch.Size([-(-p.numel() // BLOCK)]))
    return "step" in state and all(getattr(held.get(key), "shape", None) == shape for key, shape in shapes.items())
