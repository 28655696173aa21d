"""Number types in which small updates survive."""

import torch


def at_least_32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)
