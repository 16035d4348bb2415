"""From the parameters of a call to the packed tensors that a compiled graph takes.

A graph may serve many layers, so that it holds no weight: its tensors are looked up at every call. What was
found last is found again with a few comparisons, as long as the parameters are the same objects and no weight
of the process has changed its layout since.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes.plan import Operand, Order


class Resolver:
    """sources: in the order in which the graph takes their tensors, each with the positions of its weights.

    The last answer is kept by weak references: a model that nothing else holds is freed.
    """

    def __init__(self, sources: Sequence[tuple[Operand | Order, tuple[int, ...]]]) -> None:
        self.sources = sources
        self.positions = [i for _, positions in sources for i in positions]
        self.changes = -1
        self.weights: list[weakref.ref[Any]] = []
        self.packs: list[weakref.ref[Tensor]] = []

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        weights = [args[i] for i in self.positions]
        if self.changes == PackedWeight.changes and all(
            map(operator.is_, weights, [known() for known in self.weights])
        ):
            packs = [known() for known in self.packs]
            if not any(map(operator.is_, packs, itertools.repeat(None))):
                return packs  # type: ignore[return-value]
        return self._look_up(args, weights)

    def _look_up(self, args: Sequence[Any], weights: Sequence[Any]) -> list[Tensor]:
        packs: list[Tensor] = []
        for source, positions in self.sources:
            packs += source.tensors([args[i] for i in positions])
        # What is made of a dense weight is found again by looking at its numbers, at every call.
        if all(type(w) is QuantizedParameter for w in weights):
            self.changes = PackedWeight.changes
            self.weights = [weakref.ref(w) for w in weights]
            self.packs = [weakref.ref(p) for p in packs]
        return packs
