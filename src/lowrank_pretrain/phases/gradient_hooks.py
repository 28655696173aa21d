"""Find hooks that change the gradient of a target's weight (masks, clips): an adapter, factor or head would never feel them.

A hook cannot be asked what it does, and one that only looks (a log of norms) is harmless. So in the first step each hook runs
inside of a wrapper that compares what goes in with what comes out. Where W has no gradient (LoRA, heads), every hook counts.
Hooks of those who average, shard or watch gradients never count.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.lightning_private import gradient_hooks

UNSEEN = "has a hook on its gradient, which adapters, factors and heads would miss: remove the hook, or leave it out"
CHANGES = "has a hook that changes its gradient (a mask?), which adapters and factors would miss: leave it out"
_HARMLESS = (
    "torch.distributed", "torch.nn.parallel", "lightning", "pytorch_lightning", "lightning_fabric", "deepspeed", "wandb",
    "lowrank_pretrain",
)  # fmt: skip


def has_users_hook(weight: Tensor, harmless: Iterable[Callable] = ()) -> bool:
    """Return whether a weight has a hook on its gradient that is neither a framework's nor one of ``harmless``."""
    known = {id(hook) for hook in harmless}
    return any(_is_users(hook) and id(hook) not in known for hooks in gradient_hooks(weight) for hook in hooks.values())


def _is_users(hook: Callable) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    module = getattr(hook, "__module__", None) or ""
    return not any(module == package or module.startswith(f"{package}.") for package in _HARMLESS)


class HookWatch:
    """Run the hooks on the gradients of layers' weights in wrappers that note whether they change them.

    Args:
        layers: by name.

    Attributes:
        changed: names of layers whose gradient a hook has changed.
        harmless: hooks that were called and changed nothing.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = dict(layers)
        self.changed: set[str] = set()
        self.harmless: list[Callable] = []
        self._wrapped: list[tuple[dict[int, Callable], int, _Wrapper]] = []

    def begin(self) -> None:
        """Wrap the hooks there are; may be called again, for those that came later."""
        for name, layer in self._layers.items():
            weight = layer._parameters.get("weight")
            for hooks in gradient_hooks(weight) if weight is not None else ():
                for key, hook in hooks.items():
                    if not isinstance(hook, _Wrapper) and _is_users(hook):
                        hooks[key] = wrapper = _Wrapper(self, name, hook)
                        self._wrapped.append((hooks, key, wrapper))

    def end(self) -> None:
        """Put the hooks back."""
        for hooks, key, wrapper in self._wrapped:
            hook = wrapper.hook
            if hooks.get(key) is wrapper:  # else it was removed meanwhile
                hooks[key] = hook
            if wrapper.called and not wrapper.changes:
                self.harmless.append(hook)
        self._wrapped = []


class _Wrapper:
    """Stand in for a hook: of ``register_hook``, called with the gradient, or one called with the weight after it."""

    def __init__(self, watch: HookWatch, name: str, hook: Callable) -> None:
        self._watch, self._name, self.hook = watch, name, hook
        self.called = self.changes = False

    def __call__(self, tensor: Tensor) -> Any:
        of_weight = isinstance(tensor, nn.Parameter)
        before = tensor.grad if of_weight else tensor
        version = None if before is None else before._version
        out = self.hook(tensor)
        after = tensor.grad if of_weight else before if out is None else out
        self.called = True
        if after is not before:
            self.changes |= before is None or after is None or not torch.equal(before, after)
        self.changes |= before is not None and before._version != version
        if self.changes:
            self._watch.changed.add(self._name)
        return out
