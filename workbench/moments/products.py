"""Products of rows with rows, summed over them: in bands where they are symmetric, and of half precision in float32."""

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
SUMMED = 16_384
"""Products of half precision that tensor cores add up at once. On an H200 the sums of 16,384 are 2e-5 to 5e-5 off, of 4,096 a
fifth of that; each part costs another reading and writing of the product."""

BANDS = 3
"""Of a symmetric product: two thirds of its operations. More would make too narrow products of a small model's states."""


def add_square(into: Tensor, x: Tensor) -> None:
    """Add xᵀ x, in bands that leave out most of what lies above the diagonal: whoever reads it mirrors what lies below."""
    band = -(-x.shape[1] // (64 * BANDS)) * 64
    for start in range(0, x.shape[1], band):
        into[start:, start : start + band] += product(x[:, start:], x[:, start : start + band])


def product(x: Tensor, y: Tensor) -> Tensor:
    """xᵀ y. Of half precision, in float32: products are exact there, but tensor cores cut off a little of every sum with each
    product that they add."""
    if x.dtype not in HALF:
        return torch.mm(x.T, y)
    out = torch.mm(x[:SUMMED].T, y[:SUMMED], out_dtype=torch.float32)
    for start in range(SUMMED, len(x), SUMMED):
        part = slice(start, start + SUMMED)
        out = torch.addmm(out, x[part].T, y[part], out_dtype=torch.float32, out=out)
    return out
