"""Detect from a tensor's bits, in one pass, that something has written into it."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def stamp(tensor: Tensor) -> Tensor:
    """Return a 64-bit fingerprint of a tensor's bits, on its device: row sums weighted by row number."""
    return stamps([tensor])[0]


def stamps(tensors: Sequence[Tensor]) -> Tensor:
    """Return every tensor's stamp, (n,), on the first one's device, in one pass over each and few other calls."""
    device = tensors[0].device
    sums = [_row_sums(t) for t in tensors]
    if any(s.device != device for s in sums):
        sums = [s.to(device) for s in sums]
    owner, weight = _places(tuple(len(s) for s in sums), device)
    weighted = torch.cat(sums).mul_(weight)
    return torch.zeros(len(sums), dtype=torch.int64, device=device).index_add_(0, owner, weighted)


def _row_sums(tensor: Tensor) -> Tensor:
    """Return the sum of each row's bits, read as 64-bit numbers where the row length allows it."""
    tensor = tensor.detach()
    if not tensor.numel():
        return torch.zeros(1, dtype=torch.int64, device=tensor.device)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_contiguous():
        tensor = tensor.t() if tensor.ndim == 2 and tensor.t().is_contiguous() else tensor.contiguous()
    if tensor.ndim != 2:
        tensor = tensor.reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1)
    size = tensor.itemsize
    # read doubles as halves: two changed signs would cancel modulo 2⁶⁴ in 64-bit numbers
    whole = size < 8 and tensor.shape[1] * size % 8 == 0 and tensor.storage_offset() * size % 8 == 0
    return tensor.view(torch.int64 if whole else _INTEGERS[size]).sum(1, dtype=torch.int64)


@functools.lru_cache(maxsize=32)
def _places(rows: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return for each row of all tensors the tensor's index and the row's weight, an odd number."""
    with torch.inference_mode(False):
        owner = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), torch.tensor(rows, device="cpu"))
        weight = torch.cat([torch.arange(1, 2 * n, 2, device="cpu") for n in rows])
        return owner.to(device), weight.to(device)
