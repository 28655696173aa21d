"""Keep what only merges need, W_base, outer momentum and error feedback, next to the weights or in main memory.

``keep_on="cpu"`` frees the device of these copies between merges. They lie in pinned memory where the weights are on CUDA, so
that copies run in the order of the device's stream and the host never waits for one. The numbers are the same: all
arithmetic is done on the device of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEEP_ON = ("device", "cpu")


class Storage:
    """Keep tensors between merges.

    Args:
        keep_on: ``device``: where they are; ``cpu``: in main memory.

    Example:
        >>> storage = Storage("cpu")
        >>> kept = storage.put(torch.ones(2))
        >>> storage.get(kept, torch.device("cpu"))
        tensor([1., 1.])
    """

    def __init__(self, keep_on: str = "device") -> None:
        self.on_host = keep_on == "cpu"

    def put(self, t: Tensor, old: Tensor | None = None) -> Tensor:
        """Return `t` as it is kept: itself, or a copy in main memory.

        Args:
            t: on the device; nobody else may write into it afterwards.
            old: what ``put`` returned for the same tensor before; its memory is used again.
        """
        if not self.on_host or t.device.type in ("cpu", "meta"):
            return t
        if old is None or old.shape != t.shape or old.dtype != t.dtype or old.is_pinned() != t.is_cuda:
            old = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        return old.copy_(t, non_blocking=t.is_cuda)

    def get(self, kept: Tensor, device: torch.device) -> Tensor:
        """Return a kept tensor on `device`; itself if it lies there."""
        return kept.to(device, non_blocking=True)

    def place(self, kept: Tensor, device: torch.device) -> Tensor:
        """Return a kept tensor where ``put`` would have it for weights on `device`; itself if it lies there."""
        if not self.on_host:
            return kept.to(device)
        return kept.pin_memory() if device.type == "cuda" and not kept.is_pinned() else kept

    def wait(self) -> None:
        """Wait for copies to main memory, before the host reads or writes them (checkpoints)."""
        if self.on_host and torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
