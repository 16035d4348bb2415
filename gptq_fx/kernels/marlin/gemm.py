"""Calls of gemm.cu, wide.cu and dense.cu: a product of rows, or of blocks of rows, with a weight."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_fx.kernels.marlin import variants
from gptq_fx.kernels.marlin.launch import Function, counters, device, pointer
from gptq_fx.kernels.marlin.variants import Tile, Variant, WideTile, WideVariant

GEMM_ARGUMENTS = "12Q10i"
WIDE_ARGUMENTS = "11Q10i"
MOST_CLUSTER = 8  # blocks; what every GPU with clusters admits
# What it takes to add up a cluster, and tiles that two blocks share, in the time of chunks of K.
CLUSTER_OVERHEAD, SHARED_TILE = 4, 2
# Of weights that are dequantized at a time for a dense GEMM.
SCRATCH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Weight:
    """The tensors of one linear, or of a stack (experts of them), and how to read them.

    packed int32 [*, K / 16, N64 * bits * 32], scales [*, G, N64 * 64], zeros int32 or None, perm int32 [*, K]
    or None. bits: 4 or 8. group_tiles: of variants.Variant. out_features: N, without padding.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    bits: int
    group_tiles: int
    out_features: int

    @property
    def in_features(self) -> int:
        """K with its padding."""
        return self.packed.shape[-2] * 16


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks, each for one expert. They are made on the GPU: the host knows no more than `most`.

    experts: address of the expert of each block, int32 or (wide) int64. rows: of the rows of each
    [most, tokens]; 0: block b is row b. count: of the number of blocks; 0: it is `most`. top_k: row r of out
    takes row r // top_k of x. kept: the tensor that the addresses point into.
    """

    experts: int
    rows: int
    count: int
    most: int
    num_experts: int
    top_k: int
    wide: bool
    kept: Tensor

    def each_row(self) -> Blocks:
        """The same blocks, where each row of out has a row of x for itself."""
        return replace(self, top_k=1)


def _is_bf16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16


@functools.cache
def gemm_function(
    bits: int, bf16: bool, asym: bool, group_tiles: int, perm: bool, moe: bool, tile: Tile, index: int
) -> Function:
    where = device(index)
    variant = Variant(bits, bf16, asym, group_tiles, perm, moe, tile)
    stages, blocks = variant.fit(where.shared_per_multiprocessor, where.shared_per_block)
    source = variant.source(stages, blocks)
    shared = variant.shared_bytes(stages)
    return Function(source, "marlin_gemm", where, variant.tile.threads, shared, GEMM_ARGUMENTS)


def usable(x: Tensor, K: int) -> Tensor:
    """x [M, k] as the kernels read it: rows of K >= k features, each aligned to 16 bytes."""
    if x.shape[1] != K:
        return torch.nn.functional.pad(x, (0, K - x.shape[1]))
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def gemm(x: Tensor, w: Weight, bias: Tensor | None, tile: Tile, out: Tensor, blocks: Blocks | None) -> None:
    """out [*, N] = x W^T + bias on the rows of x [M, K] (see `usable`), or on `blocks` of them."""
    index = x.get_device()
    K, N64 = w.in_features, w.scales.shape[-1] // 64
    function = gemm_function(
        w.bits,
        _is_bf16(x.dtype),
        w.zeros is not None,
        w.group_tiles,
        w.perm is not None,
        blocks is not None,
        tile,
        index,
    )
    grid = function.resident
    row_blocks = -(-x.shape[0] // tile.tokens) if blocks is None else blocks.most
    if blocks is None or not blocks.count:
        chunk = 16 * tile.warps_k * tile.k_tiles
        units = -(-N64 // tile.warps_n) * row_blocks * -(-K // chunk)
        grid = min(grid, units)
    partials = torch.empty(grid * 2 * tile.tokens * 64 * tile.warps_n, dtype=torch.float32, device=x.device)
    function(
        grid,
        1,
        x.data_ptr(),
        w.packed.data_ptr(),
        w.scales.data_ptr(),
        pointer(w.zeros),
        pointer(w.perm),
        pointer(bias),
        out.data_ptr(),
        partials.data_ptr(),
        counters(index),
        *((0, 0, 0) if blocks is None else (blocks.experts, blocks.rows, blocks.count)),
        x.shape[0],
        w.out_features,
        K,
        N64,
        x.stride(0),
        w.scales.shape[-2],
        row_blocks,
        *((1, 1, 0) if blocks is None else (blocks.num_experts, blocks.top_k, int(blocks.wide))),
    )


def has_wgmma(x: Tensor) -> bool:
    return device(x.get_device()).has_wgmma


def has_clusters(x: Tensor) -> bool:
    return device(x.get_device()).has_clusters


@functools.cache
def wide_function(
    bits: int, bf16: bool, asym: bool, group_tiles: int, moe: bool, tile: WideTile, index: int
) -> Function:
    where = device(index)
    variant = WideVariant(bits, bf16, asym, group_tiles, moe, tile)
    stages = variant.fit(where.shared_per_multiprocessor, where.shared_per_block)
    shared = variant.shared_bytes(stages)
    return Function(variant.source(stages), "marlin_wide", where, tile.threads, shared, WIDE_ARGUMENTS)


@functools.lru_cache(maxsize=1024)
def _parts(function: Function, tiles: int, chunks: int) -> int:
    """How many blocks shall share a tile of the output: what ends first, as far as that can be told."""

    def time(parts: int) -> float:
        if parts == 1 and tiles > function.resident:
            return tiles / function.resident * chunks + SHARED_TILE
        waves = -(-tiles // function.clusters(parts))
        return waves * (-(-chunks // parts) + CLUSTER_OVERHEAD * (parts > 1))

    possible = [p for p in range(1, min(MOST_CLUSTER, chunks) + 1) if function.clusters(p)]
    return min(possible, key=time)


def wide(
    x: Tensor,
    w: Weight,
    bias: Tensor | None,
    tile: WideTile,
    out: Tensor,
    blocks: Blocks | None,
) -> None:
    """As `gemm`, for many rows, where Device.has_wgmma. w has no perm."""
    index = x.get_device()
    K, N64 = w.in_features, w.scales.shape[-1] // 64
    function = wide_function(
        w.bits, _is_bf16(x.dtype), w.zeros is not None, w.group_tiles, blocks is not None, tile, index
    )
    row_blocks = -(-x.shape[0] // tile.tokens) if blocks is None else blocks.most
    tiles = row_blocks * -(-N64 * 64 // tile.outputs)
    parts = _parts(function, tiles, -(-K // (16 * tile.k_tiles)))
    grid = tiles * parts if parts > 1 else min(tiles, function.resident)
    shared = tile.tokens * tile.outputs if parts == 1 and tiles > grid else 0  # by two blocks
    partials = torch.empty(grid * 2 * shared, dtype=torch.float32, device=x.device)
    function(
        grid,
        1,
        x.data_ptr(),
        w.packed.data_ptr(),
        w.scales.data_ptr(),
        pointer(w.zeros),
        pointer(bias),
        out.data_ptr(),
        *((0, 0, 0) if blocks is None else (blocks.experts, blocks.rows, blocks.count)),
        partials.data_ptr(),
        counters(index),
        x.shape[0],
        w.out_features,
        K,
        N64,
        x.stride(0),
        w.scales.shape[-2],
        row_blocks,
        *((1, 1, 0) if blocks is None else (blocks.num_experts, blocks.top_k, int(blocks.wide))),
        cluster=parts,
    )


@functools.cache
def _dense_functions(
    bits: int, bf16: bool, asym: bool, group_tiles: int, index: int
) -> tuple[Function, Function]:
    source = variants.dense_source(bits, bf16, asym, group_tiles)
    where = device(index)
    return (
        Function(source, "marlin_dequantize", where, 128, 4 * 64 * 144, "4Q3i4x"),
        Function(source, "marlin_permute", where, 256, 0, "3Q2i"),
    )


def permuted(x: Tensor, w: Weight) -> tuple[Tensor, Weight]:
    """x [M, K] in the order of the rows of w, and w without an order of its own."""
    assert w.perm is not None
    index, K = x.get_device(), w.in_features
    functions = _dense_functions(w.bits, _is_bf16(x.dtype), w.zeros is not None, w.group_tiles, index)
    ordered = torch.empty(x.shape[0], K, dtype=x.dtype, device=x.device)
    functions[1](
        x.shape[0],
        -(-K // 2048),
        x.data_ptr(),
        w.perm.data_ptr(),
        ordered.data_ptr(),
        K,
        x.stride(0),
    )
    return ordered, replace(w, perm=None)


def dense(x: Tensor, w: Weight, bias: Tensor | None, out: Tensor) -> None:
    """As `gemm` for one weight, by dequantizing it part by part for a dense GEMM."""
    index = x.get_device()
    functions = _dense_functions(w.bits, _is_bf16(x.dtype), w.zeros is not None, w.group_tiles, index)
    dequantize = functions[0]
    K, N = w.in_features, w.out_features
    if w.perm is not None:
        x, w = permuted(x, w)
    x, bias = x.detach(), None if bias is None else bias.detach()  # `out` has no gradient
    all_tiles = w.scales.shape[-1] // 64
    step = min(max(SCRATCH_BYTES // (128 * K), 1), all_tiles)
    scratch = torch.empty(step * 64, K, dtype=x.dtype, device=x.device)
    for begin in range(0, all_tiles, step):
        tiles = min(step, all_tiles - begin)
        dequantize(
            tiles * -(-K // 256),
            1,
            w.packed.data_ptr(),
            w.scales.data_ptr(),
            pointer(w.zeros),
            scratch.data_ptr(),
            K,
            all_tiles,
            begin,
        )
        first, last = begin * 64, min((begin + tiles) * 64, N)
        part = scratch[: last - first].t()
        if bias is None:
            torch.mm(x, part, out=out[:, first:last])
        else:
            torch.addmm(bias[first:last], x, part, out=out[:, first:last])
