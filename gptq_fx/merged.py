"""Several weights with one input as one pack, of which each is a view: one product in place of several."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch

from gptq_fx.kernels import Kernel, LinearSpec
from gptq_fx.modes import packing
from gptq_fx.order import sort
from gptq_fx.packed import Pack, PackedWeight
from gptq_fx.weight import QuantizedWeight


def can_merge(specs: Sequence[LinearSpec], kernel: Kernel) -> bool:
    """Whether weights of these specs can be one pack that can be cut into them again."""
    if len({replace(spec, out_features=0) for spec in specs}) != 1:
        return False
    if specs[0].scheme.desc_act or specs[0].experts is not None:
        return False
    whole = merged_spec(specs)
    borders = itertools.accumulate(spec.out_features for spec in specs[:-1])
    step = kernel.cut_at(whole)
    return kernel.refuses(whole) is None and all(border % step == 0 for border in borders)


def merged_spec(specs: Sequence[LinearSpec]) -> LinearSpec:
    return replace(specs[0], out_features=sum(spec.out_features for spec in specs))


def merge(parts: Sequence[PackedWeight], kernel: Kernel) -> PackedWeight:
    """One pack with the outputs of all parts, one behind the other; the parts become views of it.

    Weights in act-order are sorted, and have one order.

    Nothing is done where they are that already.
    """
    whole = _whole(parts, kernel)
    if whole is None:
        with packing():
            whole = _whole(parts, kernel) or _merge(parts, kernel)
    return whole


def _whole(parts: Sequence[PackedWeight], kernel: Kernel) -> PackedWeight | None:
    """The pack for `kernel` that holds exactly these parts, in this order."""
    packs = [part.pack for part in parts]
    whole, start = packs[0].merged, 0
    if whole is None or whole.kernel is not kernel:
        return None
    for part, pack in zip(parts, packs, strict=True):
        if pack.merged is not whole or pack.start != start:
            return None
        start += part.spec.out_features
    return whole if start == whole.spec.out_features else None


def _merge(parts: Sequence[PackedWeight], kernel: Kernel) -> PackedWeight:
    order = parts[0].order
    assert all(part.order is order for part in parts), "one gather for weights of different orders"
    weights = [part.unpacked() for part in parts]
    if order is not None:
        weights = [sort(weight, order) for weight in weights]
    zeros = [weight.zeros() for weight in weights]
    joined = QuantizedWeight.from_codes(
        torch.cat([weight.codes() for weight in weights], -1),
        torch.cat([weight.scales for weight in weights], -1),
        None if zeros[0] is None else torch.cat([z for z in zeros if z is not None], -1),
        weights[0].bits,
    )
    whole = PackedWeight(joined, parts[0].spec.scheme, None)
    tensors = whole.lower(kernel).tensors
    start = 0
    for part in parts:
        stop = start + part.spec.out_features
        cut = kernel.cut(tensors, whole.spec, start, stop)
        part.pack = Pack(kernel, part.spec.ordered, cut, order, whole, start)
        start = stop
    return whole
