"""PackedWeight: the bytes of one quantized weight, in the layout of one kernel at a time."""

from __future__ import annotations

import copy
import itertools
import weakref
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels import Kernel, LinearSpec, Tensors, block, get_kernel, grouped
from gptq_fx.kernels.registry import Bound
from gptq_fx.modes import are_plain, packing, plain_keys, quiet
from gptq_fx.order import gather, gather_grouped, order_of, sort, unsort
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

_LIVE: weakref.WeakValueDictionary[int, PackedWeight] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)
_CHANGES = itertools.count(1)


@dataclass(frozen=True)
class Pack:
    """The bytes of a weight in the layout of a kernel: read and replaced as one, since threads share weights.

    tensors: the pack of `kernel` for `layout`. The kernel `reference` holds the tensors of a QuantizedWeight.
    order: None, or the order that the inputs of the pack are in.
    merged, start: where the tensors are views of a larger pack that holds the outputs of several
        weights, that pack, and the place of the first output in it.
    """

    kernel: Kernel
    layout: LinearSpec
    tensors: Tensors
    order: Tensor | None = None
    merged: PackedWeight | None = None
    start: int = 0

    def call_tensors(self) -> Tensors:
        """The tensors as ops want them, contiguous even where they are cut out of a merged pack."""
        if self.merged is None:
            return self.tensors
        return tuple(None if t is None else t.contiguous() for t in self.tensors)

    @cached_property
    def bound(self) -> tuple[Bound, frozenset[int]] | None:
        """Kernel.bound on the tensors, and the keys of an x that it may be given (modes.py).

        None for a part of a merged pack, too: what it keeps would be a second copy of the bytes.
        """
        if self.merged is not None:
            return None
        run = self.kernel.bound(self.tensors, self.layout)
        return None if run is None else (run, plain_keys(self.layout.device))

    def unpacked(self, gathered: bool = False) -> QuantizedWeight:
        """The canonical form; the pack stays. gathered: with the inputs in the order of the pack."""
        weight = self.kernel.unpack_all(self.tensors, self.layout)
        return weight if self.order is None or gathered else unsort(weight, self.order)

    def dense(self, dtype: torch.dtype, gathered: bool = False) -> Tensor:
        """The dense weight [N, K]; gathered: with the inputs in the order of the pack."""
        own = self.kernel.dequantize
        if own is None or self.layout.experts is not None or (self.order is not None and not gathered):
            return self.unpacked(gathered).dequantize(dtype)
        return own(self.call_tensors(), self.layout).to(dtype)

    def expert(self, index: int, gathered: bool = False) -> QuantizedWeight:
        """The canonical form of one expert of a stack; the others are not touched."""
        one = tuple(None if t is None else t[index : index + 1] for t in self.tensors)
        weight = self.kernel.unpack_all(one, replace(self.layout, experts=1)).expert(0)
        return weight if self.order is None or gathered else unsort(weight, self.order[index])


class PackedWeight:
    """One quantized weight. `lower` changes its layout in place, and drops the one before.

    pack: its bytes; `kernel`, `tensors` and so on are those of the pack.
    spec: what it is, whatever the layout.
    order: of a weight in act-order, its inputs sorted by groups (int64 [*, K]); None where it has no
        such order, or its groups differ in size.
    error: ||W - W_quantized|| / ||W|| when it was quantized, where it was measured.
    handle: a number that names this object to ops of a graph (int64 [] on the host).
    changes: another number whenever any weight of the process is given a pack, or a parameter.
    """

    changes = 0

    def __init__(self, weight: QuantizedWeight, scheme: Scheme, error: float | None) -> None:
        kernel = get_kernel("reference")
        self.spec = LinearSpec(
            weight.in_features,
            weight.out_features,
            replace(scheme, desc_act=weight.g_idx is not None),  # static groups lie where they lay
            weight.scales.dtype,
            weight.scales.device.type,
            weight.scales.shape[0] if weight.scales.ndim == 3 else None,
        )
        self.pack = Pack(kernel, self.spec, kernel.pack_all(weight, self.spec))
        self.order = None if weight.g_idx is None else order_of(weight)
        self.error = error
        self._name_handle()

    @property
    def pack(self) -> Pack:
        return self._pack

    @pack.setter
    def pack(self, pack: Pack) -> None:
        self._pack = pack
        self.count_change()  # behind the pack: who sees the number sees the pack

    @staticmethod
    def count_change() -> None:
        PackedWeight.changes = next(_CHANGES)

    @property
    def kernel(self) -> Kernel:
        return self._pack.kernel

    @property
    def layout(self) -> LinearSpec:
        return self._pack.layout

    @property
    def tensors(self) -> Tensors:
        return self._pack.tensors

    @property
    def merged(self) -> PackedWeight | None:
        return self._pack.merged

    @property
    def start(self) -> int:
        return self._pack.start

    @property
    def sorted(self) -> bool:
        """Whether the inputs of the pack are in the order of the groups."""
        return self._pack.order is not None

    def _name_handle(self) -> None:
        number = next(_HANDLES)
        self.handle = torch.tensor(number, device="cpu")
        _LIVE[number] = self

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self.tensors if t is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors; of its part where they are views of a merged pack."""
        return sum(t.numel() * t.element_size() for t in self.tensors if t is not None)

    def call_tensors(self) -> Tensors:
        return self.pack.call_tensors()

    def unpacked(self, gathered: bool = False) -> QuantizedWeight:
        return self.pack.unpacked(gathered)

    def dense(self, dtype: torch.dtype, gathered: bool = False) -> Tensor:
        return self.pack.dense(dtype, gathered)

    def expert(self, index: int, gathered: bool = False) -> QuantizedWeight:
        return self.pack.expert(index, gathered)

    def lower(self, kernel: Kernel, sorted: bool | None = None) -> Pack:
        """Take the layout of `kernel`, if the weight is not in it; `sorted`, or as the kernel wants it.

        Returns that pack: before its caller has read it, another thread may want another one.
        """
        if sorted is None:
            sorted = kernel.sorts(self.spec)
        found = self.pack
        if found.kernel is kernel and (found.order is not None) is sorted:
            return found
        with packing():
            found = self.pack  # another thread may have been here
            if found.kernel is not kernel or (found.order is not None) is not sorted:
                weight, layout = found.unpacked(), self.spec
                if sorted:
                    assert self.order is not None, "groups of different sizes cannot be sorted"
                    weight, layout = sort(weight, self.order), self.spec.ordered
                order = self.order if sorted else None
                found = self.pack = Pack(kernel, layout, kernel.pack_all(weight, layout), order)
        return found

    def adopt(self, other: PackedWeight) -> None:
        """Take the numbers of `other`, a weight of the same spec."""
        self.order, self.error = other.order, other.error
        self.pack = replace(other.pack, merged=None, start=0)

    def linear(self, x: Tensor, bias: Tensor | None, gathered: bool = False) -> Tensor:
        """x [*, K] -> [*, N]; gathered: x is in the order of the pack already."""
        pack = self.pack
        if pack.order is not None and not gathered:
            x = gather(x, pack.order)
        bound = pack.bound if quiet() else None
        if bound is not None and are_plain(x, bias, bound[1]):
            return bound[0](x, bias)
        return pack.kernel.call(x, pack.call_tensors(), bias, pack.layout)

    def grouped(self, x: Tensor, ends: Tensor, gathered: bool = False) -> Tensor:
        """x [S, K], rows ends[e - 1] to ends[e] for expert e -> [S, N]; gathered: as for `linear`."""
        pack = self.pack
        if pack.order is not None and not gathered:
            x = gather_grouped(x, pack.order, ends)
        op, rest = grouped.call(pack.kernel, "grouped", pack.call_tensors(), ends, pack.layout)
        return op(x, *rest)  # type: ignore[no-any-return]

    def to(self, device: torch.device | None, dtype: torch.dtype | None) -> PackedWeight:
        """A new weight of the same integers, in canonical form."""
        return PackedWeight(self.unpacked().to(device, dtype), self.spec.scheme, self.error)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        new = copy.copy(self)
        tensors = tuple(None if t is None else t.clone() for t in self.tensors)
        new.pack = replace(self.pack, tensors=tensors, merged=None, start=0)
        new._name_handle()
        memo[id(self)] = new
        return new


def live(handle: Tensor) -> PackedWeight:
    """The weight that a handle names."""
    return _LIVE[int(handle)]


def living() -> list[PackedWeight]:
    """Every weight of the process."""
    return list(_LIVE.values())


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
    # A block has no place for a gather between its linears.
    first, second = (
        stack.lower(get_kernel("reference")) if stack.sorted else stack.pack for stack in (gate_up, down)
    )
    op, args = block.call(
        (first.kernel.name, second.kernel.name),
        (
            *(x, ids, weights, list(first.call_tensors()), list(second.call_tensors())),
            *(gate_up_bias, down_bias, activation),
            *(list(p.kernel.op_args(p.layout)) for p in (first, second)),
        ),
        first.layout,
        second.layout,
    )
    return op(*args)  # type: ignore[no-any-return]
