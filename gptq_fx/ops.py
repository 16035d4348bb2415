"""The ops of the library `gptq`, and gptq::linear, which a graph says between `swap` and `lower`.

A composite op is traced through (fake tensors, AOTAutograd, Inductor see its plain body): it needs no
fake and no autograd formula, and a choice it makes by a shape is made while tracing. An opaque op stays
one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptq_fx.weight import dequantize

LIBRARY = torch.library.Library("gptq", "DEF")

# What a CPU has no instructions for: torch multiplies it by plain loops, a hundred times slower than fp32.
_SLOW_ON_CPU = {
    dtype
    for dtype, fast in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not fast
}


def define(schema: str) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register a function as composite op `gptq::<schema>`, and return the op in its place."""

    def register(body: Callable[..., Any]) -> torch._ops.OpOverload:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        LIBRARY.impl(name, body, "CompositeImplicitAutograd")
        op = getattr(torch.ops.gptq, name).default
        assert isinstance(op, torch._ops.OpOverload)
        return op

    return register


def define_opaque(
    schema: str, *, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Register a function as op `gptq::<schema>` of every device that nothing traces through."""

    def register(body: Callable[..., Any]) -> torch._ops.OpOverload:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        name = schema.partition("(")[0]
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gptq::{name}", fake, lib=LIBRARY)
        op = getattr(torch.ops.gptq, name).default
        assert isinstance(op, torch._ops.OpOverload)
        return op

    return register


@define(
    "linear(Tensor x, Tensor qweight, Tensor scales, Tensor? qzeros, Tensor? g_idx, "
    "Tensor? bias, int bits) -> Tensor"
)
def linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """x [*, K] times the QuantizedWeight of the four tensors, plus bias [N] -> [*, N] in x's dtype."""
    dtype = product_dtype(x.device.type, x.dtype)
    weight = dequantize(qweight, scales, qzeros, g_idx, bits, x.shape[-1], dtype)
    y = torch.matmul(x.to(dtype), weight)
    return (y if bias is None else y + bias).to(x.dtype)


def product_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a type of device multiplies matrices of `dtype`."""
    return torch.float32 if device == "cpu" and dtype in _SLOW_ON_CPU else dtype
