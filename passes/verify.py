"""verify: what must hold between any two passes. A failure is a mistake in the pass before."""

from __future__ import annotations

from torch import fx

from gptq_fx.passes.plan import Plan


def verify(gm: fx.GraphModule, plan: Plan) -> None:
    """The graph is well formed, and takes exactly the tracer's inputs and the operands' inputs."""
    gm.graph.lint()
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    added = [node for operand in plan.operands for node in operand.inputs if node is not None]
    added += [node for order in plan.orders for node in order.inputs]
    assert set(placeholders) == {*plan.values, *added}, "inputs that belong to nobody"
    assert placeholders[: len(plan.values)] == list(plan.values), "the tracer's inputs moved"
    for operand in plan.operands:
        inputs = [node for node in operand.inputs if node is not None]
        assert operand.taken == inputs, f"{operand.node} does not take the inputs of its operand"
        for site in operand.sites:
            assert site.node is operand.node, f"{site.name} lost its node"
            assert site.scheme is not None, f"{site.name} was swapped, and has no scheme"
