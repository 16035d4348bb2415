"""Which rows meet which expert, sorted on the device; and the sum of what the experts made. See triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def count(ids, counts, slots, steps, experts, EP: tl.constexpr, C: tl.constexpr):
    """counts int32 [programs, EP]: how often each expert stands in the ids of a program's C * steps slots."""
    e = tl.arange(0, EP)
    found = tl.zeros((EP,), tl.int32)
    for step in range(steps):
        slot = (tl.program_id(0) * steps + step) * C + tl.arange(0, C)
        expert = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
        found += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * EP + e, tl.where(e < experts, found, 0))


@triton.jit
def place(ids, counts, order, ends, slots, steps, experts, programs, EP: tl.constexpr, C: tl.constexpr):
    """order int32 [slots]: the slots of each expert in turn, as they stand; ends int32 [experts]."""
    e = tl.arange(0, EP)
    before = tl.zeros((EP,), tl.int32)
    total = tl.zeros((EP,), tl.int32)
    for p in range(programs):
        found = tl.load(counts + p * EP + e)
        total += found
        before += tl.where(p < tl.program_id(0), found, 0)
    end = tl.cumsum(total, 0)
    if tl.program_id(0) == 0:
        tl.store(ends + e, end, mask=e < experts)
    start = end - total + before
    for step in range(steps):
        slot = (tl.program_id(0) * steps + step) * C + tl.arange(0, C)
        expert = tl.load(ids + slot, mask=slot < slots, other=-1).to(tl.int32)
        hit = (expert[:, None] == e[None, :]).to(tl.int32)
        position = tl.sum(hit * (start[None, :] + tl.cumsum(hit, 0) - 1), 1)
        used = (expert >= 0) & (expert < experts)
        tl.store(order + position, slot, mask=used)
        start += tl.sum(hit, 0)


@triton.jit
def weighted_sum(y, ids, out, H, experts, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """y [T * TOPK, H], weighted already, ids [T, TOPK] -> out [T, H]: the sum over those with an expert."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(TOPK):
        e = tl.load(ids + t * TOPK + i)
        used = (e >= 0) & (e < experts)
        total += tl.load(y + (t * TOPK + i) * H + c, mask=used & (c < H), other=0.0).to(tl.float32)
    tl.store(out + t * H + c, total.to(out.dtype.element_ty), mask=c < H)
