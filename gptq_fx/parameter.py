"""QuantizedParameter: what a quantized model carries in place of a dense Parameter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gptq_fx import spelling
from gptq_fx.errors import DenseUseError
from gptq_fx.expert_calls import run_stack
from gptq_fx.gradients import flows
from gptq_fx.handles import handle_experts, handle_grouped, handle_linear
from gptq_fx.modes import as_autocast
from gptq_fx.packed import PackedWeight
from gptq_fx.scheme import Scheme
from gptq_fx.state import copy_into, packed_of, state_of
from gptq_fx.weight import QuantizedWeight

aten = torch.ops.aten

# What transposes arrive as -> the name they have in `spelling`.
FLIPS = {aten.t.default: "t", aten.transpose.int: "transpose", aten.permute.default: "permute"}


class QuantizedParameter(torch.Tensor):
    """A Parameter with the shape [N, K] (or [K, N], see `transposed`) and dtype of the dense weight it
    replaces, and no dense storage. A stack of experts has one dimension more, in front.

    It is a traceable wrapper subclass whose one inner tensor is a handle, so that graphs and guards do
    not depend on the layout the bytes are in: `packed` may be lowered to a kernel, or merged with its
    siblings, after a graph was traced. Scheme, shape, dtype and whether there is an order to sort it by
    are in the flatten metadata, which Dynamo guards: layers of different schemes never share a graph.

    Linear calls on it run the kernel it is packed for, and give their inputs a gradient. detach, clone,
    deepcopy, to, t, state_dict, load_state_dict, torch.save and torch.load work; any other dense operation
    raises DenseUseError.
    `numel` counts logical elements; `nbytes` and `nelement() * element_size()` count stored bytes,
    as transformers' get_memory_footprint needs.

    fqn: the path of the site it belongs to. transposed: logical shape is [K, N].
    """

    _packed: PackedWeight | None  # None while traced with fake tensors
    scheme: Scheme
    fqn: str
    transposed: bool
    handle: Tensor
    _flat: tuple[list[str], Any]

    @staticmethod
    def __new__(
        cls,
        packed: PackedWeight | None,
        fqn: str = "",
        transposed: bool = False,
        *,
        fake: tuple[Any, ...] | None = None,
    ) -> QuantizedParameter:
        if fake is None:
            assert packed is not None
            spec = packed.spec
            shape = _flipped(spec.shape) if transposed else spec.shape
            meta: Any = (spec.scheme, shape, spec.dtype, packed.device, packed.order is not None)
            handle = packed.handle
            packed.count_change()
        else:
            handle, meta = fake[0], fake[1]
        scheme, shape, dtype, device, _ = meta
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        assert isinstance(self, QuantizedParameter)
        self._packed, self.scheme, self.handle = packed, scheme, handle
        self.fqn, self.transposed = fqn, transposed
        # Dynamo's guards ask at every call; attributes such as shape are slow on a subclass.
        self._flat = ["handle"], (meta, transposed)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Everything is set by __new__."""

    @property
    def packed(self) -> PackedWeight:
        """The bytes; a parameter has none only while it is traced with fake tensors."""
        assert self._packed is not None, "a traced QuantizedParameter has no bytes"
        return self._packed

    def quantized_weight(self) -> QuantizedWeight:
        """The weight in canonical form."""
        return self.packed.unpacked()

    def dequantize(self) -> Tensor:
        """The dense weight, in the logical shape and dtype."""
        dense = self.quantized_weight().dequantize()
        return dense.mT if self.transposed else dense

    def nelement(self) -> int:
        return -(-self.nbytes // self.element_size())

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.packed.nbytes

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        layout = self._packed.kernel.name if self._packed else "traced"
        return (
            f"QuantizedParameter({self.fqn!r}, {list(self.shape)}, {self.scheme}, "
            f"{self.dtype}, {self.device}, {layout})"
        )

    def linear(self, x: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """x [*, K] -> [*, N]; `transposed` tells which way round the caller takes the weight."""
        if transposed != self.transposed:
            raise DenseUseError(
                f"{self.fqn}: a weight {list(self.shape)} quantized along its "
                f"{'first' if self.transposed else 'second'} dimension is multiplied along the other"
            )
        _, shape, dtype, _, _ = self._flat[1][0]  # as attributes of the tensor they cost 4 us each

        def run(x: Tensor) -> Tensor:
            if self._packed is not None and type(x) in (Tensor, torch.nn.Parameter) and not flows(x, bias):
                return self._packed.linear(x, bias)
            y: Tensor = handle_linear(x, self.handle, bias, shape[1 if transposed else 0])
            return y

        return as_autocast(run, x, dtype)

    def grouped(self, x: Tensor, ends: Tensor, transposed: bool) -> Tensor:
        """x [S, K] -> [S, N]: rows ends[e - 1] to ends[e] by expert e."""
        if transposed != self.transposed or self.ndim != 3:
            raise DenseUseError(f"{self.fqn}: {list(self.shape)} is no stack of experts for this call")

        def run(x: Tensor) -> Tensor:
            if self._packed is not None and type(x) in (Tensor, torch.nn.Parameter) and not flows(x):
                return self._packed.grouped(x, ends)
            y: Tensor = handle_grouped(x, self.handle, ends, self.shape[-1 if self.transposed else -2])
            return y

        return as_autocast(run, x, self.dtype)

    def select(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        """The dense weights of the experts `ids`: right wherever code picks experts, but slow."""
        y: Tensor = handle_experts(self.handle, ids, list(self.shape[1:]), self.dtype)
        return y

    def storage(self) -> Any:
        """What transformers' save_pretrained asks every tensor for."""
        raise DenseUseError(
            f"{self.fqn or 'a weight'} is quantized and has no dense storage to save. "
            "Legal: torch.save(model.state_dict(), path)"
        )

    def share_memory_(self) -> Any:
        """Torch would look for a storage of the dense weight, and crash."""
        raise DenseUseError(f"{self.fqn or 'a weight'} is quantized and cannot be put into shared memory")

    def _stable_hash_for_caching(self) -> str:
        """What AOTAutograd's cache knows the parameter by."""
        return repr((type(self).__qualname__, self.__tensor_flatten__()[1]))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return self._flat

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, size: Any, stride: Any
    ) -> QuantizedParameter:
        return QuantizedParameter(None, "", meta[1], fake=(inner["handle"], meta[0]))

    def _alias(self, packed: PackedWeight | None, *, flip: bool = False) -> QuantizedParameter:
        """Another parameter on `packed`, or, while traced, on the same handle."""
        transposed = self.transposed != flip
        if packed is not None:
            return QuantizedParameter(packed, self.fqn, transposed)
        scheme, shape, *rest = self._flat[1][0]
        meta = (scheme, _flipped(shape) if flip else shape, *rest)
        return QuantizedParameter(None, self.fqn, transposed, fake=(self.handle, meta))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        spelled = spelling.read(func, args, kwargs)
        if spelled and isinstance(spelled.weight, cls) and not isinstance(spelled.x, cls):
            return spelled.weight.linear(spelled.x, spelled.bias, spelled.transposed)
        if spelled and isinstance(spelled.x, cls) and _on_the_left(spelled):
            return spelled.x.linear(spelled.weight.mT, None, False).mT
        if func is spelling.ATTENTION:
            return spelling.attention(*args, **kwargs)
        y = run_stack(cls, func, args, kwargs)
        if y is not None:
            return y
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self = next((a for a in args if isinstance(a, cls)), None)
        spelled = spelling.read(func, args, kwargs)
        if spelled and isinstance(spelled.weight, cls) and not isinstance(spelled.x, cls):
            return spelled.weight.linear(spelled.x, spelled.bias, spelled.transposed)
        y = run_stack(cls, func, args, kwargs)
        if y is not None:
            return y
        if self is not None:
            if func in (aten.detach.default, aten.alias.default):
                return self._alias(self._packed)
            if func is aten.clone.default:
                return self._alias(copy.deepcopy(self.packed))
            if func is aten._to_copy.default:
                return self._alias(self.packed.to(kwargs.get("device"), kwargs.get("dtype")))
            flip = FLIPS.get(func)
            if flip is not None and spelling.swaps_two_dims(flip, args[1:], self.ndim):
                return self._alias(self._packed, flip=True)
            if func is aten.copy_.default:
                return copy_into(args[0], args[1], cls)
        found = self if self is not None else next(a for a in _flat(args) if isinstance(a, cls))
        raise DenseUseError(
            f"{found.fqn or 'a weight'}: {func} needs the dense weight, which exists only as "
            f"{found.scheme}. Linear calls work; .dequantize() gives the dense weight"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedParameter:
        if id(self) not in memo:
            new = self._alias(copy.deepcopy(self.packed, memo))
            memo[id(self)] = as_parameter(new) if _is_parameter(self) else new
        result = memo[id(self)]
        assert isinstance(result, QuantizedParameter)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, state_of(self)


def _flipped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _flat(args: Any) -> Any:
    for a in args:
        yield from _flat(a) if isinstance(a, (list, tuple)) else (a,)


def _on_the_left(spelled: spelling.Spelled) -> bool:
    """Whether it is W @ x, with the weight where x is wanted; x has rows."""
    W, x = spelled.x, spelled.weight
    product = spelled.transposed and spelled.bias is None
    return product and W.ndim == 2 and x.ndim > 1 and not isinstance(x, QuantizedParameter)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def as_parameter(tensor: QuantizedParameter) -> QuantizedParameter:
    """The tensor as an nn.Parameter that asks for no gradient."""
    parameter = torch.nn.Parameter(tensor, requires_grad=False)
    assert isinstance(parameter, QuantizedParameter)
    return parameter


def _rebuild(
    in_features: int,
    tensors: list[Tensor | None],
    scheme: tuple[int, int, bool, bool],
    state: tuple[str, bool, float | None, bool],
) -> QuantizedParameter:
    """What torch.load calls."""
    fqn, transposed, error, parameter = state
    new = QuantizedParameter(packed_of(in_features, tensors, scheme, error), fqn, transposed)
    return as_parameter(new) if parameter else new


torch.serialization.add_safe_globals([_rebuild])
