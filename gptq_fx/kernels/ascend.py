"""Ascend NPUs (Atlas A2 and A3): the ops of torch_npu that multiply by 4-bit and 8-bit integer weights.

    npu_weight_quant_batchmatmul:  y = x @ ((w + offset) * scale) + bias
    npu_grouped_matmul:            the same for each expert, on its rows of x

The op adds its offset, a GPTQ zero point is subtracted: with w = q - 2^(bits-1) in the signed integers that
the op takes, (w + offset) = (q - z) gives offset = 2^(bits-1) - z, which is 0 where symmetric.

Layout: w [*, K, N] as int8, or, of 4 bits and fewer, int32 [*, K, N/8]: 8 values that follow each other
along N in one word, the first in the low bits, in two's complement. npu_convert_weight_to_int4pack makes the
same; here it is plain torch on the host, since not every release of the NPU's software can shift int32.
2-bit and 3-bit codes take 4 bits.

Source: documents, C++ checks and meta kernels of op-plugin for torch_npu 2.13. None of this ever ran on an
NPU: it is held against an emulation of the documented arithmetic, and the real schemas and meta kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from gptq_fx.errors import WeightError
from gptq_fx.kernels.registry import Kernel, LinearSpec, Tensors, register
from gptq_fx.ops import define
from gptq_fx.weight import QuantizedWeight

DTYPES = (torch.float16, torch.bfloat16)
LARGEST = 65535  # of K and of N
MOST_EXPERTS = 1024


def available() -> str | None:
    """torch_npu is never imported here: a tensor on an NPU exists only where it was imported before."""
    if torch._C._jit_get_schemas_for_operator("npu::npu_weight_quant_batchmatmul"):
        return None
    if "torch_npu" in sys.modules:
        return "this torch_npu has no npu_weight_quant_batchmatmul"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return "torch_npu is not imported, and TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from doing so"
    return "torch_npu is not imported; `import torch_npu` tells what it misses"


def supports(spec: LinearSpec) -> str | None:
    if spec.dtype not in DTYPES:
        return f"x must be float16 or bfloat16, the model is {spec.dtype}"
    if spec.groups > 1 and spec.group_size % 32:
        return f"group_size {spec.group_size} is not a multiple of 32"
    for name, size in (("in_features", spec.in_features), ("out_features", spec.out_features)):
        if size > LARGEST:
            return f"{name} {size} is more than {LARGEST}"
    if spec.scheme.bits <= 4 and spec.out_features % 8:
        return f"out_features {spec.out_features} is not a multiple of 8, which share a word"
    return None


def supports_grouped(spec: LinearSpec) -> str | None:
    """Why ascend_grouped_linear cannot run a stack of this spec, or None."""
    assert spec.experts is not None
    if reason := supports(spec):
        return reason
    if spec.scheme.bits == 8 and spec.groups > 1:
        return "npu_grouped_matmul takes 8-bit weights with one scale per output only, not with groups"
    if spec.scheme.desc_act:
        return "act-order: each expert would need its own order of the features of x"
    if spec.experts > MOST_EXPERTS:
        return f"{spec.experts} experts are more than {MOST_EXPERTS}"
    return None


def note(spec: LinearSpec) -> str | None:
    width = f"{spec.scheme.bits}-bit codes stored in 4 bits" if spec.scheme.bits < 4 else None
    loop = "experts run one by one" if spec.experts is not None else None
    return "; ".join(filter(None, [width, loop])) or None


def op_group(spec: LinearSpec) -> int:
    """The group size as the op takes it: 0 for one group, since it refuses -1 and K."""
    return spec.group_size if spec.groups > 1 else 0


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


@define(
    "ascend_linear(Tensor x, Tensor weight, Tensor scales, Tensor? offsets, Tensor? order, Tensor? bias, "
    "int group_size) -> Tensor"
)
def ascend_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """x fp16 or bf16 [*, K], the tensors of `pack`, bias [N], group_size as of `op_group` -> [*, N]."""
    # The op takes batches of x, but its meta kernel gives them a wrong shape.
    rows = x.reshape(-1, x.shape[-1])
    if guard_or_false(rows.shape[0] == 0):  # the op takes no empty tensor
        return x.new_empty(*x.shape[:-1], scales.shape[-1])
    if order is not None:
        rows = rows.index_select(-1, order)
    y: Tensor = torch.ops.npu.npu_weight_quant_batchmatmul(
        rows.contiguous(),
        weight,
        scales,
        offsets,
        bias=None if bias is None else bias.to(_bias_dtype(x.dtype)),
        antiquant_group_size=group_size,
    )
    return y.reshape(*x.shape[:-1], scales.shape[-1])


def _bias_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


# The linear of a stack of experts, on the tensors that `pack` makes of stacks. Nothing calls it yet: the
# registry has no place for it, and gptq::grouped_linear runs ascend_linear for each expert.
@define(
    "ascend_grouped_linear(Tensor x, Tensor weight, Tensor scales, Tensor offsets, Tensor ends) -> Tensor"
)
def ascend_grouped_linear(x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor, ends: Tensor) -> Tensor:
    """x fp16 or bf16 [S, K], the tensors of `pack` for a stack, ends [E] of any integers -> [S, N].

    Rows ends[e - 1] to ends[e] (from 0 for the first) meet expert e. Rows behind the last end give zeros.
    """
    if guard_or_false(x.shape[0] == 0):  # the op takes no empty tensor
        return x.new_empty(0, scales.shape[-1])
    # The op demands that the groups cover x: the last expert takes what is left, and it is blotted out.
    rows = torch.arange(x.shape[0], device=x.device)
    before_last, last = ends.narrow(0, 0, ends.shape[0] - 1), ends.select(0, -1)
    covered = torch.cat([before_last, ends.new_full((1,), x.shape[0])])
    if scales.shape[-2] == 1:  # per output, the op wants [E, N]
        scales, offsets = scales.squeeze(-2), offsets.squeeze(-2)
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [weight],
        antiquant_scale=[scales],
        antiquant_offset=[offsets],
        group_list=covered.to(torch.int64),
        split_item=2,  # one tensor for all groups, in and out
        group_type=0,  # groups of rows
        group_list_type=0,  # as cumulative sums
    )
    return torch.where((rows < last).unsqueeze(-1), y, 0)


ASCEND = register(
    Kernel(
        name="ascend",
        device="npu",
        order=100,
        available=available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=ascend_linear,
        op_args=lambda spec: (op_group(spec),),
        cut_at=lambda spec: 1 if spec.scheme.bits == 8 else 8,
        cut=cut,
        note=note,
        stacks=True,
    )
)
