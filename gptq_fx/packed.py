"""PackedWeight: the bytes of one quantized weight, in the layout of one kernel at a time."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels import Kernel, LinearSpec, Tensors, block, get_kernel, grouped
from gptq_fx.order import gather, gather_grouped, order_of, sort, unsort
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

_LIVE: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)


class PackedWeight:
    """One quantized weight. `lower` changes its layout in place, and drops the one before.

    kernel, layout, tensors: tensors are the pack of `kernel` for `layout`, which is `spec`, or, where the
        pack is `sorted`, spec.ordered. The kernel `reference` holds the tensors of a QuantizedWeight.
    order: of a weight in act-order, its inputs sorted by groups (int64 [*, K]); None where it has no
        such order, or its groups differ in size.
    sorted: the inputs of the pack are in that order.
    error: ||W - W_quantized|| / ||W|| when it was quantized, where it was measured.
    merged, start: where the tensors are views of a larger pack that holds the outputs of several
        weights, that pack, and the place of the first output in it.
    handle: a number that names this object to ops of a graph (int64 [] on the host).
    changes: how often any weight of the process was given tensors.
    """

    changes = 0

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, error: float | None) -> None:
        self.kernel = get_kernel("reference")
        self.spec = self.layout = LinearSpec(
            weight.in_features,
            weight.out_features,
            replace(scheme, desc_act=weight.g_idx is not None),  # static groups lie where they lay
            weight.scales.dtype,
            weight.scales.device.type,
            weight.scales.shape[0] if weight.scales.ndim == 3 else None,
        )
        self.tensors = self.kernel.pack_all(weight, self.spec)
        self.order = None if weight.g_idx is None else order_of(weight)
        self.sorted = False
        self.error = error
        self.merged: PackedWeight | None = None
        self.start = 0
        self._name_handle()

    @property
    def tensors(self) -> Tensors:
        return self._tensors

    @tensors.setter
    def tensors(self, tensors: Tensors) -> None:
        self._tensors = tensors
        PackedWeight.changes += 1

    def _name_handle(self) -> None:
        number = next(_HANDLES)
        self.handle = torch.tensor(number)
        _LIVE[number] = self

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self.tensors if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; of its part where they are views of a merged pack."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def call_tensors(self) -> Tensors:
        """The tensors as ops want them, contiguous even where they are cut out of a merged pack."""
        if self.merged is None:
            return self.tensors
        return tuple(None if t is None else t.contiguous() for t in self.tensors)

    def unpacked(self, gathered: bool = False) -> QuantizedWeight:
        """The canonical form; the pack stays. gathered: with the inputs in the order of the pack."""
        weight = self.kernel.unpack_all(self.tensors, self.layout)
        return weight if self.order is None or not self.sorted or gathered else unsort(weight, self.order)

    def dense(self, dtype: torch.dtype, gathered: bool = False) -> Tensor:
        """The dense weight [N, K]; gathered: with the inputs in the order of the pack."""
        own = self.kernel.dequantize
        if own is None or self.spec.experts is not None or (self.sorted and not gathered):
            return self.unpacked(gathered).dequantize(dtype)
        return own(self.call_tensors(), self.layout).to(dtype)

    def expert(self, index: int, gathered: bool = False) -> QuantizedWeight:
        """The canonical form of one expert of a stack; the others are not touched."""
        one = tuple(None if t is None else t[index : index + 1] for t in self.tensors)
        weight = self.kernel.unpack_all(one, replace(self.layout, experts=1)).expert(0)
        return (
            weight if self.order is None or not self.sorted or gathered else unsort(weight, self.order[index])
        )

    def lower(self, kernel: Kernel, sorted: bool | None = None) -> None:
        """Take the layout of `kernel`, if the weight is not in it; `sorted`, or as the kernel wants it."""
        if sorted is None:
            sorted = kernel.sorts(self.spec)
        if self.kernel is kernel and self.sorted is sorted:
            return
        weight, layout = self.unpacked(), self.spec
        if sorted:
            assert self.order is not None, "groups of different sizes cannot be sorted"
            weight, layout = sort(weight, self.order), self.spec.ordered
        self.tensors = kernel.pack_all(weight, layout)
        self.kernel, self.layout, self.sorted = kernel, layout, sorted
        self.merged, self.start = None, 0

    def adopt(self, other: PackedWeight) -> None:
        """Take the numbers of `other`, a weight of the same spec."""
        self.kernel, self.tensors, self.error = other.kernel, other.tensors, other.error
        self.layout, self.order, self.sorted = other.layout, other.order, other.sorted
        self.merged, self.start = None, 0

    def linear(self, x: Tensor, bias: Tensor | None, gathered: bool = False) -> Tensor:
        """x [*, K] -> [*, N]; gathered: x is in the order of the pack already."""
        if self.sorted and self.order is not None and not gathered:
            x = gather(x, self.order)
        return self.kernel.call(x, self.call_tensors(), bias, self.layout)

    def grouped(self, x: Tensor, ends: Tensor, gathered: bool = False) -> Tensor:
        """x [S, K], rows ends[e - 1] to ends[e] for expert e -> [S, N]; gathered: as for `linear`."""
        if self.sorted and self.order is not None and not gathered:
            x = gather_grouped(x, self.order, ends)
        op, rest = grouped.call(self.kernel, "grouped", self.call_tensors(), ends, self.layout)
        return op(x, *rest)  # type: ignore[no-any-return]

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> PackedWeight:
        """A new weight of the same integers, in canonical form."""
        return PackedWeight(self.unpacked().to(device, dtype), self.spec.scheme, self.error)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        new = copy.copy(self)
        new.tensors = tuple(None if t is None else t.clone() for t in self.tensors)
        new.merged, new.start = None, 0
        new._name_handle()
        memo[id(self)] = new
        return new


def live(handle: Tensor) -> PackedWeight:
    """The weight that a handle names."""
    return _LIVE[int(handle)]


def run_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """gptq::experts: x [T, H], ids and weights [T, k] -> [T, H]."""
    for stack in (gate_up, down):
        if stack.sorted:  # a block has no place for a gather between its linears
            stack.lower(get_kernel("reference"))
    op, args = block.call(
        (gate_up.kernel.name, down.kernel.name),
        (
            *(x, ids, weights, list(gate_up.call_tensors()), list(down.call_tensors())),
            *(gate_up_bias, down_bias, activation),
            *(list(p.kernel.op_args(p.layout)) for p in (gate_up, down)),
        ),
        gate_up.layout,
        down.layout,
    )
    return op(*args)  # type: ignore[no-any-return]


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
    whole = parts[0].merged
    start = 0
    for part in parts:
        if whole is None or part.merged is not whole or part.start != start:
            break
        start += part.spec.out_features
    else:
        assert whole is not None
        if whole.kernel is kernel and start == whole.spec.out_features:
            return whole
    return _merge(parts, kernel)


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
    whole.lower(kernel)
    start = 0
    for part in parts:
        stop = start + part.spec.out_features
        part.tensors = kernel.cut(whole.tensors, whole.spec, start, stop)
        part.layout, part.sorted = part.spec.ordered, order is not None
        part.kernel, part.merged, part.start = kernel, whole, start
        start = stop
    return whole
