"""fuse: linears that share one input become one, where the kernel's layout can be cut apart again."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from gptq_fx import ops
from gptq_fx.kernels import LinearSpec, get_kernel
from gptq_fx.packed import can_merge, merged_spec
from gptq_fx.passes.plan import Operand, Plan
from gptq_fx.passes.swap import canonical_examples

# Operators of Python that write to their first operand.
IN_PLACE = {
    "setitem",
    "delitem",
    *(f"i{n}" for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
}
IN_PLACE |= {"iand", "ior", "ixor", "ilshift", "irshift", "imatmul"}


def fuse(gm: fx.GraphModule, plan: Plan) -> int:
    """q = gptq::linear(x, Wq, bq), k = gptq::linear(x, Wk), ... (also gate and up) become

    y = gptq::linear(x, [Wq; Wk; ...]); q, k, ... = split(y); q = q + bq
    """
    groups: dict[object, list[Operand]] = {}
    writes = _writes_before(gm)
    for operand in plan.operands:
        (site,) = operand.sites
        assert site.decision is not None
        spec = replace(_spec(operand, plan), out_features=0)
        # What is written in place between two of them might be their input, or a view of it.
        same = (operand.node.args[0], spec, site.decision.kernel, writes[operand.node])
        groups.setdefault(same, []).append(operand)
    fused = [group for group in groups.values() if _mergeable(group, plan)]
    merged = [_fuse(gm, plan, group) for group in fused]
    gone = {id(operand) for group in fused for operand in group}
    plan.operands = [o for o in plan.operands if id(o) not in gone] + merged
    return len(fused)


def _writes_before(gm: fx.GraphModule) -> dict[fx.Node, int]:
    """How many calls before each node write to a tensor in place."""
    before, writes = {}, 0
    for node in gm.graph.nodes:
        before[node] = writes
        writes += _writes(node)
    return before


def _writes(node: fx.Node) -> bool:
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name in IN_PLACE
    return node.op.startswith("call") and (
        in_place_operator or (name.endswith("_") and not name.startswith("_")) or name == "__setitem__"
    )


def _spec(operand: Operand, plan: Plan) -> LinearSpec:
    (site,) = operand.sites
    return site.quantized(plan.tensor(site.weight)).spec


def _mergeable(group: list[Operand], plan: Plan) -> bool:
    decision = group[0].sites[0].decision
    assert decision is not None and decision.kernel is not None
    distinct = {operand.sites[0].weight for operand in group}
    specs = [_spec(operand, plan) for operand in group]
    return 1 < len(group) == len(distinct) and can_merge(specs, decision.kernel)


def _fuse(gm: fx.GraphModule, plan: Plan, group: list[Operand]) -> Operand:
    sites = tuple(operand.sites[0] for operand in group)
    specs = [_spec(operand, plan) for operand in group]
    spec = merged_spec(specs)
    x, bits = group[0].node.args[0], spec.scheme.bits
    stem = "_".join(operand.inputs[0].name for operand in group if operand.inputs[0])
    inputs = plan.add_inputs(gm, stem, canonical_examples(spec, plan))
    # The first of them stands behind x, and before every use of any.
    with gm.graph.inserting_before(group[0].node):
        whole = gm.graph.call_function(ops.linear, (x, *inputs, None, bits))
        parts = gm.graph.call_function(torch.split, (whole, [s.out_features for s in specs], -1))
    for i, (site, operand) in enumerate(zip(sites, group, strict=True)):
        with gm.graph.inserting_before(operand.node):
            part = gm.graph.call_function(operator.getitem, (parts, i))
            bias = operand.node.args[5]
            if bias is not None:
                part = gm.graph.call_function(operator.add, (part, bias))
        part.meta.update(operand.node.meta)
        operand.node.replace_all_uses_with(part)
        gm.graph.erase_node(operand.node)
        plan.remove_inputs(gm, operand)
        site.node = whole
    return Operand(sites, whole, get_kernel("reference"), inputs)
