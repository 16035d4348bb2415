"""The kernels behind triton.py, in Triton. Only that file imports this one, when it first launches something.

w int32 [*, KB, N, 16]: the K inputs lie in KB blocks of 16 * SLABS; SLABS = 16, 16, 8, 4 codes of 2, 3, 4, 8
    bits share a word. Word r of block b holds, from the low bits, the codes of the inputs
    k = (b * SLABS + j) * 16 + r of slab j = 0, 1, ...; those of slabs j and j + SLABS / 2 lie 16 bits apart,
    and are taken out together. So a slab is 16 inputs in their order: one step of a tensor core.
high int16 [*, KB, N, 16]: of 3 bits, the third; slab j at bit j. w has the two others.
scales [*, G, N]; zeros uint8 [*, G, N] or None: 2^(bits-1). Inputs behind K meet an x of 0.
RUN: slabs in a row that share a scale.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

# mypy: ignore-errors

# Triton's interpreter multiplies the bits of bf16 as if they were integers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _zero(zeros, where, BITS: tl.constexpr):
    """Zero points as int32, or the one number that all are."""
    if zeros is None:
        return 2 ** (BITS - 1)
    else:
        return tl.load(zeros + where).to(tl.int32)


@triton.jit
def _wide(high):
    """The third bits: those of the upper slabs moved from bits 8 to 15 up to bits 16 to 23."""
    h = high.to(tl.int32)
    return (h & 0xFF) | ((h & 0xFF00) << 8)


@triton.jit
def _and_or(word, mask, bits, PTX: tl.constexpr):
    """(word & mask) | bits: one instruction, which the compiler misses."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, bits], tl.int32, is_pure=True, pack=1
        )
    else:
        return (word & mask) | bits


@triton.jit
def _subtract(pair, offset, dtype: tl.constexpr):
    """Two numbers of 16 bits at a time."""
    if dtype == tl.bfloat16:  # compute capability 8 has no subtraction of bf16, but this
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1; }",
            "=r,r,r",
            [pair, offset],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "sub.f16x2 $0, $1, $2;", "=r,r,r", [pair, offset], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _pair(
    word, high, zero, other, j: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """The integers q - z of slabs j and j + SLABS / 2, exact in dtype; the zeros of both."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    MASK: tl.constexpr = (2**WIDTH - 1) * 0x10001
    if dtype == tl.float32 or (dtype == tl.bfloat16 and BITS == 8):
        # 2^23 + q is what these bits say in fp32
        pair = (word >> (WIDTH * j)) & MASK
        if BITS == 3:
            pair |= ((high >> j) & 0x10001) << 2
        low = ((pair & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
        up = (((pair >> 16) & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + other)
    else:
        # 128 + q in bf16, 1024 + q in fp16: q stands in the last bits of the mantissa
        ONE: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        BASE: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
        pair = _and_or(word >> (WIDTH * j), MASK, ONE * 0x10001, PTX)
        if BITS == 3:
            pair |= ((high >> j) & 0x10001) << 2
        if PTX:
            pair, offset = tl.broadcast(pair, (zero | ONE) | ((other | ONE) << 16))
            pair = _subtract(pair, offset, dtype)
        low = pair.to(tl.int16).to(dtype, bitcast=True)
        up = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        if not PTX:
            low = low.to(tl.float32) - (zero + BASE)
            up = up.to(tl.float32) - (other + BASE)
    return low.to(dtype), up.to(dtype)


@triton.jit
def _columns(tile, N, BN: tl.constexpr, ACT: tl.constexpr):
    """The BN outputs of the linear that a program computes; behind an activation, gate and up in turns."""
    i = tile * BN + tl.arange(0, BN)
    if ACT == "silu" or ACT == "gelu_tanh":
        i = (i % 2) * (N // 2) + i // 2
    return i


@triton.jit
def _activate(gate, up, ACT: tl.constexpr):
    if ACT == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * u) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1) * gate * tl.sigmoid(1.702 * gate)


@triton.jit
def _spread(table, BN: tl.constexpr, BB: tl.constexpr):
    """[BN, BB] -> [BN, BB * 16]."""
    return tl.reshape(tl.broadcast_to(table[:, :, None], (BN, BB, 16)), (BN, BB * 16))


@triton.jit
def gemv(
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
    n = _columns(tl.program_id(0), N, BN, ACT)
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
                    q = _and_or(q, (2**WIDTH - 1) << (23 - BITS), 0x3F800000, PTX)
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
        h = _activate(one, other, ACT).to(out.dtype.element_ty)
        c = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(out + row.to(tl.int64) * (N // 2) + c, h, mask=c < N // 2)


@triton.jit
def _find_tile(ends, tile, rows, experts, EP: tl.constexpr, BM: tl.constexpr, FILL: tl.constexpr):
    """(expert, first row, end of its rows) of a tile of BM rows; an expert of EP where there is no such tile.

    FILL: rows behind the last end are those of one expert more.
    """
    e = tl.arange(0, EP)
    start = tl.load(ends + e - 1, mask=(e > 0) & (e <= experts), other=0).to(tl.int32)
    end = tl.load(ends + e, mask=e < experts, other=0).to(tl.int32)
    if FILL:
        end = tl.where(e == experts, rows, end)
        count = tl.where(e <= experts, end - start, 0)
    else:
        count = tl.where(e < experts, end - start, 0)
    tiles = (tl.maximum(count, 0) + BM - 1) // BM
    after = tl.cumsum(tiles, 0)
    expert = tl.sum((after <= tile).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, start + (tile - after + tiles) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def matmul(
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
    n = _columns(tl.program_id(1), N, BN, ACT)
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
        expert, start, end = _find_tile(ends, tl.program_id(0), rows, experts, EP, BM, order is None)
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
            third = _wide(tl.load(high + block + place))
        for run in tl.static_range(0, HALF, STEP):
            k = (b * SLABS + run) * 16
            where = grid + tl.minimum(k // group_size, G - 1) * N + n
            z = _zero(zeros, where, BITS)
            s = tl.load(scales + where).to(tl.float32)
            if WHOLE:
                z2 = z
            else:
                where = grid + tl.minimum((k + HALF * 16) // group_size, G - 1) * N + n
                z2 = _zero(zeros, where, BITS)
                s2 = tl.load(scales + where).to(tl.float32)
            if zeros is not None:
                z = z[:, None]
                z2 = z2[:, None]
            p = tl.zeros((BN, BM), tl.float32)
            p2 = tl.zeros((BN, BM), tl.float32)
            for j in tl.static_range(run, run + STEP):
                low, up = _pair(word, third, z, z2, j, dtype, BITS, PTX)
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
        h = _activate(one, other, ACT).to(out.dtype.element_ty)
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


@triton.jit
def dequantize(
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
        third = _wide(tl.load(high + place))
    to = out + i[:, None].to(tl.int64) * K + r[None, :]
    for run in tl.static_range(0, HALF, STEP):
        k = (b * SLABS + run) * 16
        where = tl.minimum(k // group_size, G - 1) * N + n
        where2 = where
        if not WHOLE:
            where2 = tl.minimum((k + HALF * 16) // group_size, G - 1) * N + n
        z = _zero(zeros, where, BITS)
        z2 = _zero(zeros, where2, BITS)
        if zeros is not None:
            z = z[:, None]
            z2 = z2[:, None]
        s = tl.load(scales + where).to(tl.float32)[:, None]
        s2 = tl.load(scales + where2).to(tl.float32)[:, None]
        for j in tl.static_range(run, run + STEP):
            low, up = _pair(word, third, z, z2, j, out.dtype.element_ty, BITS, PTX)
            k1 = (b * SLABS + j) * 16
            k2 = k1 + HALF * 16
            y = (low.to(tl.float32) * s).to(out.dtype.element_ty)
            y2 = (up.to(tl.float32) * s2).to(out.dtype.element_ty)
            tl.store(to + k1, y, mask=there & (k1 + r < K)[None, :])
            tl.store(to + k2, y2, mask=there & (k2 + r < K)[None, :])
