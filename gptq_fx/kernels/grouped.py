"""Linears of a stack of experts: by the kernel's own ops for stacks, or one expert behind the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    run = body(kernel)
    parts: list[Tensor] = []
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            weight = [None if t is None else t[e] for t in weights]
            parts.append(run(x[start:end], *weight, None, *args))
            start = end
    if start < x.shape[0] or not parts:
        parts.append(x.new_zeros(x.shape[0] - start, out_features))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(x.dtype)  # under autocast, it is another


def body(kernel: str) -> Callable[..., Tensor]:
    """op(x, *tensors, bias, *args) of the kernel of that name, as cheap to call as it can be."""
    found = get_kernel(kernel)
    return found.body or found.op


@define_opaque(
    "indexed_linear(Tensor x, Tensor?[] weights, Tensor ids, int out_features, str kernel, int[] args) "
    "-> Tensor",
    fake=lambda x, weights, ids, out_features, kernel, args: x.new_empty(x.shape[0], out_features),
)
def indexed_linear(
    x: Tensor, weights: Tensors, ids: Tensor, out_features: int, kernel: str, args: Sequence[int]
) -> Tensor:
    """x [S, K] -> [S, N]: row s times the weight of expert ids[s]."""
    run = body(kernel)
    out = x.new_empty(x.shape[0], out_features)
    order = ids.argsort(stable=True)
    hit, counts = torch.unique_consecutive(ids[order], return_counts=True)
    for e, rows in zip(hit.tolist(), order.split(counts.tolist()), strict=True):
        weight = [None if t is None else t[e] for t in weights]
        out[rows] = run(x[rows], *weight, None, *args).to(x.dtype)
    return out


def call(
    kernel: Kernel, form: str, tensors: Sequence[Any], which: Any, spec: LinearSpec
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The op for a stack, and its arguments behind x; tensors and nodes of a graph alike.

    form: "grouped", with `which` = ends [E], or "indexed", with `which` = ids [S].
    """
    args = kernel.op_args(spec)
    own = kernel.expert_ops(spec)
    if own is not None:
        return (own.grouped if form == "grouped" else own.indexed), (*tensors, which, *args)
    op = grouped_linear if form == "grouped" else indexed_linear
    return op, (list(tensors), which, spec.out_features, kernel.name, list(args))
