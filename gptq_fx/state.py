"""The state of a QuantizedParameter: what torch.save keeps of it, and how load_state_dict copies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptq_fx.errors import DenseUseError
from gptq_fx.packed import PackedWeight
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

if TYPE_CHECKING:
    from gptq_fx.parameter import QuantizedParameter

# in_features, the canonical tensors, the fields of the scheme, (fqn, transposed, error, is a Parameter):
# what is in files of torch.save must be plain data and never change its meaning.
State = tuple[int, list[Tensor | None], tuple[int, int, bool, bool], tuple[str, bool, float | None, bool]]


def state_of(parameter: QuantizedParameter) -> State:
    """Plain data that torch.load can be trusted with."""
    weight, scheme = parameter.quantized_weight(), parameter.scheme
    tensors = [None if t is None else _compact(t) for t in weight.tensors]
    fields = (scheme.bits, scheme.group_size, scheme.sym, scheme.desc_act)
    is_parameter = isinstance(parameter, torch.nn.Parameter)
    rest = (parameter.fqn, parameter.transposed, parameter.packed.error, is_parameter)
    return weight.in_features, tensors, fields, rest


def packed_of(
    in_features: int, tensors: list[Tensor | None], fields: Any, error: float | None
) -> PackedWeight:
    """The bytes that a state describes."""
    qweight, scales, qzeros, g_idx = tensors
    assert qweight is not None and scales is not None
    weight = QuantizedWeight(fields[0], in_features, qweight, scales, qzeros, g_idx)
    return PackedWeight(weight, Scheme(*fields), error)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor without what else its storage holds: a part of a merged pack is a view."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def copy_into(to: Tensor, source: Tensor, quantized: type[QuantizedParameter]) -> Tensor:
    """to.copy_(source), as load_state_dict calls it; one of them is `quantized`."""
    if not isinstance(to, quantized):
        assert isinstance(source, quantized)
        raise DenseUseError(
            f"{source.fqn}: a quantized weight cannot be copied into a dense parameter. "
            "Legal: load_state_dict(..., assign=True), or quantize the model first"
        )
    if not isinstance(source, quantized):
        raise DenseUseError(
            f"{to.fqn}: a dense weight cannot be copied into a quantized parameter. "
            "Legal: load it into the dense model and quantize that"
        )
    if (source.transposed, _described(source)) != (to.transposed, _described(to)):
        raise DenseUseError(
            f"{to.fqn}: found {_described(source)} in the state dict. Legal here: {_described(to)}"
        )
    to.packed.adopt(source.packed.to(to.device, to.dtype))
    return to


def _described(parameter: QuantizedParameter) -> str:
    """What graphs were guarded by: a copy must not change it."""
    unsortable = parameter.scheme.desc_act and parameter.packed.order is None
    groups = " in groups of different sizes" if unsortable else ""
    return f"{parameter.scheme}{groups} {list(parameter.shape)}"
