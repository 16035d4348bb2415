"""Many rows: torch.mm on weights that a kernel spells out, a part of the outputs at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_fx.kernels.triton.codes import pair, wide, zero
from gptq_fx.kernels.triton.weight import Packed, speaks_ptx

SPELLED_OUT = 2**26  # bytes of weights that stand dequantized at one time


def spelled_out(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N], by torch.mm on a part of the weight after the other."""
    M, K = x.shape
    N = weight.N
    step = min(max(SPELLED_OUT // (K * x.element_size()) // 128, 1) * 128, N)
    out = x.new_empty(M, N)
    dense = x.new_empty(step, K)
    for start in range(0, N, step):
        stop = min(start + step, N)
        part = dequantize(weight, K, start, stop, dense)
        if bias is None:
            torch.mm(x, part.T, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, part.T, out=out[:, start:stop])
    return out


def dequantize(weight: Packed, K: int, start: int, stop: int, out: Tensor) -> Tensor:
    """Outputs start to stop of W [N, K], into the first rows of `out`."""
    N, _, groups, blocks, group_size = weight.sizes(K)
    dequantize_kernel[(blocks, -(-(stop - start) // 64))](
        weight.w,
        weight.high,
        weight.scales,
        weight.zeros,
        out,
        start,
        N,
        K,
        groups,
        group_size,
        stop,
        **weight.constants(K),
        PTX=speaks_ptx(out.device),
        BN=64,
        num_warps=4,
    )
    return out[: stop - start]


@triton.jit
def dequantize_kernel(
    w,
    high,
    scales,
    zeros,
    out,
    start,
    N,
    K,
    G,
    group_size,
    stop,
    BITS: tl.constexpr,
    SLABS: tl.constexpr,
    RUN: tl.constexpr,
    PTX: tl.constexpr,
    BN: tl.constexpr,
):
    """Outputs start to stop -> out [stop - start, K]: BN outputs of one block of K a program."""
    HALF: tl.constexpr = SLABS // 2
    WHOLE: tl.constexpr = RUN == SLABS
    STEP: tl.constexpr = HALF if WHOLE else RUN
    b = tl.program_id(0)
    i = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (start + i < stop)[:, None]
    n = tl.minimum(start + i, N - 1)
    r = tl.arange(0, 16)
    place = (b.to(tl.int64) * N + n[:, None]) * 16 + r[None, :]
    word = tl.load(w + place)
    third = word
    if BITS == 3:
        third = wide(tl.load(high + place))
    to = out + i[:, None].to(tl.int64) * K + r[None, :]
    for run in tl.static_range(0, HALF, STEP):
        k = (b * SLABS + run) * 16
        where = tl.minimum(k // group_size, G - 1) * N + n
        where2 = where
        if not WHOLE:
            where2 = tl.minimum((k + HALF * 16) // group_size, G - 1) * N + n
        z = zero(zeros, where, BITS)
        z2 = zero(zeros, where2, BITS)
        if zeros is not None:
            z = z[:, None]
            z2 = z2[:, None]
        s = tl.load(scales + where).to(tl.float32)[:, None]
        s2 = tl.load(scales + where2).to(tl.float32)[:, None]
        for j in tl.static_range(run, run + STEP):
            low, up = pair(word, third, z, z2, j, out.dtype.element_ty, BITS, PTX)
            k1 = (b * SLABS + j) * 16
            k2 = k1 + HALF * 16
            y = (low.to(tl.float32) * s).to(out.dtype.element_ty)
            y2 = (up.to(tl.float32) * s2).to(out.dtype.element_ty)
            tl.store(to + k1, y, mask=there & (k1 + r < K)[None, :])
            tl.store(to + k2, y2, mask=there & (k2 + r < K)[None, :])
