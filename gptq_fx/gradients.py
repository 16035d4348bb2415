"""Gradients through quantized linears, whose weights are frozen: grad_x = grad_y W, with W dequantized.

One formula serves the ops of all kernels, since an op that takes its weight by a handle runs any of them,
and W is what its kernel unpacks. What training keeps of a linear for its backward is the handle:
neither the input nor a dense weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptq_fx.handles import handle_grouped, handle_linear
from gptq_fx.kernels.block import ACTIVATIONS
from gptq_fx.ops import LIBRARY, define, define_opaque, product_dtype
from gptq_fx.packed import live


def flows(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@define_opaque(
    "linear_gradient(Tensor grad, Tensor handle, int in_features, bool gathered) -> Tensor",
    fake=lambda grad, handle, in_features, gathered: grad.new_empty(*grad.shape[:-1], in_features),
)
def linear_gradient(grad: Tensor, handle: Tensor, in_features: int, gathered: bool) -> Tensor:
    """grad [*, N] -> [*, K], by the weight [N, K] that `handle` names."""
    return _product(grad, live(handle).dense(grad.dtype, gathered))


@define_opaque(
    "grouped_gradient(Tensor grad, Tensor handle, Tensor ends, int in_features, bool gathered) -> Tensor",
    fake=lambda grad, handle, ends, in_features, gathered: grad.new_empty(grad.shape[0], in_features),
)
def grouped_gradient(grad: Tensor, handle: Tensor, ends: Tensor, in_features: int, gathered: bool) -> Tensor:
    """grad [S, N] -> [S, K]: rows ends[e - 1] to ends[e] by expert e; those behind the last give 0."""
    packed = live(handle)
    out = grad.new_zeros(grad.shape[0], in_features)
    start = 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = _product(grad[start:end], packed.expert(e, gathered).dequantize(grad.dtype))
            start = end
    return out


def _product(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [*, N] W [N, K] in grad's dtype."""
    dtype = product_dtype(grad.device.type, grad.dtype)
    product: Tensor = torch.matmul(grad.to(dtype), weight.to(dtype))
    return product.to(grad.dtype)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, bias, _, ctx.gathered = inputs
    ctx.save_for_backward(handle)
    ctx.in_features = x.shape[-1]
    ctx.has_bias = bias is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (handle,) = ctx.saved_tensors
    grads: list[Any] = [None] * 5
    if ctx.needs_input_grad[0]:
        grads[0] = linear_gradient(grad, handle, ctx.in_features, ctx.gathered)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        grads[2] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return tuple(grads)


def _keep_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, ends, _, ctx.gathered = inputs
    ctx.save_for_backward(handle, ends)
    ctx.in_features = x.shape[-1]


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return grouped_gradient(grad, *ctx.saved_tensors, ctx.in_features, ctx.gathered), None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, *tensors, _, ctx.gathered = inputs
    ctx.save_for_backward(*tensors)
    ctx.out_features = grad.shape[-1]


def _linear_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (handle,) = ctx.saved_tensors
    return handle_linear(grad, handle, None, ctx.out_features, ctx.gathered), None, None, None


def _grouped_gradient_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return handle_grouped(grad, *ctx.saved_tensors, ctx.out_features, ctx.gathered), None, None, None, None


for _name, _keep, _backward in (
    ("handle_linear", _keep_linear, _linear_backward),
    ("handle_grouped", _keep_grouped, _grouped_backward),
    ("linear_gradient", _keep_gradient, _linear_gradient_backward),
    ("grouped_gradient", _keep_gradient, _grouped_gradient_backward),
):
    torch.library.register_autograd(f"gptq::{_name}", _backward, setup_context=_keep, lib=LIBRARY)


# --- experts: what has no formula of its own is said by calls that have one


@define(
    "trained_indexed(Tensor x, Tensor handle, Tensor ids, int out_features, int experts, bool gathered) "
    "-> Tensor"
)
def trained_indexed(
    x: Tensor, handle: Tensor, ids: Tensor, out_features: int, experts: int, gathered: bool
) -> Tensor:
    """x [S, K] -> [S, N]: row s by expert ids[s] of the stack that `handle` names."""
    order = ids.argsort(stable=True)
    y = handle_grouped(x[order], handle, _ends(ids[order], experts), out_features, gathered)
    rows: Tensor = y[order.argsort()]
    return rows


@define(
    "trained_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, int experts, int width) -> Tensor"
)
def trained_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    experts: int,
    width: int,
) -> Tensor:
    """gptq::experts on the stacks that two handles name, with gradients for x, the weights and the biases.

    width: outputs of gate_up.
    """
    T, k = ids.shape
    order = ids.reshape(-1).argsort(stable=True)
    found = ids.reshape(-1)[order]
    ends = _ends(found, experts)
    known = (found < experts).unsqueeze(-1)

    def linear(rows: Tensor, stack: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        y: Tensor = handle_grouped(rows, stack, ends, out_features)
        return y if bias is None else y + bias[found.clamp(max=experts - 1)] * known

    hidden = linear(x[order // k], gate_up, gate_up_bias, width)
    y = linear(ACTIVATIONS[activation](hidden), down, down_bias, x.shape[-1])
    weighted: Tensor = y[order.argsort()].view(T, k, -1) * weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


def _ends(ids: Tensor, experts: int) -> Tensor:
    """Where the rows of each expert end, of sorted ids."""
    return torch.searchsorted(ids, torch.arange(experts, device=ids.device, dtype=ids.dtype), right=True)
