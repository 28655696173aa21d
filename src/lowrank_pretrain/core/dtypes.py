"""Choose dtypes in which small updates are not lost, and know which ones a device is quick in."""

from functools import cache

import torch


def at_least_32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


@cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return True
