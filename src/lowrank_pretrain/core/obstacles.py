"""Say why a linear layer's weight cannot be a target: what can be told from the layer alone, before any step."""

from typing import cast

from torch import nn
from torch.nn.parameter import is_lazy


def obstacle(layer: nn.Module) -> str | None:
    """Say why a linear layer's weight can never be a target, and the cure; ``None`` if it can.

    Frozen and tied weights are not checked here: some methods accept them (see ``targets.select``).
    """
    if bypassed(layer):
        return "belongs to nn.MultiheadAttention, which never calls it: it cannot be a target"
    if "weight" not in layer._parameters and hasattr(layer, "_plain_class"):
        return None  # factored: its weight is a product of ours
    for own in ("weight", "bias"):
        if own not in layer._parameters:
            return _computed(layer, own)
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight is None:
        return "has no weight: it cannot be a target"
    if is_lazy(weight) or (bias is not None and is_lazy(bias)):
        return "is lazy and has no shape yet: call it once (in setup or configure_model), or leave it out"
    if weight.is_complex():
        return f"is complex ({weight.dtype}): only real matrices can be targets, so leave it out"
    if getattr(layer, "_stored", None) is None and (not weight.is_floating_point() or weight.itemsize < 2):
        return f"holds {weight.dtype}: only weights of 16 bits or more can be trained, so leave it out"
    if weight.ndim != 2 or not weight.numel():
        return f"has shape {tuple(weight.shape)}: only a matrix can be a target, so leave it out"
    return None


def bypassed(layer: nn.Module) -> bool:
    """Return whether it is the ``out_proj`` of ``nn.MultiheadAttention``, whose forward is never called."""
    return isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def _computed(layer: nn.Module, own: str) -> str:
    """Say why a weight or bias is not a parameter of its layer."""
    if own in getattr(layer, "parametrizations", {}):
        each = cast(nn.ModuleDict, layer.parametrizations)[own]
        kinds = ", ".join(dict.fromkeys(type(p).__name__.strip("_") for p in each.children()))
        how, cure = f"is parametrized ({kinds})", "leave it out, or call parametrize.remove_parametrizations before the fit"
    elif f"{own}_mask" in layer._buffers:
        how, cure = "is pruned by a mask", "leave it out, or call prune.remove before the fit"
    elif f"{own}_g" in layer._parameters:
        how, cure = "has weight_norm", "leave it out, or call remove_weight_norm before the fit"
    elif f"{own}_orig" in layer._parameters:
        how, cure = "has spectral_norm", "leave it out, or call remove_spectral_norm before the fit"
    else:
        how, cure = f"has a {own} that is no parameter of its own (a view of a flat one?)", "leave it out"
    return f"{how}: its {own} is computed at every forward and cannot be a target; {cure}"
