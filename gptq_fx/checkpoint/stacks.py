"""Where quantized modules of a checkpoint go, and how several of them become one stack of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from gptq_fx.checkpoint.files import TensorFiles
from gptq_fx.checkpoint.settings import CheckpointSettings
from gptq_fx.checkpoint.tensors import read_module
from gptq_fx.errors import CheckpointError
from gptq_fx.scheme import Scheme
from gptq_fx.shard import Part, cut, length, overlap
from gptq_fx.weight import QuantizedWeight


@dataclass(frozen=True)
class Place:
    """Where quantized modules of a checkpoint go.

    target: path of the parameter. modules: the modules of the checkpoint it is made of; several make a
        stack of experts. transposed: the parameter has the logical shape [K, N].
    parts: of a stack, what each module holds: (expert, first row, last row + 1).
    share: what this rank takes of it (of every expert), where several share it.
    """

    target: str
    modules: tuple[str, ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[tuple[int, int, int], ...] = ()
    share: Part | None = None

    @property
    def in_features(self) -> int:
        return self.shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        return self.shape[-1 if self.transposed else -2]


# A module of a stack: its name, its first row in the expert, its weight.
_Part = tuple[str, int, QuantizedWeight]


def read_stack(
    files: TensorFiles, settings: CheckpointSettings, place: Place
) -> tuple[QuantizedWeight, Scheme]:
    """The experts of a stack, or a rank's share of each; of one module, or of several with some rows."""
    experts: dict[int, list[_Part]] = {}
    schemes: dict[Scheme, str] = {}
    ordered = False  # experts without calibration are in their natural order, whatever the others are in
    for module, (expert, start, stop) in zip(place.modules, place.parts, strict=True):
        weight, scheme = read_module(files, settings, module, place.in_features, stop - start)
        if place.share is not None:
            rows = overlap(place.share.outputs, start, stop)
            start = length(overlap(place.share.outputs, 0, start))
            if not rows:
                continue
            weight, scheme = cut(weight, scheme, Part(rows, place.share.inputs))
        ordered |= scheme.desc_act
        schemes.setdefault(replace(scheme, desc_act=False), module)
        experts.setdefault(expert, []).append((module, start, weight))
    if len(schemes) > 1:
        (one, first), (other, second) = list(schemes.items())[:2]
        raise CheckpointError(
            f"{settings.file}: {first} is {one}, {second} is {other}. Legal: one scheme for {place.target}"
        )
    joined = [_joined(files, place, experts[e], ordered) for e in sorted(experts)]
    return QuantizedWeight.stack(joined), replace(next(iter(schemes)), desc_act=ordered)


def _joined(files: TensorFiles, place: Place, parts: Sequence[_Part], ordered: bool) -> QuantizedWeight:
    """One weight [N, K] with the outputs of all parts; with a g_idx, which they must share, if `ordered`."""
    parts = sorted(parts, key=lambda part: part[1])
    weights = [weight for _, _, weight in parts]
    g_idx = None
    if ordered:
        inputs = torch.arange(weights[0].in_features, dtype=torch.int32, device="cpu")
        counted = inputs // weights[0].group_size
        orders = [counted if weight.g_idx is None else weight.g_idx for weight in weights]
        g_idx = orders[0]
        if not all(torch.equal(g_idx, order) for order in orders):
            raise CheckpointError(
                f"{files.folder.name}: {' and '.join(name for name, _, _ in parts)} differ in their g_idx. "
                f"Legal: one for all, since they are one matrix of {place.target}"
            )
    zeros = [z for weight in weights if (z := weight.zeros()) is not None]
    return QuantizedWeight.from_codes(
        torch.cat([weight.codes() for weight in weights], -1),
        torch.cat([weight.scales for weight in weights], -1),
        torch.cat(zeros, -1) if zeros else None,
        weights[0].bits,
        g_idx,
    )
