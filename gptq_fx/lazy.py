"""The quantized form of any weight: its own, or, for a dense one, a round-to-nearest form made once.

A lazily quantized dense parameter keeps its dense storage; the form lives as long as the parameter
does, and is made anew if the numbers change.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.grid import check_finite, round_to_nearest
from gptq_fx.modes import packing
from gptq_fx.names import full_path
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Scheme


@dataclass
class _Forms:
    """The quantized forms of one dense parameter."""

    parameter: weakref.ref[Tensor]
    version: tuple[int, int]
    storage: torch.UntypedStorage  # kept, so that no other numbers can come to lie at its address
    by_scheme: dict[tuple[Scheme, bool], PackedWeight] = field(default_factory=dict)

    def current(self, weight: Tensor) -> bool:
        return self.parameter() is weight and self.version == _version(weight)


_FORMS: dict[int, _Forms] = {}


def quantized(weight: Tensor, scheme: Scheme, name: str, transposed: bool) -> PackedWeight:
    """The packed weight of a parameter [N, K] ([K, N] if `transposed`).

    scheme, name: for a weight that is still dense. Raises WeightError if it cannot be quantized.
    """
    if isinstance(weight, QuantizedParameter):
        return weight.packed
    key = (scheme, transposed)
    forms = _FORMS.get(id(weight))
    if forms is None or not forms.current(weight) or key not in forms.by_scheme:
        with packing():
            forms = _make(weight, key, name)
    return forms.by_scheme[key]


def _make(weight: Tensor, key: tuple[Scheme, bool], name: str) -> _Forms:
    """The forms of a weight, the one for `key` among them, unless another thread has made it meanwhile."""
    scheme, transposed = key
    number = id(weight)
    forms = _FORMS.get(number)
    if forms is None or not forms.current(weight):
        gone = weakref.ref(weight, lambda _: _FORMS.pop(number, None))
        forms = _FORMS[number] = _Forms(gone, _version(weight), weight.untyped_storage())
    if key not in forms.by_scheme:
        dense = weight.detach().mT if transposed else weight.detach()
        try:
            rounded = round_to_nearest(dense, scheme, name)
        except WeightError:  # the graph may have been made for another layer, whose name this is
            check_finite(dense, full_path(weight, name))
            raise
        forms.by_scheme[key] = PackedWeight(rounded, scheme, None)
    return forms


def _version(weight: Tensor) -> tuple[int, int]:
    """In-place changes move the version, `parameter.data = ...` moves the address."""
    return -1 if weight.is_inference() else weight._version, weight.data_ptr()
