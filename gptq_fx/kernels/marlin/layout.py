"""The Marlin layout, bit by bit, in plain torch: packs interchange with those of vLLM and SGLang.

Codes q [K, N] lie in tiles of 16 (k) x 64 (n), in order of k, then of n; a tile is 1024 * bits / 32 words.
Lane t = 4 * g + c of a warp (g = 0..7, c = 0..3) owns, for each block w = 0..3 of 16 outputs, the codes

    k = 2 * c + 8 * h + e,  n = 16 * w + 8 * r + g      (e, h, r = 0, 1)

which are its registers of an operand of mma.m16n8k16. As they lie in memory:

    4 bits: word 4 * t + w,          field 4 * e + 2 * r + h
    8 bits: word 8 * t + 2 * w + r,  field 2 * e + h

so that one mask takes the pair e = 0, 1, that shares a register, out of a word.

Scales [G, N]: with groups, each run of 64 columns is transposed as 8 x 8, so that the 8 scales of a lane
(columns g + 8 * j) follow each other. With one group, column 8 * a + 2 * i + e of each run of 32 is stored
at 8 * i + 2 * a + e. Zero points [G, N * bits / 32]: columns as those of scales with groups, then the even
ones of a run of 8 (4 bits) or 4 (8 bits) before the odd ones, packed along N with the first in the low bits.

The leading dimension of a stack of experts is allowed everywhere (*).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.weight import QuantizedWeight

BITS = (4, 8)
TILE_K, TILE_N = 16, 64


def _to_words(fields: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits [*, 32 / bits], the first in the low bits -> int32 [*]."""
    words = fields.new_zeros(fields.shape[:-1], dtype=torch.int32)
    for i in range(32 // bits):
        words |= fields[..., i].to(torch.int32) << bits * i
    return words


def _from_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of _to_words: int32 [*] -> uint8 [*, 32 / bits]."""
    fields = [(words >> bits * i) & (2**bits - 1) for i in range(32 // bits)]
    return torch.stack(fields, -1).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [*, K, N], K a multiple of 16 and N of 64 -> int32 [*, K / 16, N * bits / 2]."""
    *stack, K, N = codes.shape
    if K % TILE_K or N % TILE_N or bits not in BITS:
        raise WeightError(
            f"codes of {bits} bits [{K}, {N}] have no Marlin layout. "
            f"Legal: 4 or 8 bits, K a multiple of {TILE_K}, N of {TILE_N}"
        )
    dims = codes.reshape(-1, K // 16, 2, 4, 2, N // 64, 4, 2, 8)  # batch kt h c e nt w r g
    if bits == 4:
        fields = dims.permute(0, 1, 5, 8, 3, 6, 4, 7, 2).reshape(-1, 8)
    else:
        fields = dims.permute(0, 1, 5, 8, 3, 6, 7, 4, 2).reshape(-1, 4)
    return _to_words(fields, bits).reshape(*stack, K // 16, N * bits // 2)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_codes: int32 [*, K / 16, N * bits / 2] -> uint8 [*, K, N]."""
    *stack, K, N = packed.shape
    K, N = 16 * K, N * 2 // bits
    fields = _from_words(packed, bits)
    if bits == 4:
        dims = fields.reshape(-1, K // 16, N // 64, 8, 4, 4, 2, 2, 2)  # batch kt nt g c w e r h
        dims = dims.permute(0, 1, 8, 4, 6, 2, 5, 7, 3)
    else:
        dims = fields.reshape(-1, K // 16, N // 64, 8, 4, 4, 2, 2, 2)  # batch kt nt g c w r e h
        dims = dims.permute(0, 1, 8, 4, 7, 2, 5, 6, 3)
    return dims.reshape(*stack, K, N)


def _transpose_runs(columns: Tensor) -> Tensor:
    """Each run of 64 columns as the transpose of its 8 x 8."""
    transposed: Tensor = columns.unflatten(-1, (-1, 8, 8)).mT.flatten(-3)
    return transposed


def permute_scales(scales: Tensor) -> Tensor:
    """Scales [*, G, N], N a multiple of 64, in their order in memory."""
    N = scales.shape[-1]
    if scales.shape[-2] > 1:
        return _transpose_runs(scales).contiguous()
    dims = scales.unflatten(-1, (N // 32, 4, 4, 2))  # a i e
    permuted: Tensor = dims.transpose(-3, -2).flatten(-4)
    return permuted.contiguous()


def restore_scales(scales: Tensor) -> Tensor:
    """The inverse of permute_scales: both orders are transposes, which undo themselves."""
    return permute_scales(scales)


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points [*, G, N], N a multiple of 64 -> int32 [*, G, N * bits / 32]."""
    N = zeros.shape[-1]
    columns = _transpose_runs(zeros)
    run = 32 // bits
    fields = columns.unflatten(-1, (N // run, run // 2, 2)).mT.flatten(-2)
    return _to_words(fields, bits)


def unpack_zeros(packed: Tensor, bits: int) -> Tensor:
    """The inverse of pack_zeros: int32 [*, G, N * bits / 32] -> uint8 [*, G, N]."""
    run = 32 // bits
    columns = _from_words(packed, bits).unflatten(-1, (2, run // 2)).mT.flatten(-3)
    return _transpose_runs(columns)


def check_marlin_format(settings: dict[str, object]) -> bool:
    """Whether the quantization_config of a checkpoint says that its files hold Marlin packs.

    Two spellings exist: checkpoint_format "marlin", and is_marlin_format of AutoGPTQ up to 0.7.1.
    """
    return settings.get("checkpoint_format") == "marlin" or bool(settings.get("is_marlin_format", False))


def from_marlin_tensors(
    packed: Tensor, scales: Tensor, bits: int = 4, qzeros: Tensor | None = None
) -> QuantizedWeight:
    """The weight in the tensors of a Marlin checkpoint: B int32 [*, K / 16, N * bits / 2], s [*, G, N].

    qzeros int32 [*, G, N * bits / 32] are zero points in Marlin's order; None where symmetric.
    Raises WeightError where the shapes do not go together.
    """
    G, N = scales.shape[-2:]
    K = packed.shape[-2] * TILE_K
    fits = packed.shape[-1] * 2 == N * bits and N % TILE_N == 0 and K % G == 0
    if bits not in BITS or packed.dtype != torch.int32 or not fits:
        raise WeightError(
            f"B {packed.dtype} {list(packed.shape)} with s {list(scales.shape)} is no Marlin pack of "
            f"{bits} bits. Legal: int32 [K / 16, N * bits / 2] of 4 or 8 bits with [G, N], "
            "N a multiple of 64, G a divisor of K"
        )
    zeros = None if qzeros is None else unpack_zeros(qzeros, bits)
    return QuantizedWeight.from_codes(unpack_codes(packed, bits), restore_scales(scales), zeros, bits)
