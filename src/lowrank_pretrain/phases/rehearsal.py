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

import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.lightning_private import (
    is_compiled,
    is_compiled_whole,
    is_traced,
    runs_compiled,
    transforms_active,
    tree_leaves,
    tree_map,
)
from lowrank_pretrain.core.targets import MatrixLayer, Target
from lowrank_pretrain.lora.layer import LoRALinear, give_adapters, has_own_forward
from lowrank_pretrain.lora.products import Part

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


class Rehearsal:
    """Watch targets through one training step.

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
        self._has_mode = not compiled and not any(
            isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) and not child.training
            for child in module.modules()
        )
        self.called = {name for name in self.layers if name not in self.watched}
        self.elsewhere: set[str] = set()  # in a product outside of its layer
        self.touched: set[str] = set()  # in any other operation outside of its layer
        self.asked: set[str] = set()  # for the dtype of its weight, outside of its layer
        self.has_grad: set[str] = set()
        self.finite: dict[str, Tensor] = {}  # layer name -> whether all of the first input is finite, on the device
        self.other: dict[str, str] = {}  # layer name -> what its class computes
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
                reasons[name] = self.other.get(name, _OTHER)
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


_OTHER = "computes something else than W x + b, which an adapter cannot follow: leave it out"


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
        targets = [target for target in rehearsal.targets.values() if target.layer is layer]
        reason = differs(layer, targets, args, kwargs)
        if reason is not None:
            rehearsal.other[self._name] = reason


class _Outside(TorchFunctionMode):
    """Follow the targets' weights, and tensors computed from them, through operations outside of their layers."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        super().__init__()
        self.rehearsal = rehearsal
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
        out = func(*args, **(kwargs or {}))
        if not torch.compiler.is_compiling():
            self._look(func, args, kwargs, out)
        return out

    def _look(self, func: Any, args: tuple, kwargs: dict | None, out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = frozenset().union(*(self._layers(tensor) for tensor in tensors)) if tensors else frozenset()
        if not names:
            return
        if getattr(func, "__self__", None) is Tensor.dtype:
            self.rehearsal.asked |= {n for n in names if not _inside(self.rehearsal.layers[n], self.rehearsal, n)}
        word = getattr(func, "__name__", "").strip("_")
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not made or word in ("set", "requires_grad"):
            return
        names -= {name for name in names if _inside(self.rehearsal.layers[name], self.rehearsal, name)}
        if not names:
            return
        others = [t for t in tensors if t.ndim and not self._layers(t) and not isinstance(t, nn.Parameter)]
        mine = max(t.numel() for t in tensors if self._layers(t))
        indexed = word == "getitem" and any(not t.is_floating_point() and t.dtype != torch.bool for t in others)
        wider = word in _ARITHMETIC and max(t.numel() for t in made) > mine
        meets_data = bool(others) and (word in _PRODUCTS or indexed or wider)
        if torch.is_grad_enabled() or in_autograd_function():  # else it is looked at, and adds nothing to the loss
            (self.rehearsal.elsewhere if meets_data else self.rehearsal.touched).update(names)
        if word in _FOLLOWED and not meets_data:
            for tensor in made:
                if tensor.is_floating_point() and tensor.ndim:
                    self._add(tensor, names)


def _inside(layer: MatrixLayer, rehearsal: Rehearsal, name: str) -> bool:
    """Return whether the layer's own forward is running, that of a layer that its weight is tied to, or compiled code."""
    sharing = rehearsal._sharing.get(name, ())
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if runs_compiled(frame):
            return True  # a compiled function: its graph has no frames of layers
        if frame.f_code.co_name in _CALLS:
            running = frame.f_locals.get("self")
            if running is layer:
                rehearsal.called.add(name)
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


@torch.no_grad()
def differs(layer: MatrixLayer, targets: list[Target], args: tuple, kwargs: dict) -> str | None:
    """Return why a layer with an adapter computes something other than with the adapter merged.

    Args:
        layer: plain, or with adapters; not changed.
        targets: its own.
        args: what it is called with.
        kwargs: likewise.

    Returns:
        The reason, or ``None``.
    """
    try:
        copied = _copy(layer)
        if not isinstance(copied, LoRALinear):
            give_adapters(copied, [(target, 1) for target in targets], None, True, seed=0)
        adapted = cast(LoRALinear, copied)
        for part in adapted._parts:
            _draw(adapted, part)
        merged, plain = _copy(layer), _copy(layer)
        merged.weight.copy_(adapted.merged_weight())
        y, with_adapter, with_merged = (_call(copied, args, kwargs) for copied in (plain, adapted, merged))
        dtypes = {tensor.dtype for tensor in y}
        effect = sum(_norm(b.float() - a.float()) for a, b in zip(y, with_merged, strict=True))
        off = sum(_norm(b.float() - a.float()) for a, b in zip(with_adapter, with_merged, strict=True))
        size = sum(_norm(a.float()) for a in with_merged)
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        return f"has a forward of its own, which failed with an adapter ({first[:120]}): leave it out"
    rounding = max(torch.finfo(dtype).eps for dtype in (layer.weight.dtype, *dtypes))
    if off <= 0.05 * effect + 4 * rounding * size:
        return None
    return f"has a forward of its own ({type(layer).__name__}) and {_OTHER}"


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _draw(layer: LoRALinear, part: Part) -> None:
    """Give a part a B with which its update is a third of W."""
    B, A = layer.lora_B[part.name], layer.lora_A[part.a : part.a + part.rank]
    B.copy_(torch.randn(B.shape, generator=generator("rehearsal", part.name, seed=0)))
    weight = torch.linalg.vector_norm(layer.weight.float()) / layer.weight.numel() ** 0.5
    update = torch.linalg.vector_norm((B @ A).float()) / (part.rows * A.shape[1]) ** 0.5
    B.mul_((0.3 * weight if weight > 0 else 1.0) / (part.scale * update).clamp_min(1e-12))


def _copy(layer: MatrixLayer) -> MatrixLayer:
    """Return a layer of the same class with its own tensors and without hooks."""
    twin = copy.copy(layer)
    for kind in ("_parameters", "_buffers"):
        own = {}
        for name, tensor in layer.__dict__[kind].items():
            if tensor is not None:
                tensor = tensor.detach().clone()
                tensor = nn.Parameter(tensor, requires_grad=False) if kind == "_parameters" else tensor
            own[name] = tensor
        twin.__dict__[kind] = own
    twin.__dict__["_modules"] = {name: copy.deepcopy(child) for name, child in layer._modules.items()}
    for name, held in layer.__dict__.items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(held, dict):
            twin.__dict__[name] = type(held)()
    return twin


def _call(layer: nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the layer's floating outputs for copies of its arguments; the random state is restored."""
    args, kwargs = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, (args, kwargs))
    devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        out = layer.forward(*args, **kwargs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def compiled_parts(module: nn.Module) -> set[int]:
    """Return the ids of all modules that are compiled, or inside of one that is."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return set()
    found: set[int] = set()
    for child in module.modules():
        if is_compiled_whole(child) or is_compiled(child):
            found |= {id(part) for part in child.modules()}
    return found
