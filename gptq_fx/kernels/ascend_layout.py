"""The layout that the ops of torch_npu take weights in, and back.

w [*, K, N] as int8, or, of 4 bits and fewer, int32 [*, K, N/8]: 8 values that follow each other along N in
one word, the first in the low bits, in two's complement. npu_convert_weight_to_int4pack makes the same; here
it is plain torch on the host, since not every release of the NPU's software can shift int32. 2-bit and 3-bit
codes take 4 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.kernels.registry import LinearSpec, Tensors
from gptq_fx.weight import QuantizedWeight


def pack(weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
    """-> w int32 [*, K, N/8] or int8 [*, K, N], scales and offsets [*, G, N], order int32 [*, K].

    order: the features of x in the order of the rows of w, so that groups are runs of rows; None without
    g_idx. offsets: None where symmetric; but zeros in a stack [E, K, N], since npu_grouped_matmul wants some.
    Raises WeightError where g_idx has groups of unequal size: the ops know only equal ones.
    """
    device = weight.scales.device
    weight = weight.to("cpu")
    middle = 2 ** (weight.bits - 1)
    values = weight.codes().to(torch.int16) - middle
    order = None
    if weight.g_idx is not None:
        order = weight.g_idx.argsort(dim=-1, stable=True)
        _check_groups(weight, order)
        values = torch.take_along_dim(values, order.unsqueeze(-1), -2)
    zeros = weight.zeros()
    offsets = None
    if zeros is not None:
        offsets = (middle - zeros.to(torch.int16)).to(weight.scales.dtype).contiguous()
    elif values.ndim == 3:
        offsets = torch.zeros_like(weight.scales)
    packed = values.to(torch.int8) if weight.bits == 8 else pack_int4(values)
    tensors = (packed, weight.scales, offsets, None if order is None else order.to(torch.int32))
    return tuple(None if t is None else t.to(device) for t in tensors)


def _check_groups(weight: QuantizedWeight, order: Tensor) -> None:
    assert weight.g_idx is not None
    found = torch.take_along_dim(weight.g_idx, order, -1)
    expected = torch.arange(weight.in_features) // weight.group_size
    if not torch.equal(found, expected.to(found.dtype).expand_as(found)):
        sizes = torch.bincount(weight.g_idx.flatten(), minlength=weight.scales.shape[-2])
        raise WeightError(
            f"g_idx has groups of {int(sizes.min())} to {int(sizes.max())} input features. "
            f"Legal here: {weight.group_size} in each"
        )


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    assert tensors[0] is not None
    device = tensors[0].device
    packed, scales, offsets, order = (None if t is None else t.to("cpu") for t in tensors)
    assert packed is not None and scales is not None
    bits = spec.scheme.bits
    middle = 2 ** (bits - 1)
    values = packed.to(torch.int16) if packed.dtype == torch.int8 else unpack_int4(packed)
    g_idx = None
    if order is not None:
        place = order.argsort(-1)
        values = torch.take_along_dim(values, place.unsqueeze(-1), -2)
        g_idx = (place // spec.group_size).to(torch.int32)
    zeros = None if spec.scheme.sym or offsets is None else middle - offsets.to(torch.int16)
    return QuantizedWeight.from_codes(values + middle, scales, zeros, bits, g_idx).to(device)


def pack_int4(values: Tensor) -> Tensor:
    """Integers -8 to 7 [*, N] -> int32 [*, N/8]."""
    nibbles = (values.to(torch.int32) & 15).unflatten(-1, (-1, 8))
    packed = torch.zeros_like(nibbles[..., 0])
    for j in range(8):
        packed |= nibbles[..., j] << 4 * j
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of pack_int4: int32 [*, N/8] -> int32 [*, N]."""
    to_the_top = 28 - 4 * torch.arange(8, dtype=torch.int32)
    values: Tensor = (packed.unsqueeze(-1) << to_the_top) >> 28
    return values.flatten(-2)


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    packed, scales, offsets, order = tensors
    assert packed is not None and scales is not None
    per_column = 8 if packed.dtype == torch.int32 else 1
    return (
        packed[..., start // per_column : stop // per_column],
        scales[..., start:stop],
        None if offsets is None else offsets[..., start:stop],
        order,
    )


ND, FRACTAL_NZ = 2, 29  # numbers of formats, as npu_format_cast takes them


def pack_nz(weight: QuantizedWeight, spec: LinearSpec, blocked: bool) -> Tensors:
    """`pack`, with w in FRACTAL_NZ if `blocked`: a layout that shapes and strides do not show."""
    packed, *rest = pack(weight, spec)
    return (torch.ops.npu.npu_format_cast(packed, FRACTAL_NZ) if blocked else packed, *rest)


def unpack_nz(tensors: Tensors, spec: LinearSpec, blocked: bool) -> QuantizedWeight:
    packed, *rest = tensors
    return unpack((torch.ops.npu.npu_format_cast(packed, ND) if blocked else packed, *rest), spec)
