"""How many floating-point operations a batch takes: counted once, while a real batch passes, and never estimated."""

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule
from torch.utils.flop_counter import FlopCounterMode

# Lightning's words for a precision -> the dtype that its matrix products run in
DTYPES = {"32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16, "64": torch.float64}


class FlopCount:
    """Counts the matrix products, convolutions and attention of one forward and backward pass.

    Between `begin` and `end` every operation passes through torch's own counter, which costs a few tens of
    microseconds each and changes no number. So it is done once per phase. Recomputed activations count as often as they
    are computed.
    """

    def __init__(self) -> None:
        self._counter: FlopCounterMode | None = None

    def begin(self, module: LightningModule) -> None:
        """Count from here on, unless `module` is one whose operations the counter cannot see one by one."""
        if self._counter is None and _visible(module):
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def end(self) -> int | None:
        """Stop; the operations since `begin`, or None where nothing was counted."""
        counter, self._counter = self._counter, None
        if counter is None:
            return None
        counter.__exit__(None, None, None)
        return counter.get_total_flops() or None


def _visible(module: LightningModule) -> bool:
    """False for compiled modules (their kernels are no torch operations) and for sharded ones (sizes are the whole's)."""
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules()):
        return False
    return not any(hasattr(p, "to_local") for p in module.parameters())


def peak_flops(device: torch.device, precision: str) -> int | None:
    """What the chip could do per second at this precision by its maker's word; None where Lightning does not know the chip.

    Args:
        device: a CPU is never known.
        precision: the Trainer's, e.g. ``"bf16-mixed"``.
    """
    dtype = DTYPES.get(str(precision).split("-")[0])
    return None if device.type == "cpu" or dtype is None else get_available_flops(device, dtype)
