"""What a block of experts needs beside its two products, in Triton. Imported where a block first runs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024  # of a row that one program takes


def align_rows(ids: Tensor, rows: Tensor, owners: Tensor, used: Tensor, experts: int, tile: int) -> None:
    """See humming_experts.align; ids [S] -> rows [capacity], owners [capacity/tile], used [1]."""
    S = ids.shape[0]
    bins = triton.next_power_of_2(experts + 1)
    next_row = rows.new_empty(bins)
    warps = 4 if S <= 1024 else 16
    # A histogram wants no fewer values than there are threads.
    chunk = max(min(triton.next_power_of_2(S), 1024), 32 * warps)
    _align[(1,)](
        ids,
        rows,
        owners,
        used,
        next_row,
        S,
        rows.shape[0],
        owners.shape[0],
        experts,
        TILE=tile,
        BINS=bins,
        CHUNK=chunk,
        OWNERS=max(4096 // bins, 1),
        num_warps=warps,
    )


@triton.jit
def _align(
    ids,
    rows,
    owners,
    used,
    next_row,
    S,
    capacity,
    tiles,
    experts,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    OWNERS: tl.constexpr,
):
    """One program: count the rows of each expert, give each whole tiles, then hand out the places."""
    e = tl.arange(0, BINS)
    i = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, S, CHUNK):
        mine = tl.load(ids + start + i, mask=start + i < S, other=experts).to(tl.int32)
        mine = tl.minimum(mine, experts)  # any larger number means none, too
        counts += tl.histogram(mine, BINS)
    counts = tl.where(e < experts, counts, 0)
    blocks = (counts + TILE - 1) // TILE
    last = tl.cumsum(blocks, 0)
    tl.store(next_row + e, (last - blocks) * TILE)
    tl.store(used, tl.sum(blocks, 0) * TILE)
    for start in range(0, tiles, OWNERS):
        t = start + tl.arange(0, OWNERS)
        before = tl.where((last[None, :] <= t[:, None]) & (e < experts)[None, :], 1, 0)
        owner = tl.minimum(tl.sum(before, 1), experts - 1)
        tl.store(owners + t, owner, mask=t < tiles)
    for start in range(0, capacity, CHUNK):
        tl.store(rows + start + i, S, mask=start + i < capacity)
    tl.debug_barrier()  # the stores above are seen by all threads below
    for start in range(0, S, CHUNK):
        inside = start + i < S
        mine = tl.load(ids + start + i, mask=inside, other=experts).to(tl.int32)
        inside = inside & (mine < experts)
        place = tl.atomic_add(next_row + mine, 1, mask=inside)
        tl.store(rows + place, start + i, mask=inside)


def activate(
    both: Tensor, hidden: Tensor, ids: Tensor, bias: Tensor | None, activation: str, experts: int
) -> None:
    """hidden [S, I] from both [S, 2I], + bias [E, 2I] of expert ids[s]: see ExpertOps.block."""
    S, width = hidden.shape
    _activate[(S, triton.cdiv(width, COLUMNS))](
        both, hidden, ids, bias, width, experts, ACT=activation, BIAS=bias is not None, COLUMNS=COLUMNS
    )


@triton.jit
def _activate(
    both, hidden, ids, bias, width, experts, ACT: tl.constexpr, BIAS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < width
    if ACT == "gpt_oss":
        gate_at, up_at = 2 * c, 2 * c + 1
    else:
        gate_at, up_at = c, c + width
    source = both + row * 2 * width
    gate = tl.load(source + gate_at, mask=inside, other=0).to(tl.float32)
    up = tl.load(source + up_at, mask=inside, other=0).to(tl.float32)
    if BIAS:
        expert = tl.load(ids + row).to(tl.int64)
        given = inside & (expert < experts)
        gate += tl.load(bias + expert * 2 * width + gate_at, mask=given, other=0).to(tl.float32)
        up += tl.load(bias + expert * 2 * width + up_at, mask=given, other=0).to(tl.float32)
    if ACT == "gpt_oss":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0) + 1.0
        act = gate * tl.sigmoid(1.702 * gate)
    elif ACT == "gelu_tanh":  # (1 + tanh(z)) / 2 = sigmoid(2z), z = sqrt(2/pi) (g + 0.044715 g^3)
        act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        act = gate * tl.sigmoid(gate)
    tl.store(hidden + row * width + c, (act * up).to(hidden.dtype.element_ty), mask=inside)


def combine(
    y: Tensor,
    ids: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    place: Tensor | None,
    out: Tensor,
    experts: int,
) -> Tensor:
    """out [T, H] = the sum over k of weights [T, k] * (y[place[t, k]] + bias[ids[t, k]]), added in fp32.

    ids int [T*k]; place int [T*k] or None: row t*k + j of y belongs to the j-th expert of t.
    """
    (T, H), k = out.shape, weights.shape[1]
    _combine[(T, triton.cdiv(H, COLUMNS))](
        y,
        ids,
        weights.contiguous(),
        bias,
        place,
        out,
        H,
        experts,
        K=k,
        BIAS=bias is not None,
        PLACE=place is not None,
        COLUMNS=COLUMNS,
    )
    return out


@triton.jit
def _combine(
    y,
    ids,
    weights,
    bias,
    place,
    out,
    H,
    experts,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    PLACE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(K):
        row = t * K + j
        expert = tl.load(ids + row).to(tl.int64)
        weight = tl.load(weights + row).to(tl.float32)
        if PLACE:
            row = tl.load(place + row).to(tl.int64)
        # Where there is no expert, the row of y holds whatever was in the memory.
        given = (c < H) & (expert < experts)
        value = tl.load(y + row * H + c, mask=given, other=0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + expert * H + c, mask=given, other=0).to(tl.float32)
        total += weight * value
    tl.store(out + t * H + c, total.to(out.dtype.element_ty), mask=c < H)
