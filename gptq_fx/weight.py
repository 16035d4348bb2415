"""QuantizedWeight, the canonical form: schemes produce it, kernels consume it.

Only this file knows the int32 packing of GPTQ checkpoints and the two versions of their zero points.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.errors import WeightError


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight W[N, K] of N outputs and K inputs on an integer grid, G groups along K:

        W[n, k] = scales[g(k), n] * (q[k, n] - z[g(k), n])
        g(k) = k // (K / G), or g_idx[k] where g_idx is given
        z = 2^(bits-1) where qzeros is None (symmetric)

    qweight int32 [*, ceil(K*bits/32), N]: codes q packed along K, the first in the low bits.
    scales  float [*, G, N]: fp32, fp16 or bf16; its dtype is the logical dtype of W.
    qzeros  int32 [*, G, ceil(N*bits/32)] or None: zero points packed along N as they are ("gptq_v2").
    g_idx   int32 [*, K] or None.
    *: none, or one leading dimension of experts.
    Values of 3 bits run on across word borders (32 values in 3 words); the last word is zero-filled.
    """

    bits: int
    in_features: int
    qweight: Tensor
    scales: Tensor
    qzeros: Tensor | None = None
    g_idx: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.scales.shape[-1]

    @property
    def group_size(self) -> int:
        """Input features in one group; K where there is one group."""
        return self.in_features // self.scales.shape[-2]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.qweight, self.scales, self.qzeros, self.g_idx

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        g_idx: Tensor | None = None,
    ) -> QuantizedWeight:
        """Pack codes [*, K, N], scales [*, G, N] and zero points [*, G, N] (None: symmetric)."""
        K, N = codes.shape[-2:]
        G = scales.shape[-2]
        if scales.shape[-1] != N or K % G:
            raise WeightError(
                f"codes {list(codes.shape)} do not go with scales {list(scales.shape)}. "
                "Legal: [K, N] with [G, N] where G divides K"
            )
        qzeros = None if zeros is None else pack_int32(zeros.mT, bits).mT.contiguous()
        return cls(bits, K, pack_int32(codes, bits), scales.contiguous(), qzeros, g_idx)

    def expert(self, index: int) -> QuantizedWeight:
        """The weight of one expert."""
        qweight, scales, qzeros, g_idx = (None if t is None else t[index] for t in self.tensors)
        assert qweight is not None and scales is not None
        return QuantizedWeight(self.bits, self.in_features, qweight, scales, qzeros, g_idx)

    @classmethod
    def stack(cls, experts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """The weights of experts, which all have the same bits, groups and shape, as one."""
        qzeros = [e.qzeros for e in experts if e.qzeros is not None]
        g_idx = [e.g_idx for e in experts if e.g_idx is not None]
        return cls(
            experts[0].bits,
            experts[0].in_features,
            torch.stack([e.qweight for e in experts]),
            torch.stack([e.scales for e in experts]),
            torch.stack(qzeros) if qzeros else None,
            torch.stack(g_idx) if g_idx else None,
        )

    def codes(self) -> Tensor:
        """The integers q, uint8 [*, K, N]."""
        return unpack_int32(self.qweight, self.bits, self.in_features).to(torch.uint8)

    def zeros(self) -> Tensor | None:
        """The zero points z, uint8 [*, G, N], or None where symmetric."""
        if self.qzeros is None:
            return None
        return unpack_int32(self.qzeros.mT, self.bits, self.out_features).mT.to(torch.uint8)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [*, N, K] in `dtype` (None: the dtype of the scales), computed in fp32 or `dtype` if wider."""
        return dequantize(*self.tensors, self.bits, self.in_features, dtype).mT

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> QuantizedWeight:
        """The same integers on `device`, with scales in `dtype`."""
        moved = [None if t is None else t.to(device) for t in self.tensors]
        moved[1] = self.scales.to(device, dtype)
        qweight, scales, qzeros, g_idx = moved
        assert qweight is not None and scales is not None
        return dataclasses.replace(self, qweight=qweight, scales=scales, qzeros=qzeros, g_idx=g_idx)

    def qzeros_v1(self) -> Tensor:
        """qzeros as "gptq" (v1) checkpoints store them: less one; symmetric ones written out."""
        qzeros = self.qzeros
        if qzeros is None:
            full = torch.full(self.scales.shape, 2 ** (self.bits - 1), device=self.scales.device)
            qzeros = pack_int32(full.mT, self.bits).mT.contiguous()
        return _shift_zeros(qzeros, self.bits, self.out_features, -1)


def qzeros_from_v1(qzeros: Tensor, bits: int, out_features: int) -> Tensor:
    """v1 zero points [*, G, words] as v2: stored + 1, the exact inverse of QuantizedWeight.qzeros_v1."""
    return _shift_zeros(qzeros, bits, out_features, 1)


def _shift_zeros(qzeros: Tensor, bits: int, out_features: int, by: int) -> Tensor:
    """Add `by` to packed zero points, the way that v1 was made from v2.

    The writers of v1 subtract 1 from all fields of a word at once, so that z = 0 borrows from the field
    above it: only arithmetic on whole words gives such files back. Fields of 3 bits cross words; there
    each value is taken modulo 8, as the same writers do.
    """
    if bits == 3:
        values = unpack_int32(qzeros.mT, bits, out_features) + by
        return pack_int32(values & 7, bits).mT.contiguous()
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return qzeros + by * ones  # int32 wraps around


def _block(bits: int) -> tuple[int, int]:
    """(values, words) of the smallest run of codes that fills whole words."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def packed_rows(rows: int, bits: int) -> int:
    """Words that `rows` codes fill."""
    return -(-rows * bits // 32)


def pack_int32(values: Tensor, bits: int) -> Tensor:
    """Codes [*, R, C] below 2^bits -> int32 [*, ceil(R*bits/32), C], little end first along R."""
    block, words = _block(bits)
    rows = values.shape[-2]
    values = values.to(torch.int32)
    if pad := -rows % block:
        values = torch.nn.functional.pad(values, (0, 0, 0, pad))
    values = values.unflatten(-2, (-1, block))
    packed = values.new_zeros(*values.shape[:-2], words, values.shape[-1])
    for i in range(block):
        word, shift = divmod(i * bits, 32)
        packed[..., word, :] |= values[..., i, :] << shift
        if shift + bits > 32:
            packed[..., word + 1, :] |= values[..., i, :] >> (32 - shift)
    return packed.flatten(-3, -2)[..., : packed_rows(rows, bits), :].contiguous()


def unpack_int32(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of pack_int32: int32 [*, ceil(rows*bits/32), C] -> int32 [*, rows, C]."""
    block, words = _block(bits)
    if pad := -packed.shape[-2] % words:
        packed = torch.nn.functional.pad(packed, (0, 0, 0, pad))
    packed = packed.unflatten(-2, (-1, words))
    first_bit = torch.arange(block, device=packed.device, dtype=torch.int32) * bits
    values = packed
    if words > 1:
        values = packed[..., first_bit // 32, :]
    values = (values >> (first_bit % 32)[:, None]) & (2**bits - 1)
    if bits == 3:  # codes 10 and 21 keep their upper bits in the next word
        low = torch.stack([values[..., 10, :] & 3, values[..., 21, :] & 1], -2)
        high = torch.stack([packed[..., 1, :] << 2, packed[..., 2, :] << 1], -2) & 7
        ten, twenty_one = (low | high).unbind(-2)
        parts = [values[..., :10, :], ten[..., None, :], values[..., 11:21, :]]
        parts += [twenty_one[..., None, :], values[..., 22:, :]]
        values = torch.cat(parts, -2)
    return values.flatten(-3, -2)[..., :rows, :]


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor | None,
    g_idx: Tensor | None,
    bits: int,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The equation of QuantizedWeight on plain tensors -> W^T [*, K, N]."""
    out = dtype or scales.dtype
    wide = torch.promote_types(out, torch.float32)
    q = unpack_int32(qweight, bits, in_features).to(wide)
    s = scales.to(wide)
    if qzeros is None:
        z = s.new_full((), 2 ** (bits - 1))
    else:
        z = unpack_int32(qzeros.mT, bits, scales.shape[-1]).mT.to(wide)
    if g_idx is not None:
        s = _rows(s, g_idx)
        z = _rows(z, g_idx) if qzeros is not None else z
        return ((q - z) * s).to(out)
    groups = scales.shape[-2]
    z = z.unsqueeze(-2) if qzeros is not None else z
    w: Tensor = (q.unflatten(-2, (groups, -1)) - z) * s.unsqueeze(-2)
    return w.flatten(-3, -2).to(out)


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table [*, G, N], index [*, K] -> [*, K, N]."""
    if index.ndim == 1:
        return table.index_select(-2, index)  # copies whole rows
    return torch.take_along_dim(table, index.long().unsqueeze(-1), -2)
