"""verify: a graph that a pass broke does not go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from graphs import Stage, after
from models import MLP

from gptq_fx import passes
from gptq_fx.passes.verify import verify


@pytest.fixture
def stage() -> Stage:
    stage = after("lower", MLP().requires_grad_(False), torch.randn(3, 64))
    verify(stage.graph, stage.plan)
    return stage


def foreign_input(stage: Stage) -> None:
    graph = stage.graph.graph
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("foreign")


def moved_inputs(stage: Stage) -> None:
    first, second, *_ = stage.plan.values
    second.append(first)


def other_inputs(stage: Stage) -> None:
    one, other = stage.plan.operands
    one.node.args, other.node.args = other.node.args, one.node.args
    one.node.args = (other.node.args[0], *one.node.args[1:])


def lost_node(stage: Stage) -> None:
    stage.plan.operands[0].sites[0].node = stage.plan.operands[1].node


def lost_scheme(stage: Stage) -> None:
    stage.plan.operands[0].sites[0].decision = None


def used_before_made(stage: Stage) -> None:
    output = next(n for n in stage.graph.graph.nodes if n.op == "output")
    call = stage.plan.operands[0].node
    output.append(call)


@pytest.mark.parametrize(
    "broken", [foreign_input, moved_inputs, other_inputs, lost_node, lost_scheme, used_before_made]
)
def test_a_broken_graph_is_caught(stage: Stage, broken: Callable[[Stage], None]) -> None:
    broken(stage)
    with pytest.raises((AssertionError, RuntimeError)):
        verify(stage.graph, stage.plan)


def test_the_pipeline_verifies_behind_every_pass(stage: Stage) -> None:
    def breaks(gm: torch.fx.GraphModule, plan: passes.Plan) -> int:
        foreign_input(stage)
        return 1

    with pytest.raises(AssertionError, match="belong to nobody"):
        passes.run(stage.graph, stage.plan, [breaks])
