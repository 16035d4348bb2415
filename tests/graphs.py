"""Graphs before and after one pass, for the tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gptq_fx.backend import make_plan
from gptq_fx.names import running_module
from gptq_fx.options import Options
from gptq_fx.passes import PIPELINE, Plan
from gptq_fx.passes.capture import capture
from gptq_fx.passes.verify import verify


@dataclass(eq=False)
class Stage:
    """What one pass did: calls of the graph before and after it, and the number of its changes."""

    graph: fx.GraphModule
    plan: Plan
    before: list[str]
    after: list[str]
    changes: int

    def run(self) -> Any:
        """The outputs of the graph as it is now, on the inputs it was traced with."""
        values = dict(self.plan.values)
        for operand in self.plan.operands:
            weights = [self.plan.tensor(site.weight) for site in operand.sites]
            tensors = operand.packed(weights).call_tensors()
            values.update({n: t for n, t in zip(operand.inputs, tensors, strict=True) if n is not None})
        for order in self.plan.orders:
            weights = [self.plan.tensor(site.weight) for site in order.sites]
            values.update(zip(order.inputs, order.tensors(weights), strict=True))
        self.graph.recompile()
        with torch.no_grad():
            return self.graph(*(values[n] for n in self.graph.graph.nodes if n.op == "placeholder"))[0]


def after(last: str, model: nn.Module, *inputs: Tensor, **options: Any) -> Stage:
    """The passes up to and with the one named `last`, on Dynamo's graph of model(*inputs)."""
    stages = []

    def take(gm: fx.GraphModule, values: list[Any]) -> Callable[..., Any]:
        stages.append(run_passes(last, gm, values, **options))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=take, fullgraph=True)(*inputs)
    (stage,) = stages
    return stage


def run_passes(last: str, gm: fx.GraphModule, values: list[Any], **options: Any) -> Stage:
    graph, values = capture(gm, values)
    parsed = Options.parse(options, None)
    plan = make_plan(
        graph, values, parsed.config, kernel=parsed.kernel, explicit=parsed.explicit, root=running_module()
    )
    for step in PIPELINE:
        before = calls(graph)
        changes = step(graph, plan)
        verify(graph, plan)
        if step.__name__ == last:
            return Stage(graph, plan, before, calls(graph), changes)
    raise ValueError(f"no pass is named {last}")


def calls(gm: fx.GraphModule) -> list[str]:
    """The names of the calls, in order."""
    return [name(node) for node in gm.graph.nodes if node.op.startswith("call_")]


def name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace == "aten":
            return node.target.overloadpacket.__name__
        return str(node.target).removesuffix(".default")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


class Call(nn.Module):
    """function(x, weight, bias) on parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], shape: tuple[int, ...] = (96, 64)) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(96), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)
