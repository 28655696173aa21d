"""Slow twin of SinkGD (arXiv 2502.06742, Algorithms 3 and 4): one matrix, every normalisation written out entry by entry."""

import math


class Twin:
    """One matrix's optimizer; it keeps nothing from step to step."""

    def __init__(self, weight, lr, *, iterations=5, scale=0.2, weight_decay=0.0):
        self.w, self.lr, self.iterations, self.scale, self.weight_decay = weight, lr, iterations, scale, weight_decay

    def step(self, grad):
        rows, cols = grad.shape
        x = grad.clone()
        for _ in range(self.iterations):
            for i in range(rows):
                norm = math.sqrt(sum(x[i, j].item() ** 2 for j in range(cols)))
                x[i] *= math.sqrt(cols) / norm if norm else 0.0
            for j in range(cols):
                norm = math.sqrt(sum(x[i, j].item() ** 2 for i in range(rows)))
                x[:, j] *= math.sqrt(rows) / norm if norm else 0.0
        self.w *= 1 - self.lr * self.weight_decay
        self.w -= self.lr * self.scale * x
