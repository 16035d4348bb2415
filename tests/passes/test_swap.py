"""swap: a linear becomes gptq::linear on the canonical tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Call, after
from models import MLP, dequantized, output, quantized, relative
from torch import Tensor, nn

X = torch.randn(2, 3, 64)


def mlp(bias: bool = False) -> nn.Module:
    return MLP(bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sym", [False, True])
def test_linears_become_the_semantic_op(bias: bool, sym: bool) -> None:
    model = mlp(bias)
    stage = after("swap", model, X, sym=sym)
    assert stage.before == ["linear", "silu", "linear", "mul", "linear"]
    assert stage.after == ["gptq.linear", "silu", "gptq.linear", "mul", "gptq.linear"]
    assert stage.changes == 3
    assert relative(stage.run(), output(dequantized(model, sym=sym), {"x": X})) <= 1e-6


def test_the_shape_of_the_result_is_kept() -> None:
    stage = after("swap", mlp(), X)
    for operand in stage.plan.operands:
        example = operand.node.meta["example_value"]
        assert tuple(example.shape) == (2, 3, operand.sites[0].weight.meta["example_value"].shape[0])


def test_conv1d_weights_and_biases_of_addmm() -> None:
    model = Call(lambda x, w, b: torch.addmm(b, x.view(-1, 64), w).view(2, 3, 96), (64, 96))
    stage = after("swap", model, X)
    assert (stage.before, stage.after) == (["view", "addmm", "view"], ["view", "gptq.linear", "view"])
    assert stage.changes == 1
    assert relative(stage.run(), output(dequantized_call(model), {"x": X})) <= 1e-6


def dequantized_call(model: Call) -> Call:
    """Not a linear module: `quantize` does not see it, and the numbers are made by hand."""
    linear = nn.Linear(64, 96, bias=False)
    linear.weight = nn.Parameter(model.weight.mT.contiguous(), False)
    rounded = dequantized(linear).weight
    twin = Call(model.function, (64, 96))
    twin.weight, twin.bias = nn.Parameter(rounded.mT.contiguous(), False), model.bias
    return twin


def test_canonical_inputs_are_not_made_of_a_weight_that_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized(mlp().bfloat16())
    with torch.no_grad():
        torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(X.bfloat16())
    kernels = {p.packed.kernel.name for p in model.parameters()}
    torch._dynamo.reset()
    after("swap", model, X.bfloat16())
    assert {p.packed.kernel.name for p in model.parameters()} == kernels == {"cpu_int4"}


def test_what_has_no_scheme_is_not_swapped() -> None:
    stage = after("swap", mlp(), X, dynamic={"-:": {}})
    assert stage.before == stage.after
    assert stage.changes == 0
    assert stage.plan.operands == []


def test_a_weight_with_another_use_keeps_its_input() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + w.sum()

    model = Call(function)
    stage = after("swap", model, X)
    assert stage.after == ["gptq.linear", "sum", "add"]
    assert stage.plan.sites[0].weight.users
    assert relative(stage.run(), F.linear(X, model.weight) + model.weight.sum()) < 0.2
