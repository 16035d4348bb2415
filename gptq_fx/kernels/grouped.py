"""Linears of a stack of experts: each expert that has rows runs the kernel's own op on its part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels.registry import Kernel, LinearSpec, Tensors, get_kernel
from gptq_fx.ops import define_opaque


@define_opaque(
    "grouped_linear(Tensor x, Tensor?[] weights, Tensor ends, int out_features, str kernel, int[] args) "
    "-> Tensor",
    fake=lambda x, weights, ends, out_features, kernel, args: x.new_empty(x.shape[0], out_features),
)
def grouped_linear(
    x: Tensor, weights: Tensors, ends: Tensor, out_features: int, kernel: str, args: Sequence[int]
) -> Tensor:
    """x [S, K] -> [S, N]: rows ends[e - 1] to ends[e] (from 0 for the first) times the weight of expert e.

    weights: the tensors of `kernel`, each with a leading dimension of experts. Rows behind the last end
    give zeros.
    """
    op = get_kernel(kernel).op
    out = x.new_zeros(x.shape[0], out_features)
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            part = (None if t is None else t[e] for t in weights)
            out[start:end] = op(x[start:end], *part, None, *args)
        start = end
    return out


@define_opaque(
    "indexed_linear(Tensor x, Tensor?[] weights, Tensor ids, int out_features, str kernel, int[] args) "
    "-> Tensor",
    fake=lambda x, weights, ids, out_features, kernel, args: x.new_empty(x.shape[0], out_features),
)
def indexed_linear(
    x: Tensor, weights: Tensors, ids: Tensor, out_features: int, kernel: str, args: Sequence[int]
) -> Tensor:
    """x [S, K] -> [S, N]: row s times the weight of expert ids[s]."""
    op = get_kernel(kernel).op
    out = x.new_empty(x.shape[0], out_features)
    order = ids.argsort(stable=True)
    hit, counts = torch.unique_consecutive(ids[order], return_counts=True)
    for e, rows in zip(hit.tolist(), order.split(counts.tolist()), strict=True):
        part = (None if t is None else t[e] for t in weights)
        out[rows] = op(x[rows], *part, None, *args)
    return out


def call(kernel: Kernel, tensors: Sequence[Any], which: Any, spec: LinearSpec) -> tuple[Any, ...]:
    """The arguments of both ops behind x."""
    return list(tensors), which, spec.out_features, kernel.name, list(kernel.op_args(spec))
