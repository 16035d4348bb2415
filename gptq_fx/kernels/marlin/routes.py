"""Calls of moe.cu: which rows meet which expert, and what stands between and behind the two products."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptq_fx.kernels.marlin import variants
from gptq_fx.kernels.marlin.gemm import Blocks
from gptq_fx.kernels.marlin.launch import Function, device


@functools.cache
def _moe_functions(bf16: bool, index: int) -> tuple[Function, Function, Function]:
    source, where = variants.moe_source(bf16), device(index)
    return (
        Function(source, "marlin_align", where, 1024, 4 * 4096, "4Q5i4x"),
        Function(source, "marlin_activate", where, 256, 0, "2Q3i4x"),
        Function(source, "marlin_combine", where, 256, 0, "4Q6i"),
    )


MOST_EXPERTS = 1024  # one thread each


def align(
    index_of: Tensor, ends: bool, rows: int, experts: int, tokens: int, top_k: int, bf16: bool
) -> Blocks:
    """Blocks of at most `tokens` rows of one expert each.

    index_of: the expert of each row [rows], of any integers; or (ends) where the rows of each expert end.
    """
    most = rows // tokens + min(rows, experts)
    index = index_of.get_device()
    room = torch.empty(1 + most * (1 + tokens), dtype=torch.int32, device=index_of.device)
    count = room.data_ptr()
    wide = index_of.dtype == torch.int64
    _moe_functions(bf16, index)[0](
        1,
        1,
        index_of.data_ptr(),
        count,
        count + 4,
        count + 4 + 4 * most,
        rows,
        experts,
        tokens,
        int(wide),
        int(ends),
    )
    return Blocks(count + 4, count + 4 + 4 * most, count, most, experts, top_k, False, room)


def alone(ids: Tensor, experts: int, top_k: int) -> Blocks:
    """Each row a block of its own: ids [rows] are the experts."""
    return Blocks(ids.data_ptr(), 0, 0, ids.numel(), experts, top_k, ids.dtype == torch.int64, ids)


ACTIVATIONS = ("silu", "gelu_tanh", "gpt_oss")  # their numbers in moe.cu


def activate(x: Tensor, activation: str) -> Tensor:
    """[rows, 2 I] -> [rows, I]"""
    rows, double = x.shape
    out = torch.empty(rows, double // 2, dtype=x.dtype, device=x.device)
    index = x.get_device()
    blocks = min(-(-rows * -(-double // 4) // 256), 16 * device(index).multiprocessors)
    _moe_functions(x.dtype == torch.bfloat16, index)[1](
        blocks, 1, x.data_ptr(), out.data_ptr(), rows, double // 2, ACTIVATIONS.index(activation)
    )
    return out


def combine(x: Tensor, ids: Tensor, weights: Tensor, experts: int) -> Tensor:
    """x [T * k, H], ids and weights [T, k] -> [T, H], the weighted sum over k; no expert counts nothing."""
    T, k = ids.shape
    H = x.shape[1]
    out = torch.empty(T, H, dtype=x.dtype, device=x.device)
    index = x.get_device()
    blocks = min(-(-T * -(-H // 2) // 256), 16 * device(index).multiprocessors)
    _moe_functions(x.dtype == torch.bfloat16, index)[2](
        blocks,
        1,
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        T,
        H,
        k,
        experts,
        int(ids.dtype == torch.int64),
        int(weights.dtype == torch.float32),
    )
    return out
