"""reorder: weights in act-order get their inputs gathered, once for all of one input and one order.

The gather is a node of the graph, so that Inductor makes it part of whatever computes the input: behind
a norm or an activation it costs no kernel of its own. Permuting the outputs of the linear in front of
an activation instead would save no more, and cost every such weight a second order to undo in eager code.
"""

from __future__ import annotations

import torch
from torch import fx

from gptq_fx import ops
from gptq_fx.kernels import grouped
from gptq_fx.order import gather_grouped, gather_indexed
from gptq_fx.passes.plan import Operand, Order, Plan
from gptq_fx.passes.rewrites import allowed
from gptq_fx.passes.writes import writes_before


def reorder(gm: fx.GraphModule, plan: Plan) -> int:
    """q = gptq::linear(x, Wq with its g_idx), k = gptq::linear(x, Wk with its g_idx), ... become

    y = index_select(x, -1, order); q = gptq::linear(y, Wq[:, order]), k = gptq::linear(y, Wk[:, order]), ...
    and calls on experts the same with the order of each expert.
    """
    orders: dict[object, Order] = {}
    gathers: dict[object, fx.Node] = {}
    writes = writes_before(gm)
    found = [o for o in plan.operands if o.sites[0].decision is not None and o.sites[0].decision.sorted]
    for operand in found:
        (site,) = operand.sites
        if not allowed("reorder", site.name):
            break
        tensor = site.quantized(plan.tensor(site.weight)).order
        assert tensor is not None
        x, which = operand.node.args[0], _which(operand.node)
        # What is written in place between two of them might be their input, or a view of it.
        same = (x, which, operand.node.target, id(tensor), writes[operand.node])
        if same not in gathers:
            if id(tensor) not in orders:
                orders[id(tensor)] = plan.add_order(gm, tensor)
            gathers[same] = _gather(gm, operand.node, which, *orders[id(tensor)].inputs)
        orders[id(tensor)].sites.append(site)
        _take(gm, plan, operand, gathers[same])
    return len(gathers)


def _which(call: fx.Node) -> fx.Node | None:
    """What tells the experts of the rows."""
    which = None if call.target is ops.linear else call.args[2]
    assert which is None or isinstance(which, fx.Node)
    return which


def _gather(gm: fx.GraphModule, call: fx.Node, which: fx.Node | None, order: fx.Node) -> fx.Node:
    x = call.args[0]
    with gm.graph.inserting_before(call):
        if which is None:
            node = gm.graph.call_function(torch.ops.aten.index_select.default, (x, -1, order))
        else:
            op = gather_grouped if call.target is grouped.grouped_linear else gather_indexed
            node = gm.graph.call_function(op, (x, order, which))
    assert isinstance(x, fx.Node)
    node.meta.update({k: v for k, v in x.meta.items() if k == "example_value"})
    return node


def _take(gm: fx.GraphModule, plan: Plan, operand: Operand, x: fx.Node) -> None:
    """The call takes x, and the canonical tensors of the sorted weight, which has no g_idx."""
    call, (*others, g_idx) = operand.node, operand.inputs
    assert g_idx is not None
    if call.target is ops.linear:
        call.args = (x, *others, None, *call.args[5:])
    else:
        call.args = (x, [*others, None], *call.args[2:])
    plan.remove_input(gm, g_idx)
    operand.inputs, operand.sorted = (*others, None), True
