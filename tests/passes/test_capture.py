"""capture: one form of graph, from Dynamo and from torch.fx.symbolic_trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import calls, run_passes
from models import MLP, Stack, dequantized, output, quantized, relative
from torch import Tensor, nn

import gptq_fx
from gptq_fx.passes.capture import capture, is_dynamo

X = torch.randn(2, 3, 64)
EAGER = {"inner_backend": "eager"}


class Functional(nn.Module):
    """F.linear on parameters of its own: get_attr in a traced graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(96), requires_grad=False)
        self.register_buffer("shift", torch.randn(96))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.shift + F.linear(x, self.weight)


def evaluated(graph: torch.fx.GraphModule, values: list[Any]) -> Tensor:
    graph.recompile()
    result: Tensor = graph(*values)
    return result


def test_modules_become_calls_on_placeholders() -> None:
    gm = torch.fx.symbolic_trace(MLP(bias=True).requires_grad_(False))
    before = [str(n) for n in gm.graph.nodes]
    assert [n.op for n in gm.graph.nodes].count("call_module") == 3
    graph, values = capture(gm, [X])
    assert calls(graph) == ["linear", "silu", "linear", "mul", "linear"]
    assert {n.op for n in graph.graph.nodes} == {"placeholder", "call_function", "output"}
    assert len(values) == 1 + 6
    assert [str(n) for n in gm.graph.nodes] == before  # a copy
    assert torch.equal(evaluated(graph, values), gm(X))


def test_an_attribute_becomes_one_placeholder_however_often_it_is_used() -> None:
    gm = torch.fx.symbolic_trace(Functional())
    graph, values = capture(gm, [X])
    assert len(values) == 1 + 3
    assert torch.equal(evaluated(graph, values), gm(X))


def test_every_node_has_an_example() -> None:
    graph, _ = capture(torch.fx.symbolic_trace(MLP().requires_grad_(False)), [X])
    shapes = [tuple(n.meta["example_value"].shape) for n in graph.graph.nodes if n.op == "call_function"]
    assert shapes == [(2, 3, 128)] * 4 + [(2, 3, 64)]


@pytest.mark.parametrize("module", [MLP(), MLP(bias=True), Stack(2)], ids=["mlp", "with bias", "stack"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.8e-2)])
def test_a_symbolic_trace_of_modules_is_quantized(
    module: nn.Module, dtype: torch.dtype, tolerance: float
) -> None:
    model, x = module.to(dtype).requires_grad_(False), X.to(dtype)
    run = gptq_fx.backend(torch.fx.symbolic_trace(model), [x], options=EAGER)
    found = first(run(x))
    wanted = output(dequantized(model), {"x": x})
    assert relative(found, wanted) <= tolerance
    assert relative(output(model, {"x": x}), wanted) > 1.5 * tolerance


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def test_a_symbolic_trace_of_a_quantized_model() -> None:
    model, _ = quantized(MLP().requires_grad_(False))
    run = gptq_fx.backend(torch.fx.symbolic_trace(model), [X], options=EAGER)
    assert relative(first(run(X)), output(model, {"x": X})) <= 1e-5


def test_a_symbolic_trace_of_attributes_is_quantized() -> None:
    gm = torch.fx.symbolic_trace(Functional())
    stage = run_passes("swap", gm, [X])
    assert stage.before == ["linear", "add", "linear", "add"]
    assert stage.after == ["gptq.linear", "add", "gptq.linear", "add"]
    assert {s.name for s in stage.plan.sites} == {"weight"}


@pytest.mark.parametrize("model", [MLP().requires_grad_(False), Functional()], ids=["modules", "attributes"])
def test_weights_changed_after_tracing_are_seen(model: nn.Module) -> None:
    gm = torch.fx.symbolic_trace(model)
    run = gptq_fx.backend(gm, [X], options=EAGER)
    before = first(run(X))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.mul_(2)
    in_place = first(run(X))
    assert relative(in_place, first(gptq_fx.backend(gm, [X], options=EAGER)(X))) == 0
    assert relative(in_place, before) > 0.5
    name, old = next((n, p) for n, p in gm.named_parameters() if p.ndim == 2)
    owner, _, leaf = name.rpartition(".")
    setattr(gm.get_submodule(owner), leaf, nn.Parameter(torch.randn_like(old), requires_grad=False))
    replaced = first(run(X))
    assert relative(replaced, first(gptq_fx.backend(gm, [X], options=EAGER)(X))) == 0
    assert relative(replaced, in_place) > 0.1


def test_a_dynamo_graph_is_copied_and_its_inputs_are_the_parameters() -> None:
    model = MLP().requires_grad_(False)

    def take(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        assert is_dynamo(gm)
        graph, values = capture(gm, inputs)
        assert calls(graph) == calls(gm)
        assert not {*graph.graph.nodes} & {*gm.graph.nodes}
        assert {id(p) for p in model.parameters()} <= {id(v) for v in values}
        sources = [n._dynamo_source for n in graph.graph.nodes if n.op == "placeholder"]
        assert sources == [n._dynamo_source for n in gm.graph.nodes if n.op == "placeholder"]
        graph.graph.erase_node(next(iter(reversed(graph.graph.nodes))))  # what is done to the copy
        return gm.forward

    assert relative(output(torch.compile(model, backend=take), {"x": X}), output(model, {"x": X})) < 1e-6
