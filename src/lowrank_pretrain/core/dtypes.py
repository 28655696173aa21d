"""Choose dtypes in which small updates are not lost."""

import torch


def at_least_32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for the half precisions, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)
