"""Count the floating-point operations of a batch: once, during a real batch, without estimates."""

import math
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule
from torch.utils.flop_counter import flop_registry, shape_wrapper

from lowrank_pretrain.core.lightning_private import TorchDispatchMode, is_compiled

# Lightning's words for a precision -> the dtype that its matrix products run in
DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}


def _product(added: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """Count the operations of (…, m, k) times (…, k, n), from shapes."""
    return 2 * math.prod(a) * b[-1]


# torch knows addmm and baddbmm, but not their forms in place, which adapters use
IN_PLACE = {torch.ops.aten.addmm_: shape_wrapper(_product), torch.ops.aten.baddbmm_: shape_wrapper(_product)}


class _Counter(TorchDispatchMode):
    """Sum torch's own formulas.

    Torch's FlopCounterMode also decomposes operations for which it has none, such as silu's backward. This changed bits of a
    gradient, and a resumed run no longer equalled the uninterrupted one.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", func)
        formula = IN_PLACE.get(packet) or flop_registry.get(packet)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


class FlopCount:
    """Count the matrix products, convolutions and attention of one forward and backward pass.

    Between `begin` and `end` every operation is looked up in torch's own formulas, which costs a few tens of
    microseconds each and changes no number. So it is done once per phase. Recomputed activations count as often as they
    are computed.
    """

    def __init__(self) -> None:
        self._counter: _Counter | None = None

    def begin(self, module: LightningModule) -> None:
        """Count from here on, unless `module` is one whose operations the counter cannot see one by one."""
        if self._counter is None and _visible(module):
            self._counter = _Counter()
            self._counter.__enter__()

    def end(self) -> int | None:
        """Stop, and return the operations since `begin`, or None if nothing was counted."""
        counter, self._counter = self._counter, None
        if counter is None:
            return None
        counter.__exit__(None, None, None)
        return counter.total or None


def _visible(module: LightningModule) -> bool:
    """Return False for compiled modules (their kernels are not torch operations) and sharded ones (sizes are the whole's)."""
    if any(is_compiled(m) for m in module.modules()):
        return False
    return not any(hasattr(p, "to_local") for p in module.parameters())


def peak_flops(device: torch.device, precision: str) -> int | None:
    """Return the chip's operations per second at a precision, by its maker; None if Lightning does not know the chip.

    Args:
        device: a CPU is never known.
        precision: the Trainer's, e.g. ``"bf16-mixed"``.
    """
    dtype = DTYPES.get(str(precision).split("-")[0])
    return None if device.type == "cpu" or dtype is None else get_available_flops(device, dtype)
