"""What the kernels share, in Triton: codes out of their words, the outputs of a program, activations.

w, high, scales, zeros: see layout.py. A slab is 16 inputs in their order: one step of a tensor core.
The codes of slabs j and j + SLABS / 2 lie 16 bits apart in a word, and are taken out together. Inputs
behind K meet an x of 0. RUN: slabs in a row that share a scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

# mypy: ignore-errors


@triton.jit
def zero(zeros, where, BITS: tl.constexpr):
    """Zero points as int32, or the one number that all are."""
    if zeros is None:
        return 2 ** (BITS - 1)
    else:
        return tl.load(zeros + where).to(tl.int32)


@triton.jit
def wide(high):
    """The third bits: those of the upper slabs moved from bits 8 to 15 up to bits 16 to 23."""
    h = high.to(tl.int32)
    return (h & 0xFF) | ((h & 0xFF00) << 8)


@triton.jit
def and_or(word, mask, bits, PTX: tl.constexpr):
    """(word & mask) | bits: one instruction, which the compiler misses."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [word, mask, bits], tl.int32, is_pure=True, pack=1
        )
    else:
        return (word & mask) | bits


@triton.jit
def subtract(pair, offset, dtype: tl.constexpr):
    """Two numbers of 16 bits at a time."""
    if dtype == tl.bfloat16:  # compute capability 8 has no subtraction of bf16, but this
        return tl.inline_asm_elementwise(
            "{ .reg .b32 m; mov.b32 m, 0xBF80BF80; fma.rn.bf16x2 $0, $2, m, $1; }",
            "=r,r,r",
            [pair, offset],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            "sub.f16x2 $0, $1, $2;", "=r,r,r", [pair, offset], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def pair(
    word, high, zero, other, j: tl.constexpr, dtype: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr
):
    """The integers q - z of slabs j and j + SLABS / 2, exact in dtype; the zeros of both."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    MASK: tl.constexpr = (2**WIDTH - 1) * 0x10001
    if dtype == tl.float32 or (dtype == tl.bfloat16 and BITS == 8):
        # 2^23 + q is what these bits say in fp32
        pair = (word >> (WIDTH * j)) & MASK
        if BITS == 3:
            pair |= ((high >> j) & 0x10001) << 2
        low = ((pair & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
        up = (((pair >> 16) & 0xFFFF) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + other)
    else:
        # 128 + q in bf16, 1024 + q in fp16: q stands in the last bits of the mantissa
        ONE: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        BASE: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
        pair = and_or(word >> (WIDTH * j), MASK, ONE * 0x10001, PTX)
        if BITS == 3:
            pair |= ((high >> j) & 0x10001) << 2
        if PTX:
            pair, offset = tl.broadcast(pair, (zero | ONE) | ((other | ONE) << 16))
            pair = subtract(pair, offset, dtype)
        low = pair.to(tl.int16).to(dtype, bitcast=True)
        up = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        if not PTX:
            low = low.to(tl.float32) - (zero + BASE)
            up = up.to(tl.float32) - (other + BASE)
    return low.to(dtype), up.to(dtype)


@triton.jit
def columns(tile, N, BN: tl.constexpr, ACT: tl.constexpr):
    """The BN outputs of the linear that a program computes; behind an activation, gate and up in turns."""
    i = tile * BN + tl.arange(0, BN)
    if ACT == "silu" or ACT == "gelu_tanh":
        i = (i % 2) * (N // 2) + i // 2
    return i


@triton.jit
def activate(gate, up, ACT: tl.constexpr):
    if ACT == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACT == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        u = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2 * u) * up
    else:
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        return (up + 1) * gate * tl.sigmoid(1.702 * gate)
