"""Borrow the global random generators: augmentation libraries draw from them, and we must restore their state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from lowrank_pretrain.core.agreement import generator


@contextmanager
def borrowed() -> Iterator[None]:
    """Restore Python's, numpy's and torch's CPU generators at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def reseed(*words: object, seed: int | None) -> None:
    """Seed the three generators from the run's seed and ``words``; only inside :func:`borrowed`."""
    value = generator(*words, seed=seed).initial_seed()
    random.seed(value)
    np.random.seed(value % (1 << 32))
    torch.default_generator.manual_seed(value)  # torch.manual_seed would seed the GPUs as well
