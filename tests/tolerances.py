"""How far a number may be from the right one. Every tolerance of the tests stands here, with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative (Frobenius) error of a linear against float64 on the same dequantized weights.
LINEAR = {
    torch.float32: 1e-5,  # sums of K <= 2048 products, each rounded to 2^-24
    torch.float16: 1e-3,  # weight and output are each rounded to 2^-12, sums are kept in fp32
    torch.bfloat16: 1e-2,  # weight and output are each rounded to 2^-9, sums are kept in fp32 or rounded once
}

# Of a block of experts: two linears behind each other, an activation between them, and a weighted sum.
BLOCK = {dtype: 3 * limit for dtype, limit in LINEAR.items()}

# Relative (Frobenius) error of two algorithms of one kernel against each other: either may be off by LINEAR.
SAME_KERNEL = {dtype: 2 * limit for dtype, limit in LINEAR.items()}

# Dequantized weights against the equation in float64, relative to the largest: one rounding of the result.
DEQUANTIZE = {
    torch.float32: 2**-23,  # the product is formed in fp32
    torch.float16: 2**-10,  # formed in fp32, rounded to fp16
    torch.bfloat16: 2**-7,  # formed in fp32, rounded to bf16
}

# Distance to the nearest code, in steps of the grid: near a tie the fp32 quotient may fall on either side.
NEAREST_CODE = 1e-4


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, in float64."""
    expected = expected.detach().double()
    return float((found.detach().double() - expected).norm() / expected.norm())
