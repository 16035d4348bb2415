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
from typing import Any, NamedTuple

from torch import Tensor

from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes.plan import Operand, Order


class _Answer(NamedTuple):
    """The tensors that were found for parameters of these ids when PackedWeight.changes was so."""

    changes: int
    weights: Sequence[int]
    tensors: Sequence[weakref.ref[Tensor]]


class Resolver:
    """sources: in the order in which the graph takes their tensors, each with the positions of its weights.

    The last answer holds nothing, so that a model that nothing else holds is freed. It has no weak references
    to parameters, either: torch moves a model to another device by swapping its parameters, and cannot swap
    one that has some. Their ids will do: a new parameter, whose address might be an old one's, is a change.
    """

    def __init__(self, sources: Sequence[tuple[Operand | Order, tuple[int, ...]]]) -> None:
        self.sources = sources
        self.positions = [i for _, positions in sources for i in positions]
        self.last = _Answer(-1, (), ())

    def __call__(self, args: Sequence[Any]) -> list[Tensor]:
        last = self.last  # read once, and replaced as one: threads may share a graph, with other weights
        if last.changes == PackedWeight.changes:
            weights = [id(args[i]) for i in self.positions]
            if weights == last.weights:
                tensors = [known() for known in last.tensors]
                if not any(map(operator.is_, tensors, itertools.repeat(None))):
                    return tensors  # type: ignore[return-value]
        return self._look_up(args)

    def _look_up(self, args: Sequence[Any]) -> list[Tensor]:
        changes = PackedWeight.changes  # now: whatever another thread changes from here on is looked up again
        tensors: list[Tensor] = []
        for source, positions in self.sources:
            tensors += source.tensors([args[i] for i in positions])
        weights = [args[i] for i in self.positions]
        # What is made of a dense weight is found again by looking at its numbers, at every call.
        if all(type(w) is QuantizedParameter for w in weights):
            self.last = _Answer(changes, [id(w) for w in weights], [weakref.ref(t) for t in tensors])
        return tensors
