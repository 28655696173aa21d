"""What the paper's formula says that GaLore's state should take, to print beside what is really held."""

from typing import TYPE_CHECKING

from lowrank_pretrain.core.dtypes import at_least_32
from lowrank_pretrain.galore import dtensor as sharded
from lowrank_pretrain.galore import moments

if TYPE_CHECKING:
    from lowrank_pretrain.galore.optimizer import GaLoreAdamW


def formula_bytes(optimizer: "GaLoreAdamW") -> int:
    """The paper's mr + 2nr for each projected m×n matrix (m the projected side) and 2mn for each other one, in bytes.

    8-bit moments count with one float32 scale per 256 elements; APOLLO's basis and the step counters count nothing. Under
    FSDP2 it is this rank's share: bases are whole everywhere, moments are cut unless the projection is from the left.
    """
    total = 0
    for p, (group, _, slot) in optimizer.lookup().items():
        kept = moments.kind(group)
        wide = at_least_32(p.dtype).itemsize
        narrow = wide if kept == "float32" else p.dtype.itemsize
        elements = sharded.local(p).numel()
        if slot is not None:
            elements = slot.numel_low if slot.left else slot.numel_low * elements // p.numel()
            d, k = (slot.rows, slot.cols) if slot.left else (slot.cols, slot.rows)
            if group["variant"] == "galore":
                total += slot.rank * (d + (k if slot.two_sided else 0)) * narrow
            total += wide if group["residual"] or group["variant"] == "apollo" else 0
        if kept == "8bit" and elements >= moments.SMALLEST:
            total += 2 * (elements + -(-elements // moments.BLOCK) * 4)
        else:
            total += 2 * elements * (wide if kept == "8bit" else narrow)
    return total
