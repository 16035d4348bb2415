"""Stacks of experts.

few rows    gemv: each row reads the weights of its own expert
more        the rows are sorted by experts on the device, then matmul
"""

from __future__ import annotations

from torch import Tensor

from gptq_fx.kernels.triton import gemv, matmul, route
from gptq_fx.kernels.triton.weight import Packed, Tile, on

GEMV_SLOTS = 64  # rows of experts; and only while each expert has less than one of them, or they are 16


def few(slots: int, experts: int) -> bool:
    """Whether each row reads its own expert's weights, though some of them be read twice."""
    return slots <= 16 or slots <= min(GEMV_SLOTS, experts // 2)


def grouped(x: Tensor, weight: Packed, ends: Tensor) -> Tensor:
    """x [S, K], ends [E] -> [S, N]."""
    S = x.shape[0]
    out = x.new_empty(S, weight.N)
    if S > 0:
        with on(x):
            # the rows behind the last end are one expert more
            tile, tiles = expert_tiles(x, weight, S, weight.experts + 1)
            matmul.launch(x, weight, None, ends, None, None, out, "", rows=S, tiles=tiles, tile=tile)
    return out


def expert_tiles(x: Tensor, weight: Packed, slots: int, kinds: int) -> tuple[Tile, int]:
    """The tile, and how many tiles of rows there are at most, where each of `kinds` begins its own."""
    tile = matmul.matmul_tile(weight, max(slots // weight.experts, 1), x.shape[1], x.dtype)
    return tile, slots // tile.BM + min(kinds, slots)


def indexed(x: Tensor, weight: Packed, ids: Tensor) -> Tensor:
    """x [S, K], ids [S] -> [S, N]."""
    S = x.shape[0]
    out = x.new_empty(S, weight.N)
    if S == 0:
        return out
    with on(x):
        ids = ids.contiguous()
        if few(S, weight.experts):
            gemv.launch(x, weight, None, ids, None, out, "", rows=S, topk=1, share=1)
        else:
            order, ends = route.route(ids, weight.experts)
            tile, tiles = expert_tiles(x, weight, S, weight.experts)
            matmul.launch(x, weight, None, ends, order, None, out, "", rows=S, tiles=tiles, tile=tile)
    return out


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
    with on(x):
        ids, weights = ids.contiguous(), weights.contiguous()
        if few(slots, E):
            gemv.launch(x, first, first_bias, ids, None, h, activation, rows=slots, topk=1, share=k)
            gemv.launch(h, second, second_bias, ids, weights, out, "", rows=T, topk=k, share=1)
            return out
        order, ends = route.route(ids, E)
        tile, tiles = expert_tiles(x, first, slots, E)
        matmul.launch(
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
        matmul.launch(h, second, second_bias, ends, order, weights, y, "", rows=slots, tiles=tiles, tile=tile)
        route.weighted_sum[(T, -(-H // 1024))](y, ids, out, H, E, TOPK=k, BLOCK=1024)
    return out
