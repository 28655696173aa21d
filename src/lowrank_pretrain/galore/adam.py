"""Run Adam on the tensors it is given: the direction N = m̂/(√v̂ + ε) by torch's fused kernel, and the storage of moments.

``moments``: ``float32`` (float64 for float64 gradients), ``grad`` (the gradient's dtype, as the published code), ``8bit``
(block-wise codes and scales as plain tensors, by bitsandbytes), ``auto`` (``grad`` in the published mode, else float32).
The published ε is added to √v before its bias correction; torch adds it after. Dividing ε by √(1−β₂ᵗ) makes them agree.

The fused kernel walks raw memory from the first element on and checks nothing. A transposed gradient would be a wrong update;
an expanded one would be read past its end. So :func:`fit_layout` copies what does not agree with the weight in shape, layout,
dtype and device, and refuses another shape.
"""

import importlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.lightning_private import fused_adamw
from lowrank_pretrain.galore.dtensor import as_dtensor, local_piece
from lowrank_pretrain.galore.guard import has_values, wide_dtype

T = TypeVar("T")
MOMENTS = ("auto", "float32", "grad", "8bit")
BLOCK = 256  # elements per scale
SMALLEST_8BIT = 4096  # smaller tensors stay in float32, as in bitsandbytes' own optimizers: their codes would save nothing
# Bytes of gradients per call of the kernel: on a CPU as much as fits the cache, on a device enough to keep it busy.
BYTES_CPU, BYTES_DEVICE = 4 << 20, 64 << 20
_ZERO = {True: 127, False: 0}  # the code of 0, signed and unsigned
_NEAR_ZERO = {True: (123, 131), False: (0, 7)}  # the codes between which the library's CPU code looks up too coarsely
_KEYS = ("exp_avg", "exp_avg_sq")

# ---- moments: their dtype, and how they are kept --------------------------------------------------------------------------


def moment_kind(group: Mapping[str, Any]) -> str:
    """Return the group's ``moments``, ``auto`` resolved.

    Example:
        >>> moment_kind({"moments": "auto", "refresh": "svd", "rotate_moments": False})
        'grad'
    """
    if group["moments"] != "auto":
        return group["moments"]
    published = group["refresh"] == "svd" and not group["rotate_moments"]
    return "grad" if published else "float32"


def moment_dtype(group: Mapping[str, Any], grad_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of Adam's arithmetic for this group (8-bit moments are float32 while they are worked on)."""
    return grad_dtype if moment_kind(group) == "grad" else wide_dtype(grad_dtype)


def read_moments(
    state: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return first and second moment of a parameter, zeros if it has none yet.

    Unless kept in 8 bit they are the live state; ``dtype`` and ``like``'s layout are those of new ones.
    """
    if "exp_avg" not in state:
        if like is not None and like.dtype == dtype:
            return torch.zeros_like(like), torch.zeros_like(like)
        return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    if "exp_avg_scale" not in state:
        return state["exp_avg"], state["exp_avg_sq"]
    v = _decode(state["exp_avg_sq"].to(device), state["exp_avg_sq_scale"].to(device), signed=False)
    return read_first_moment(state, shape, dtype, device), v.square_().to(dtype)


def read_first_moment(state: Mapping[str, Any], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the first moment alone, for a rule that keeps no second one or another form of it."""
    if "exp_avg" not in state:
        return torch.zeros(shape, dtype=dtype, device=device)
    if "exp_avg_scale" not in state:
        return state["exp_avg"]
    return _decode(state["exp_avg"].to(device), state["exp_avg_scale"].to(device), signed=True).to(dtype)


def write_moments(state: dict[str, Any], m: Tensor, v: Tensor | None, eight_bit: bool) -> None:
    """Store the moments; in 8 bits the root of v, whose exponent range is half of v's. None: there is no v."""
    for key in _KEYS:  # left over from a larger tensor, from 8-bit moments, or from before an adoption
        state.pop(f"{key}_scale", None)
    if v is None:
        state.pop("exp_avg_sq", None)
    if eight_bit and m.numel() >= SMALLEST_8BIT:
        state["exp_avg"], state["exp_avg_scale"] = _encode(m, signed=True)
        if v is not None:
            state["exp_avg_sq"], state["exp_avg_sq_scale"] = _encode(v.sqrt(), signed=False)
    else:
        state["exp_avg"] = m
        if v is not None:
            state["exp_avg_sq"] = v


def steps_taken(state: Mapping[str, Any]) -> int:
    """Return the number of steps that a parameter has taken.

    Example:
        >>> steps_taken({}), steps_taken({"step": torch.tensor(3.0)})
        (0, 3)
    """
    return int(state["step"]) if "step" in state else 0


def count_step(state: dict[str, Any]) -> None:
    """Count one more step, in a tensor on the CPU as in torch's optimizers.

    It is float64 for any default dtype: the refreshes depend on it, and float32 stops counting at 2^24.
    """
    step = state.get("step")
    if type(step) is Tensor and step.dtype == torch.float64:  # a FakeTensor can be read until it is written to
        step.add_(1)
    else:
        state["step"] = torch.tensor(steps_taken(state) + 1.0, dtype=torch.float64, device="cpu")


# ---- the fused kernel, what it takes at once, and what it needs of its arguments ------------------------------------------


def adam_directions(
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    step: int,
    group: Mapping[str, Any],
    skip: Tensor | None = None,
    into: list[Tensor] | None = None,
    lr: float = 1.0,
) -> list[Tensor]:
    """Update the moments in place and return −lr·N for each gradient.

    Args:
        grads: gradients, of one dtype and device.
        ms: first moments; they agree with the gradients as :func:`fit_layout` makes them, and so do the others.
        vs: second moments.
        step: this step's number, from 1.
        group: its ``betas``, ``eps`` and ``correct_bias``.
        skip: device scalar, 1.0 where a gradient of this step is not finite: then the moments stay and the result is 0.
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
    # the kernel of torch.optim.AdamW(fused=True), without its overhead
    fused_adamw(
        out, grads, ms, vs, [], list(steps.unbind()), found_inf=skip,
        amsgrad=False, beta1=beta1, beta2=beta2, lr=lr, weight_decay=0.0, eps=eps, maximize=False,
    )  # fmt: skip
    return out


def bias_correction(step: int, group: Mapping[str, Any]) -> float:
    """Return the bias correction √(1−β₂ᵗ)/(1−β₁ᵗ) that N contains at step t (Nesterov: 1−β₁ᵗ⁺¹); 1 without, and for Muon.

    Example:
        >>> round(bias_correction(1, {"betas": (0.9, 0.999), "correct_bias": True}), 4)
        0.3162
    """
    beta1, beta2 = group["betas"]
    if not group["correct_bias"] or group.get("rule") == "muon":
        return 1.0
    ahead = step + 1 if group.get("nesterov") else step  # the sum of the weights of all gradients in the mixture
    return math.sqrt(1 - beta2**step) / (1 - beta1**ahead)


def decay_weights(weights: list[Tensor], group: Mapping[str, Any], skip: Tensor | None) -> None:
    """Apply the decoupled weight decay W ← W − ηλW, after the update as published, to this rank's pieces."""
    rate = float(group["lr"]) * group["weight_decay"]
    if not rate or not weights:
        return
    if skip is None:
        torch._foreach_add_(weights, weights, alpha=-rate)  # 1 - rate, rounded, would drift from the published sum
    else:
        torch._foreach_mul_(weights, 1 - rate * (1 - skip))


def split_by(items: list[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Group items with equal keys, in the order of each group's first item.

    Example:
        >>> split_by([1, 2, 3, 4], lambda i: i % 2)
        [[1, 3], [2, 4]]
    """
    found: dict[Any, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def kernel_batches(items: list[T], sizes: list[int], device: torch.device) -> Iterator[list[T]]:
    """Yield consecutive items for one call of the kernel, up to ``BYTES_CPU`` or ``BYTES_DEVICE`` in float32.

    Args:
        items: the parameters of one group, step and dtype.
        sizes: elements of what the kernel works on, for each.
        device: where they are.
    """
    limit = BYTES_CPU if device.type == "cpu" else BYTES_DEVICE
    some: list[T] = []
    size = 0
    for item, elements in zip(items, sizes, strict=True):
        some.append(item)
        size += 4 * elements
        if size >= limit:
            yield some
            some, size = [], 0
    if some:
        yield some


def row_slices(t: Tensor) -> list[Tensor]:
    """Return views of a tensor along its first dimension, none much larger than what one call of the kernel takes."""
    if t.ndim == 0 or not t.numel():
        return [t]
    rows = max(1, BYTES_DEVICE // 4 * t.shape[0] // t.numel())
    return list(t.split(rows))


def is_dense(t: Tensor) -> bool:
    """Return whether the elements fill one stretch of memory, each once, with the dimensions in any order.

    Example:
        >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(4, 3)[:, :2])
        (True, False)
    """
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def fit_layout(t: Tensor, like: Tensor, name: str, what: str) -> Tensor:
    """Return ``t`` if it agrees with the dense tensor ``like``, else a copy that does.

    Raises:
        ConfigError: another shape.
    """
    if t.shape == like.shape and t.dtype is like.dtype and t.device == like.device and not t.is_neg():
        if t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous()):  # sizes of 1 may have any stride
            return t
    check_same_shape(t, like, name, what)
    return torch.empty_like(like).copy_(t)


def check_same_shape(t: Tensor, like: Tensor, name: str, what: str) -> None:
    """Refuse a gradient or moment of another shape than the weight's.

    Raises:
        ConfigError: the parameter was resized after the optimizer was made.
    """
    if t.shape == like.shape:
        return
    raise ConfigError(
        "params", name, f"has shape {tuple(like.shape)}, but its {what} has {tuple(t.shape)}: a parameter that was resized "
        "needs a new optimizer, or no state (optimizer.state.pop(p)) and a new gradient"
    )  # fmt: skip


# ---- plain AdamW, for parameters of groups without a rank -----------------------------------------------------------------


@dataclass(slots=True)
class PlainParameter:
    """Hold a parameter of a group without a rank, in this step.

    Attributes:
        p: the parameter.
        name: for messages.
        grad: this step's gradient.
        state: its state.
    """

    p: Tensor
    name: str
    grad: Tensor
    state: dict[str, Any]

    def second_moment(self) -> Tensor | None:
        """Return v; None before the first step."""
        return self.read(local_piece(self.p), torch.float32)[1] if "exp_avg" in self.state else None

    def read(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return this rank's piece of the moments; new ones have ``dtype``, and the weight's layout if that is its dtype."""
        m, v = read_moments(self.state, weight.shape, dtype, weight.device, like=weight)
        return (m, v) if weight is self.p else (local_piece(m), local_piece(v))

    def read_as(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the moments in ``dtype`` and of the weight's shape."""
        m, v = self.read(weight, dtype)
        check_same_shape(m, weight, self.name, "first moment")
        check_same_shape(v, weight, self.name, "second moment")
        return m.to(weight.device, dtype).contiguous(), v.to(weight.device, dtype).contiguous()

    def write(self, m: Tensor, v: Tensor, eight_bit: bool, distributed: bool) -> None:
        """Store the moments, and count the step."""
        if distributed:
            m, v = as_dtensor(m, self.p, self.p.shape, 0), as_dtensor(v, self.p, self.p.shape, 0)
        write_moments(self.state, m, v, eight_bit)
        count_step(self.state)


def adamw_step(items: list[PlainParameter], group: Mapping[str, Any], skip: Tensor | None, distributed: bool) -> None:
    """Take a plain AdamW step for parameters of one group, step count and dtype.

    Args:
        items: the parameters.
        group: their group.
        skip: device scalar, 1.0 where nothing may change.
        distributed: some parameters may be DTensors.
    """
    weights, grads = [item.p for item in items], [item.grad for item in items]
    if distributed:
        weights, grads = [local_piece(w) for w in weights], [local_piece(g) for g in grads]
    step, lr = steps_taken(items[0].state) + 1, float(group["lr"])
    dtype, eight_bit = moment_dtype(group, grads[0].dtype), moment_kind(group) == "8bit"
    ms, vs = [], []
    if dtype == weights[0].dtype:  # the kernel writes into W itself, or into a dense copy of a W with gaps
        works = [w if is_dense(w) else w.clone() for w in weights]
        for i, (work, item) in enumerate(zip(works, items, strict=True)):
            grads[i] = fit_layout(grads[i], work, item.name, "gradient")
            m, v = item.read(work, dtype)
            ms.append(fit_layout(m, work, item.name, "first moment"))
            vs.append(fit_layout(v, work, item.name, "second moment"))
        adam_directions(grads, ms, vs, step, group, skip, into=works, lr=lr)
        for w, work in zip(weights, works, strict=True):
            if w is not work:
                w.copy_(work)
    else:  # W is narrower than Adam's arithmetic: by slices, so that no full float32 copy is made
        for item, weight, grad in zip(items, weights, grads, strict=True):
            check_same_shape(grad, weight, item.name, "gradient")
            m, v = item.read_as(weight, dtype)
            ms.append(m)
            vs.append(v)
        for weight, grad, m, v in zip(weights, grads, ms, vs, strict=True):
            for w, g, some_m, some_v in zip(*map(row_slices, (weight, grad, m, v)), strict=True):
                w.add_(*adam_directions([g.to(dtype).contiguous()], [some_m], [some_v], step, group, skip, lr=lr))
    for item, m, v in zip(items, ms, vs, strict=True):
        item.write(m, v, eight_bit, distributed)
    decay_weights(weights, group, skip)


# ---- memory between calls, and 8-bit codes --------------------------------------------------------------------------------


class _Scratch(threading.local):
    """Reuse memory between calls, separately per thread: two optimizers may step at the same time."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}


_scratch = _Scratch()


def _zeros(like: list[Tensor]) -> list[Tensor]:
    """Return zeros of these shapes; on the CPU in reused memory, because fresh pages cost more than Adam's arithmetic."""
    if like[0].device.type != "cpu" or not has_values(like[0]):
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in like]
    sizes = [t.numel() for t in like]
    kept = _scratch.kept.get(like[0].dtype)
    # memory made in inference mode cannot be written to outside it, nor the other way round without being recorded
    if kept is None or kept.numel() < sum(sizes) or kept.is_inference() != torch.is_inference_mode_enabled():
        kept = _scratch.kept[like[0].dtype] = torch.empty(sum(sizes), dtype=like[0].dtype, device="cpu")
    return [flat.view(t.shape) for flat, t in zip(kept[: sum(sizes)].zero_().split(sizes), like, strict=True)]


def load_bitsandbytes() -> Any:
    """Import ``bitsandbytes.functional``.

    Raises:
        ConfigError: it is not installed.
    """
    with optional_import("moments", "8bit"):
        return importlib.import_module("bitsandbytes.functional")


def _encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes in x's shape, and a scale for each block.

    On the CPU the library encodes 0, and all values under about 1e-5 of their block's largest, as 2e-5: weights that never had
    a gradient would move at full rate. Those values are looked up here.
    """
    x = x.float().contiguous()
    if not has_values(x):
        raise ConfigError("moments", "8bit", "needs numbers to encode, and meta and fake tensors have none: use float32 there")
    code = _code(signed, x.device)
    codes, scales = load_bitsandbytes().quantize_blockwise(x, code=code, blocksize=BLOCK)
    if x.device.type != "cpu":
        return codes.masked_fill_(x == 0, _ZERO[signed]), scales.absmax
    flat = codes.view(-1)
    low, high = _NEAR_ZERO[signed]
    # in numpy, many times faster on bytes; codes below `low` wrap to large values
    found = torch.from_numpy(np.flatnonzero(flat.numpy() - np.uint8(low) <= high - low))
    if found.numel():
        share = x.view(-1)[found] / scales.absmax[found // BLOCK].clamp_min(torch.finfo(x.dtype).tiny)
        flat[found] = torch.bucketize(share, (code[1:] + code[:-1]) / 2).to(codes.dtype)
    return codes, scales.absmax


def _decode(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    return load_bitsandbytes().dequantize_blockwise(codes, absmax=scales, code=_code(signed, codes.device), blocksize=BLOCK)


_codes: dict[tuple[bool, torch.device], Tensor] = {}


def _code(signed: bool, device: torch.device) -> Tensor:
    if (signed, device) not in _codes:
        with torch.device("cpu"):  # for any default device of the process
            _codes[signed, device] = load_bitsandbytes().create_dynamic_map(signed=signed).to(device)
    return _codes[signed, device]
