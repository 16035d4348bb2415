"""NVIDIA GPUs: the kernels of humming-kernels (Apache-2.0, compiled at run time), for 2 to 8 bits.

One layout serves every number of rows: tensor-core instructions of a warp for few, of a warpgroup (on GPUs
that have them) for many, with weights dequantized in registers. See humming_layout.py for the tensors,
humming_library.py for how the kernels are compiled before they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels import humming_experts as experts
from gptq_fx.kernels import humming_library as library
from gptq_fx.kernels.humming_layout import BLOCK, cut, pack, padded, unpack
from gptq_fx.kernels.registry import Bound, Kernel, LinearSpec, Tensors, register
from gptq_fx.ops import define, define_opaque

GROUPS = (32, 64, 128, 256, 512, 1024)


def supports(spec: LinearSpec) -> str | None:
    if reason := library.refuses_dtype(spec.dtype):
        return reason
    if spec.scheme.desc_act:
        return "act-order: the kernel reads groups of inputs that follow each other"
    if spec.groups > 1 and spec.group_size not in GROUPS:
        return f"group_size {spec.group_size} is none of {', '.join(map(str, GROUPS))}, -1"
    if spec.in_features % 32:
        return f"in_features {spec.in_features} is not a multiple of 32"
    if spec.out_features % 8:
        return f"out_features {spec.out_features} is not a multiple of 8"
    return None


def op_args(spec: LinearSpec) -> tuple[int, ...]:
    """out_features, bits, group_size (0 for one group)."""
    return spec.out_features, spec.scheme.bits, spec.group_size if spec.groups > 1 else 0


def problem(spec: LinearSpec, device: int, form: str = "dense") -> library.Problem:
    N, bits, group_size = op_args(spec)
    return library.Problem(
        device,
        spec.in_features,
        padded(N),
        padded(N) - N,
        bits,
        group_size,
        not spec.scheme.sym,
        spec.dtype,
        spec.experts or 0,
        form,
    )


def prepare(specs: Sequence[LinearSpec]) -> None:
    """Compile the kernels of all these weights, for every number of rows."""
    device = torch.cuda.current_device()
    forms = [("dense",) if spec.experts is None else experts.FORMS for spec in specs]
    library.prepare([problem(s, device, f) for s, fs in zip(specs, forms, strict=True) for f in fs])


def matmul(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [M, K], the tensors of `pack` -> [M, N].

    Raises ValueError where x has not K features or is on another device than the weight, TypeError where its
    dtype is not that of the scales.
    """
    device = scales.get_device()
    if x.shape[1] != weight.shape[-2] * 16 or x.dtype is not scales.dtype or x.get_device() != device:
        raise _refusal(x, weight, scales)
    out = x.new_empty((x.shape[0], out_features))
    if x.shape[0]:
        configs = library.table(_key(weight, scales, zeros, out_features, bits, group_size)).configs
        _launch(library.launcher(), configs, x, weight, scales, zeros, out, device)
    return out


def bind(tensors: Tensors, spec: LinearSpec) -> Bound:
    """See Kernel.bind. What it returns raises as `matmul` does. Every line of it costs the host time at every
    call."""
    weight, scales, zeros = tensors
    assert weight is not None and scales is not None
    K, out_features, dtype, device = spec.in_features, spec.out_features, scales.dtype, scales.get_device()
    key, launch = _key(weight, scales, zeros, *op_args(spec)), library.launcher()
    configs: Tensor | None = None

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        nonlocal configs
        shape = x.shape
        if shape[-1] != K or x.dtype is not dtype or x.get_device() != device:
            raise _refusal(x, weight, scales)
        flat = len(shape) == 2
        rows = x if flat else x.reshape(shape[:-1].numel(), K)
        out = rows.new_empty((rows.shape[0], out_features))
        if rows.shape[0]:
            if configs is None:
                configs = library.table(key).configs
            _launch(launch, configs, rows, weight, scales, zeros, out, device)
        y = out if flat else out.view((*shape[:-1], out_features))
        return y if bias is None else y + bias

    return run


def _key(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, bits: int, group_size: int
) -> tuple[Any, ...]:
    """The fields of a Problem."""
    whole = scales.shape[-1]
    return (
        scales.get_device(), weight.shape[-2] * 16, whole, whole - out_features, bits, group_size,
        zeros is not None, scales.dtype, 0, "dense",
    )  # fmt: skip


def _launch(
    launch: Callable[..., None],
    configs: Tensor,
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    out: Tensor,
    device: int,
) -> None:
    if not x.is_contiguous() or x.data_ptr() % 16:  # the loads are of 16 bytes
        x = x.clone(memory_format=torch.contiguous_format)
    locks = library.current_locks(device)
    launch(
        configs, x, weight, scales, None, None, None, zeros, None, out,
        None, None, None, None, locks, 1, x.shape[0],
    )  # fmt: skip


def _refusal(x: Tensor, weight: Tensor, scales: Tensor) -> Exception:
    if x.dtype is not scales.dtype:
        return TypeError(f"humming: x is {x.dtype}, the scales {scales.dtype}. Legal: the same dtype")
    K = weight.shape[-2] * 16
    if x.shape[-1] != K:
        return ValueError(f"humming: x has {x.shape[-1]} features, the weight {K}")
    return ValueError(f"humming: x is on {x.device}, the weight on {scales.device}. Legal: the same device")


humming_matmul = define_opaque(
    "humming_matmul(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, int out_features, int bits, "
    "int group_size) -> Tensor",
    fake=lambda x, weight, scales, zeros, out_features, bits, group_size: x.new_empty(
        x.shape[0], out_features
    ),
)(matmul)


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """x [*, K], the tensors of `pack`, bias [N] -> [*, N]."""
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = humming_matmul(rows, weight, scales, zeros, out_features, bits, group_size)
    y = y.reshape(*x.shape[:-1], out_features)
    return y if bias is None else y + bias


humming_linear = define(
    "humming_linear(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, int out_features, "
    "int bits, int group_size) -> Tensor"
)(linear)


HUMMING = register(
    Kernel(
        name="humming",
        device="cuda",
        order=100,
        available=library.available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=humming_linear,
        op_args=op_args,
        body=linear,
        bind=bind,
        cut_at=lambda spec: BLOCK,
        cut=cut,
        stacks=True,
        prepare=prepare,
        experts=experts.EXPERTS,
    )
)
