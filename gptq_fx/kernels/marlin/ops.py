"""The ops on Marlin packs. None of them waits for the GPU: they may be captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_fx.kernels.block import BLOCK_ARGUMENTS, block_fake
from gptq_fx.kernels.marlin import decode, gemm, routes
from gptq_fx.kernels.marlin.gemm import Weight
from gptq_fx.kernels.marlin.variants import ORDERED_TOKENS, Tile, WideTile, tile_for, wide_tile_for
from gptq_fx.ops import define_opaque

# Rows of x beyond which dequantizing and a dense GEMM are the faster way: without wgmma, and with.
MANY_ROWS, MANY_ROWS_OF_WGMMA = 256, 2048
# Rows of x beyond which x is put into the order of act-order once, not by each block that reads it.
PERMUTED_ROWS = 2
# Rows of x beyond which wgmma is faster, where there is such.
FEW_ROWS = 16
# Outputs from which they may do so: for fewer, cuBLAS splits its sum and rounds the parts to x's dtype.
DENSE_OUTPUTS = 1024
# Mean rows of an expert, as a part of a tile's, up to which that tile serves a stack.
FILLED = 0.9
_DTYPES = (torch.float16, torch.bfloat16)


def _check(x: Tensor, w: Weight) -> None:
    K = w.in_features
    if x.dtype not in _DTYPES or x.dtype != w.scales.dtype:
        raise TypeError(
            f"marlin: x is {x.dtype}, the scales {w.scales.dtype}. Legal: both float16 or bfloat16"
        )
    if not K - 16 < x.shape[-1] <= K:
        raise ValueError(f"marlin: x has {x.shape[-1]} features, the weight {K}")


def _empty(x: Tensor, rows: int, w: Weight) -> Tensor:
    return torch.empty(rows, w.out_features, dtype=x.dtype, device=x.device)


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_tiles: int,
    out_features: int,
) -> Tensor:
    """x fp16 or bf16 [*, K], the tensors of `pack`, bias [N] -> [*, N]."""
    return multiply(x, Weight(packed, scales, zeros, perm, bits, group_tiles, out_features), bias)


def multiply(x: Tensor, w: Weight, bias: Tensor | None) -> Tensor:
    """x fp16 or bf16 [*, K], bias [N] -> [*, N]."""
    _check(x, w)
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    out = _empty(x, rows.shape[0], w)
    if len(rows):
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        _product(gemm.usable(rows, w.in_features), w, bias, out)
    return out if x.ndim == 2 else out.reshape(*x.shape[:-1], w.out_features)


def _product(x: Tensor, w: Weight, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x W^T + bias, of at least one row, by whichever kernel is fastest for so many."""
    rows, many = x.shape[0], MANY_ROWS_OF_WGMMA if gemm.has_wgmma(x) else MANY_ROWS
    if rows > many and w.out_features >= DENSE_OUTPUTS:
        gemm.dense(x, w, bias, out)
    elif not _decode(x, w, bias, out):
        ordered = w.perm is not None and rows > PERMUTED_ROWS
        if ordered:
            x, w = gemm.permuted(x, w)
        if not ordered or not _decode(x, w, bias, out):
            _gemm(x, w, bias, _tile(rows, w, x), out, None)


def _decode(x: Tensor, w: Weight, bias: Tensor | None, out: Tensor) -> bool:
    return gemm.has_clusters(x) and decode.linear(x, w, bias, out)


def _tile(rows: int, w: Weight, x: Tensor) -> Tile | WideTile:
    """For so many rows of one weight."""
    if rows > FEW_ROWS and w.perm is None and gemm.has_wgmma(x):
        return wide_tile_for(rows)
    return tile_for(rows, w.bits)


def _gemm(
    x: Tensor, w: Weight, bias: Tensor | None, tile: Tile | WideTile, out: Tensor, blocks: gemm.Blocks | None
) -> None:
    if isinstance(tile, WideTile):
        gemm.wide(x, w, bias, tile, out, blocks)
    else:
        gemm.gemm(x, w, bias, tile, out, blocks)


def _linear_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_tiles: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_TENSORS = "Tensor packed, Tensor scales, Tensor? zeros, Tensor? perm"
_ARGS = "int bits, int group_tiles, int out_features"

marlin_linear = define_opaque(
    f"marlin_linear(Tensor x, {_TENSORS}, Tensor? bias, {_ARGS}) -> Tensor", fake=_linear_fake
)(linear)


def _stack_tile(rows: int, experts: int, w: Weight, x: Tensor) -> Tile | WideTile:
    """For as many rows as an expert has in the mean."""
    most = ORDERED_TOKENS if w.perm is not None else 128
    return _tile(min(int(rows / experts / FILLED), most), w, x)


def _one_each(rows: int, experts: int) -> bool:
    """Whether so few rows hardly share an expert: each may be a block of its own."""
    return rows == 1 or rows * 16 <= experts


def _stack_fake(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    which: Tensor,
    bits: int,
    group_tiles: int,
    out_features: int,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


@define_opaque(f"marlin_grouped(Tensor x, {_TENSORS}, Tensor ends, {_ARGS}) -> Tensor", fake=_stack_fake)
def marlin_grouped(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    ends: Tensor,
    bits: int,
    group_tiles: int,
    out_features: int,
) -> Tensor:
    """x [S, K] -> [S, N]: rows ends[e - 1] to ends[e] meet expert e; rows behind the last end give zeros."""
    return _stack(x, Weight(packed, scales, zeros, perm, bits, group_tiles, out_features), ends, True)


@define_opaque(f"marlin_indexed(Tensor x, {_TENSORS}, Tensor ids, {_ARGS}) -> Tensor", fake=_stack_fake)
def marlin_indexed(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    ids: Tensor,
    bits: int,
    group_tiles: int,
    out_features: int,
) -> Tensor:
    """x [S, K] -> [S, N]: row s meets expert ids[s]; zeros where there is no such expert."""
    return _stack(x, Weight(packed, scales, zeros, perm, bits, group_tiles, out_features), ids, False)


def _stack(x: Tensor, w: Weight, which: Tensor, ends: bool) -> Tensor:
    """which: the expert of each row, or (ends) where the rows of each expert end."""
    _check(x, w)
    S, E = x.shape[0], w.packed.shape[0]
    out = _empty(x, S, w).zero_()
    if S:
        tile, which = _stack_tile(S, E, w, x), _integers(which)
        if ends:
            blocks = routes.align(which, True, S, E, tile.tokens, 1, x.dtype == torch.bfloat16)
        else:
            blocks = _blocks(which, E, tile, 1, _one_each(S, E), x.dtype)
        _gemm(gemm.usable(x, w.in_features), w, None, tile, out, blocks)
    return out


def _integers(index: Tensor) -> Tensor:
    if index.dtype not in (torch.int32, torch.int64):
        index = index.to(torch.int32)
    return index.contiguous()


def _blocks(
    ids: Tensor, experts: int, tile: Tile | WideTile, top_k: int, one_each: bool, dtype: torch.dtype
) -> gemm.Blocks:
    if one_each:
        return routes.alone(ids, experts, top_k)
    return routes.align(ids, False, ids.numel(), experts, tile.tokens, top_k, dtype == torch.bfloat16)


@define_opaque(f"marlin_experts({BLOCK_ARGUMENTS}) -> Tensor", fake=block_fake)
def marlin_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_up_args: Sequence[int],
    down_args: Sequence[int],
) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]: the sum over k of weights * down(activation(gate_up(x))).

    gate_up_bias [E, 2I], down_bias [E, H]. An id that is no expert counts nothing.
    """
    first, second = _weight(gate_up, gate_up_args), _weight(down, down_args)
    _check(x, first)
    T, k = ids.shape
    if T == 0:
        return torch.empty_like(x)
    E = first.packed.shape[0]
    ids, weights = _integers(ids), _routed(weights, x.dtype)
    rows = T * k
    if _few_routes(x, ids, first, second, gate_up_bias, down_bias, activation):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        if decode.experts(gemm.usable(x, first.in_features), ids, weights, first, second, activation, out):
            return out
    biases = [None if b is None else b.to(x.dtype).contiguous() for b in (gate_up_bias, down_bias)]
    tiles = [_stack_tile(rows, E, w, x) for w in (first, second)]
    if tiles[0].tokens != tiles[1].tokens:  # both take the same blocks of rows
        tiles = [tile_for(min(tile.tokens for tile in tiles), w.bits) for w in (first, second)]
    blocks = _blocks(ids, E, tiles[0], k, T == 1 or _one_each(rows, E), x.dtype)
    hidden = _empty(x, rows, first)
    _gemm(gemm.usable(x, first.in_features), first, biases[0], tiles[0], hidden, blocks)
    active = gemm.usable(routes.activate(hidden, activation), second.in_features)
    out = _empty(x, rows, second)
    _gemm(active, second, biases[1], tiles[1], out, blocks.each_row())
    return routes.combine(out, ids, weights, E)


def _few_routes(
    x: Tensor,
    ids: Tensor,
    gate_up: Weight,
    down: Weight,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> bool:
    """Whether decode.cu has a form for the block, and routes hardly share an expert."""
    T, E = x.shape[0], gate_up.packed.shape[0]
    return (
        gemm.has_clusters(x)
        and (T == 1 or ids.numel() * 2 <= E)
        and activation in ("silu", "gelu_tanh")
        and gate_up.out_features % 128 == 0
        and all(each is None for each in (gate_up.perm, down.perm, gate_up_bias, down_bias))
    )


def _weight(tensors: Sequence[Tensor | None], args: Sequence[int]) -> Weight:
    packed, scales, zeros, perm = tensors
    assert packed is not None and scales is not None
    bits, group_tiles, out_features = args
    return Weight(packed, scales, zeros, perm, bits, group_tiles, out_features)


def _routed(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32, or of the dtype of x."""
    if weights.dtype not in (torch.float32, dtype):
        weights = weights.float()
    return weights.contiguous()
