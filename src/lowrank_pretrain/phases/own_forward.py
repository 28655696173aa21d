"""Compare a layer that has a forward of its own with an adapter and with it merged, on copies and without autograd."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.lightning_private import tree_leaves, tree_map
from lowrank_pretrain.core.targets import MatrixLayer, Target
from lowrank_pretrain.lora.layer import LoRALinear, give_adapters
from lowrank_pretrain.lora.products import Part

OTHER = "computes something else than W x + b, which an adapter cannot follow: leave it out"


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
        for each in (plain, adapted, merged):
            each.train(layer.training)  # some keep there what they computed from W
        y, with_adapter, with_merged = (_call(each, args, kwargs) for each in (plain, adapted, merged))
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
    return f"has a forward of its own ({type(layer).__name__}) and {OTHER}"


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
