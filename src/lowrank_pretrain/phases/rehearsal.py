"""Check every target in the first training step, so that problems do not show up days later at the switch.

An adapter adds B A x where its layer is *called*. So a layer that is never called gives a dead adapter; a weight that is also
used somewhere else (``x @ fc.weight``) makes the merged model differ from the trained one; so does a class that computes
something else than W x + b. All three are seen in one step:

* hooks on the targets say which were called;
* a ``TorchFunctionMode`` sees the targets' weights in products outside of their layer. A penalty (``weight.pow(2).sum()``) is
  no such use;
* after backward, a weight that has a gradient though its layer was not called (and no penalty explains it) was used outside;
* a layer whose class has its own forward is called three times more, on copies, without autograd and with the random
  state restored: with W, with an adapter, and with the adapter merged.

Nothing of this changes a number of the training, and nothing is left after the step, but for one hook on each layer that was
not called yet: one step is no evidence against a layer (experts, LayerDrop, one task a batch). That hook removes itself.

Code under ``torch.compile`` is not watched (hooks and modes would be compiled in): its layers count as called.
Pure torch: ``start``, ``forward`` around each training forward, ``after_backward`` before the optimizer's step, ``finish``.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.lightning_private import (
    is_compiled,
    is_compiled_whole,
    is_traced,
    runs_compiled,
    transforms_active,
    tree_leaves,
)
from lowrank_pretrain.core.targets import MatrixLayer, Target
from lowrank_pretrain.lora.layer import has_own_forward
from lowrank_pretrain.phases.own_forward import OTHER, differs

_PRODUCTS = {
    "linear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "inner", "outer",
    "dot", "vdot", "bilinear", "multi_dot", "chain_matmul", "kron", "cdist", "cosine_similarity", "embedding", "embedding_bag",
    "index_select", "gather", "take", "take_along_dim", "conv1d", "conv2d", "conv3d", "multi_head_attention_forward",
    "scaled_dot_product_attention",
}  # fmt: skip
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "radd", "rsub", "rmul", "rtruediv", "multiply", "subtract", "divide"}
_CALLS = ("forward", "_call_impl", "_wrapped_call_impl")
_FOLLOWED = _PRODUCTS | _ARITHMETIC | {
    "t", "transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "contiguous",
    "clone", "to", "type", "type_as", "half", "bfloat16", "float", "double", "cat", "concat", "stack", "chunk", "split",
    "unbind", "narrow", "select", "getitem", "normalize", "dropout", "where", "masked_fill", "neg", "alias", "view_as", "get",
    "rearrange", "movedim", "swapaxes", "mT", "T",
}  # fmt: skip


_LOOKED_UP = "the step asks torch.autograd.grad for its gradient, which a frozen weight or a factor has not: leave it out"
_VALIDATED = (
    "its weight is also used outside of its layer in validation, where an adapter has no effect: leave it out, or call the "
    "layer there"
)


class Rehearsal:
    """Watch targets through one training step, and through any further step or batch of validation.

    Args:
        module: names of the targets count from it.
        targets: by name.
        adapters: check that layers with their own forward compute the same with an adapter and merged.
    """

    def __init__(self, module: nn.Module, targets: Mapping[str, Target], adapters: bool = True) -> None:
        self.targets = dict(targets)
        self.layers: dict[str, MatrixLayer] = {target.layer_name: target.layer for target in targets.values()}
        compiled = compiled_parts(module)
        self.watched = {name: layer for name, layer in self.layers.items() if id(layer) not in compiled}
        # an output head may share its weight with an embedding: as a target it comes untied, so that is no use of it elsewhere
        weights = {id(layer.weight): name for name, layer in self.layers.items()}
        self._sharing: dict[str, list[nn.Module]] = {}
        for child in module.modules():
            name = weights.get(id(child._parameters.get("weight")))
            if name is not None and child is not self.layers[name]:
                self._sharing.setdefault(name, []).append(child)
        self._adapters = adapters
        # a mode would be compiled in, or would take nn.MultiheadAttention in eval off its fast path
        fast = [child for child in module.modules() if isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer))]
        self._has_mode = not compiled and all(child.training for child in fast)
        self._has_mode_in_eval = not compiled and not fast
        self.called = {name for name in self.layers if name not in self.watched}
        self.elsewhere: set[str] = set()  # in a product outside of its layer
        self.touched: set[str] = set()  # in any other operation outside of its layer
        self.asked: set[str] = set()  # for the dtype of its weight, outside of its layer
        self.has_grad: set[str] = set()
        self.finite: dict[str, Tensor] = {}  # layer name -> whether all of the first input is finite, on the device
        self.other: dict[str, str] = {}  # layer name -> what its class computes
        self.compared: set[str] = set()  # in eval mode, with an adapter
        self._handles: dict[str, list[Any]] = {}

    def start(self) -> None:
        """Begin to watch."""
        for name, layer in self.watched.items():
            if "forward" in layer.__dict__:
                self.other[name] = "has a forward that was replaced on the layer itself, and would never call an adapter"
            self._handles[name] = [layer.register_forward_pre_hook(_Seen(self, name), with_kwargs=True)]
            if self._adapters and has_own_forward(layer):
                self._handles[name].append(layer.register_forward_pre_hook(_Compare(self, name), with_kwargs=True))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Watch what a forward pass does with the targets' weights."""
        if self._has_mode:
            with _Outside(self):
                yield
        else:
            yield

    @contextmanager
    def validation(self) -> Iterator[None]:
        """Watch what a step of validation does with the targets' weights. It has no autograd, so each use counts."""
        own = [(name, layer) for name, layer in self.watched.items() if self._adapters and has_own_forward(layer)]
        handles = [layer.register_forward_pre_hook(_CompareInEval(self, name), with_kwargs=True) for name, layer in own]
        try:
            with _Outside(self, validates=True) if self._has_mode_in_eval else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def compare(self, name: str, args: tuple, kwargs: dict) -> None:
        """Note whether a layer with its own forward computes the same with an adapter and merged."""
        layer = self.layers[name]
        reason = differs(layer, [target for target in self.targets.values() if target.layer is layer], args, kwargs)
        if reason is not None:
            self.other[name] = reason

    def after_backward(self) -> None:
        """Note which layers have a gradient without having been called. Before the gradients are dropped."""
        for name, layer in self.layers.items():
            grad = layer.weight.grad
            if name not in self.called and grad is not None and grad.any():
                self.has_grad.add(name)

    def evidence(self) -> list[list[int]]:
        """Return per layer: called, in a product elsewhere, touched elsewhere, has a gradient, computes something else.

        With several processes, take the maximum over all of them, and pass it to ``finish``.
        """
        sets = (self.called, self.elsewhere, self.touched, self.has_grad, self.other)
        return [[int(name in seen) for seen in sets] for name in self.layers]

    def finish(self, evidence: list[list[int]] | None = None) -> dict[str, str]:
        """Stop watching all but layers that have not been called yet.

        May be called again, after unseen layers were called.

        Args:
            evidence: of all processes; default: this one's.

        Returns:
            Why a target cannot have an adapter, by name of the target.
        """
        reasons: dict[str, str] = {}
        for name, found in zip(self.layers, evidence or self.evidence(), strict=True):
            called, elsewhere, touched, has_grad, other = found
            if called:
                self.called.add(name)
            if other:
                reasons[name] = self.other.get(name, OTHER)
            elif elsewhere and called:
                reasons[name] = (
                    "its weight is also used outside of its layer, where an adapter has no effect: leave it out, or call the "
                    "layer there"
                )
            elif not called and (elsewhere or (has_grad and not touched)):
                reasons[name] = (
                    "is never called: its weight is used outside of it, where an adapter has no effect. Leave it out, or call "
                    "the layer"
                )
            for handle in self._handles.pop(name, []) if called or name in reasons else ():
                handle.remove()
        return {name: reasons[target.layer_name] for name, target in self.targets.items() if target.layer_name in reasons}

    def broken(self) -> str | None:
        """Return the first layer whose input and whose weight's gradient hold NaN or infinite numbers, after backward."""
        for name, finite in self.finite.items():
            grad = self.layers[name].weight.grad
            if not bool(finite) and grad is not None and not bool(torch.isfinite(grad).all()):
                return name
        return None

    def unseen(self) -> list[str]:
        """Return the targets whose layers have not been called so far."""
        return [name for name, target in self.targets.items() if target.layer_name not in self.called]

    def stop(self) -> None:
        """Stop watching."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self._handles.clear()


class Hook:
    """Define a hook that copies and pickles of the layer drop."""

    def __init__(self, watcher: Any, name: str) -> None:
        self._watcher, self._name = weakref.ref(watcher), name

    def __deepcopy__(self, memo: dict) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple:
        return _inert, ()


def _nothing(*_: Any) -> None:
    """Do nothing, in a copied layer, instead of a hook."""


def _inert() -> Callable[..., None]:
    return _nothing


class _Seen(Hook):
    """Note that the layer was called, once."""

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        rehearsal = self._watcher()
        if rehearsal is None:
            return
        rehearsal.called.add(self._name)
        if not torch.compiler.is_compiling():  # a compiled method calls the layer: the rest cannot be compiled in
            x = args[0] if args else next(iter(kwargs.values()), None)
            if (
                isinstance(x, Tensor)
                and x.is_floating_point()
                and not x.is_nested
                and not transforms_active()
                and not is_traced()
            ):
                rehearsal.finite.setdefault(self._name, torch.isfinite(x.detach()).all())
            if len(rehearsal._handles.get(self._name, ())) == 1:
                rehearsal._handles.pop(self._name)[0].remove()


class _Compare(Hook):
    """Compare, at the first call of a layer with its own forward, its outputs with an adapter and with it merged."""

    def __call__(self, layer: MatrixLayer, args: tuple, kwargs: dict) -> None:
        rehearsal = self._watcher()
        if rehearsal is None or self._name not in rehearsal._handles or torch.compiler.is_compiling():
            return
        for handle in rehearsal._handles.pop(self._name):
            handle.remove()
        rehearsal.compare(self._name, args, kwargs)


class _CompareInEval(Hook):
    """Compare likewise at a layer's first call in validation: some keep there what they computed from W before."""

    def __call__(self, layer: MatrixLayer, args: tuple, kwargs: dict) -> None:
        rehearsal = self._watcher()
        if rehearsal is None or torch.compiler.is_compiling():
            return
        if self._name not in rehearsal.compared and self._name not in rehearsal.other:
            rehearsal.compared.add(self._name)
            rehearsal.compare(self._name, args, kwargs)


class _Outside(TorchFunctionMode):
    """Follow the targets' weights, and tensors computed from them, through operations outside of their layers."""

    def __init__(self, rehearsal: Rehearsal, validates: bool = False) -> None:
        super().__init__()
        self.rehearsal, self._validates = rehearsal, validates
        self._of: dict[int, tuple[weakref.ref, frozenset[str]]] = {}  # id of a tensor -> itself, and of which layers it is
        for name, layer in rehearsal.watched.items():
            self._add(layer.weight, frozenset({name}))

    def _add(self, tensor: Tensor, names: frozenset[str]) -> None:
        known = self._of.get(id(tensor))
        if known is not None and known[0]() is tensor:
            names = names | known[1]
        self._of[id(tensor)] = weakref.ref(tensor), names

    def _layers(self, tensor: Tensor) -> frozenset[str]:
        found = self._of.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else frozenset()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.autograd.grad and not torch.compiler.is_compiling():
            self._look_up(args[1] if len(args) > 1 else (kwargs or {}).get("inputs"))
        out = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self._look(func, args, kwargs, out)
        return out

    def _look_up(self, inputs: Any) -> None:
        """Note whose gradient is asked for by name (GradNorm, MAML): once W is frozen, torch refuses that.

        Raises:
            ConfigError: it is frozen already, beneath an adapter.
        """
        for tensor in tree_leaves(inputs):
            for name in self._layers(tensor) if isinstance(tensor, Tensor) else ():
                self.rehearsal.other.setdefault(name, _LOOKED_UP)
                if not tensor.requires_grad:
                    raise ConfigError("targets", name, _LOOKED_UP)

    def _look(self, func: Any, args: tuple, kwargs: dict | None, out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = frozenset().union(*(self._layers(tensor) for tensor in tensors)) if tensors else frozenset()
        if not names:
            return
        if getattr(func, "__self__", None) is Tensor.dtype:
            self.rehearsal.asked |= {name for name in names if not self._is_inside(name)}
        word = getattr(func, "__name__", "").strip("_")
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not made or word in ("set", "requires_grad") or func is torch.autograd.grad:
            return
        names -= {name for name in names if self._is_inside(name)}
        if not names:
            return
        others = [t for t in tensors if t.ndim and not self._layers(t) and not isinstance(t, nn.Parameter)]
        mine = max(t.numel() for t in tensors if self._layers(t))
        indexed = word == "getitem" and any(not t.is_floating_point() and t.dtype != torch.bool for t in others)
        wider = word in _ARITHMETIC and max(t.numel() for t in made) > mine
        meets_data = bool(others) and (word in _PRODUCTS or indexed or wider)
        if self._validates:
            self.rehearsal.other |= {name: _VALIDATED for name in names if meets_data and name not in self.rehearsal.other}
        elif torch.is_grad_enabled() or in_autograd_function():  # else it is looked at, and adds nothing to the loss
            (self.rehearsal.elsewhere if meets_data else self.rehearsal.touched).update(names)
        if word in _FOLLOWED and not meets_data:
            for tensor in made:
                if tensor.is_floating_point() and tensor.ndim:
                    self._add(tensor, names)

    def _is_inside(self, name: str) -> bool:
        """Return whether the layer's own forward is running, that of a layer that its weight is tied to, or compiled code."""
        layer, sharing = self.rehearsal.layers[name], self.rehearsal._sharing.get(name, ())
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if runs_compiled(frame):
                return True  # its graph has no frames of layers
            if frame.f_code.co_name in _CALLS:
                running = frame.f_locals.get("self")
                if running is layer:
                    if not self._validates:
                        self.rehearsal.called.add(name)
                    return True
                if any(running is other for other in sharing):
                    return True
            frame = frame.f_back
        return False


def in_autograd_function() -> bool:
    """Return whether the forward of an ``autograd.Function`` is running, inside which autograd is off."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), FunctionCtx):
            return True
        frame = frame.f_back
    return False


def compiled_parts(module: nn.Module) -> set[int]:
    """Return the ids of all modules that are compiled, or inside of one that is."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return set()
    found: set[int] = set()
    for child in module.modules():
        if is_compiled_whole(child) or is_compiled(child):
            found |= {id(part) for part in child.modules()}
    return found
