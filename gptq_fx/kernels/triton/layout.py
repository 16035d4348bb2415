"""The layout of weights, packed and unpacked.

KB blocks of 16 * SLABS input features (SLABS = 16, 16, 8, 4 for 2, 3, 4, 8 bits; the last block is filled up
with codes of 0). Feature k = (b * SLABS + j) * 16 + r, of slab j, lies in word r of block b:
    w      int32 [*, KB, N, 16]   its code at bit 2j, 2j, 4j, 8j; of 3 bits the two lower ones
    high   int16 [*, KB, N, 16]   its third bit at bit j; None unless of 3 bits
    scales float [*, G, N]
    zeros  uint8 [*, G, N]        None where symmetric
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_fx.kernels.registry import LinearSpec, Tensors
from gptq_fx.weight import QuantizedWeight

SLABS = {2: 16, 3: 16, 4: 8, 8: 4}


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
