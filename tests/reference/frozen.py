"""A layer whose frozen W is stored in a cheaper type, number by number as the formulas say, on rows of float64.

y = x̂ Ŵᵀ + b + s B A x and dx = dŷ Ŵ + s Aᵀ Bᵀ dy, where a hat is what the type keeps of a number.
"""

import torch

FLOAT8 = torch.float8_e4m3fn


def rows8(rows):
    """Each row scaled so that its largest number is 448, rounded to e4m3, and scaled back."""
    scale = (rows.abs().amax(1, keepdim=True).float() / 448).double()
    return (rows.double() / scale).float().to(FLOAT8).double() * scale


def kept_weight(W, kind):
    """Ŵ for y and Ŵ for dx, (O, D), float64."""
    if kind in ("bfloat16", "float16"):
        held = W.to(getattr(torch, kind)).double()
        return held, held
    if kind == "int8":
        scale = (W.abs().amax(1, keepdim=True) / 127).double()
        held = (W.double() / scale).round() * scale
        return held, held
    return rows8(W), rows8(W.t()).t()  # the kernel wants W by column, and scales along the sum


def kept_input(x, kind):
    """x̂ of the product, float64."""
    return rows8(x) if kind == "float8" else x.double() if kind == "float16" else x.bfloat16().double()


def layer(x, dy, W, b, blocks, kind):
    """y, dx and per block (dA, dB). blocks: (first row, A, B, scale)."""
    forward, backward = kept_weight(W, kind)
    y, dx = kept_input(x, kind) @ forward.t() + b.double(), kept_input(dy, kind) @ backward
    if kind == "int8":  # its scales, one for each output, go into dy before it is rounded
        scale = (W.abs().amax(1) / 127).float()
        dx = (dy * scale).bfloat16().double() @ (W.double() / scale.double()[:, None]).round()
    grads = []
    for start, A, B, scale in blocks:
        rows, (A, B) = slice(start, start + len(B)), (A.double(), B.double())
        y[:, rows] += scale * (x.double() @ A.t()) @ B.t()
        dz = scale * dy[:, rows].double() @ B
        dx += dz @ A
        grads.append((dz.t() @ x.double(), scale * dy[:, rows].double().t() @ (x.double() @ A.t())))
    return y, dx, grads
