"""Weights of up to 4 bits on the CPU: aten's int4 kernel for few rows, dequantize and matmul for many.

Layout of aten (source: aten/src/ATen/native/cpu/int4mm_kernel.cpp of PyTorch): outputs in blocks of
BLOCK (64 with AVX512, 32 with AVX2). A full block is bytes [K, BLOCK/2]; byte j holds output j in its
low and output j + BLOCK/2 in its high half. The outputs left over are one block [K, rest/2] in which
byte j holds outputs 2j (low) and 2j + 1 (high). The numbers are W[n, k] = (c - 8) * s + m with m real.
Codes of b bits are stored as c = q + 8 - 2^(b-1), so m = (2^(b-1) - z) * s is 0 where symmetric, and
loses little to its bf16 elsewhere.
"""

from __future__ import annotations

import functools
import threading

import torch
from torch import Tensor

from gptq_fx.kernels.cpu_dequantize import BLOCK, dequantize_blocks
from gptq_fx.kernels.cpu_experts import CPU_EXPERTS
from gptq_fx.kernels.registry import Kernel, LinearSpec, Tensors, register
from gptq_fx.ops import define, define_opaque, product_dtype
from gptq_fx.weight import QuantizedWeight

# Rows up to which aten's kernel is the faster one; examples/benchmarks/cpu_rows.py prints the table.
FEW_ROWS = 28
GROUP_SIZES = (256, 128, 64, 32)
CHUNK = 2**20  # numbers dequantized at a time: 2 MiB of bf16, which stay in cache


@functools.cache
def available() -> str | None:
    """aten's kernel has no documented layout: pack a counting pattern and see that we can read it."""
    if BLOCK == 0:
        return f"the int4 layout for {torch.backends.cpu.get_cpu_capability()} is not known"
    rows, columns = (torch.arange(size, device="cpu") for size in (2 * BLOCK + 16, 32))
    codes = rows[:, None] * 7 + columns
    codes = (codes % 16).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    if not torch.equal(unpack_codes(packed), codes.T.to(torch.uint8)):
        return "aten packs int4 weights in a layout that is not the known one"
    return None


def supports(spec: LinearSpec) -> str | None:
    if spec.dtype != torch.bfloat16:
        return f"the int4 kernel is fast in bfloat16 only, the model is {spec.dtype}"
    if spec.scheme.bits > 4:
        return f"{spec.scheme.bits}-bit codes do not fit 4 bits"
    if spec.scheme.desc_act:
        return "no act-order"
    if spec.out_features % 16:
        return f"out_features {spec.out_features} is not a multiple of 16"
    if kernel_group(spec) is None:
        return f"group_size {spec.group_size} is not a multiple of 32"
    return None


def note(spec: LinearSpec) -> str | None:
    return f"{spec.scheme.bits}-bit codes stored in 4 bits" if spec.scheme.bits < 4 else None


def kernel_group(spec: LinearSpec) -> int | None:
    """The group size the kernel runs with: the largest legal one that divides the group."""
    return next((g for g in GROUP_SIZES if spec.group_size % g == 0), None)


def pack(weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
    """-> packed uint8 [N, K/2], and (s, m) bf16 [K/g, N, 2] with g = kernel_group(spec)."""
    middle = 2 ** (weight.bits - 1)
    codes = (weight.codes() + (8 - middle)).mT.to(torch.int32).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    zeros = weight.zeros()
    z = middle if zeros is None else zeros.to(weight.scales.dtype)
    scales_mins = torch.stack([weight.scales, (middle - z) * weight.scales], -1)
    group = kernel_group(spec)
    assert group is not None
    repeats = spec.group_size // group
    return packed, scales_mins.repeat_interleave(repeats, 0).contiguous()


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    packed, scales_mins = tensors
    group = kernel_group(spec)
    assert packed is not None and scales_mins is not None and group is not None
    scales, mins = scales_mins[:: spec.group_size // group].unbind(-1)
    bits = spec.scheme.bits
    middle = 2 ** (bits - 1)
    zeros = None if spec.scheme.sym else (middle - mins.float() / scales.float()).round()
    return QuantizedWeight.from_codes(unpack_codes(packed) - (8 - middle), scales, zeros, bits)


def unpack_codes(packed: Tensor) -> Tensor:
    """packed uint8 [N, K/2] -> the codes, uint8 [K, N]."""
    N, K = packed.shape[0], packed.shape[1] * 2
    full = N // BLOCK * BLOCK
    blocks = packed[:full].reshape(-1, K, BLOCK // 2)
    codes = torch.cat([blocks & 15, blocks >> 4], -1).transpose(0, 1).reshape(K, full)
    if full == N:
        return codes
    rest = packed[full:].reshape(K, -1)
    rest = torch.stack([rest & 15, rest >> 4], -1).flatten(-2)
    return torch.cat([codes, rest], -1)


def int4_linear(
    x: Tensor, packed: Tensor, scales_mins: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x bf16 [*, K] -> [*, N]; the algorithm is chosen by the number of rows of x."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor
    if rows.shape[0] <= FEW_ROWS:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scales_mins)
    else:
        y = rows.new_empty(rows.shape[0], packed.shape[0])
        cpu_int4_many_rows(rows, packed, scales_mins, y)
    y = y.reshape(*x.shape[:-1], packed.shape[0])
    return y if bias is None else y + bias


cpu_int4_linear = define(
    "cpu_int4_linear(Tensor x, Tensor packed, Tensor scales_mins, Tensor? bias, int group_size) -> Tensor"
)(int4_linear)


# Fresh memory costs more, in page faults, than filling it: the result is written where the caller
# says (Inductor uses its buffers again), and the buffers of the chunks stay from call to call.
_buffers = threading.local()


def _buffer(name: str, size: int, like: Tensor) -> Tensor:
    kept: Tensor | None = getattr(_buffers, name, None)
    if kept is None or kept.numel() < size or kept.dtype != like.dtype:
        kept = torch.empty(size, dtype=like.dtype, device="cpu")
        setattr(_buffers, name, kept)
    return kept[:size]


@define_opaque(
    "cpu_int4_many_rows(Tensor x, Tensor packed, Tensor scales_mins, Tensor(a!) out) -> ()",
    fake=lambda x, packed, scales_mins, out: None,
)
def cpu_int4_many_rows(x: Tensor, packed: Tensor, scales_mins: Tensor, out: Tensor) -> None:
    """x bf16 [M, K] -> out [M, N]: dequantize as many outputs as stay in cache, multiply, go on."""
    M, K = x.shape
    N = packed.shape[0]
    rows = x.to(product_dtype("cpu", x.dtype))
    step = max(CHUNK // K // BLOCK, 1) * BLOCK
    for start in range(0, N, step):
        part = slice(start, min(start + step, N))
        n = part.stop - start
        weight = _buffer("weight", K * n, x).view(K, n)
        _dequantize(packed[part], scales_mins[:, part], weight)
        if rows.dtype != x.dtype:
            weight = _buffer("wide", K * n, rows).view(K, n).copy_(weight)
        product = _buffer("product", M * n, rows).view(M, n)
        out[:, part] = torch.mm(rows, weight, out=product)


def _dequantize(packed: Tensor, scales_mins: Tensor, out: Tensor) -> None:
    """W^T [K, n] into `out`, from packed uint8 [n, K/2] and scales_mins bf16 [G, n, 2]."""
    K, n = out.shape
    if n % BLOCK == 0 and dequantize_blocks(packed, scales_mins, out, BLOCK):
        return
    scales, mins = scales_mins.float().unsqueeze(1).unbind(-1)
    codes = unpack_codes(packed).float().view(scales.shape[0], -1, n)
    out.copy_(codes.sub_(8).mul_(scales).add_(mins).view(K, n))


def dequantize(tensors: Tensors, spec: LinearSpec) -> Tensor:
    """W bf16 [N, K], a view of its transpose."""
    packed, scales_mins = tensors
    assert packed is not None and scales_mins is not None
    out = scales_mins.new_empty(spec.in_features, spec.out_features)
    _dequantize(packed, scales_mins, out)
    return out.mT


CPU_INT4 = register(
    Kernel(
        name="cpu_int4",
        device="cpu",
        order=100,
        available=available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=cpu_int4_linear,
        op_args=lambda spec: (kernel_group(spec) or 0,),
        body=int4_linear,
        cut_at=lambda spec: BLOCK,
        cut=lambda tensors, spec, start, stop: (
            tensors[0][start:stop] if tensors[0] is not None else None,
            tensors[1][:, start:stop] if tensors[1] is not None else None,
        ),
        dequantize=dequantize,
        note=note,
        experts=CPU_EXPERTS,
    )
)
