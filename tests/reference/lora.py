"""LoRA as the paper writes it (arXiv 2106.09685, eq. 3): h = W₀x + (α/r) B A x, by autograd and one row block at a time."""

import torch
from torch import nn


class ReferenceLoRA(nn.Module):
    """weight (O, D); blocks = [(first row, rows, rank, scale)]; one A (R, D) and B (rows, R) each."""

    def __init__(self, weight, bias, blocks):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.blocks = blocks
        self.A = nn.ParameterList(torch.zeros(rank, weight.shape[1], dtype=weight.dtype) for _, _, rank, _ in blocks)
        self.B = nn.ParameterList(torch.zeros(rows, rank, dtype=weight.dtype) for _, rows, rank, _ in blocks)

    def forward(self, x):
        h = x @ self.weight.T + self.bias
        columns = list(h.split(1, dim=-1))
        for (start, rows, _, scale), A, B in zip(self.blocks, self.A, self.B, strict=True):
            delta = scale * ((x @ A.T) @ B.T)
            for i in range(rows):
                columns[start + i] = columns[start + i] + delta[..., i : i + 1]
        return torch.cat(columns, dim=-1)
