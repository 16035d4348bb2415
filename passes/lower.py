"""lower: gptq::linear becomes the op of the kernel that was chosen, on tensors packed for it.

Where gradients are to flow, it becomes the op that has one for every kernel, on the handle of the pack.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from gptq_fx import ops
from gptq_fx.gradients import trained_experts, trained_indexed
from gptq_fx.handles import handle_grouped, handle_linear
from gptq_fx.kernels import LinearSpec, block, get_kernel, grouped
from gptq_fx.merged import merged_spec
from gptq_fx.passes.plan import Operand, Plan
from gptq_fx.passes.rewrites import allowed
from gptq_fx.progress import progress


def lower(gm: fx.GraphModule, plan: Plan) -> int:
    """gptq::linear(x, canonical tensors, bias, bits) -> kernel.op(x, its tensors, bias, its args)

    gptq::grouped_linear(x, canonical tensors, ends, N, "reference", ...) -> the kernel's op for stacks, or
        the same on its tensors.
    gptq::experts(...) likewise, where one kernel has both stacks.
    With gradients: gptq::handle_linear, gptq::handle_grouped, gptq::trained_indexed, gptq::trained_experts.
    """
    trains = plan.trains
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
        spec = _lower(gm, plan, operand, trains)
        if target is block.experts:
            blocks.setdefault(operand.node, []).append(spec)
        count += 1
    for node, specs in blocks.items():
        if len(specs) == 2:  # one, where the rewrites end between the stacks: then each has its own kernel
            if trains:
                _train_block(node, specs[0])
                continue
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


def _lower(gm: fx.GraphModule, plan: Plan, operand: Operand, trains: bool) -> LinearSpec:
    decision = operand.sites[0].decision
    assert decision is not None and decision.kernel is not None
    kernel = operand.kernel = decision.kernel
    weights = [plan.tensor(site.weight) for site in operand.sites]
    packed = operand.packed(weights)
    spec, node = packed.layout, operand.node
    stem = next(n.name for n in operand.inputs if n is not None)
    tensors = (operand.owner(weights).handle,) if trains else packed.call_tensors()
    inputs = plan.add_inputs(gm, f"{kernel.name}_{stem}", tensors)
    call = operand.sites[0].experts
    operand.by_handle = trains
    if trains and node.target is not block.experts:
        _train(operand, inputs[0], spec)
    elif call is None:
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


def _train(operand: Operand, handle: fx.Node | None, spec: LinearSpec) -> None:
    """The call by handle in place of a call on canonical tensors."""
    node, gathered = operand.node, operand.sorted
    if node.target is ops.linear:
        node.target, node.args = (
            handle_linear,
            (node.args[0], handle, node.args[5], spec.out_features, gathered),
        )
        return
    x, _, which = node.args[:3]
    if node.target is grouped.grouped_linear:
        node.target, node.args = handle_grouped, (x, handle, which, spec.out_features, gathered)
    else:
        experts = spec.experts
        node.target, node.args = trained_indexed, (x, handle, which, spec.out_features, experts, gathered)


def _train_block(node: fx.Node, gate_up: LinearSpec) -> None:
    """The same for gptq::experts, whose slots for tensors have the handles."""
    arguments: Any = node.args
    x, ids, weights, (up,), (down,), *rest = arguments[:8]
    node.target = trained_experts
    node.args = (x, ids, weights, up, down, *rest, gate_up.experts, gate_up.out_features)
