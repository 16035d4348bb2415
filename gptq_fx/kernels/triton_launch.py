"""Which Triton kernel runs for how many rows, and with which tiles. Tensors here are contiguous.

few rows               gemv: multiplications in fp32, bound by reading the weights
more                   matmul on tensor cores; K is cut into parts where there are too few tiles
many                   torch.mm on weights that dequantize spells out, a part of the outputs at a time
few rows of experts    gemv: each row reads the weights of its own expert
more                   the rows are sorted by experts on the device, then matmul
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels import triton_code, triton_route
from gptq_fx.kernels.registry import Tensors

GEMV_ROWS = 2
MATMUL_ROWS = 256
SPELLED_OUT = 2**26  # bytes of weights that stand dequantized at one time
GEMV_SLOTS = 64  # rows of experts; and only while each expert has less than one of them, or they are 16
SLOTS_PER_CHUNK = 64


@dataclass(frozen=True)
class Packed:
    """The tensors of triton.py, of one weight or a stack."""

    w: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @classmethod
    def of(cls, tensors: Tensors, bits: int) -> Packed:
        w, high, scales, zeros = tensors
        assert w is not None and scales is not None
        return cls(w, high, scales, zeros, bits)

    @property
    def N(self) -> int:
        return self.w.shape[-2]

    @property
    def experts(self) -> int:
        return self.w.shape[0]

    def sizes(self, K: int) -> tuple[int, int, int, int, int]:
        """N, K, G, KB, group_size: what the kernels want to know."""
        groups = self.scales.shape[-2]
        return self.N, K, groups, self.w.shape[-3], K // groups

    def constants(self, K: int) -> dict[str, int]:
        """BITS, SLABS, RUN."""
        slabs = (32 if self.bits != 3 else 48) // self.bits
        groups = self.scales.shape[-2]
        run = slabs if groups == 1 else math.gcd(K // groups, 16 * slabs) // 16
        return {"BITS": self.bits, "SLABS": slabs, "RUN": run}


@dataclass(frozen=True)
class Tile:
    """BM rows by BN outputs (of gemv: BB blocks of K at a time), and options of the launch."""

    BN: int
    BM: int = 0
    BB: int = 0
    warps: int = 4
    stages: int = 3


def gemv_tile(weight: Packed, programs: int, rows: int, device: torch.device) -> Tile:
    """As many outputs a program as leave two programs for each multiprocessor, and as registers can hold."""
    for BN in (64, 32):
        fits = BN * rows * (2 if weight.bits < 4 else 1) <= 64
        if fits and -(-weight.N // BN) * programs >= 2 * processors(device):
            return Tile(BN=BN, BB=8, warps=8)
    return Tile(BN=16, BB=8, warps=8)


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


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 4  # Triton's interpreter


@functools.cache
def speaks_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.device.type == "xpu" and x.device.index != torch.xpu.current_device():
        return torch.xpu.device(x.device)
    return nullcontext()


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x [M, K] -> [M, N]."""
    M = x.shape[0]
    if M == 0:
        return x.new_empty(0, weight.N)
    with on_device(x):
        if M <= GEMV_ROWS:
            return gemv(x, weight, bias)
        if M <= MATMUL_ROWS:
            return matmul(x, weight, bias)
        return spelled_out(x, weight, bias)


def gemv(x: Tensor, weight: Packed, bias: Tensor | None, tile: Tile | None = None) -> Tensor:
    """x [M, K] -> [M, N], two rows a program."""
    out = x.new_empty(x.shape[0], weight.N)
    _gemv(x, weight, bias, None, None, out, "", rows=x.shape[0], topk=1, share=1, tile=tile)
    return out


def _gemv(
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
    triton_code.gemv[(-(-weight.N // tile.BN), programs)](
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
    _matmul(x, weight, bias, None, None, None, to, "", rows=M, tiles=-(-M // tile.BM), tile=tile, parts=parts)
    if parts > 1:
        grid = (-(-M * N // 1024),)
        triton_code.add_parts[grid](to, bias, out, M, N, SPLIT=parts, BLOCK=1024)
    return out


def _matmul(
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
    triton_code.matmul[(tiles, -(-weight.N // tile.BN), parts)](
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
        EP=_power_of_two(weight.experts + 1) if ends is not None else 1,
        SPLIT=parts,
        EVEN=K % (16 * constants["SLABS"]) == 0,
        PTX=speaks_ptx(x.device),
        BM=tile.BM,
        BN=tile.BN,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


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
    triton_code.dequantize[(blocks, -(-(stop - start) // 64))](
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


# --- stacks of experts


def few(slots: int, experts: int) -> bool:
    """Whether each row reads its own expert's weights, though some of them be read twice."""
    return slots <= 16 or slots <= min(GEMV_SLOTS, experts // 2)


def grouped(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """x [S, K], ends [E] -> [S, N]."""
    S = x.shape[0]
    out = x.new_empty(S, weight.N)
    if S > 0:
        with on_device(x):
            # the rows behind the last end are one expert more
            tile, tiles = expert_tiles(x, weight, S, weight.experts + 1)
            _matmul(x, weight, None, ends, None, None, out, "", rows=S, tiles=tiles, tile=tile)
    return out


def expert_tiles(x: Tensor, weight: Packed, slots: int, kinds: int) -> tuple[Tile, int]:
    """The tile, and how many tiles of rows there are at most, where each of `kinds` begins its own."""
    tile = matmul_tile(weight, max(slots // weight.experts, 1), x.shape[1], x.dtype)
    return tile, slots // tile.BM + min(kinds, slots)


def indexed(x: Tensor, weight: Packed, ids: Tensor) -> Tensor:
    """x [S, K], ids [S] -> [S, N]."""
    S = x.shape[0]
    out = x.new_empty(S, weight.N)
    if S == 0:
        return out
    with on_device(x):
        ids = ids.contiguous()
        if few(S, weight.experts):
            _gemv(x, weight, None, ids, None, out, "", rows=S, topk=1, share=1)
        else:
            order, ends = route(ids, weight.experts)
            tile, tiles = expert_tiles(x, weight, S, weight.experts)
            _matmul(x, weight, None, ends, order, None, out, "", rows=S, tiles=tiles, tile=tile)
    return out


def route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """ids [*] of S slots -> order int32 [S], the slots sorted by experts, and ends int32 [experts]."""
    S = ids.numel()
    EP = _power_of_two(experts)
    chunk = max(16, min(SLOTS_PER_CHUNK, 2**13 // EP))
    programs = min(-(-S // chunk), 64)
    steps = -(-S // (chunk * programs))
    counts = torch.empty(programs, EP, dtype=torch.int32, device=ids.device)
    order = torch.empty(S, dtype=torch.int32, device=ids.device)
    ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
    triton_route.count[(programs,)](ids, counts, S, steps, experts, EP=EP, C=chunk)
    triton_route.place[(programs,)](ids, counts, order, ends, S, steps, experts, programs, EP=EP, C=chunk)
    return order, ends


def block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: tuple[Packed, Tensor | None],
    down: tuple[Packed, Tensor | None],
    activation: str,
) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]: see gptq::experts."""
    T, H = x.shape
    out = x.new_empty(T, H)
    k = ids.shape[1]
    slots = T * k
    if slots == 0:
        return out.zero_()
    (first, first_bias), (second, second_bias) = gate_up, down
    E, hidden = first.experts, first.N // 2
    h = x.new_empty(slots, hidden)
    with on_device(x):
        ids, weights = ids.contiguous(), weights.contiguous()
        if few(slots, E):
            _gemv(x, first, first_bias, ids, None, h, activation, rows=slots, topk=1, share=k)
            _gemv(h, second, second_bias, ids, weights, out, "", rows=T, topk=k, share=1)
            return out
        order, ends = route(ids, E)
        tile, tiles = expert_tiles(x, first, slots, E)
        _matmul(
            x,
            first,
            first_bias,
            ends,
            order,
            None,
            h,
            activation,
            rows=slots,
            tiles=tiles,
            tile=tile,
            share=k,
        )
        y = x.new_empty(slots, H)
        tile, tiles = expert_tiles(h, second, slots, E)
        _matmul(h, second, second_bias, ends, order, weights, y, "", rows=slots, tiles=tiles, tile=tile)
        triton_route.weighted_sum[(T, -(-H // 1024))](y, ids, out, H, E, TOPK=k, BLOCK=1024)
    return out
