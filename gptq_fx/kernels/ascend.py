"""Ascend NPUs (Atlas A2 and A3): the ops of torch_npu that multiply by 4-bit and 8-bit integer weights.

    npu_weight_quant_batchmatmul:  y = x @ ((w + offset) * scale) + bias
    npu_grouped_matmul:            the same for each expert, on its rows of x

The op adds its offset, a GPTQ zero point is subtracted: with w = q - 2^(bits-1) in the signed integers that
the op takes, (w + offset) = (q - z) gives offset = 2^(bits-1) - z, which is 0 where symmetric.

Source: documents, C++ checks and meta kernels of op-plugin for torch_npu 2.13. None of this ever ran on an
NPU: it is held against an emulation of the documented arithmetic, and the real schemas and meta kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from gptq_fx.kernels import ascend_experts, ascend_layout
from gptq_fx.kernels.block import ACTIVATIONS
from gptq_fx.kernels.registry import ExpertOps, Kernel, LinearSpec, prefer_inner_backends, register
from gptq_fx.ops import define

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


# --- what the ops take


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


def supports_stack(spec: LinearSpec) -> str | None:
    """Why npu_grouped_matmul cannot run a stack of experts of this spec, or None."""
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


def supports_block(gate_up: LinearSpec, down: LinearSpec, activation: str) -> str | None:
    """Why ascend_experts cannot run a block of experts with these linears, or None."""
    for name, spec in (("gate_up", gate_up), ("down", down)):
        if reason := supports_stack(spec):
            return f"{name}: {reason}"
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}"
    return None


def nz_refusal(spec: LinearSpec) -> str | None:
    """Why a weight of this spec stays ND where FRACTAL_NZ was asked for, or None."""
    if spec.experts is not None:
        return "stack of experts"
    if spec.scheme.bits == 8:
        return "8 bits"
    if spec.groups == 1 or spec.group_size not in (64, 128):
        return f"group_size {spec.scheme.group_size} is neither 64 nor 128"
    if spec.out_features % 64:
        return f"out_features {spec.out_features} is not a multiple of 64"
    return None


def op_group(spec: LinearSpec) -> int:
    """The group size as the op takes it: 0 for one group, since it refuses -1 and K."""
    return spec.group_size if spec.groups > 1 else 0


def note(spec: LinearSpec) -> str | None:
    notes = [f"{spec.scheme.bits}-bit codes stored in 4 bits"] if spec.scheme.bits < 4 else []
    if spec.experts is not None and (reason := supports_stack(spec)):
        notes.append(f"experts run one by one: {reason}")
    return "; ".join(notes) or None


def note_nz(spec: LinearSpec) -> str | None:
    reason = nz_refusal(spec)
    layout = f"in ND, not FRACTAL_NZ: {reason}" if reason else None
    return "; ".join(filter(None, [note(spec), layout])) or None


# --- registration

ASCEND = register(
    Kernel(
        name="ascend",
        device="npu",
        order=100,
        available=available,
        supports=supports,
        pack=ascend_layout.pack,
        unpack=ascend_layout.unpack,
        op=ascend_linear,
        op_args=lambda spec: (op_group(spec),),
        cut_at=lambda spec: 1 if spec.scheme.bits == 8 else 8,
        cut=ascend_layout.cut,
        note=note,
        stacks=True,
        experts=ExpertOps(
            supports=supports_stack,
            grouped=ascend_experts.ascend_grouped_linear,
            indexed=ascend_experts.ascend_indexed_linear,
            block=ascend_experts.ascend_experts,
            block_supports=supports_block,
        ),
    )
)

# The same with weights in the blocked layout of the matrix unit, where the op takes it: options={"kernel":
# "ascend_nz"}. It is never chosen by itself, since nobody here measured that it is faster, and torch_npu's
# documents restrict it to compiled graphs. A blocked tensor cannot be cut: nothing is merged along N.
ASCEND_NZ = register(
    replace(
        ASCEND,
        name="ascend_nz",
        order=ASCEND.order + 1,
        supports=lambda spec: "as ascend" if supports(spec) else None,  # whose reason is told, too
        pack=lambda weight, spec: ascend_layout.pack_nz(weight, spec, nz_refusal(spec) is None),
        unpack=lambda tensors, spec: ascend_layout.unpack_nz(tensors, spec, nz_refusal(spec) is None),
        cut_at=lambda spec: spec.out_features,
        note=note_nz,
    )
)

# What torch_npu recommends for inference; where it has none, its ops one by one, as they stand in the graph.
prefer_inner_backends("npu", "npugraph_ex", "aot_eager")
