"""A few rows: multiplications in fp32, bound by reading the weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_fx.kernels.triton.codes import activate, and_or, columns
from gptq_fx.kernels.triton.weight import Packed, Tile, processors, speaks_ptx


def gemv_tile(weight: Packed, programs: int, rows: int, device: torch.device) -> Tile:
    """As many outputs a program as leave two programs for each multiprocessor, and as registers can hold."""
    for BN in (64, 32):
        fits = BN * rows * (2 if weight.bits < 4 else 1) <= 64
        if fits and -(-weight.N // BN) * programs >= 2 * processors(device):
            return Tile(BN=BN, BB=8, warps=8)
    return Tile(BN=16, BB=8, warps=8)


def gemv(x: Tensor, weight: Packed, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """x [M, K] -> [M, N], two rows a program."""
    out = x.new_empty(x.shape[0], weight.N)
    launch(x, weight, bias, None, None, out, "", rows=x.shape[0], topk=1, share=1, tile=tile)
    return out


def launch(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    ids: Tensor | None,
    gates: Tensor | None,
    out: Tensor,
    activation: str,
    *,
    rows: int,
    topk: int,
    share: int,
    tile: Tile | None = None,
) -> None:
    K = x.shape[1]
    rows_each = 2 if ids is None and rows > 1 else 1
    programs = -(-rows // rows_each)
    tile = tile or gemv_tile(weight, programs, rows_each, x.device)
    gemv_kernel[(-(-weight.N // tile.BN), programs)](
        x,
        weight.w,
        weight.high,
        weight.scales,
        weight.zeros,
        bias,
        ids,
        gates,
        out,
        rows,
        *weight.sizes(K),
        weight.experts,
        **weight.constants(K),
        ACT=activation,
        TOPK=topk,
        SHARE=share,
        PTX=speaks_ptx(x.device),
        ROWS=rows_each,
        BN=tile.BN,
        BB=tile.BB,
        num_warps=tile.warps,
    )


@triton.jit
def _spread(table, BN: tl.constexpr, BB: tl.constexpr):
    """[BN, BB] -> [BN, BB * 16]."""
    return tl.reshape(tl.broadcast_to(table[:, :, None], (BN, BB, 16)), (BN, BB * 16))


@triton.jit
def gemv_kernel(
    x,
    w,
    high,
    scales,
    zeros,
    bias,
    ids,
    gates,
    out,
    rows,
    N,
    K,
    G,
    KB,
    group_size,
    experts,
    BITS: tl.constexpr,
    SLABS: tl.constexpr,
    RUN: tl.constexpr,
    ACT: tl.constexpr,
    TOPK: tl.constexpr,
    SHARE: tl.constexpr,
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
):
    """A few rows by multiplications in fp32: BN outputs of ROWS rows a program, BB blocks of K at a time.

    With ids [*] and one row: row p is the sum over i < TOPK of what expert ids[s], s = p * TOPK + i, makes of
    row s // SHARE of x, times gates[s] where given. An id of `experts` stands for no expert.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    STEPS: tl.constexpr = 2**BITS
    C: tl.constexpr = BB * 16
    n = columns(tl.program_id(0), N, BN, ACT)
    there = n < N
    n = tl.minimum(n, N - 1)
    # Word c of a tile is word c % 16 of block c / 16. Threads hold four in a row, and so they should of x:
    # else it would go through shared memory.
    c = tl.arange(0, C)
    r = tl.max_contiguous(c % 16, 4)
    row = tl.program_id(1) * ROWS
    total = tl.zeros((BN, C), tl.float32)
    total2 = tl.zeros((BN, C), tl.float32)
    offset = tl.zeros((BN,), tl.float32)
    for i in range(TOPK):
        e = tl.zeros((), tl.int64)
        used = True
        gate = 1.0
        at = row
        if ids is not None:
            slot = row * TOPK + i
            e = tl.load(ids + slot).to(tl.int64)
            used = (e >= 0) & (e < experts)
            e = tl.where(used, e, 0)
            at = slot // SHARE
            if gates is not None:
                gate = tl.load(gates + slot).to(tl.float32)
            gate = tl.where(used, gate, 0.0)
        words = w + e * KB * N * 16
        if BITS == 3:
            highs = high + e * KB * N * 16
        grid = e * G * N
        xs = x + at.to(tl.int64) * K
        part = tl.zeros((BN, C), tl.float32)
        for first in range(0, KB, BB):
            b = first + c // 16
            here = (b < KB) & used
            b = tl.minimum(b, KB - 1)
            place = (b[None, :] * N + n[:, None]) * 16 + (c % 16)[None, :]
            word = tl.load(words + place)
            if BITS == 3:
                third = tl.load(highs + place).to(tl.int32)
            for run in tl.static_range(0, SLABS, RUN):
                p = tl.zeros((BN, C), tl.float32)
                p2 = tl.zeros((BN, C), tl.float32)
                sums = tl.zeros((C,), tl.float32)
                sums2 = tl.zeros((C,), tl.float32)
                for j in tl.static_range(run, run + RUN):
                    k = (b * SLABS + j) * 16 + r
                    # 1 + q / 2^bits is what these bits say in fp32: q stands first in the mantissa
                    if WIDTH * j > 23 - BITS:
                        q = word >> (WIDTH * j - 23 + BITS)
                    else:
                        q = word << (23 - BITS - WIDTH * j)
                    q = and_or(q, (2**WIDTH - 1) << (23 - BITS), 0x3F800000, PTX)
                    if BITS == 3:
                        q |= ((third >> j) & 1) << 22
                    f = q.to(tl.float32, bitcast=True)
                    a = tl.load(xs + k, mask=here & (k < K), other=0.0).to(tl.float32)
                    p += a[None, :] * f
                    sums += a
                    if ROWS == 2:
                        a = tl.load(xs + K + k, mask=here & (k < K) & (row + 1 < rows), other=0.0)
                        a = a.to(tl.float32)
                        p2 += a[None, :] * f
                        sums2 += a
                g = first + tl.arange(0, BB)
                g = tl.minimum((g * SLABS + run) * 16 // group_size, G - 1)
                where = grid + g[None, :] * N + n[:, None]
                s = _spread(tl.load(scales + where).to(tl.float32), BN, BB)
                if zeros is None:
                    z = 1 + 2 ** (BITS - 1) / STEPS
                else:
                    z = _spread(1 + tl.load(zeros + where).to(tl.float32) / STEPS, BN, BB)
                part += (p - z * sums[None, :]) * s
                if ROWS == 2:
                    total2 += (p2 - z * sums2[None, :]) * s
        total += part * gate
        if bias is not None:
            offset += tl.load(bias + e * N + n).to(tl.float32) * gate
    y = tl.sum(total, 1) * STEPS + offset
    if ACT == "":
        o = out + row.to(tl.int64) * N + n
        tl.store(o, y.to(out.dtype.element_ty), mask=there)
        if ROWS == 2:
            y = tl.sum(total2, 1) * STEPS + offset
            tl.store(o + N, y.to(out.dtype.element_ty), mask=there & (row + 1 < rows))
    else:
        one, other = tl.split(tl.reshape(y, (BN // 2, 2)))
        h = activate(one, other, ACT).to(out.dtype.element_ty)
        c = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(out + row.to(tl.int64) * (N // 2) + c, h, mask=c < N // 2)
