"""Mixtures of experts on humming-kernels: one product of a stack, and the whole block.

    indexed             tiles of rows of one expert each, which `align` lists; x is read by row number, so it
                        need not be sorted. For few rows to an expert.
    grouped_contiguous  rows sorted by experts. For many rows.

Nothing here waits for the device, so that all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_fx.kernels import humming_library as library
from gptq_fx.kernels.block import BLOCK_ARGUMENTS, block_fake
from gptq_fx.kernels.registry import ExpertOps, LinearSpec, Tensors
from gptq_fx.ops import define_opaque

FORMS = ("indexed", "grouped_contiguous")
MANY = 32  # rows to an expert from which sorting x pays: measured on Qwen3-30B-A3B and Mixtral shapes
ACTIVATIONS = ("silu", "gelu_tanh", "gpt_oss")


def supports(spec: LinearSpec) -> str | None:
    return None  # what the kernel takes at all, it takes in stacks


def block_supports(gate_up: LinearSpec, down: LinearSpec, activation: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}"
    if gate_up.out_features != 2 * down.in_features:
        return f"gate_up has {gate_up.out_features} outputs, which is not twice the inputs of down"
    return None


def _table(x: Tensor, tensors: Tensors, args: Sequence[int], form: str) -> library.Table:
    weight, scales, zeros = tensors
    assert weight is not None and scales is not None
    N, bits, group_size = args
    whole = scales.shape[-1]
    key = (
        x.get_device(), x.shape[1], whole, whole - N, bits, group_size, zeros is not None, x.dtype,
        weight.shape[0], form,
    )  # fmt: skip
    return library.table(key)


def _launch(
    x: Tensor,
    tensors: Tensors,
    out: Tensor,
    table: library.Table,
    aligned: Sequence[Tensor | None] = (None, None, None),
    layout: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """aligned: of `align`, for an indexed product; row r of x then meets experts r*top_k to (r+1)*top_k - 1.
    layout: int [E + 1], where the rows of each expert begin, for a grouped one."""
    device = x.get_device()
    if not x.is_contiguous() or x.data_ptr() % 16:  # the loads are of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    weight, scales, zeros = tensors
    locks = library.current_locks(device)
    library.launcher()(
        table.configs, x, weight, scales, None, None, None, zeros, None, out,
        *aligned, layout, locks, top_k, out.shape[0],
    )  # fmt: skip
    return out


def align(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, by the expert of each, in tiles of rows of one expert.

    ids: int [S], `experts` where a row has none. -> int32: row numbers [capacity], S where a tile is padded;
    the expert of each tile [capacity/tile]; how many of the first are used [1].
    """
    from gptq_fx.kernels.humming_triton import align_rows

    S = ids.shape[0]
    tiles = min(S, S // tile + experts)  # each expert has at most one tile that is not full
    rows = torch.empty(tiles * tile, dtype=torch.int32, device=ids.device)
    owners = torch.empty(tiles, dtype=torch.int32, device=ids.device)
    used = torch.empty(1, dtype=torch.int32, device=ids.device)
    align_rows(ids, rows, owners, used, experts, tile)
    return rows, owners, used


@define_opaque(
    "humming_grouped(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor ends, int out_features, "
    "int bits, int group_size) -> Tensor",
    fake=lambda x, weight, scales, zeros, ends, out_features, bits, group_size: x.new_empty(
        x.shape[0], out_features
    ),
)
def humming_grouped(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ends: Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [S, K], the tensors of `pack` for a stack, ends int [E] -> [S, N]: see ExpertOps.grouped."""
    out = x.new_zeros(x.shape[0], out_features)
    if x.shape[0] == 0:
        return out
    tensors = (weight, scales, zeros)
    table = _table(x, tensors, (out_features, bits, group_size), "grouped_contiguous")
    layout = torch.nn.functional.pad(ends, (1, 0))
    return _launch(x, tensors, out, table, layout=layout)


@define_opaque(
    "humming_indexed(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor ids, int out_features, "
    "int bits, int group_size) -> Tensor",
    fake=lambda x, weight, scales, zeros, ids, out_features, bits, group_size: x.new_empty(
        x.shape[0], out_features
    ),
)
def humming_indexed(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    ids: Tensor,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [S, K], the tensors of `pack` for a stack, ids int [S] -> [S, N]: see ExpertOps.indexed."""
    S = x.shape[0]
    out = x.new_empty(S, out_features)
    if S == 0:
        return out
    tensors = (weight, scales, zeros)
    table = _table(x, tensors, (out_features, bits, group_size), "indexed")
    return _launch(x, tensors, out, table, align(ids, weight.shape[0], table.tile(S)))


@define_opaque(f"humming_block({BLOCK_ARGUMENTS}) -> Tensor", fake=block_fake)
def humming_block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensors,
    down: Tensors,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_up_args: Sequence[int],
    down_args: Sequence[int],
) -> Tensor:
    """x [T, H], ids int [T, k], weights [T, k] -> [T, H]: see ExpertOps.block."""
    from gptq_fx.kernels.humming_triton import activate, combine

    T, k = ids.shape
    S = T * k
    out = x.new_empty(x.shape)
    if T == 0:
        return out
    assert gate_up[0] is not None
    E = gate_up[0].shape[0]
    flat = ids.reshape(-1)
    both = x.new_empty(S, gate_up_args[0])
    hidden = x.new_empty(S, gate_up_args[0] // 2)
    y = x.new_empty(S, down_args[0])
    if S < MANY * E:
        up, low = (
            _table(rows, tensors, args, "indexed")
            for rows, tensors, args in ((x, gate_up, gate_up_args), (hidden, down, down_args))
        )
        aligned = align(flat, E, up.tile(S))
        _launch(x, gate_up, both, up, aligned, top_k=k)
        activate(both, hidden, flat, gate_up_bias, activation, E)
        if low.tile(S) != up.tile(S):
            aligned = align(flat, E, low.tile(S))
        _launch(hidden, down, y, low, aligned)
        return combine(y, flat, weights, down_bias, None, out, E)
    order = flat.argsort(stable=True)  # rows without an expert come last
    which = flat[order]
    layout = torch.searchsorted(which, torch.arange(E + 1, device=x.device, dtype=flat.dtype))
    place = torch.empty_like(order)
    place[order] = torch.arange(S, device=x.device)
    rows = x.index_select(0, order // k)
    _launch(rows, gate_up, both, _table(rows, gate_up, gate_up_args, FORMS[1]), layout=layout)
    activate(both, hidden, which, gate_up_bias, activation, E)
    _launch(hidden, down, y, _table(hidden, down, down_args, FORMS[1]), layout=layout)
    return combine(y, flat, weights, down_bias, place, out, E)


EXPERTS = ExpertOps(
    supports=supports,
    grouped=humming_grouped,
    indexed=humming_indexed,
    block=humming_block,
    block_supports=block_supports,
)
