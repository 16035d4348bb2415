"""The part of a quantized weight that one of several ranks holds: the same integers, never quantized again.

Outputs are cut column by column. Inputs are cut at the borders of groups where a rank's part begins and
ends there; where a border cuts a group, groups become smaller, by the largest size that divides all of
their pieces, and each keeps the scale of the group that it was a part of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight, pack_int32

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
        raise WeightError(f"a rank would hold {list(part.shape)} of {weight.out_features} outputs and "
                          f"{weight.in_features} inputs. Legal: fewer ranks")
    weight = _outputs(weight, part.outputs)
    if part.inputs == ((0, weight.in_features),):
        return weight, scheme
    weight = _inputs(weight, part.inputs)
    if weight.g_idx is not None:  # groups are named one by one: their size says nothing
        return weight, scheme
    size = weight.group_size
    if size == weight.in_features and (scheme.group_size == -1 or size % 8):
        size = -1
    if size > 0 and size % 8:
        raise WeightError(
            f"the borders between ranks cut groups of {scheme.group_size} inputs into pieces with the common "
            f"divisor {size}. Legal: a multiple of 8, by fewer ranks or another group_size"
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
    codes = _take(weight.codes(), runs, -2)
    qweight, K = pack_int32(codes, weight.bits), codes.shape[-2]
    if weight.g_idx is not None:
        return _named_groups(replace(weight, in_features=K, qweight=qweight), _take(weight.g_idx, runs, -1))
    group = _take(torch.arange(weight.in_features) // weight.group_size, runs, 0)
    borders = (group[1:] != group[:-1]).nonzero().flatten() + 1
    size = math.gcd(K, *borders.tolist())
    rows = group[::size].to(weight.scales.device)
    return replace(
        weight,
        in_features=K,
        qweight=qweight,
        scales=weight.scales.index_select(-2, rows),
        qzeros=None if weight.qzeros is None else weight.qzeros.index_select(-2, rows),
    )


def _named_groups(weight: QuantizedWeight, g_idx: Tensor) -> QuantizedWeight:
    """Act-order: any inputs of a group may be here, so that each stays in its own; unused ones go.

    A stack keeps all, since its experts use different ones.
    """
    if g_idx.ndim == 2:
        return replace(weight, g_idx=g_idx)
    used, local = g_idx.unique(return_inverse=True)
    rows = used.long()
    return replace(
        weight,
        scales=weight.scales.index_select(-2, rows),
        qzeros=None if weight.qzeros is None else weight.qzeros.index_select(-2, rows),
        g_idx=local.to(torch.int32),
    )


def _take(tensor: Tensor, runs: Runs, dim: int) -> Tensor:
    parts: Sequence[Tensor] = [tensor.narrow(dim, start, stop - start) for start, stop in runs]
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)).contiguous()
