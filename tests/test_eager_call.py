"""Eager linears: which of them call the function behind a kernel's op, and that both say the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import humming_emulation
import pytest
import torch
import torch.nn.functional as F
from humming_emulation import HERE
from tolerances import LINEAR, relative_error
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gptq_fx
from gptq_fx import GPTQConfig, QuantizedParameter
from gptq_fx.kernels import Kernel, get_kernel, humming
from gptq_fx.merged import merge
from gptq_fx.modes import plain_keys

K, N = 256, 128


@pytest.fixture(autouse=True)
def emulated() -> Iterator[None]:
    with humming_emulation.emulated():
        yield


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels of which an op was called."""
    called: list[str] = []
    call = Kernel.call

    def counted(self: Kernel, *args: Any) -> Tensor:
        called.append(self.name)
        return call(self, *args)

    monkeypatch.setattr(Kernel, "call", counted)
    return called


def linear(bias: bool = False) -> nn.Linear:
    """Packed for humming."""
    model = nn.Sequential(nn.Linear(K, N, bias, dtype=torch.bfloat16)).requires_grad_(False)
    gptq_fx.quantize(model, GPTQConfig(group_size=64), progress=False)
    model[0].weight.packed.lower(HERE)
    return model[0]  # type: ignore[return-value]


def by_op(layer: nn.Linear, x: Tensor) -> Tensor:
    pack = layer.weight.packed.pack  # type: ignore[attr-defined]
    return pack.kernel.op(x, *pack.tensors, layer.bias, *pack.kernel.op_args(pack.layout))  # type: ignore[no-any-return]


@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_it_gives_what_the_op_gives(ops: list[str], shape: tuple[int, ...], bias: bool) -> None:
    layer, x = linear(bias), torch.randn(shape).bfloat16()
    y = layer(x)
    assert not ops
    assert torch.equal(y, by_op(layer, x)) and y.shape == (*shape[:-1], N)
    assert type(y) is Tensor and not y.requires_grad


def test_x_may_be_strided_or_lie_anywhere(ops: list[str]) -> None:
    layer = linear()
    flat = torch.randn(12 * K).bfloat16()
    for x in (flat.view(K, 12).mT, flat[1 : 6 * K + 1].view(6, K), flat.view(2, 3, 2 * K)[..., :K]):
        assert torch.equal(layer(x), by_op(layer, x))
    assert not ops


def test_modes_without_a_watcher_keep_it(ops: list[str]) -> None:
    layer, x = linear(True), torch.randn(3, K).bfloat16()
    expected = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x.clone().requires_grad_()), expected)
    with torch.inference_mode():
        made = x.clone()
        y = layer(made)
        assert torch.equal(y, expected) and y.is_inference()
    assert not layer(made).is_inference()
    assert torch.equal(layer(nn.Parameter(x, requires_grad=False)), expected)
    with torch.autocast("cpu", torch.float16):
        y = layer(x.float())
        assert y.dtype is torch.float16 and torch.equal(y, expected.to(torch.float16))
    with torch.device("meta"):  # what makes tensors without a device: not ours
        assert torch.equal(layer(x), expected)
    assert not ops


def test_it_follows_the_pack(ops: list[str]) -> None:
    layer, x = linear(), torch.randn(3, K).bfloat16()
    layer(x)
    other = linear()
    layer.load_state_dict(other.state_dict())
    layer.weight.packed.lower(HERE)  # type: ignore[attr-defined]
    assert torch.equal(layer(x), other(x)) and not ops
    layer.weight.packed.lower(get_kernel("reference"))  # type: ignore[attr-defined]
    layer(x)
    assert ops == ["reference"]


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op(ops: list[str]) -> None:
    layer, x = linear(), torch.randn(3, K).bfloat16()
    expected = layer(x)
    with Watching() as mode:
        assert torch.equal(layer(x), expected)
    assert "gptq.humming_matmul.default" in mode.seen and ops == ["humming"]


def test_transforms_of_torch_func_see_the_op(ops: list[str]) -> None:
    layer, x = linear(), torch.randn(2, 3, K).bfloat16()
    expected = layer(x)
    found = torch.func.vmap(layer)(x)  # of other numbers of rows: in another order of sums
    assert relative_error(found, expected) <= LINEAR[torch.bfloat16]
    assert torch.equal(torch.func.functionalize(layer)(x), expected)
    assert ops == ["humming", "humming"]


@pytest.mark.parametrize("first", ["functionalize", "jvp", "fake"])
def test_a_first_call_in_a_mode_does_not_decide_for_the_process(ops: list[str], first: str) -> None:
    layer, x = linear(), torch.randn(3, K).bfloat16()
    plain_keys.cache_clear()  # as in a new process
    if first == "functionalize":
        torch.func.functionalize(layer)(x)
    elif first == "jvp":  # of something else; the layer is called meanwhile
        torch.func.jvp(lambda z: (layer(x), z)[1], (x,), (x,))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            layer(x)
    ops.clear()
    layer(x)
    assert not ops


def test_a_tracer_sees_the_op(ops: list[str]) -> None:
    layer, x = linear(), torch.randn(3, K).bfloat16()
    traced = torch.jit.trace(lambda x: F.linear(x, layer.weight), (x,), check_trace=False)
    assert "gptq::humming" in str(traced.graph) and ops == ["humming"]


def test_fake_tensors_get_the_fake_of_the_op() -> None:
    layer = linear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(3, K).bfloat16()))
    assert y.shape == (3, N)


def test_a_negative_view_is_not_read_as_it_lies(ops: list[str]) -> None:
    layer, x = linear(), torch.randn(3, K).bfloat16()
    assert torch.equal(layer(torch._neg_view(x)), -layer(x))
    assert ops == ["humming"]


@pytest.mark.parametrize("which", ["x", "bias"])
def test_gradients_go_through_the_op_that_has_some(ops: list[str], which: str) -> None:
    layer, x = linear(True), torch.randn(3, K).bfloat16()
    asked = x if which == "x" else layer.bias
    layer(asked.requires_grad_() if which == "x" else x)
    if which == "bias":
        asked.requires_grad_()
    y = layer(x)
    assert y.requires_grad
    y.sum().backward()
    assert asked.grad is not None


def test_a_part_of_a_merged_pack_keeps_no_second_copy(ops: list[str]) -> None:
    layers, x = [linear(), linear()], torch.randn(3, K).bfloat16()
    expected = [layer(x) for layer in layers]
    merge([layer.weight.packed for layer in layers], HERE)  # type: ignore[misc]
    assert [layer.weight.packed.pack.bound for layer in layers] == [None, None]  # type: ignore[attr-defined]
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
    assert ops == ["humming", "humming"]


@pytest.mark.parametrize("run", [lambda layer, x: layer(x), by_op], ids=["direct", "op"])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, K), TypeError, r"x is torch.float32, the scales torch.bfloat16"),
        (torch.zeros(2, K // 2).bfloat16(), ValueError, rf"x has {K // 2} features, the weight {K}"),
    ],
    ids=["dtype", "features"],
)
def test_what_does_not_fit_is_refused(run: Any, x: Tensor, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run(linear(), x)


def test_another_device_is_refused() -> None:
    layer = linear()
    pack = layer.weight.packed.pack  # type: ignore[attr-defined]
    run = humming.bind(pack.tensors, pack.layout)

    class Elsewhere(Tensor):
        def get_device(self) -> int:
            return 1

    with pytest.raises(ValueError, match=r"x is on cpu, the weight on cpu"):
        run(torch.zeros(2, K).bfloat16().as_subclass(Elsewhere), None)


def test_every_kernel_with_a_body_is_called_so(ops: list[str]) -> None:
    kernel = get_kernel("cpu_int4")
    if reason := kernel.available():
        pytest.skip(reason)
    layer, x = linear(True), torch.randn(3, K).bfloat16()
    layer.weight.packed.lower(kernel)  # type: ignore[attr-defined]
    assert torch.equal(layer(x), by_op(layer, x)) and not ops


def test_shape_and_dtype_are_not_asked_of_the_subclass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each such question costs 4 us of a call of 30."""
    layer, x = linear(), torch.randn(3, K).bfloat16()
    asked: list[Any] = []
    answer = QuantizedParameter.__torch_function__.__func__  # type: ignore[attr-defined]

    def listening(cls: Any, func: Any, *args: Any) -> Any:
        asked.append(func)
        return answer(cls, func, *args)

    monkeypatch.setattr(QuantizedParameter, "__torch_function__", classmethod(listening))
    layer(x)
    assert asked == [F.linear]
