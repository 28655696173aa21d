"""Decide when factors pay off: compare the cost of two thin products with that of one wide product.

A dense layer multiplies by D·O numbers, a factored one of rank k by k (D + O). Measured on one CPU thread (widths 384 to 1536,
N = 3152 rows, forward and backward; ``benchmarks/factorize.py --layers``): time over dense time is that share plus about .05 in
float32 and .1 to .15 under bfloat16 autocast, where casts and the thin products' edges weigh more. So a share under the limits
below makes a layer faster, and a larger one is not worth the lost rank. One ``autograd.Function`` for both products was as fast
as two calls of ``F.linear`` (within 3 %, in either precision), so the layer makes the two calls. No GPU was measured.
"""

import torch

_FULL_PRECISION = 0.85  # float32 and float64 products
_HALF_PRECISION = 0.75  # bfloat16 and float16 products, by autocast or by the weights' type


def largest_share(dtype: torch.dtype) -> float:
    """Return c of ``k (D + O) < c · D·O``, for products in this dtype."""
    return _HALF_PRECISION if dtype in (torch.bfloat16, torch.float16) else _FULL_PRECISION


def numbers_of(rank: int, rows: int, cols: int) -> int:
    """Return the size of the factors of a ``rows`` x ``cols`` matrix: k (D + O), which is also their cost per input.

    Example:
        >>> numbers_of(4, 16, 8)
        96
    """
    return rank * (rows + cols)


def largest_rank(rows: int, cols: int, share: float) -> int:
    """Return the largest rank whose factors cost less than ``share`` of the matrix; 0 if none does.

    Example:
        >>> largest_rank(384, 384, 0.5), largest_rank(2, 2, 0.5)
        (95, 0)
    """
    most = int(share * rows * cols / (rows + cols))
    return most - 1 if numbers_of(most, rows, cols) >= share * rows * cols and most > 0 else most
