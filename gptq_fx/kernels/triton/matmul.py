"""More rows: a product on tensor cores; K is cut into parts where there are too few tiles."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_fx.kernels.triton.codes import activate, columns, pair, wide, zero
from gptq_fx.kernels.triton.route import find_tile
from gptq_fx.kernels.triton.weight import Packed, Tile, power_of_two, processors, speaks_ptx

# Triton's interpreter multiplies the bits of bf16 as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def matmul_tile(weight: Packed, rows: int, K: int, dtype: torch.dtype) -> Tile:
    """For `rows` rows of one weight, or of one expert on average."""
    if dtype == torch.float32:  # no tensor cores: what fits registers
        return Tile(BM=16, BN=32, warps=4, stages=2)
    # Of 2 and 3 bits, a block is twice as long as of 4, and so are its buffers in shared memory.
    stages = 2 if weight.bits < 4 else 4
    if rows <= 16:
        return Tile(BM=16, BN=64, warps=4, stages=stages)
    if rows <= 32:
        return Tile(BM=32, BN=64, warps=4, stages=stages)
    constants = weight.constants(K)
    if rows <= 64 or weight.bits < 4 or constants["RUN"] < constants["SLABS"]:
        return Tile(BM=64, BN=128, warps=8, stages=stages)
    return Tile(BM=128, BN=128, warps=8, stages=3)


def split(programs: int, blocks: int, device: torch.device) -> int:
    """Into how many parts K is cut so that all multiprocessors have work, but each part 4 blocks."""
    parts = 1
    while parts < 8 and programs * parts < 2 * processors(device) and blocks >= 8 * parts:
        parts *= 2
    return parts


def matmul(
    x: Tensor, weight: Packed, bias: Tensor | None, tile: Tile | None = None, parts: int | None = None
) -> Tensor:
    """x [M, K] -> [M, N]; the tile, and into how many parts K is cut, are chosen here unless given."""
    M, K = x.shape
    N = weight.N
    tile = tile or matmul_tile(weight, M, K, x.dtype)
    tiles = -(-M // tile.BM) * -(-N // tile.BN)
    parts = parts or split(tiles, weight.w.shape[-3], x.device)
    out = x.new_empty(M, N)
    to = out if parts == 1 else x.new_empty(parts, M, N, dtype=torch.float32)
    launch(x, weight, bias, None, None, None, to, "", rows=M, tiles=-(-M // tile.BM), tile=tile, parts=parts)
    if parts > 1:
        grid = (-(-M * N // 1024),)
        add_parts[grid](to, bias, out, M, N, SPLIT=parts, BLOCK=1024)
    return out


def launch(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    ends: Tensor | None,
    order: Tensor | None,
    gates: Tensor | None,
    out: Tensor,
    activation: str,
    *,
    rows: int,
    tiles: int,
    tile: Tile,
    share: int = 1,
    parts: int = 1,
) -> None:
    K = x.shape[1]
    constants = weight.constants(K)
    matmul_kernel[(tiles, -(-weight.N // tile.BN), parts)](
        x,
        weight.w,
        weight.high,
        weight.scales,
        weight.zeros,
        bias,
        ends,
        order,
        gates,
        out,
        rows,
        *weight.sizes(K),
        weight.experts,
        **constants,
        ACT=activation,
        SHARE=share,
        EP=power_of_two(weight.experts + 1) if ends is not None else 1,
        SPLIT=parts,
        EVEN=K % (16 * constants["SLABS"]) == 0,
        PTX=speaks_ptx(x.device),
        BM=tile.BM,
        BN=tile.BN,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def matmul_kernel(
    x,
    w,
    high,
    scales,
    zeros,
    bias,
    ends,
    order,
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
    SHARE: tl.constexpr,
    EP: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PTX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """W[BN, K] x^T[K, BM] on tensor cores, transposed so that the weights are the operand in registers.

    Sums of integer codes, times the scale of their group, are added up in fp32.
    With ends [experts]: tiles of the rows that one expert has; order [rows]: which slots those are (None: as
    they lie); slot s is row s // SHARE of x, row s of out, and is multiplied by gates[s] where given.
    SPLIT > 1: K is cut, and part p of the sums, without bias, goes to out[p] of fp32.
    """
    HALF: tl.constexpr = SLABS // 2
    # Slabs j and j + HALF come together; where they do not share a scale, they have sums of their own.
    WHOLE: tl.constexpr = RUN == SLABS
    STEP: tl.constexpr = HALF if WHOLE else RUN
    dtype: tl.constexpr = x.dtype.element_ty
    n = columns(tl.program_id(1), N, BN, ACT)
    there = n < N
    n = tl.minimum(n, N - 1)
    r = tl.arange(0, 16)
    e = tl.zeros((), tl.int64)
    first = 0
    last = KB
    if ends is None:
        slot = tl.program_id(0) * BM + tl.arange(0, BM)
        inside = slot < rows
        row = slot
    else:
        expert, start, end = find_tile(ends, tl.program_id(0), rows, experts, EP, BM, order is None)
        if expert >= EP:
            return
        slot = start + tl.arange(0, BM)
        inside = slot < end
        if order is not None:
            slot = tl.load(order + slot, mask=inside, other=0)
        row = slot // SHARE
        if expert >= experts:
            last = 0
            expert = 0
        e = expert.to(tl.int64)
    if SPLIT > 1:
        each = (KB + SPLIT - 1) // SPLIT
        first = tl.program_id(2) * each
        last = tl.minimum(first + each, KB)
    place = n[:, None] * 16 + r[None, :]
    grid = e * G * N
    xs = x + row[None, :].to(tl.int64) * K + r[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for b in range(first, last):
        block = (e * KB + b) * N * 16
        word = tl.load(w + block + place)
        third = word
        if BITS == 3:
            third = wide(tl.load(high + block + place))
        for run in tl.static_range(0, HALF, STEP):
            k = (b * SLABS + run) * 16
            where = grid + tl.minimum(k // group_size, G - 1) * N + n
            z = zero(zeros, where, BITS)
            s = tl.load(scales + where).to(tl.float32)
            if WHOLE:
                z2 = z
            else:
                where = grid + tl.minimum((k + HALF * 16) // group_size, G - 1) * N + n
                z2 = zero(zeros, where, BITS)
                s2 = tl.load(scales + where).to(tl.float32)
            if zeros is not None:
                z = z[:, None]
                z2 = z2[:, None]
            p = tl.zeros((BN, BM), tl.float32)
            p2 = tl.zeros((BN, BM), tl.float32)
            for j in tl.static_range(run, run + STEP):
                low, up = pair(word, third, z, z2, j, dtype, BITS, PTX)
                k1 = (b * SLABS + j) * 16
                k2 = k1 + HALF * 16
                if EVEN:
                    a = tl.load(xs + k1, mask=inside[None, :], other=0.0)
                    a2 = tl.load(xs + k2, mask=inside[None, :], other=0.0)
                else:
                    a = tl.load(xs + k1, mask=inside[None, :] & (k1 + r < K)[:, None], other=0.0)
                    a2 = tl.load(xs + k2, mask=inside[None, :] & (k2 + r < K)[:, None], other=0.0)
                p = _dot(low, a, p)
                if WHOLE:
                    p = _dot(up, a2, p)
                else:
                    p2 = _dot(up, a2, p2)
            acc += p * s[:, None]
            if not WHOLE:
                acc += p2 * s2[:, None]
    if SPLIT > 1:
        o = (tl.program_id(2) * rows + slot[None, :].to(tl.int64)) * N + n[:, None]
        tl.store(out + o, acc, mask=there[:, None] & inside[None, :])
        return
    if bias is not None and last > 0:
        acc += tl.load(bias + e * N + n).to(tl.float32)[:, None]
    if ACT == "":
        if gates is not None:
            acc *= tl.load(gates + slot, mask=inside, other=0.0).to(tl.float32)[None, :]
        o = slot[None, :].to(tl.int64) * N + n[:, None]
        tl.store(out + o, acc.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])
    else:
        one, other = tl.split(tl.permute(tl.reshape(acc, (BN // 2, 2, BM)), (0, 2, 1)))
        c = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
        o = slot[None, :].to(tl.int64) * (N // 2) + c[:, None]
        h = activate(one, other, ACT).to(out.dtype.element_ty)
        tl.store(out + o, h, mask=(c < N // 2)[:, None] & inside[None, :])


@triton.jit
def add_parts(parts, bias, out, rows, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """parts fp32 [SPLIT, rows, N] -> out [rows, N], always in the same order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < rows * N
    y = tl.zeros((BLOCK,), tl.float32)
    for p in tl.static_range(SPLIT):
        y += tl.load(parts + p * rows * N + i, mask=there, other=0.0)
    if bias is not None:
        y += tl.load(bias + i % N, mask=there, other=0.0).to(tl.float32)
    tl.store(out + i, y.to(out.dtype.element_ty), mask=there)
