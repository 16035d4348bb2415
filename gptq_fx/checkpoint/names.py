"""A model under the names that its checkpoints have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.tensors import rows_of
from gptq_fx.errors import CheckpointError
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter


def named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, QuantizedParameter]]:
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
    quantized: dict[str, QuantizedParameter] = {}
    for name, tensor in skeleton.checkpoint_names(model, shown).items():
        if id(tensor) in stand_ins:
            quantized[name.removesuffix(".weight")] = stand_ins.pop(id(tensor))[1]
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
        else:
            dense[name] = tensor.detach()
    if stand_ins:
        name, _ = next(iter(stand_ins.values()))
        raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
    for name, stack in stacks.items():
        quantized |= _experts(model, name, stack)
    return dense, quantized


def _experts(model: nn.Module, name: str, stack: QuantizedParameter) -> dict[str, QuantizedParameter]:
    """The matrices that checkpoints keep a stack of experts in."""
    spec, weight = stack.packed.spec, stack.quantized_weight()
    assert spec.experts is not None
    cut = skeleton.parts(model, name, spec.experts, spec.out_features, stack.transposed)
    made = {}
    for module, (expert, start, stop) in cut.items():
        part = rows_of(weight.expert(expert), start, stop)
        made[module] = QuantizedParameter(PackedWeight(part, stack.scheme, None), module)
    return made


def heads_of(
    model: Any, dense: Mapping[str, Tensor], quantized: Mapping[str, QuantizedParameter]
) -> set[str]:
    """The names of the output projection."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    names = {n for n, p in quantized.items() if p is weight}
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


def is_conv1d(model: nn.Module, parameter: QuantizedParameter) -> bool:
    return any(skeleton.is_conv1d(m) and m.weight is parameter for m in model.modules())
