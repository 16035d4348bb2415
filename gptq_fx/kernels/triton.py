"""Our own kernels in Triton, for GPUs where no library takes the weight: linears, experts, MoE blocks.

The files: triton.py says what is supported, the layout and the ops; triton_launch.py which kernel runs for
how many rows; triton_code.py and triton_route.py are the kernels.

Layout: KB blocks of 16 * SLABS input features (SLABS = 16, 16, 8, 4 for 2, 3, 4, 8 bits; the last block is
filled up with codes of 0). Feature k = (b * SLABS + j) * 16 + r lies in word r of block b:
    w      int32 [*, KB, N, 16]   its code at bit 2j, 2j, 4j, 8j; of 3 bits the two lower ones
    high   int16 [*, KB, N, 16]   its third bit at bit j; None unless of 3 bits
    scales float [*, G, N]
    zeros  uint8 [*, G, N]        None where symmetric
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels.block import BLOCK_ARGUMENTS, block_fake
from gptq_fx.kernels.registry import ExpertOps, Kernel, LinearSpec, Tensors, register
from gptq_fx.ops import define_opaque
from gptq_fx.weight import QuantizedWeight

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SLABS = {2: 16, 3: 16, 4: 8, 8: 4}
MOST_EXPERTS = 1024  # their counts stand in the registers of one program


@functools.cache
def available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU is found"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "compute capability 8.0 is needed, the GPU has {}.{}".format(
            *torch.cuda.get_device_capability()
        )
    return None


@functools.cache
def xpu_available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if torch.xpu.is_available() else "no GPU is found"


def supports(spec: LinearSpec) -> str | None:
    if spec.dtype not in DTYPES:
        return f"x must be bfloat16, float16 or float32, the model is {spec.dtype}"
    if spec.scheme.desc_act:
        return "no act-order"
    if spec.groups > 1 and spec.group_size % 16:
        return f"group_size {spec.group_size} is not a multiple of 16"
    if spec.experts is not None and spec.experts > MOST_EXPERTS:
        return f"{spec.experts} experts are more than {MOST_EXPERTS}"
    return None


def pack(weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
    """-> w, high, scales, zeros."""
    bits, slabs = weight.bits, SLABS[weight.bits]
    codes = weight.codes()
    K, N = codes.shape
    blocks = -(-K // (16 * slabs))
    codes = torch.nn.functional.pad(codes, (0, 0, 0, blocks * 16 * slabs - K))
    codes = codes.view(blocks, slabs, 16, N)
    width = 2 if bits == 3 else bits
    w = codes.new_zeros(blocks, 16, N, dtype=torch.int32)
    high = codes.new_zeros(blocks, 16, N, dtype=torch.int16) if bits == 3 else None
    for j in range(slabs):
        w |= (codes[:, j] & (2**width - 1)).to(torch.int32) << width * j
        if high is not None:
            high |= (codes[:, j] >> 2).to(torch.int16) << j
    zeros = weight.zeros()
    return (
        _lines(w),
        None if high is None else _lines(high),
        weight.scales,
        None if zeros is None else zeros.contiguous(),
    )


def _lines(words: Tensor) -> Tensor:
    """[KB, 16, N] -> [KB, N, 16]."""
    return words.mT.contiguous()


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    w, high, scales, zeros = tensors
    assert w is not None and scales is not None
    bits = spec.scheme.bits
    width = 2 if bits == 3 else bits
    parts = []
    for j in range(SLABS[bits]):
        codes = (w >> width * j) & (2**width - 1)
        if high is not None:
            codes |= ((high >> j) & 1).to(torch.int32) << 2
        parts.append(codes.to(torch.uint8).mT)
    codes = torch.stack(parts, 1).reshape(-1, w.shape[1])[: spec.in_features]
    return QuantizedWeight.from_codes(codes, scales, zeros, bits)


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    w, high, scales, zeros = tensors
    assert w is not None and scales is not None
    return (
        w[..., start:stop, :],
        None if high is None else high[..., start:stop, :],
        scales[..., start:stop],
        None if zeros is None else zeros[..., start:stop],
    )


def _out(x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[-1])


def linear(
    x: Tensor,
    w: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """x [*, K], the tensors of `pack`, bias [N] -> [*, N]."""
    from gptq_fx.kernels import triton_launch

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = triton_launch.linear(rows, triton_launch.Packed(w, high, scales, zeros, bits), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


triton_linear = define_opaque(
    "triton_linear(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor? bias, int bits) "
    "-> Tensor",
    fake=_out,
)(linear)


@define_opaque(
    "triton_grouped(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor ends, int bits) "
    "-> Tensor",
    fake=_out,
)
def triton_grouped(
    x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, ends: Tensor, bits: int
) -> Tensor:
    """x [S, K], ends [E] -> [S, N]: rows ends[e - 1] to ends[e] meet expert e, those behind give 0."""
    from gptq_fx.kernels import triton_launch

    return triton_launch.grouped(x.contiguous(), triton_launch.Packed(w, high, scales, zeros, bits), ends)


@define_opaque(
    "triton_indexed(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor ids, int bits) "
    "-> Tensor",
    fake=_out,
)
def triton_indexed(
    x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, ids: Tensor, bits: int
) -> Tensor:
    """x [S, K], ids [S] -> [S, N]: row s meets expert ids[s]."""
    from gptq_fx.kernels import triton_launch

    return triton_launch.indexed(x.contiguous(), triton_launch.Packed(w, high, scales, zeros, bits), ids)


@define_opaque(f"triton_experts({BLOCK_ARGUMENTS}) -> Tensor", fake=block_fake)
def triton_experts(
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
    """x [T, H], ids and weights [T, k] -> [T, H]: gptq::experts, on stacks packed by this kernel."""
    from gptq_fx.kernels import triton_launch

    first = triton_launch.Packed.of(gate_up, gate_up_args[0])
    second = triton_launch.Packed.of(down, down_args[0])
    return triton_launch.block(
        x.contiguous(), ids, weights, (first, gate_up_bias), (second, down_bias), activation
    )


def block_supports(gate_up: LinearSpec, down: LinearSpec, activation: str) -> str | None:
    if activation not in ("silu", "gelu_tanh", "gpt_oss"):
        return f"activation {activation!r} is not one of silu, gelu_tanh, gpt_oss"
    return None


TRITON = register(
    Kernel(
        name="triton",
        device="cuda",
        order=300,
        available=available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=triton_linear,
        op_args=lambda spec: (spec.scheme.bits,),
        body=linear,
        cut_at=lambda spec: 1,
        cut=cut,
        experts=ExpertOps(
            supports=lambda spec: None,
            grouped=triton_grouped,
            indexed=triton_indexed,
            block=triton_experts,
            block_supports=block_supports,
        ),
    )
)

# The same kernels on Intel GPUs. They never ran on one.
TRITON_XPU = register(replace(TRITON, name="triton_xpu", device="xpu", available=xpu_available))
