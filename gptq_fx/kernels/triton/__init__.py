"""Our own kernels in Triton, for GPUs where no library takes the weight: linears, experts, MoE blocks.

    layout      the layout, packed and unpacked
    ops         the ops of torch
    linear      one weight: gemv for few rows, matmul for more, spelled_out for many
    experts     stacks of experts, by gemv and matmul; route sorts their rows
    codes       what the kernels share; weight: what they are called with

All but layout, ops and weight import Triton, and are imported when an op first runs.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace

import torch

from gptq_fx.kernels.registry import ExpertOps, Kernel, LinearSpec, register
from gptq_fx.kernels.triton import ops
from gptq_fx.kernels.triton.layout import cut, pack, unpack

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_EXPERTS = 1024  # their counts stand in the registers of one program


@functools.cache
def available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "no GPU is found"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "compute capability 8.0 is needed, the GPU has {}.{}".format(
            *torch.cuda.get_device_capability()
        )
    return None


@functools.cache
def xpu_available() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if torch.xpu.is_available() else "no GPU is found"


def supports(spec: LinearSpec) -> str | None:
    if spec.dtype not in DTYPES:
        return f"x must be bfloat16, float16 or float32, the model is {spec.dtype}"
    if spec.scheme.desc_act:
        return "no act-order"
    if spec.groups > 1 and spec.group_size % 16:
        return f"group_size {spec.group_size} is not a multiple of 16"
    if spec.experts is not None and spec.experts > MOST_EXPERTS:
        return f"{spec.experts} experts are more than {MOST_EXPERTS}"
    return None


def block_supports(gate_up: LinearSpec, down: LinearSpec, activation: str) -> str | None:
    if activation not in ("silu", "gelu_tanh", "gpt_oss"):
        return f"activation {activation!r} is not one of silu, gelu_tanh, gpt_oss"
    return None


TRITON = register(
    Kernel(
        name="triton",
        device="cuda",
        order=300,
        available=available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=ops.triton_linear,
        op_args=lambda spec: (spec.scheme.bits,),
        body=ops.linear,
        cut_at=lambda spec: 1,
        cut=cut,
        experts=ExpertOps(
            supports=lambda spec: None,
            grouped=ops.triton_grouped,
            indexed=ops.triton_indexed,
            block=ops.triton_experts,
            block_supports=block_supports,
        ),
    )
)

# The same kernels on Intel GPUs. They never ran on one.
TRITON_XPU = register(replace(TRITON, name="triton_xpu", device="xpu", available=xpu_available))
