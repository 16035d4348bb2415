"""swap: a linear on a weight becomes gptq::linear on the canonical tensors of its quantized form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from gptq_fx import ops
from gptq_fx.kernels import LinearSpec, get_kernel
from gptq_fx.passes.experts import insert, insert_block
from gptq_fx.passes.match import read
from gptq_fx.passes.plan import Operand, Plan, Site
from gptq_fx.passes.rewrites import allowed
from gptq_fx.passes.writes import writes_before
from gptq_fx.weight import packed_rows


def swap(gm: fx.GraphModule, plan: Plan) -> int:
    """linear(x, W, bias) -> gptq::linear(x, qweight, scales, qzeros, g_idx, bias, bits)

    calls on a stack of experts -> gptq::grouped_linear, or gptq::indexed_linear
    gptq::quantized_experts on two stacks -> gptq::experts
    Where the graph was traced under autocast: x in the dtype of the weight, the result in that of the graph.
    """
    calls: dict[fx.Node, list[Site]] = {}
    for site in plan.sites:
        if site.scheme is not None:
            assert site.node is not None
            calls.setdefault(site.node, []).append(site)
    casts: dict[object, fx.Node] = {}
    writes = writes_before(gm)
    count = 0
    for node, sites in calls.items():
        if not allowed("swap", ", ".join(site.name for site in sites)):
            return count
        specs = [site.quantized(plan.tensor(site.weight)).spec for site in sites]
        _cast_input(gm, node, sites, specs[0].dtype, casts, writes[node])
        plan.operands += _swap(gm, plan, node, sites, specs)
        count += 1
    return count


def _cast_input(
    gm: fx.GraphModule,
    node: fx.Node,
    sites: list[Site],
    dtype: torch.dtype,
    casts: dict[object, fx.Node],
    writes: int,
) -> None:
    """Have the call take x in `dtype`; calls on one x that nothing writes to between them share the cast."""
    spelled = None if sites[0].experts is not None else read(node)
    x = sites[0].experts.x if sites[0].experts is not None else spelled.x if spelled else None
    assert isinstance(x, fx.Node)
    example = x.meta["example_value"]
    if example.dtype == dtype:
        return
    key = (x, dtype, writes)
    if key not in casts:
        with gm.graph.inserting_before(node):
            casts[key] = gm.graph.call_method("to", (x, dtype))
        casts[key].meta = {**x.meta, "example_value": example.to(dtype)}
    node.replace_input_with(x, casts[key])
    for site in sites:
        if site.experts is not None:
            site.experts = replace(site.experts, x=casts[key])


def _swap(
    gm: fx.GraphModule, plan: Plan, node: fx.Node, sites: list[Site], specs: list[LinearSpec]
) -> list[Operand]:
    inputs = [
        plan.add_inputs(gm, site.weight.name, canonical_examples(spec, plan))
        for site, spec in zip(sites, specs, strict=True)
    ]
    with gm.graph.inserting_before(node):
        if len(sites) > 1:
            call = result = insert_block(gm, node, list(zip(inputs, specs, strict=True)))
        elif sites[0].experts is not None:
            call, result = insert(gm, sites[0].experts, inputs[0], specs[0])
        else:
            spelled = read(node)
            assert spelled is not None
            args = (spelled.x, *inputs[0], spelled.bias, specs[0].scheme.bits)
            call = result = gm.graph.call_function(ops.linear, args)
        result.meta.update(node.meta)
        example = node.meta["example_value"]
        if example.dtype != specs[0].dtype:
            result.meta["example_value"] = example.to(specs[0].dtype)
            result = gm.graph.call_method("to", (result, example.dtype))
            result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    for site in sites:
        site.node = call
    reference = get_kernel("reference")
    return [Operand((site,), call, reference, taken) for site, taken in zip(sites, inputs, strict=True)]


def canonical_examples(spec: LinearSpec, plan: Plan) -> tuple[Tensor | None, ...]:
    """Stand-ins for the tensors of QuantizedWeight; a weight that is packed need not be unpacked."""
    K, N, G, bits = spec.in_features, spec.out_features, spec.groups, spec.scheme.bits
    E = () if spec.experts is None else (spec.experts,)
    assert plan.fake_mode is not None
    with plan.fake_mode:
        int32 = {"dtype": torch.int32, "device": spec.device}
        return (
            torch.empty(*E, packed_rows(K, bits), N, **int32),  # type: ignore[call-overload]
            torch.empty(*E, G, N, dtype=spec.dtype, device=spec.device),
            None if spec.scheme.sym else torch.empty(*E, G, packed_rows(N, bits), **int32),  # type: ignore[call-overload]
            torch.empty(*E, K, **int32) if spec.scheme.desc_act else None,  # type: ignore[call-overload]
        )
