"""fuse: linears that share one input become one, where the kernel's layout can be cut apart again."""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch import fx

from gptq_fx import ops
from gptq_fx.kernels import get_kernel
from gptq_fx.merged import can_merge, merged_spec
from gptq_fx.passes.plan import Operand, Plan
from gptq_fx.passes.rewrites import allowed
from gptq_fx.passes.swap import canonical_examples
from gptq_fx.passes.writes import writes_before

aten = torch.ops.aten


def fuse(gm: fx.GraphModule, plan: Plan) -> int:
    """q = gptq::linear(x, Wq, bq), k = gptq::linear(x, Wk), ... (also gate and up) become

    y = gptq::linear(x, [Wq; Wk; ...]); q, k, ... = split(y); q = q + bq
    """
    groups: dict[object, list[Operand]] = {}
    writes = writes_before(gm)
    for operand in plan.operands:
        if operand.node.target is not ops.linear:
            continue
        (site,) = operand.sites
        assert site.decision is not None
        spec = replace(plan.specs(operand)[0], out_features=0)
        # What is written in place between two of them might be their input, or a view of it.
        same = (operand.node.args[0], spec, site.decision.kernel, writes[operand.node])
        groups.setdefault(same, []).append(operand)
    mergeable = [group for group in groups.values() if _mergeable(group, plan)]
    fused = [group for group in mergeable if allowed("fuse", ", ".join(o.sites[0].name for o in group))]
    merged = [_fuse(gm, plan, group) for group in fused]
    gone = {id(operand) for group in fused for operand in group}
    plan.operands = [o for o in plan.operands if id(o) not in gone] + merged
    return len(fused)


def _mergeable(group: list[Operand], plan: Plan) -> bool:
    decision = group[0].sites[0].decision
    assert decision is not None and decision.kernel is not None
    distinct = {operand.sites[0].weight for operand in group}
    specs = [plan.specs(operand)[0] for operand in group]
    return 1 < len(group) == len(distinct) and can_merge(specs, decision.kernel)


def _fuse(gm: fx.GraphModule, plan: Plan, group: list[Operand]) -> Operand:
    sites = tuple(operand.sites[0] for operand in group)
    specs = [plan.specs(operand)[0] for operand in group]
    spec = merged_spec(specs)
    x, bits = group[0].node.args[0], spec.scheme.bits
    stem = "_".join(operand.inputs[0].name for operand in group if operand.inputs[0])
    inputs = plan.add_inputs(gm, stem, canonical_examples(spec, plan))
    # The first of them stands behind x, and before every use of any.
    with gm.graph.inserting_before(group[0].node):
        whole = gm.graph.call_function(ops.linear, (x, *inputs, None, bits))
        parts = gm.graph.call_function(
            aten.split_with_sizes.default, (whole, [s.out_features for s in specs], -1)
        )
    for i, (site, operand) in enumerate(zip(sites, group, strict=True)):
        with gm.graph.inserting_before(operand.node):
            part = gm.graph.call_function(operator.getitem, (parts, i))
            bias = operand.node.args[5]
            if bias is not None:
                part = gm.graph.call_function(aten.add.Tensor, (part, bias))
        part.meta.update(operand.node.meta)
        operand.node.replace_all_uses_with(part)
        gm.graph.erase_node(operand.node)
        plan.remove_inputs(gm, operand)
        site.node = whole
    return Operand(sites, whole, get_kernel("reference"), inputs, group[0].sorted)
