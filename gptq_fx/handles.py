"""The ops that take a quantized weight by its handle: what eager code, other backends and graphs with
gradients (see gradients.py) trace.

gathered: the inputs of a weight in act-order come in the order of its pack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptq_fx.ops import define_opaque
from gptq_fx.packed import live, run_experts


@define_opaque(
    "handle_linear(Tensor x, Tensor handle, Tensor? bias, int out_features, bool gathered=False) -> Tensor",
    fake=lambda x, handle, bias, out_features, gathered=False: x.new_empty(*x.shape[:-1], out_features),
)
def handle_linear(
    x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int, gathered: bool = False
) -> Tensor:
    """x [*, K] -> [*, N] by the weight that `handle` names."""
    return live(handle).linear(x, bias, gathered)


@define_opaque(
    "handle_grouped(Tensor x, Tensor handle, Tensor ends, int out_features, bool gathered=False) -> Tensor",
    fake=lambda x, handle, ends, out_features, gathered=False: x.new_empty(x.shape[0], out_features),
)
def handle_grouped(
    x: Tensor, handle: Tensor, ends: Tensor, out_features: int, gathered: bool = False
) -> Tensor:
    """x [S, K] -> [S, N] by the experts that `handle` names, as QuantizedParameter.grouped."""
    return live(handle).grouped(x, ends, gathered)


@define_opaque(
    "handle_block(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def handle_block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """gptq::experts on the stacks that two handles name."""
    return run_experts(x, ids, weights, live(gate_up), live(down), gate_up_bias, down_bias, activation)


@define_opaque(
    "handle_experts(Tensor handle, Tensor ids, int[] shape, ScalarType dtype) -> Tensor",
    fake=lambda handle, ids, shape, dtype: ids.new_empty(*ids.shape, *shape, dtype=dtype),
)
def handle_experts(handle: Tensor, ids: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The dense weights [*ids.shape, N, K] of some experts, in the order of `shape` ([K, N] too)."""
    weight = live(handle).unpacked()
    found = [weight.expert(e).dequantize(dtype) for e in ids.flatten().tolist()]
    dense = torch.stack(found) if found else ids.new_empty(0, *shape, dtype=dtype)
    dense = dense if dense.shape[1:] == tuple(shape) else dense.mT
    return dense.reshape(*ids.shape, *shape).contiguous()
