"""The layout of humming-kernels for 16-bit activations: QuantizedWeight -> its tensors, and back.

    weight  int32 [*, K/16, N'*bits/2], where N' is N rounded up to BLOCK by outputs of scale 0: tiles of 16
            inputs by 64 outputs. Lane l of a warp holds 32 codes of a tile in `bits` words that follow each
            other: inputs 8a + 2(l % 4) + b and outputs 16c + 8d + l // 4, in the order (c, d, a, b). Inside
            a word the codes of even place come first.
    scales  [*, G, N'], outputs permuted inside runs of 64 (groups) or 32 (one group, applied to the result).
    zeros   int32 [*, G, N'/8] (up to 4 bits) or [*, G, N'/4] (8 bits): permuted as the scales of groups.

bfloat16 holds 8-bit codes of its own sign: q - z where q >= z, and 255 - q below (`_to_signed`).
No permutation reaches over a BLOCK of outputs, so that packs can be cut along N.

The library's own transformation is not called: this one runs on every device, is exact in both directions,
and never changes a layer's format by what its codes happen to be (the library re-encodes a layer in which
no code is 0). Source: humming 0.1.19, transform.py and kernel/process.cuh.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gptq_fx.kernels.registry import LinearSpec, Tensors
from gptq_fx.weight import QuantizedWeight

BLOCK = 128  # outputs; the library's tiles for some GPUs are never narrower
CHUNK = 1 << 28  # codes of a stack that are packed at once: more would need much memory for a moment


def width(bits: int) -> int:
    """Bits that a code takes in a word; the words of 3-bit codes are then squeezed from 4 to 3."""
    return 4 if bits == 3 else bits


def padded(out_features: int) -> int:
    """N', the outputs that a pack holds."""
    return -(-out_features // BLOCK) * BLOCK


@functools.cache
def _places(bits: int) -> tuple[int, ...]:
    """Which of the codes that share a word stands in each slot: the even ones, then the odd ones."""
    count = 32 // width(bits)
    return (*range(0, count, 2), *range(1, count, 2))


@functools.cache
def _order(spec_groups: int) -> tuple[int, ...]:
    """Which output stands in each place of a run of scales."""
    if spec_groups == 1:
        first = [0, 1, 8, 9, 16, 17, 24, 25]
        return tuple(x + 2 * i for i in range(4) for x in first)
    return tuple(8 * j + i for i in range(8) for j in range(8))


def pack(weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
    """-> weight, scales, zeros (None where symmetric), as the module says."""
    if spec.experts is not None:
        step = max(CHUNK // (spec.in_features * spec.out_features), 1)
        ids = [range(e, min(e + step, spec.experts)) for e in range(0, spec.experts, step)]
        parts = [QuantizedWeight.stack([weight.expert(e) for e in part]) for part in ids]
        codes = torch.cat([_pack_codes(part, spec) for part in parts])
    else:
        codes = _pack_codes(weight, spec)
    zeros = weight.zeros()
    scales = _permute(_pad(weight.scales), _order(spec.groups))
    return codes, scales, None if zeros is None else _pack_zeros(_pad(zeros), weight.bits)


def _pad(table: Tensor) -> Tensor:
    N = table.shape[-1]
    return torch.nn.functional.pad(table, (0, padded(N) - N))


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    packed, scales, packed_zeros = tensors
    assert packed is not None and scales is not None
    bits = spec.scheme.bits
    N = spec.out_features
    zeros = None if packed_zeros is None else _unpack_zeros(packed_zeros, bits)[..., :N]
    scales = _permute(scales, _inverse(_order(spec.groups)))[..., :N]
    if spec.experts is None:
        codes = _unpack_codes(packed, zeros, spec)
        return QuantizedWeight.from_codes(codes, scales, zeros, bits)
    experts = []
    for e in range(spec.experts):
        z = None if zeros is None else zeros[e]
        experts.append(QuantizedWeight.from_codes(_unpack_codes(packed[e], z, spec), scales[e], z, bits))
    return QuantizedWeight.stack(experts)


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    """Views of outputs start to stop, both multiples of BLOCK or the end."""
    whole, stop = padded(spec.out_features), padded(stop)

    def part(t: Tensor) -> Tensor:
        return t[..., start * t.shape[-1] // whole : stop * t.shape[-1] // whole]

    return tuple(None if t is None else part(t) for t in tensors)


def _pack_codes(weight: QuantizedWeight, spec: LinearSpec) -> Tensor:
    """-> int32 [*, K/16, N*bits/2]."""
    bits = weight.bits
    codes = weight.codes()
    if _is_signed(spec):
        codes = _to_signed(codes, _all_zeros(weight.zeros(), codes))
    tiles = _pad(codes).unflatten(-2, (-1, 2, 4, 2)).unflatten(-1, (-1, 4, 2, 8))
    # [*, K/16, a, l % 4, b, N/64, c, d, l // 4] -> [*, K/16, N/64, l // 4, l % 4, c, d, a, b]
    tiles = tiles.movedim((-4, -1, -6, -3, -2, -7, -5), (-7, -6, -5, -4, -3, -2, -1))
    slots = tiles.flatten(-4).unflatten(-1, (width(bits), -1))
    words = torch.zeros(slots.shape[:-1], dtype=torch.int32, device=codes.device)
    for slot, place in enumerate(_places(bits)):
        words |= slots[..., place].to(torch.int32) << slot * width(bits)
    if bits == 3:
        words = _squeeze(words)
    return words.flatten(-4)


def _unpack_codes(packed: Tensor, zeros: Tensor | None, spec: LinearSpec) -> Tensor:
    """The inverse of _pack_codes -> uint8 [K, N]."""
    bits = spec.scheme.bits
    words = packed.unflatten(-1, (-1, 8, 4, bits))
    if bits == 3:
        words = _unsqueeze(words)
    shifts = torch.arange(0, 32, width(bits), dtype=torch.int32, device=packed.device)
    slots = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    slots = slots.to(torch.uint8)[..., list(_inverse(_places(bits)))]
    tiles = slots.flatten(-2).unflatten(-1, (4, 2, 2, 2))
    tiles = tiles.movedim((-7, -6, -5, -4, -3, -2, -1), (-4, -1, -6, -3, -2, -7, -5))
    codes = tiles.flatten(-4).flatten(-5, -2)[..., : spec.out_features]
    return _from_signed(codes, _all_zeros(zeros, codes)) if _is_signed(spec) else codes


def _squeeze(words: Tensor) -> Tensor:
    """Four words of eight 3-bit codes, each in 4 bits -> three words."""
    a, b, c, d = words.unbind(-1)
    first = a & 0x77777777 | (b & 0x44444444) << 1
    second = b & 0x33333333 | (c & 0x66666666) << 1
    third = c & 0x11111111 | (d & 0x77777777) << 1
    return torch.stack([first, second, third], -1)


def _unsqueeze(words: Tensor) -> Tensor:
    first, second, third = words.unbind(-1)
    a = first & 0x77777777
    b = second & 0x33333333 | (first >> 1) & 0x44444444
    c = third & 0x11111111 | (second >> 1) & 0x66666666
    d = (third >> 1) & 0x77777777
    return torch.stack([a, b, c, d], -1)


def _is_signed(spec: LinearSpec) -> bool:
    return spec.scheme.bits == 8 and spec.dtype == torch.bfloat16


def _all_zeros(zeros: Tensor | None, codes: Tensor) -> Tensor:
    """The zero point of each code, uint8 [*, K, N] or one for all."""
    if zeros is None:
        return codes.new_full((), 128)
    return zeros.repeat_interleave(codes.shape[-2] // zeros.shape[-2], -2)


def _to_signed(codes: Tensor, zeros: Tensor) -> Tensor:
    return torch.where(codes >= zeros, codes - zeros, 255 - codes)


def _from_signed(stored: Tensor, zeros: Tensor) -> Tensor:
    return torch.where(stored <= 255 - zeros, stored + zeros, 255 - stored)


def _pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """uint8 [*, G, N] -> int32 [*, G, N/8] or [*, G, N/4]."""
    zeros = _permute(zeros, _order(0)).to(torch.int32)
    size = 4 if bits <= 4 else 8
    fields = zeros.unflatten(-1, (-1, 32 // size))
    words = torch.zeros_like(fields[..., 0])
    for i in range(32 // size):
        words |= fields[..., i] << i * size
    return words


def _unpack_zeros(packed: Tensor, bits: int) -> Tensor:
    size = 4 if bits <= 4 else 8
    shifts = torch.arange(0, 32, size, dtype=torch.int32, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & (2**size - 1)
    return _permute(fields.flatten(-2).to(torch.uint8), _inverse(_order(0)))


def _permute(table: Tensor, order: tuple[int, ...]) -> Tensor:
    """Outputs [*, N] reordered inside runs of len(order)."""
    permuted: Tensor = table.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)
    return permuted


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
