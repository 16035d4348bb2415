"""The integer grid: scales and zero points of a group, and rounding to it.

Symmetric: scale = 2 * absmax / (2^bits - 1), z = 2^(bits-1). Asymmetric: the range of the group,
widened to hold 0. Scales are rounded to the dtype they are stored in before any code is chosen, so
that the codes are the nearest ones on the grid that will be used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# How much of the range of its group a grid may cover: a little more helps where +absmax is clipped.
PARTS = tuple(1.06 - 0.04 * i for i in range(15))
BLOCK = 128  # columns after which the errors reach the columns behind the block


@dataclass(frozen=True)
class Search:
    """How the grid of a group is found: of its range (norm None), or of the part of it that rounds best.

    norm: the exponent of the error. dtype: of the scales.
    """

    bits: int
    sym: bool
    dtype: torch.dtype
    norm: float | None

    def __call__(self, groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        """groups [*, G, g, N] of W^T, importance [*, G, g] -> fp32 scales [*, G, N], and zero points."""
        if self.norm is None:
            scales, zeros = find_grid(groups, self.bits, self.sym, self.dtype)
        else:
            scales, zeros = search_grid(groups, self.bits, self.sym, self.dtype, importance, self.norm)
        return scales.float(), zeros


@dataclass(frozen=True)
class Static:
    """Grids found before any column is rounded: scales, zeros [E, G, N] fp32 (zeros None: symmetric).

    group_of: int64 [E, K], the row of them for each column, in the order of work.
    """

    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor


@dataclass(frozen=True)
class Columns:
    """What the column loop gives: codes uint8 [E, K, N] in the order of work.

    scales, zeros: fp32 [E, G, N], those of Static, or of the groups in the order of work.
    loss: [E, N], sum of the squares of Err. bits: of the codes.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    loss: Tensor


def find_grid(groups: Tensor, bits: int, sym: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points for groups [*, G, g, N] of W^T -> ([*, G, N] in `dtype`, the same or None).

    A group of zeros gets scale 1.
    """
    return _grid(groups.amin(-2), groups.amax(-2), bits, sym, dtype)


def search_grid(
    groups: Tensor, bits: int, sym: bool, dtype: torch.dtype, importance: Tensor, norm: float
) -> tuple[Tensor, Tensor | None]:
    """find_grid for the range of each group, or a part of it, whichever rounds best.

    The error that is least: sum over the group of importance * |W - Wq|^norm; importance [*, G, g].
    """
    low, high = groups.amin(-2), groups.amax(-2)
    best: tuple[Tensor, Tensor | None] = _grid(low, high, bits, sym, dtype)
    least = _rounding_error(groups, *best, bits, importance, norm)
    for part in PARTS:
        scales, zeros = _grid(low * part, high * part, bits, sym, dtype)
        error = _rounding_error(groups, scales, zeros, bits, importance, norm)
        better = error < least
        least = torch.where(better, error, least)
        kept = None if zeros is None or best[1] is None else torch.where(better, zeros, best[1])
        best = torch.where(better, scales, best[0]), kept
    return best


def _grid(
    low: Tensor, high: Tensor, bits: int, sym: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    levels = 2**bits - 1
    if sym:
        scales = torch.maximum(high, -low) / (levels / 2)
    else:
        low, high = low.clamp_max(0), high.clamp_min(0)
        scales = high / levels - low / levels  # apart, since the difference may overflow
    scales = scales.to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    zeros = None if sym else (-low / scales.to(low.dtype)).round().clamp(0, levels)
    return scales, zeros


def _rounding_error(
    groups: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, importance: Tensor, norm: float
) -> Tensor:
    z = float(2 ** (bits - 1)) if zeros is None else zeros.unsqueeze(-2)
    s = scales.to(groups.dtype).unsqueeze(-2)
    rounded = (groups / s).round_().add_(z).clamp_(0, 2**bits - 1).sub_(z).mul_(s)
    error = rounded.sub_(groups).abs_().pow_(norm)
    return torch.einsum("...gn,...g->...n", error, importance)


def round_to_grid(groups: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The nearest codes for groups [*, G, g, N] -> uint8 of the same shape."""
    z = float(2 ** (bits - 1)) if zeros is None else zeros.unsqueeze(-2)
    scaled = groups / scales.to(groups.dtype).unsqueeze(-2)
    return scaled.round_().add_(z).clamp_(0, 2**bits - 1).to(torch.uint8)


def check_finite(weight: Tensor, name: str) -> None:
    """Raise WeightError, naming `name`, if the weight is no floating-point matrix, or holds NaN or Inf."""
    if weight.dtype not in FLOATS or weight.ndim < 2 or weight.numel() == 0:
        raise WeightError(
            f"{name}: found {weight.dtype} {list(weight.shape)}. "
            "Legal: a non-empty matrix of float32, float16 or bfloat16"
        )
    bad = ~torch.isfinite(weight)
    if bad.any():
        where = bad.nonzero()[0].tolist()
        kind = "NaN" if torch.isnan(weight[bad]).any() else "Inf"
        raise WeightError(f"{name}: {kind} among {int(bad.sum())} non-finite values, first at {where}")


def round_to_nearest(weight: Tensor, scheme: Scheme, name: str = "weight") -> QuantizedWeight:
    """Quantize W [*, N, K] without data; the act-order of the scheme has no meaning here.

    Raises WeightError, naming `name`, if the weight is no floating-point matrix, or holds NaN or Inf.
    """
    check_finite(weight, name)
    K = weight.shape[-1]
    size = K if scheme.group_size == -1 else scheme.group_size
    if K % size:
        raise WeightError(f"{name}: group_size {size} does not divide its {K} input features")
    groups = weight.detach().mT.float().unflatten(-2, (K // size, size))
    scales, zeros = find_grid(groups, scheme.bits, scheme.sym, weight.dtype)
    codes = round_to_grid(groups, scales, zeros, scheme.bits).flatten(-3, -2)
    return QuantizedWeight.from_codes(codes, scales, zeros, scheme.bits)


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||W - W_quantized|| / ||W|| (Frobenius), for W [*, N, K]."""
    dense = weight.detach().float()
    difference = quantized.dequantize(torch.float32).sub_(dense).norm()
    return float(difference / dense.norm().clamp_min(torch.finfo(torch.float32).tiny))
