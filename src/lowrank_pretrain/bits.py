"""Tell by a tensor's bits, in one pass over it, whether anyone has written into it."""

import torch
from torch import Tensor

_HALVES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def stamp(tensor: Tensor) -> Tensor:
    """Return a 64-bit integer of a tensor's bits, on its device: one pass, by row, weighted by the row's number."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_contiguous():
        tensor = tensor.t() if tensor.ndim == 2 and tensor.t().is_contiguous() else tensor.contiguous()
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    width, offset = rows.shape[1] * rows.itemsize, rows.storage_offset() * rows.itemsize
    # of two 64-bit numbers changed signs would cancel modulo 2⁶⁴: doubles are read as halves
    whole = width % 8 == 0 and offset % 8 == 0 and rows.itemsize < 8
    bits = rows.view(torch.int64 if whole else _HALVES[rows.itemsize])
    sums = bits.sum(1, dtype=torch.int64)
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()
