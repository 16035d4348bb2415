"""The part of a quantized weight that one of several ranks holds: the same integers, never quantized again.

Outputs are cut column by column. Inputs are cut at the borders of groups where a rank's part begins and
ends there; where a border cuts a group, groups become smaller, by the largest size that divides all of
their pieces, and each keeps the scale of the group that it was a part of. In act-order a rank keeps the
scales of all groups, and the g_idx of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight, pack_int32, packed_rows, unpack_int32

# Indices of one dimension: runs (first, last + 1), one behind the other.
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Part:
    """What a rank holds of a weight [N, K]: its outputs and its inputs."""

    outputs: Runs
    inputs: Runs

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the part."""
        return length(self.outputs), length(self.inputs)


def length(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def pick(runs: Runs, start: int, stop: int) -> Runs:
    """What lies from `start` to `stop` where the runs are laid one behind the other.

    pick(((0, 4), (8, 12)), 2, 6) is ((2, 4), (8, 10)).
    """
    found, first = [], 0
    for a, b in runs:
        low, high = max(start - first, 0), min(stop - first, b - a)
        if low < high:
            found.append((a + low, a + high))
        first += b - a
    return tuple(found)


def overlap(runs: Runs, start: int, stop: int) -> Runs:
    """The indices from `start` to `stop` that are in the runs, counted from `start`."""
    found = [(max(a, start) - start, min(b, stop) - start) for a, b in runs]
    return tuple((a, b) for a, b in found if a < b)


def chunk(runs: Runs, rank: int, ranks: int, split: int = 1) -> Runs:
    """The part of a rank where each of `split` equal stretches is dealt out in runs of equal length.

    split > 1: several matrices lie one behind the other, such as gate and up, and each is cut by itself.
    The last ranks get less, or nothing, where there is no equal part for all, as torch.chunk deals.
    """
    stretch = length(runs) // split
    each = -(-stretch // ranks)
    found: list[tuple[int, int]] = []
    for first in range(0, stretch * split, stretch):
        start, stop = (first + min(r * each, stretch) for r in (rank, rank + 1))
        found += pick(runs, start, stop)
    return tuple(found)


def cut(weight: QuantizedWeight, scheme: Scheme, part: Part) -> tuple[QuantizedWeight, Scheme]:
    """The part of a weight [*, N, K], and its scheme, which has another group size where groups were cut.

    Raises WeightError where the part is empty, or would need groups that no kernel knows.
    """
    if 0 in part.shape:
        raise WeightError(
            f"a rank would hold {list(part.shape)} of {weight.out_features} outputs and "
            f"{weight.in_features} inputs. Legal: fewer ranks"
        )
    weight = _outputs(weight, part.outputs)
    if part.inputs == ((0, weight.in_features),):
        return weight, scheme
    weight = _inputs(weight, part.inputs)
    if weight.in_features % weight.scales.shape[-2]:
        return weight, scheme  # act-order, with groups of different sizes
    size = weight.group_size
    if size == weight.in_features and (scheme.group_size == -1 or size % 8):
        size = -1
    if size % 8 and size > 0:
        raise WeightError(
            f"the borders between ranks cut groups of {scheme.group_size} inputs into pieces of {size}. "
            "Legal: a multiple of 8, by fewer ranks or another group_size"
        )
    return weight, replace(scheme, group_size=size)


def _outputs(weight: QuantizedWeight, runs: Runs) -> QuantizedWeight:
    if runs == ((0, weight.out_features),):
        return weight
    zeros = weight.zeros()
    qzeros = None if zeros is None else pack_int32(_take(zeros, runs, -1).mT, weight.bits).mT.contiguous()
    return replace(
        weight, qweight=_take(weight.qweight, runs, -1), scales=_take(weight.scales, runs, -1), qzeros=qzeros
    )


def _inputs(weight: QuantizedWeight, runs: Runs) -> QuantizedWeight:
    codes = torch.cat([_codes(weight, start, stop) for start, stop in runs], -2)
    part = replace(weight, in_features=codes.shape[-2], qweight=pack_int32(codes, weight.bits))
    if weight.g_idx is not None:  # any inputs of a group may be here, and each stays in its own
        return replace(part, g_idx=_take(weight.g_idx, runs, -1))
    group = _take(torch.arange(weight.in_features) // weight.group_size, runs, 0)
    borders = (group[1:] != group[:-1]).nonzero().flatten() + 1
    size = math.gcd(part.in_features, *borders.tolist())
    rows = group[::size].to(weight.scales.device)
    qzeros = None if weight.qzeros is None else weight.qzeros.index_select(-2, rows)
    return replace(part, scales=weight.scales.index_select(-2, rows), qzeros=qzeros)


def _codes(weight: QuantizedWeight, start: int, stop: int) -> Tensor:
    """The codes of some inputs. Of a weight that is mapped from a file, no other words are read.

    32 codes fill `bits` whole words.
    """
    first, last = start // 32 * weight.bits, packed_rows(-(-stop // 32) * 32, weight.bits)
    words = weight.qweight[..., first:last, :]
    skipped = start // 32 * 32
    return unpack_int32(words, weight.bits, stop - skipped)[..., start - skipped :, :]


def _take(tensor: Tensor, runs: Runs, dim: int) -> Tensor:
    parts: Sequence[Tensor] = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)).contiguous()
