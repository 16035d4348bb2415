"""One weight: which algorithm runs for how many rows. Tensors here are contiguous.

few rows    gemv
more        matmul
many        spelled_out
"""

from __future__ import annotations

from torch import Tensor

from gptq_fx.kernels.triton.gemv import gemv
from gptq_fx.kernels.triton.matmul import matmul
from gptq_fx.kernels.triton.spelled_out import spelled_out
from gptq_fx.kernels.triton.weight import Packed, on

GEMV_ROWS = 2
MATMUL_ROWS = 256


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N]."""
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, weight.N)
    with on(x):
        if M <= GEMV_ROWS:
            return gemv(x, weight, bias)
        if M <= MATMUL_ROWS:
            return matmul(x, weight, bias)
        return spelled_out(x, weight, bias)
