"""A model under the names that its checkpoints have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.tensors import rows_of
from gptq_fx.errors import CheckpointError
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight


@dataclass(frozen=True)
class Part:
    """A quantized module of a checkpoint: a parameter, or some rows of one expert of it, from `start` on."""

    parameter: QuantizedParameter
    out_features: int
    expert: int | None = None
    start: int = 0

    @property
    def scheme(self) -> Scheme:
        return self.parameter.scheme

    @property
    def in_features(self) -> int:
        return self.parameter.packed.spec.in_features

    def weight(self) -> QuantizedWeight:
        """The numbers in canonical form, unpacked now: those of a model are too many to hold at once."""
        if self.expert is None:
            return self.parameter.quantized_weight()
        whole = self.parameter.packed.expert(self.expert)
        return rows_of(whole, self.start, self.start + self.out_features)


def named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Part]]:
    """Dense tensors, and quantized parameters by module, both under the names of checkpoints."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict(keep_vars=True)
    once = {n: t for n, t in state.items() if not (n in tied and t is state.get(tied[n]))}
    stand_ins: dict[int, tuple[str, QuantizedParameter]] = {}
    shown: dict[str, Tensor] = {}
    stacks: dict[str, QuantizedParameter] = {}
    for name, tensor in once.items():
        shown[name] = tensor
        if isinstance(tensor, QuantizedParameter) and tensor.ndim == 3:
            del shown[name]
            stacks[name] = tensor
        elif isinstance(tensor, QuantizedParameter):
            shown[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            stand_ins[id(shown[name])] = (name, tensor)
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: is on the meta device, without numbers to save")
    dense: dict[str, Tensor] = {}
    quantized: dict[str, Part] = {}
    for name, tensor in skeleton.checkpoint_names(model, shown).items():
        if id(tensor) in stand_ins:
            parameter = stand_ins.pop(id(tensor))[1]
            quantized[name.removesuffix(".weight")] = Part(parameter, parameter.packed.spec.out_features)
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
        else:
            dense[name] = tensor.detach()
    if stand_ins:
        name, _ = next(iter(stand_ins.values()))
        raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
    for name, stack in stacks.items():
        spec = stack.packed.spec
        assert spec.experts is not None
        cut = skeleton.parts(model, name, spec.experts, spec.out_features, stack.transposed)
        quantized |= {m: Part(stack, stop - start, e, start) for m, (e, start, stop) in cut.items()}
    return dense, quantized


def heads_of(model: Any, dense: Mapping[str, Tensor], quantized: Mapping[str, Part]) -> set[str]:
    """The names of the output projection."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    names = {n for n, p in quantized.items() if p.parameter is weight}
    names |= {n for n in (*dense, *quantized) if n.rpartition(".")[2] in ("lm_head", "embed_out")}
    if isinstance(weight, Tensor) and not isinstance(weight, QuantizedParameter):
        place = weight.data_ptr()
        names |= {n.removesuffix(".weight") for n, t in dense.items() if t.data_ptr() == place}
    return names


def dense_linears(model: nn.Module, dense: Mapping[str, Tensor]) -> list[str]:
    """The linears that stay dense: readers quantize every linear that no rule leaves out."""
    linears, tables = set(), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, QuantizedParameter):
            continue
        if isinstance(module, nn.Linear) or skeleton.is_conv1d(module):
            linears.add(weight.data_ptr())
        elif isinstance(module, nn.Embedding):
            tables.add(weight.data_ptr())
    return [
        name.removesuffix(".weight")
        for name, tensor in dense.items()
        if name.endswith(".weight") and tensor.data_ptr() in linears - tables
    ]


def is_bare(model: nn.Module, part: Part) -> bool:
    """Whether it is a matrix [K, N] that belongs to no module which tells that it lies so."""
    held = (m.weight for m in model.modules() if skeleton.is_conv1d(m))
    return part.expert is None and part.parameter.transposed and all(part.parameter is not w for w in held)
