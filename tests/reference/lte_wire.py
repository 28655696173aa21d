"""The slow twins of ``lte/wire.py`` and ``lte/outer.py``: one number at a time, all workers in one process."""

import math

import numpy as np
import torch

from lowrank_pretrain.lte.wire import BLOCK


def quantised(x, bits):
    """What arrives of float32 numbers, by the definition in the module's docstring; ties as IEEE 754 rounds them."""
    arrived = []
    for start in range(0, len(x), BLOCK):
        block = list(x[start : start + BLOCK].numpy())  # numpy's float32: torch takes a microsecond for each number
        if bits == 2:
            step = 0.9957 * (sum(float(v) ** 2 for v in block) / BLOCK) ** 0.5
        else:
            top = 2 ** (bits - 1) - 1
            step = max(abs(float(v)) for v in block) / top
        step = np.float32(torch.tensor(step).to(torch.bfloat16).float())
        for v in block:
            if step == 0:
                level = 0.0
            elif bits == 2:
                level = min(max(math.floor(float(v / step)), -2), 1) + 0.5
            else:
                level = min(max(round(float(v / step)), -top), top)
            arrived.append(level * float(step))
    return torch.tensor(arrived)


class Wire:
    """The mean over w workers through a wire, all of them here: error feedback on each message."""

    def __init__(self, workers, n, bits):
        self.w, self.n, self.bits = workers, n, bits
        self.length = -(-n // (BLOCK * workers)) * BLOCK * workers
        self.sent_error = [torch.zeros(self.length) for _ in range(workers)]
        self.mean_error = torch.zeros(self.length)

    def mean(self, tensors):
        arrived = []
        for worker, x in enumerate(tensors):
            message = torch.cat((x, torch.zeros(self.length - self.n))) + self.sent_error[worker]
            arrived.append(quantised(message, self.bits))
            self.sent_error[worker] = message - arrived[-1]
        mean = sum(arrived) / self.w + self.mean_error
        result = quantised(mean, self.bits)
        self.mean_error = mean - result
        return result[: self.n]
