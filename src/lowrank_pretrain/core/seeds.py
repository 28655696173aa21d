"""Private random generators: ours never draw from torch's global one, so a resumed or validated run draws the same."""

import hashlib
import os

import torch


def run_seed() -> int:
    """The seed given to ``lightning.seed_everything``; 0 if none was."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def generator(*words: object, seed: int | None = None) -> torch.Generator:
    """A CPU generator seeded by a stable hash of the run's seed and ``words``.

    Args:
        words: what the numbers are for, e.g. target name, head id, refresh count.
        seed: the run's seed; by default the one given to ``lightning.seed_everything`` (0 if none was).

    Returns:
        A generator that yields the same numbers in every process and on every machine.
    """
    if seed is None:
        seed = run_seed()
    text = "\x1f".join(str(word) for word in (seed, *words))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
