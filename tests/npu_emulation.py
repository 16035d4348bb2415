"""The ops of torch_npu that kernels/ascend.py calls, on the CPU: their schemas, checks and arithmetic.

`emulated` gives torch.ops.npu.* kernels for CPU tensors: those of the real torch_npu where it can be imported
(see tests/npu_stub), of a namespace of our own otherwise. Rounding follows the golden script of the vendor's
ops-nn: (w + offset) is rounded to the dtype of the scales, its product with them again, sums are fp32 and
rounded once. The checks are those of the documents and of op-plugin's C++, many of which the meta kernels
lack: what passes here was asked as documented.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# As torch_npu 2.13.0 and 2.14.0 print them; a test of tests/npu_stub compares them with the real ones.
SCHEMAS = {
    "npu_weight_quant_batchmatmul": (
        "(Tensor x, Tensor weight, Tensor antiquant_scale, Tensor? antiquant_offset=None, "
        "Tensor? quant_scale=None, Tensor? quant_offset=None, Tensor? bias=None, int antiquant_group_size=0, "
        "int inner_precise=0, int? weight_dtype=None) -> Tensor"
    ),
    "npu_grouped_matmul": (
        "(Tensor[] x, Tensor[] weight, *, Tensor[]? bias=None, Tensor[]? scale=None, Tensor[]? offset=None, "
        "Tensor[]? antiquant_scale=None, Tensor[]? antiquant_offset=None, Tensor[]? per_token_scale=None, "
        "Tensor? group_list=None, Tensor[]? activation_input=None, Tensor[]? activation_quant_scale=None, "
        "Tensor[]? activation_quant_offset=None, int? split_item=0, int? group_type=None, "
        "int? group_list_type=0, int? act_type=0, int[]? tuning_config=None, int? output_dtype=None, "
        "int? x_dtype=None, int? weight_dtype=None, int? scale_dtype=None, int? per_token_scale_dtype=None) "
        "-> Tensor[]"
    ),
    "npu_moe_init_routing_v2": (
        "(Tensor x, Tensor expert_idx, *, Tensor? scale=None, Tensor? offset=None, int active_num=-1, "
        "int expert_capacity=-1, int expert_num=-1, int drop_pad_mode=0, int expert_tokens_num_type=0, "
        "bool expert_tokens_num_flag=False, int quant_mode=-1, int[2] active_expert_range=[], "
        "int row_idx_type=0, int? x_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "npu_swiglu": "(Tensor input, int dim=-1) -> Tensor",
    "npu_moe_finalize_routing": (
        "(Tensor expanded_permuted_rows, Tensor? skip1, Tensor? skip2, Tensor? bias, Tensor? scales, "
        "Tensor expanded_src_to_dst_row, Tensor? export_for_source_row, int? drop_pad_mode=0, int? k=1) "
        "-> Tensor"
    ),
    "npu_convert_weight_to_int4pack": "(Tensor weight, int inner_k_tiles=0) -> Tensor",
    "npu_format_cast": (
        "(Tensor input, int acl_format, *, int? customize_dtype=None, int? input_dtype=None) -> Tensor"
    ),
}
FORMATS = {2: "ND", 29: "FRACTAL_NZ"}


def check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def integers(weight: Tensor) -> Tensor:
    """int8 [*, K, N], or int32 [*, K, N/8] of nibbles -> fp32 [*, K, N]."""
    check(weight.is_contiguous(), "emulated for plain weights only")
    if weight.dtype == torch.int8:
        return weight.float()
    check(weight.dtype == torch.int32, f"weight is {weight.dtype}")
    two = weight.view(torch.uint8)  # little endian: the low byte first
    nibbles = torch.stack([two & 15, two >> 4], -1).flatten(-2).float()
    return torch.where(nibbles > 7, nibbles - 16, nibbles)


def dequantized(weight: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """(w + offset) * scale [K, N] in the dtype of the scales [G, N]."""
    w = integers(weight)
    check(scale.shape[1] == w.shape[1], "scales and weight differ in N")
    check(w.shape[0] % scale.shape[0] == 0, "groups do not divide K")
    group = w.shape[0] // scale.shape[0]
    if offset is not None:
        w = w + offset.float().repeat_interleave(group, 0)
    return w.to(scale.dtype) * scale.repeat_interleave(group, 0)


def check_antiquant(x: Tensor, scale: Tensor, offset: Tensor | None) -> None:
    check(x.dtype in (torch.float16, torch.bfloat16), f"x is {x.dtype}")
    for name, t in (("scale", scale), ("offset", offset)):
        if t is not None:
            check(t.dtype == x.dtype, f"{name} is {t.dtype}, x is {x.dtype}")
            check(t.shape == scale.shape, f"{name} is {list(t.shape)}, scale is {list(scale.shape)}")
            check(t.is_contiguous(), f"{name} is not contiguous")


def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    check(quant_scale is None and quant_offset is None and not inner_precise, "not emulated")
    check(x.dim() == 2 and x.numel() > 0, f"x is {list(x.shape)}, not a matrix with rows")
    check(x.is_contiguous() or x.mT.is_contiguous(), "x is strided")
    K, N = x.shape[1], antiquant_scale.shape[-1]
    check(weight.shape[0] == K, f"x has {K} columns, the weight {weight.shape[0]} rows")
    check(K <= 65535 and N <= 65535, f"K {K} or N {N} is more than 65535")
    size = antiquant_group_size
    check(size == 0 or (size % 32 == 0 and 32 <= size < K), f"antiquant_group_size {size}")
    groups = K // size if size else 1
    check(antiquant_scale.shape[0] == groups, f"{len(antiquant_scale)} rows of scales, {groups} groups")
    check_antiquant(x, antiquant_scale, antiquant_offset)
    if getattr(weight, "npu_format", "ND") == "FRACTAL_NZ":
        check(weight.dtype == torch.int32 and groups > 1, "FRACTAL_NZ: 4 bits with groups only")
        check(size in (64, 128) and N % 64 == 0, f"FRACTAL_NZ: antiquant_group_size {size}, N {N}")
    y = x.float() @ dequantized(weight, antiquant_scale, antiquant_offset).float()
    if bias is not None:
        wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        check(bias.dtype == wanted, f"bias is {bias.dtype}, not {wanted}")
        check(bias.shape in ((N,), (1, N)), f"bias is {list(bias.shape)}")
        y = y + bias.float()
    return y.to(x.dtype)


def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    antiquant_scale: list[Tensor] | None = None,
    antiquant_offset: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int = 0,
    group_type: int | None = None,
    group_list_type: int = 0,
    **others: object,
) -> list[Tensor]:
    asked = [name for name, value in others.items() if value not in (None, 0)]
    check(not asked, f"not emulated: {asked}")
    check(split_item in (2, 3) and group_type == 0 and group_list_type == 0, "not emulated")
    check(antiquant_scale is not None, "no scales")
    check(antiquant_offset is not None, "antiquant_offset may not be left out")
    (rows,), (stack,), (scale,), (offset,) = x, weight, antiquant_scale, antiquant_offset
    check(rows.dim() == 2 and rows.numel() > 0, f"x is {list(rows.shape)}, not a matrix with rows")
    E, K = stack.shape[:2]
    N = scale.shape[-1]
    check(rows.shape[1] == K, f"x has {rows.shape[1]} columns, the weight {K} rows")
    check(E <= 1024 and N % 2 == 0, f"{E} groups, N {N}")
    check(scale.shape in ((E, N), (E, scale.shape[1], N)), f"scale is {list(scale.shape)}")
    check(scale.dim() == 2 or stack.dtype == torch.int32, "int8 weights with groups along K")
    check_antiquant(rows, scale, offset)
    check(group_list.dtype == torch.int64 and group_list.shape == (E,), "group_list is no int64 [E]")
    ends = group_list.tolist()
    check(ends == sorted(ends) and ends[-1] == len(rows), f"group_list {ends} does not end with {len(rows)}")
    if scale.dim() == 2:
        scale, offset = scale.unsqueeze(1), offset.unsqueeze(1)
    parts = [
        rows[start:end].float() @ dequantized(stack[e], scale[e], offset[e]).float()
        for e, (start, end) in enumerate(pairwise([0, *ends]))
    ]
    return [torch.cat(parts).to(rows.dtype)]


def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] = (),
    **others: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    asked = [name for name, value in others.items() if value not in (None, 0, -1)]
    check(not asked and quant_mode == -1, f"not emulated: {asked}")
    check(expert_tokens_num_type == 1 and expert_tokens_num_flag, "the documents know counts only")
    check(x.dim() == expert_idx.dim() == 2 and len(x) == len(expert_idx), "x or expert_idx is no matrix")
    check(x.numel() > 0 and x.is_contiguous() and expert_idx.is_contiguous(), "empty or strided")
    check(expert_idx.dtype == torch.int32, f"expert_idx is {expert_idx.dtype}")
    check(active_num in (-1, 0, expert_idx.numel()), "rows left out are not emulated")
    start, end = active_expert_range
    check(0 <= start < end <= expert_num <= 10240, f"experts {start} to {end} of {expert_num}")
    ids = expert_idx.flatten()
    check(int(ids.min()) >= 0 and int(ids.max()) < expert_num, "an expert that does not exist")
    active = (ids >= start) & (ids < end)
    order = torch.where(active, ids, expert_num).argsort(stable=True)
    available = int(active.sum())
    rows = x[order // expert_idx.shape[1]]
    rows[available:] = torch.nan  # not written
    places = torch.full_like(ids, -1)
    places[order[:available]] = torch.arange(available, dtype=torch.int32)
    counts = torch.bincount(ids, minlength=expert_num)[start:end]
    return rows, places, counts, torch.full((ids.numel(),), torch.nan)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    check(input.is_contiguous() and input.shape[dim] % 2 == 0, "strided, or no two halves")
    gate, up = input.float().chunk(2, dim)
    return (gate * torch.sigmoid(gate) * up).to(input.dtype)


def moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> Tensor:
    rows, places = expanded_permuted_rows, expanded_src_to_dst_row
    check(skip1 is skip2 is bias is export_for_source_row is None and scales is not None, "not emulated")
    check(drop_pad_mode in (0, 2), "rows left out are not emulated")
    check(rows.dim() == scales.dim() == 2 and places.dim() == 1, "dimensions")
    check(places.dtype == torch.int32, f"expanded_src_to_dst_row is {places.dtype}")
    check(scales.dtype == rows.dtype, f"scales is {scales.dtype}, the rows are {rows.dtype}")
    check(rows.numel() > 0 and scales.numel() == len(places) == len(rows), f"scales is {list(scales.shape)}")
    check(int(places.min()) >= 0 and int(places.max()) < len(rows), "an index leaves the rows")
    n, k = scales.shape
    by_token = places.view(n, k) if drop_pad_mode == 2 else places.view(k, n).T
    return (rows.float()[by_token] * scales.float().unsqueeze(-1)).sum(1).to(rows.dtype)


def format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    """Only a mark: shapes and strides do not show the format, and no number changes."""
    check(acl_format in FORMATS, f"format {acl_format}")
    result = input.clone()
    result.npu_format = FORMATS[acl_format]
    return result


def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    check(weight.dtype == torch.int32 and weight.is_contiguous() and weight.dim() == 2, "no int32 matrix")
    check(weight.shape[-1] % 8 == 0, f"N is {weight.shape[-1]}")
    low, high = (weight & 15).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).contiguous().view(torch.int32)


KERNELS = {
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_init_routing_v2": moe_init_routing_v2,
    "npu_swiglu": swiglu,
    "npu_moe_finalize_routing": moe_finalize_routing,
    "npu_format_cast": format_cast,
    "npu_convert_weight_to_int4pack": convert_weight_to_int4pack,
}
FAKES = {
    "npu_weight_quant_batchmatmul": lambda x, weight, antiquant_scale, *args, **kwargs: x.new_empty(
        x.shape[0], antiquant_scale.shape[-1]
    ),
    "npu_grouped_matmul": lambda x, weight, *, antiquant_scale, **kwargs: [
        x[0].new_empty(x[0].shape[0], antiquant_scale[0].shape[-1])
    ],
    "npu_moe_init_routing_v2": lambda x, expert_idx, *, active_expert_range, **kwargs: (
        x.new_empty(expert_idx.numel(), x.shape[1]),
        x.new_empty(expert_idx.numel(), dtype=torch.int32),
        x.new_empty(active_expert_range[1] - active_expert_range[0], dtype=torch.int64),
        x.new_empty(expert_idx.numel(), dtype=torch.float32),
    ),
    "npu_swiglu": lambda input, dim=-1: torch.empty_like(input.chunk(2, dim)[0].contiguous()),
    "npu_moe_finalize_routing": lambda rows, skip1, skip2, bias, scales, *args, **kwargs: rows.new_empty(
        scales.shape[0], rows.shape[1]
    ),
    "npu_format_cast": lambda input, acl_format: torch.empty_like(input),
    "npu_convert_weight_to_int4pack": lambda weight, inner_k_tiles=0: weight.new_empty(
        weight.shape[0], weight.shape[1] // 8
    ),
}
FAKED: list[str] = []


def is_real() -> bool:
    """Whether torch.ops.npu is the real torch_npu."""
    if importlib.util.find_spec("torch_npu") is None:
        return False
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        import torch_npu  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # no CANN, or a CUDA build of torch
        return False
    return True


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """torch.ops.npu.* run on CPU tensors; afterwards all is as before."""
    with contextlib.ExitStack() as stack:
        if not is_real():
            own = stack.enter_context(torch.library._scoped_library("npu", "FRAGMENT"))
            for name, schema in SCHEMAS.items():
                own.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
                torch.library.register_fake(f"npu::{name}", FAKES[name], lib=own)
        elif not FAKED:  # the real library has no meta kernel for this one; a second registration raises
            name = "npu_convert_weight_to_int4pack"
            torch.library.register_fake(f"npu::{name}", FAKES[name])
            FAKED.append(name)
        kernels = stack.enter_context(torch.library._scoped_library("npu", "IMPL"))
        for name, kernel in KERNELS.items():
            kernels.impl(name, kernel, "CPU")
        yield
