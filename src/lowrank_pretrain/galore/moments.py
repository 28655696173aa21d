"""Adam on whatever it is given: the direction N = m̂/(√v̂ + ε) by torch's fused kernel, and how moments are kept.

``moments``: ``float32`` (float64 for float64 gradients), ``grad`` (the gradient's dtype, as the published code), ``8bit``
(block-wise codes and scales as plain tensors, by bitsandbytes), ``auto`` (``grad`` in the published mode, else float32).
The published ε is added to √v before its bias correction; torch adds it after. Dividing ε by √(1−β₂ᵗ) makes them agree.
"""

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.galore.dtensor import local
from lowrank_pretrain.galore.surroundings import has_values

MOMENTS = ("auto", "float32", "grad", "8bit")
BLOCK = 256  # elements per scale
_ZERO = {True: 127, False: 0}  # the code of 0, signed and unsigned
_NEAR_ZERO = {True: (123, 131), False: (0, 7)}  # the codes between which the library's CPU code looks up too coarsely
_KEYS = ("exp_avg", "exp_avg_sq")
SMALLEST = 4096  # smaller tensors stay in float32, as in bitsandbytes' own optimizers: their codes would save nothing


def kind(group: dict[str, Any]) -> str:
    """The group's ``moments``, ``auto`` resolved."""
    if group["moments"] != "auto":
        return group["moments"]
    published = group["refresh"] == "svd" and not group["rotate_moments"]
    return "grad" if published else "float32"


def moment_dtype(group: dict[str, Any], grad_dtype: torch.dtype) -> torch.dtype:
    """Number format that Adam's arithmetic has for this group (8-bit moments are float32 while they are worked on)."""
    return grad_dtype if kind(group) == "grad" else at_least_32(grad_dtype)


def read(
    state: dict[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return first and second moment of a parameter, zeros if it has none yet.

    Unless kept in 8 bit they are the live state; ``dtype`` and ``like``'s layout are those of new ones.
    """
    if "exp_avg" not in state:
        if like is not None and like.dtype == dtype:
            return torch.zeros_like(like), torch.zeros_like(like)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    if "exp_avg_scale" not in state:
        return local(state["exp_avg"]), local(state["exp_avg_sq"])
    m, v = (
        _decode(state[key].to(device), state[f"{key}_scale"].to(device), signed)
        for key, signed in zip(_KEYS, (True, False), strict=True)
    )
    return m.to(dtype), v.square_().to(dtype)


def write(state: dict[str, Any], m: Tensor, v: Tensor, eight_bit: bool) -> None:
    """Keep the moments; in 8 bit the root of v, whose range the code spans twice as well as v's."""
    if eight_bit and m.numel() >= SMALLEST:
        state["exp_avg"], state["exp_avg_scale"] = _encode(m, signed=True)
        state["exp_avg_sq"], state["exp_avg_sq_scale"] = _encode(v.sqrt(), signed=False)
    else:
        state["exp_avg"], state["exp_avg_sq"] = m, v
        for key in _KEYS:  # left over from a larger tensor, or from 8-bit moments
            state.pop(f"{key}_scale", None)


def steps_taken(state: Mapping[str, Any]) -> int:
    """Return how many steps a parameter has taken."""
    return int(state["step"]) if "step" in state else 0


def count(state: dict[str, Any]) -> None:
    """Count one more step, in a tensor on the CPU as in torch's optimizers.

    In float64 whatever the process' default: the refreshes go by this number, and float32 stops counting at 2^24.
    """
    step = state.get("step")
    if type(step) is Tensor and step.dtype == torch.float64:  # a FakeTensor can be read until it is written to
        step.add_(1)
    else:
        state["step"] = torch.tensor(steps_taken(state) + 1.0, dtype=torch.float64, device="cpu")


def directions(
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    step: int,
    group: dict[str, Any],
    skip: Tensor | None = None,
    into: list[Tensor] | None = None,
    lr: float = 1.0,
) -> list[Tensor]:
    """Update the moments in place and return −lr·N for each gradient.

    Args:
        grads: gradients, of one dtype and device.
        ms: first moments; they agree with the gradients as ``layout.fit`` has it, and so do the others.
        vs: second moments.
        step: this step's number, from 1.
        group: its ``betas``, ``eps`` and ``correct_bias``.
        skip: device scalar, 1.0 where a gradient of this step is not finite: then moments stay and 0 is returned.
        into: tensors to which −lr·N is added instead (parameters of that dtype).
        lr: factor.

    Returns:
        ``into``, or tensors that the next call of this thread may overwrite.
    """
    beta1, beta2 = group["betas"]
    correct = group["correct_bias"]
    out = _zeros(grads) if into is None else into
    # without bias correction the step is a number so large that 1−βᵗ is 1
    steps = torch.full((len(grads),), float(step) if correct else 1e9, dtype=torch.float32, device=grads[0].device)
    eps = group["eps"] / math.sqrt(1 - beta2**step) if correct else group["eps"]
    # the kernel of torch.optim.AdamW(fused=True), without what is around it there
    torch._fused_adamw_(
        out, grads, ms, vs, [], list(steps.unbind()), found_inf=skip,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False,
    )  # fmt: skip
    return out


def correction(step: int, group: dict[str, Any]) -> float:
    """Bias correction √(1−β₂ᵗ)/(1−β₁ᵗ) that N contains at step t; 1 without."""
    beta1, beta2 = group["betas"]
    return math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["correct_bias"] else 1.0


class _Scratch(threading.local):
    """Memory kept from call to call, for each thread its own: two optimizers may step at the same time."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def _zeros(like: list[Tensor]) -> list[Tensor]:
    """Zeros of these shapes. On the CPU in memory kept from call to call: fresh pages cost more than Adam's arithmetic."""
    if like[0].device.type != "cpu" or not has_values(like[0]):
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in like]
    sizes = [t.numel() for t in like]
    kept = _scratch.kept.get(like[0].dtype)
    # memory made in inference mode cannot be written to outside it, nor the other way round without a trace
    if kept is None or kept.numel() < sum(sizes) or kept.is_inference() != torch.is_inference_mode_enabled():
        kept = _scratch.kept[like[0].dtype] = torch.empty(sum(sizes), dtype=like[0].dtype, device="cpu")
    return [flat.view(t.shape) for flat, t in zip(kept[: sum(sizes)].zero_().split(sizes), like, strict=True)]


def bitsandbytes() -> Any:
    """``bitsandbytes.functional``; raises ``ConfigError`` with the cure where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError:
        raise ConfigError("moments", "8bit", "needs bitsandbytes: pip install bitsandbytes") from None


def _encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes in x's shape, and a scale for each block.

    On the CPU the library takes 0, and all that is less than about 1e-5 of its block, for 2e-5: weights that never had a
    gradient would move at full rate. Those are looked up here.
    """
    x = x.float().contiguous()
    if not has_values(x):
        raise ConfigError("moments", "8bit", "needs numbers to encode, and meta and fake tensors have none: use float32 there")
    code = _code(signed, x.device)
    codes, scales = bitsandbytes().quantize_blockwise(x, code=code, blocksize=BLOCK)
    if x.device.type != "cpu":
        return codes.masked_fill_(x == 0, _ZERO[signed]), scales.absmax
    flat = codes.view(-1)
    low, high = _NEAR_ZERO[signed]
    # by numpy, many times quicker on bytes; what is below `low` wraps to far above
    found = torch.from_numpy(np.flatnonzero(flat.numpy() - np.uint8(low) <= high - low))
    if found.numel():
        share = x.view(-1)[found] / scales.absmax[found // BLOCK].clamp_min(torch.finfo(x.dtype).tiny)
        flat[found] = torch.bucketize(share, (code[1:] + code[:-1]) / 2).to(codes.dtype)
    return codes, scales.absmax


def _decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    return bitsandbytes().dequantize_blockwise(codes, absmax=scales, code=_code(signed, codes.device), blocksize=BLOCK)


_codes: dict[tuple[bool, torch.device], Tensor] = {}


def _code(signed: bool, device: torch.device) -> Tensor:
    if (signed, device) not in _codes:
        with torch.device("cpu"):  # whatever the process' default device is
            _codes[signed, device] = bitsandbytes().create_dynamic_map(signed=signed).to(device)
    return _codes[signed, device]
