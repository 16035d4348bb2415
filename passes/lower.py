"""lower: gptq::linear becomes the op of the kernel that was chosen, on tensors packed for it."""

from __future__ import annotations

from torch import fx

from gptq_fx import ops
from gptq_fx.kernels import grouped
from gptq_fx.passes.plan import Operand, Plan
from gptq_fx.progress import progress


def lower(gm: fx.GraphModule, plan: Plan) -> int:
    """gptq::linear(x, canonical tensors, bias, bits) -> kernel.op(x, its tensors, bias, its args)

    gptq::grouped_linear(x, canonical tensors, ends, N, "reference", ...) -> the same of the kernel.
    """
    for operand in progress(plan.operands, "packing weights"):
        _lower(gm, plan, operand)
    return len(plan.operands)


def _lower(gm: fx.GraphModule, plan: Plan, operand: Operand) -> None:
    decision = operand.sites[0].decision
    assert decision is not None and decision.kernel is not None
    kernel = operand.kernel = decision.kernel
    packed = operand.packed([plan.tensor(site.weight) for site in operand.sites])
    x = operand.node.args[0]
    stem = next(node.name for node in operand.inputs if node is not None)
    inputs = plan.add_inputs(gm, f"{kernel.name}_{stem}", packed.call_tensors())
    if operand.node.target is ops.linear:
        bias = operand.node.args[5]
        operand.node.target = kernel.op
        operand.node.args = (x, *inputs, bias, *kernel.op_args(packed.layout))
    else:
        which = operand.node.args[2]
        operand.node.args = (x, *grouped.call(kernel, inputs, which, packed.layout))
    plan.remove_inputs(gm, operand)
    operand.inputs = inputs
