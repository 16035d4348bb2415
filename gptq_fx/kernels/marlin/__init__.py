"""NVIDIA GPUs of compute capability 8.0 and above: our own kernels on weights in the Marlin layout.

    layout    the layout, packed and unpacked
    *.cu      the kernels; *.cuh: parts of them, and what they share
    variants  what they are compiled for
    nvrtc     the compiler and its cache; launch: the driver
    gemm      calls of the kernels; decode: for a few rows of x; routes: around the products of experts
    ops       the ops of torch

Codes of 2 and 3 bits are stored in 4, as q + 8 - 2^(bits-1), their zero points likewise.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.kernels.marlin import launch, layout, nvrtc, ops
from gptq_fx.kernels.marlin.gemm import Weight
from gptq_fx.kernels.marlin.layout import check_marlin_format, from_marlin_tensors
from gptq_fx.kernels.marlin.routes import ACTIVATIONS, MOST_EXPERTS
from gptq_fx.kernels.registry import Bound, ExpertOps, Kernel, LinearSpec, Tensors, register
from gptq_fx.weight import QuantizedWeight

__all__ = ["MARLIN", "check_marlin_format", "from_marlin_tensors"]

DTYPES = (torch.float16, torch.bfloat16)
GROUP_TILES = (8, 4, 2)  # of 16 features: groups of 128, 64, 32
LARGEST = 2**30  # numbers in a row of x, or in a column of the output: places are int32


@functools.cache
def available() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch finds no NVIDIA GPU"
    if torch.version.cuda is None:
        return "PyTorch is built for AMD GPUs"
    if launch.driver() is None:
        return "libcuda.so.1, the driver of the GPU, is not found"
    capability = torch.cuda.get_device_capability()
    if capability < launch.FEWEST_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return nvrtc.available()


def supports(spec: LinearSpec) -> str | None:
    if spec.dtype not in DTYPES:
        return f"x must be float16 or bfloat16, the model is {spec.dtype}"
    if spec.groups > 1 and spec.group_size % 32:
        return f"group_size {spec.group_size} is not a multiple of 32"
    if max(spec.in_features, spec.out_features) > LARGEST:
        return f"more than {LARGEST} features"
    return None


def supports_stack(spec: LinearSpec) -> str | None:
    assert spec.experts is not None
    if spec.experts > MOST_EXPERTS:
        return f"{spec.experts} experts are more than {MOST_EXPERTS}"
    return supports(spec)


def supports_block(gate_up: LinearSpec, down: LinearSpec, activation: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}"
    return None


def note(spec: LinearSpec) -> str | None:
    return f"{spec.scheme.bits}-bit codes stored in 4 bits" if spec.scheme.bits < 4 else None


def stored_bits(spec: LinearSpec) -> int:
    return max(spec.scheme.bits, 4)


def group_tiles(spec: LinearSpec) -> int:
    """Tiles of 16 features that share a scale in the pack; 0 where each output has one scale."""
    if spec.groups == 1:
        return 0
    return next(tiles for tiles in GROUP_TILES if spec.group_size % (16 * tiles) == 0)


def _repeats(spec: LinearSpec) -> int:
    """How often the pack repeats each group: the kernel knows groups of 32, 64 and 128."""
    tiles = group_tiles(spec)
    return spec.group_size // (16 * tiles) if tiles else 1


def _lift(bits: int) -> int:
    """What is added to codes of fewer than 4 bits, so that the middle of the grid is that of 4."""
    return 8 - 2 ** (bits - 1) if bits < 4 else 0


def pack(weight: QuantizedWeight, spec: LinearSpec) -> Tensors:
    """-> packed, scales, zeros, perm as in `gemm.Weight`, of one weight; see layout.py.

    K is filled up to a multiple of 16, N to one of 64. perm int32 [K]: the features of x in the order of the
    rows of the pack, so that groups are runs of rows; None without g_idx.
    Raises WeightError where g_idx has groups of unequal size.
    """
    bits, K, N = stored_bits(spec), weight.in_features, weight.out_features
    if weight.scales.is_cuda:
        launch.prepare(weight.scales.get_device())
    codes = weight.codes() + _lift(weight.bits)
    perm = None
    pad_k, pad_n = -K % layout.TILE_K, -N % layout.TILE_N
    if weight.g_idx is not None:
        perm = _order(weight)
        codes = codes[perm]
        rest = torch.arange(K, K + pad_k, device=perm.device)
        perm = torch.cat([perm, rest]).to(torch.int32)
    repeats = _repeats(spec)
    scales = F.pad(weight.scales, (0, pad_n)).repeat_interleave(repeats, 0)
    zeros = weight.zeros()
    if zeros is not None:
        zeros = F.pad(zeros + _lift(weight.bits), (0, pad_n)).repeat_interleave(repeats, 0)
    return (
        layout.pack_codes(F.pad(codes, (0, pad_n, 0, pad_k)), bits),
        layout.permute_scales(scales),
        None if zeros is None else layout.pack_zeros(zeros, bits),
        perm,
    )


def _order(weight: QuantizedWeight) -> Tensor:
    """Features sorted by their groups."""
    assert weight.g_idx is not None
    order = weight.g_idx.argsort(stable=True)
    expected = torch.arange(weight.in_features, device=order.device) // weight.group_size
    if not torch.equal(weight.g_idx[order].to(expected.dtype), expected):
        sizes = torch.bincount(weight.g_idx, minlength=weight.scales.shape[-2])
        raise WeightError(
            f"g_idx has groups of {int(sizes.min())} to {int(sizes.max())} input features. "
            f"Legal here: {weight.group_size} in each"
        )
    return order


def unpack(tensors: Tensors, spec: LinearSpec) -> QuantizedWeight:
    packed, scales, qzeros, perm = tensors
    assert packed is not None and scales is not None
    bits, K, N = spec.scheme.bits, spec.in_features, spec.out_features
    codes = layout.unpack_codes(packed, stored_bits(spec))[:K, :N] - _lift(bits)
    g_idx = None
    if perm is not None:
        place = perm[:K].argsort()
        codes = codes[place]
        g_idx = (place // spec.group_size).to(torch.int32)
    repeats = _repeats(spec)
    zeros = None
    if qzeros is not None:
        zeros = layout.unpack_zeros(qzeros, stored_bits(spec))[::repeats, :N] - _lift(bits)
    scales = layout.restore_scales(scales)[::repeats, :N]
    return QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx)


def cut(tensors: Tensors, spec: LinearSpec, start: int, stop: int) -> Tensors:
    packed, scales, zeros, perm = tensors
    assert packed is not None and scales is not None
    bits = stored_bits(spec)
    stop += -stop % layout.TILE_N
    return (
        packed[..., start * bits // 2 : stop * bits // 2],
        scales[..., start:stop],
        None if zeros is None else zeros[..., start * bits // 32 : stop * bits // 32],
        perm,
    )


def op_args(spec: LinearSpec) -> tuple[int, int, int]:
    """What the ops take behind the tensors: bits, group_tiles, out_features."""
    return stored_bits(spec), group_tiles(spec), spec.out_features


def bind(tensors: Tensors, spec: LinearSpec) -> Bound:
    """See Kernel.bind."""
    packed, scales, zeros, perm = tensors
    assert packed is not None and scales is not None
    weight = Weight(packed, scales, zeros, perm, *op_args(spec))
    return lambda x, bias: ops.multiply(x, weight, bias)


MARLIN = register(
    Kernel(
        name="marlin",
        device="cuda",
        order=120,
        available=available,
        supports=supports,
        pack=pack,
        unpack=unpack,
        op=ops.marlin_linear,
        op_args=op_args,
        cut_at=lambda spec: layout.TILE_N,
        cut=cut,
        note=note,
        body=ops.linear,
        bind=bind,
        experts=ExpertOps(
            supports=supports_stack,
            grouped=ops.marlin_grouped,
            indexed=ops.marlin_indexed,
            block=ops.marlin_experts,
            block_supports=supports_block,
        ),
    )
)
