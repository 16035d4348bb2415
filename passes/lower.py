"""lower: gptq::linear becomes the op of the kernel that was chosen, on tensors packed for it."""

from __future__ import annotations

from typing import Any

from torch import fx

from gptq_fx.kernels import LinearSpec, block, get_kernel, grouped
from gptq_fx.packed import merged_spec
from gptq_fx.passes.plan import Operand, Plan
from gptq_fx.passes.rewrites import allowed
from gptq_fx.progress import progress


def lower(gm: fx.GraphModule, plan: Plan) -> int:
    """gptq::linear(x, canonical tensors, bias, bits) -> kernel.op(x, its tensors, bias, its args)

    gptq::grouped_linear(x, canonical tensors, ends, N, "reference", ...) -> the kernel's op for stacks, or
        the same on its tensors.
    gptq::experts(...) likewise, where one kernel has both stacks.
    """
    blocks: dict[fx.Node, list[LinearSpec]] = {}
    _prepare(plan)
    count = 0
    for operand in progress(plan.operands, "packing weights"):
        names = ", ".join(site.name for site in operand.sites)
        decision = operand.sites[0].decision
        assert decision is not None and decision.kernel is not None
        if not allowed("lower", f"{names} by {decision.kernel.name}"):
            break
        target = operand.node.target
        spec = _lower(gm, plan, operand)
        if target is block.experts:
            blocks.setdefault(operand.node, []).append(spec)
        count += 1
    for node, specs in blocks.items():
        if len(specs) == 2:  # one, where the rewrites end between the stacks: then each has its own kernel
            *args, first, second = node.args
            node.target, node.args = block.call((str(first), str(second)), args, *specs)
    return count


def _prepare(plan: Plan) -> None:
    """Tell each kernel at once what it will run."""
    specs: dict[str, list[LinearSpec]] = {}
    for operand in plan.operands:
        decision = operand.sites[0].decision
        assert decision is not None and decision.kernel is not None
        specs.setdefault(decision.kernel.name, []).append(merged_spec(plan.specs(operand)))
    for name, wanted in specs.items():
        get_kernel(name).prepare(wanted)


def _lower(gm: fx.GraphModule, plan: Plan, operand: Operand) -> LinearSpec:
    decision = operand.sites[0].decision
    assert decision is not None and decision.kernel is not None
    kernel = operand.kernel = decision.kernel
    packed = operand.packed([plan.tensor(site.weight) for site in operand.sites])
    spec, node = packed.layout, operand.node
    stem = next(n.name for n in operand.inputs if n is not None)
    inputs = plan.add_inputs(gm, f"{kernel.name}_{stem}", packed.call_tensors())
    call = operand.sites[0].experts
    if call is None:
        node.args = (node.args[0], *inputs, node.args[5], *kernel.op_args(spec))
        node.target = kernel.op
    elif node.target is block.experts:
        args: list[Any] = list(node.args)
        slots = block.GATE_UP if call.form == "gate_up" else block.DOWN
        for slot, value in zip(slots, (list(inputs), list(kernel.op_args(spec)), kernel.name), strict=True):
            args[slot] = value
        node.args = tuple(args)
    else:
        form = "grouped" if node.target is grouped.grouped_linear else "indexed"
        node.target, rest = grouped.call(kernel, form, inputs, node.args[2], spec)
        node.args = (node.args[0], *rest)
    plan.remove_inputs(gm, operand)
    operand.inputs = inputs
    return spec
