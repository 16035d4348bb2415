"""Which rows meet which expert, sorted on the device; and the sum of what the experts made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptq_fx.kernels.triton.weight import power_of_two

SLOTS_PER_CHUNK = 64


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """ids [*] of S slots -> order int32 [S], the slots sorted by experts, and ends int32 [experts]."""
    S = ids.numel()
    EP = power_of_two(experts)
    chunk = max(16, min(SLOTS_PER_CHUNK, 2**13 // EP))
    programs = min(-(-S // chunk), 64)
    steps = -(-S // (chunk * programs))
    counts = torch.empty(programs, EP, dtype=torch.int32, device=ids.device)
    order = torch.empty(S, dtype=torch.int32, device=ids.device)
    ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
    count[(programs,)](ids, counts, S, steps, experts, EP=EP, C=chunk)
    place[(programs,)](ids, counts, order, ends, S, steps, experts, programs, EP=EP, C=chunk)
    return order, ends


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


@triton.jit
def find_tile(ends, tile, rows, experts, EP: tl.constexpr, BM: tl.constexpr, FILL: tl.constexpr):
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
