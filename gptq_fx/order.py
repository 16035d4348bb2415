"""Act-order at run time: inputs gathered into the order of their groups, for kernels that know no g_idx.

A kernel without act-order runs W as W[:, order] on x[..., order]: there the groups lie one behind the
other. One gather serves every weight of one input that has the same order, so that equal orders are one
object, and whether two are equal is a comparison of addresses.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor

from gptq_fx.ops import define
from gptq_fx.weight import QuantizedWeight, pack_int32

# (device, shape, checksum) -> the one tensor of that order
_ORDERS: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()


def order_of(weight: QuantizedWeight) -> Tensor | None:
    """The inputs of a weight with a g_idx, sorted by groups: int64 [*, K].

    None where groups differ in size: then only g_idx can tell where each of them ends.
    """
    g_idx = weight.g_idx
    assert g_idx is not None
    order = g_idx.argsort(dim=-1, stable=True)
    counted = torch.arange(weight.in_features, device=g_idx.device) // weight.group_size
    found = torch.take_along_dim(g_idx, order, -1)
    return _shared(order) if torch.equal(found.long(), counted.expand_as(found)) else None


def _shared(order: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, order.shape, generator=generator, device="cpu")
    checksum = int((order.cpu() * factors).sum())  # wraps around
    return _ORDERS.setdefault((order.device, order.shape, checksum), order)


def sort(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """W[:, order], which needs no g_idx."""
    if order.ndim == 2:
        return QuantizedWeight.stack([sort(weight.expert(e), o) for e, o in enumerate(order)])
    codes = weight.codes().index_select(0, order)
    return replace(weight, qweight=pack_int32(codes, weight.bits), g_idx=None)


def unsort(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """The exact inverse of `sort`."""
    if order.ndim == 2:
        return QuantizedWeight.stack([unsort(weight.expert(e), o) for e, o in enumerate(order)])
    place = order.argsort()
    codes = weight.codes().index_select(0, place)
    g_idx = (place // weight.group_size).to(torch.int32)
    return replace(weight, qweight=pack_int32(codes, weight.bits), g_idx=g_idx)


def gather(x: Tensor, order: Tensor) -> Tensor:
    """x [*, K] in the order [K] of a weight."""
    return x.index_select(-1, order)


@define("gather_grouped(Tensor x, Tensor order, Tensor ends) -> Tensor")
def gather_grouped(x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """x [S, K]: rows ends[e - 1] to ends[e] in the order of expert e, order [E, K]."""
    rows = torch.arange(x.shape[0], device=ends.device, dtype=ends.dtype)
    ids = torch.searchsorted(ends, rows, right=True).clamp(max=order.shape[0] - 1)
    return x.gather(-1, order[ids])


@define("gather_indexed(Tensor x, Tensor order, Tensor ids) -> Tensor")
def gather_indexed(x: Tensor, order: Tensor, ids: Tensor) -> Tensor:
    """x [S, K]: row s in the order of expert ids[s], order [E, K]."""
    return x.gather(-1, order[ids])
