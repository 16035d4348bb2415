"""The kernels behind triton_gptq.py, in Triton. W fp32 [E, N, K], columns in the order of work.

scales, zeros fp32 [E, G, N]; zeros may be None: 2^(BITS-1). Each program has some outputs of one matrix.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def _round(x):
    """To nearest, ties to even, of what is below 2^22; above that only whether it is large matters."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale(low, high, BITS: tl.constexpr, SYM: tl.constexpr, DTYPE: tl.constexpr):
    """The grid from low to high, as gptq_fx.grid.find_grid has it."""
    LEVELS: tl.constexpr = 2.0**BITS - 1
    if SYM:
        scale = tl.math.div_rn(tl.maximum(high, -low), tl.full(low.shape, LEVELS / 2, tl.float32))
    else:
        levels = tl.full(low.shape, LEVELS, tl.float32)
        low = tl.minimum(low, 0.0)
        scale = tl.math.div_rn(tl.maximum(high, 0.0), levels) - tl.math.div_rn(low, levels)
    if DTYPE == "fp16":
        scale = scale.to(tl.float16).to(tl.float32)
    elif DTYPE == "bf16":
        scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale == 0.0, 1.0, scale)
    if SYM:
        zero = tl.full(low.shape, 2.0 ** (BITS - 1), tl.float32)
    else:
        zero = tl.minimum(tl.maximum(_round(tl.math.div_rn(-low, scale)), 0.0), LEVELS)
    return scale, zero


@triton.jit
def search(
    W,
    importance,
    parts,
    scales,
    zeros,
    start,
    N,
    K,
    G,
    group_size,
    norm,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    SQUARE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The grid of the group of columns from `start` on: of its range, or the best of PARTS of it.

    importance [E, K]: what the error of a column counts. parts fp32 [PARTS]: the first is 1.
    """
    SYM: tl.constexpr = zeros is None
    TOP: tl.constexpr = 2.0**BITS - 1
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, CHUNK)
    here = W + (e * N + row)[:, None] * K + start
    low = tl.full((ROWS,), float("inf"), tl.float32)
    high = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, group_size, CHUNK):
        inside = (row < N)[:, None] & (first + k < group_size)[None, :]
        w = tl.load(here + (first + k)[None, :], mask=inside, other=0.0)
        low = tl.minimum(low, tl.min(tl.where(inside, w, float("inf")), 1))
        high = tl.maximum(high, tl.max(tl.where(inside, w, float("-inf")), 1))
    low = tl.where(row < N, low, 0.0)
    high = tl.where(row < N, high, 0.0)
    scale, zero = _scale(low, high, BITS, SYM, DTYPE)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    for p in range(PARTS):
        part = tl.load(parts + p)
        s, z = _scale(low * part, high * part, BITS, SYM, DTYPE)
        error = tl.zeros((ROWS,), tl.float32)
        for first in range(0, group_size, CHUNK):
            inside = (row < N)[:, None] & (first + k < group_size)[None, :]
            w = tl.load(here + (first + k)[None, :], mask=inside, other=0.0)
            matters = tl.load(importance + e * K + start + first + k, mask=first + k < group_size, other=0.0)
            q = tl.minimum(tl.maximum(_round(w / s[:, None]) + z[:, None], 0.0), TOP)
            off = tl.abs((q - z[:, None]) * s[:, None] - w)
            if SQUARE:
                off = off * off
            else:
                off = tl.exp2(norm * tl.log2(tl.maximum(off, 1e-38))).to(tl.float32) * (off > 0.0)
            error += tl.sum(off * matters[None, :], 1)
        better = error < least
        least = tl.where(better, error, least)
        scale = tl.where(better, s, scale)
        zero = tl.where(better, z, zero)
    where = (e * G + start // group_size) * N + row
    tl.store(scales + where, scale, mask=row < N)
    if not SYM:
        tl.store(zeros + where, zero, mask=row < N)


@triton.jit(do_not_specialize=["group"])
def columns(
    W,
    U,
    scales,
    zeros,
    group_of,
    codes,
    Err,
    loss,
    start,
    width,
    N,
    K,
    G,
    group,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The columns of one block, one after the other, each of which makes up for the errors before it.

    U [E, K, K], of which the square of the block is read. group_of int64 [E, K]: the row of scales for each
    column; None: `group` for all. codes uint8 [E, N, K]; Err fp32 [E, N, WIDTH] is written;
    loss fp32 [E, N] grows by the squares of Err.
    """
    TOP: tl.constexpr = 2.0**BITS - 1
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < N
    k = tl.arange(0, WIDTH)
    tile = (e * N + row)[:, None] * K + start + k[None, :]
    inside = there[:, None] & (k < width)[None, :]
    # Columns that are done hold their Err from then on.
    w = tl.load(W + tile, mask=inside, other=0.0)
    q = tl.zeros((ROWS, WIDTH), tl.float32)
    line = U + (e * K + start) * K + start
    s = tl.load(scales + (e * G + group) * N + row, mask=there, other=1.0)
    z = tl.full((ROWS,), 2.0 ** (BITS - 1), tl.float32)
    if zeros is not None:
        z = tl.load(zeros + (e * G + group) * N + row, mask=there, other=0.0)
    for i in range(width):
        if group_of is not None:
            own = tl.load(group_of + e * K + start + i)
            s = tl.load(scales + (e * G + own) * N + row, mask=there, other=1.0)
            if zeros is not None:
                z = tl.load(zeros + (e * G + own) * N + row, mask=there, other=0.0)
        u = tl.load(line + k, mask=(k > i) & (k < width), other=0.0)
        d = tl.load(line + i)
        line += K
        now = (k == i)[None, :]
        column = tl.sum(tl.where(now, w, 0.0), 1)
        code = tl.minimum(tl.maximum(_round(tl.math.div_rn(column, s)) + z, 0.0), TOP)
        err = (column - (code - z) * s) / d
        w = tl.where(now, err[:, None], w - err[:, None] * u[None, :])
        q = tl.where(now, code[:, None], q)
    tl.store(codes + tile, q.to(tl.uint8), mask=inside)
    tl.store(Err + (e * N + row)[:, None] * WIDTH + k[None, :], w, mask=inside)
    before = tl.load(loss + e * N + row, mask=there, other=0.0)
    tl.store(loss + e * N + row, before + tl.sum(w * w, 1), mask=there)
