"""Keep all ranks equal: random numbers depend only on their purpose, and weights are compared.

Random numbers never come from torch's global generator, so a resumed or validated run draws the same. Weights are compared
because adapters drawn differently, or a reducer that missed some, would let ranks drift apart silently.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lowrank_pretrain.core.lightning_private import LEFT_OUT_OF_DDP


def run_seed() -> int:
    """Return the seed given to ``lightning.seed_everything``; 0 if none was."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def generator(*words: object, seed: int | None = None, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded by a stable hash of the run's seed and ``words``.

    Args:
        words: what the numbers are for, e.g. target name, head id, refresh count.
        seed: the run's seed; by default the one given to ``lightning.seed_everything`` (0 if none was).
        device: where the numbers are drawn.

    Returns:
        A generator that yields the same numbers in every process: a CPU one on every machine, another on every device of
        the same kind.
    """
    if seed is None:
        seed = run_seed()
    text = "\x1f".join(str(word) for word in (seed, *words))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


class Disagreement(RuntimeError):
    """Report that ranks hold different weights although they should be equal."""


def fingerprint(p: Tensor) -> Tensor:
    """Return a 64-bit fingerprint of a tensor's bits, on its device; equal tensors have equal fingerprints.

    Sums of bit patterns by row, weighted by the row's number: no temporary is larger than one number per row, and a change
    of bits, or a swap of rows, is noticed.
    """
    # read doubles as two halves: an even number of changed signs would cancel modulo 2⁶⁴ in 64-bit integers
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    bits = p.detach().contiguous().reshape(p.shape or (1,))
    bits = torch.view_as_real(bits).contiguous() if bits.is_complex() else bits
    bits = bits.view(kinds[bits.element_size()])
    if not bits.numel():  # an adapter of rank 0
        return torch.zeros((), dtype=torch.int64, device=bits.device)
    rows = bits.reshape(bits.shape[0], -1).sum(1, dtype=torch.int64)
    return (rows * torch.arange(1, len(rows) + 1, device=rows.device)).sum()


@torch.no_grad()
def agreed_hash(
    strategy: Any, module: nn.Module, when: str, apart: Collection[str] | None = None, cause: str = "",
    further: Mapping[str, Tensor] | None = None,
) -> int:  # fmt: skip
    """Return a hash of all parameters, after checking that all ranks hold the same.

    Args:
        strategy: the trainer's. All ranks must call this together.
        module: its parameters.
        when: for the message, e.g. ``after the switch at step 8``.
        apart: names of parameters that may differ; ``None``: those that DDP was told to ignore.
        cause: the likely cause of the drift, for the message.
        further: tensors by name that all ranks must share as well.

    Returns:
        32 bits, the same on every rank.

    Raises:
        Disagreement: on every rank, naming the first parameter that differs and the ranks where it differs.
    """
    apart = set(getattr(module, LEFT_OUT_OF_DDP, ())) if apart is None else set(apart)
    named: list[tuple[str, Tensor]] = [
        (name, p) for name, p in nn.Module.named_parameters(module) if name not in apart and not is_lazy(p)
    ]
    named += (further or {}).items()
    if not named:
        return 0
    device = next((p.device for _, p in nn.Module.named_parameters(module)), named[0][1].device)
    mine = torch.stack([fingerprint(p).to(device) for _, p in named])
    everyone = strategy.all_gather(mine).reshape(-1, len(named)).tolist()  # (ranks, parameters)
    for i, (name, _) in enumerate(named):
        others = [rank for rank, theirs in enumerate(everyone) if theirs[i] != everyone[0][i]]
        if others:
            raise Disagreement(
                f"ranks disagree {when}: {name} on rank {', '.join(map(str, others))} is not that of rank 0"
                f"{f' ({cause})' if cause else ''}; go on from a checkpoint written before they drifted apart"
            )
    total = 0
    for value in everyone[0]:
        total = (total * 1_000_003 + value) % 2**64
    return (total >> 32) ^ (total & 0xFFFFFFFF)
