"""Every way in which PyTorch code can say "linear": one row each, for graphs and for eager calls alike.

A row takes the arguments of the call and returns Spelled, or None if these arguments are no linear.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Spelled(NamedTuple):
    """y = x W^T + bias, with W [N, K], or [K, N] if `transposed`. Nodes of a graph, or tensors."""

    x: Any
    weight: Any
    bias: Any
    transposed: bool


def _linear(input: Any, weight: Any, bias: Any = None) -> Spelled:
    return Spelled(input, weight, bias, False)


def _matmul(input: Any, other: Any, *, out: Any = None) -> Spelled | None:
    return None if out is not None else Spelled(input, other, None, True)


def _addmm(
    input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1, out: Any = None
) -> Spelled | None:
    if beta != 1 or alpha != 1 or out is not None:
        return None
    return Spelled(mat1, mat2, input, True)


def _einsum(equation: Any, *operands: Any) -> Spelled | None:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    for x, weight, left, right in ((*operands, *terms), (*operands[::-1], *terms[::-1])):
        # x "...k" and W "nk" or "kn" give "...n"
        if len(right) != 2 or not left or "." in right:
            continue
        rows, k = left[:-1], left[-1]
        n = right.replace(k, "", 1)
        if len(n) == 1 and n not in left and result == rows + n:
            return Spelled(x, weight, None, right[0] == k)
    return None


# What the call is -> the row that reads it.
LINEAR: dict[Any, Callable[..., Spelled | None]] = {
    F.linear: _linear,
    torch.ops.aten.linear.default: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    operator.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.ops.aten.mm.default: _matmul,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.matmul.default: _matmul,
    torch.functional.einsum: _einsum,
    torch.ops.aten.einsum.default: _einsum,
}


class Grouped(NamedTuple):
    """y[rows of expert e] = x[rows of expert e] W[e]^T, with W [E, N, K], or [E, K, N] if `transposed`.

    The rows [S, K] are sorted by experts; ends [E] says where those of each end.
    """

    x: Any
    weight: Any
    ends: Any
    transposed: bool


def _grouped_mm(
    input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Grouped | None:
    if offs is None or bias is not None or out_dtype is not None:
        return None
    return Grouped(input, mat2, offs, True)


def _grouped_mm_fallback(input: Any, weight: Any, offs: Any) -> Grouped:
    return Grouped(input, weight, offs, True)


# By name, since not every torch has each of them, and the last comes with transformers.
GROUPED: dict[str, Callable[..., Grouped | None]] = {
    "_grouped_mm": _grouped_mm,
    "grouped_mm": _grouped_mm,
    "aten._grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _grouped_mm_fallback,
}


def call_name(call: Any) -> str:
    """The name of a function, method or op, without its overload."""
    if isinstance(call, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return ".".join(str(call).split(".")[:2])
    return call if isinstance(call, str) else getattr(call, "__name__", str(call))


def read_grouped(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grouped | None:
    """The linear of several experts that the call says, or None."""
    row = GROUPED.get(call_name(call))
    return None if row is None else row(*args, **kwargs)


class Block(NamedTuple):
    """A whole block of experts: the arguments of gptq::quantized_experts."""

    x: Any
    ids: Any
    weights: Any
    gate_up: Any
    down: Any
    gate_up_bias: Any
    down_bias: Any
    activation: str


def read_block(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Block | None:
    """The block of experts that the call says, or None."""
    return Block(*args, **kwargs) if call_name(call) == "gptq.quantized_experts" else None


# Calls that swap the last two dimensions: name of the function, method or attribute.
TRANSPOSES = {"t", "T", "numpy_T", "mT", "H", "transpose", "swapaxes", "permute", "adjoint", "swapdims"}


def swaps_two_dims(name: str, args: tuple[Any, ...], ndim: int) -> bool:
    """Whether `name` with these arguments (after the tensor) turns [*, a, b] into [*, b, a]."""
    if ndim not in (2, 3) or name not in TRANSPOSES:
        return False
    if name in ("transpose", "swapaxes", "swapdims"):
        return len(args) == 2 and {d % ndim for d in args} == {ndim - 2, ndim - 1}
    if name == "permute":
        dims = args[0] if len(args) == 1 else args
        return [d % ndim for d in dims] == [*range(ndim - 2), ndim - 1, ndim - 2]
    return not args and (ndim == 2 or name in ("mT", "adjoint"))


# torch's own attention, which takes the weights of its projections as arguments, and the same code
# without the question whether one of them overrides it: the linears in it are asked one by one.
ATTENTION = F.multi_head_attention_forward
attention = FunctionType(
    ATTENTION.__code__,
    {**ATTENTION.__globals__, "has_torch_function": lambda args: False},
    ATTENTION.__name__,
    ATTENTION.__defaults__,
)


def read(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelled | None:
    """The linear that the call says, or None."""
    row = LINEAR.get(call)
    if row is None:
        return None
    try:
        return row(*args, **kwargs)
    except TypeError:  # arguments that the row has no name for (out=, dtype=)
        return None
