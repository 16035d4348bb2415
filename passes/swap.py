"""swap: a linear on a weight becomes gptq::linear on the canonical tensors of its quantized form."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptq_fx import ops
from gptq_fx.kernels import LinearSpec, get_kernel
from gptq_fx.passes.experts import insert
from gptq_fx.passes.match import read
from gptq_fx.passes.plan import Operand, Plan, Site
from gptq_fx.weight import packed_rows


def swap(gm: fx.GraphModule, plan: Plan) -> int:
    """linear(x, W, bias) -> gptq::linear(x, qweight, scales, qzeros, g_idx, bias, bits)

    and calls on a stack of experts -> gptq::grouped_linear, or gptq::indexed_linear.
    """
    chosen = [site for site in plan.sites if site.scheme is not None]
    for site in chosen:
        plan.operands.append(_swap(gm, plan, site))
    return len(chosen)


def _swap(gm: fx.GraphModule, plan: Plan, site: Site) -> Operand:
    assert site.node is not None
    spec = site.quantized(plan.tensor(site.weight)).spec
    inputs = plan.add_inputs(gm, site.weight.name, canonical_examples(spec, plan))
    with gm.graph.inserting_before(site.node):
        if site.experts is not None:
            call, result = insert(gm, site.experts, inputs, spec)
        else:
            spelled = read(site.node)
            assert spelled is not None
            args = (spelled.x, *inputs, spelled.bias, spec.scheme.bits)
            call = result = gm.graph.call_function(ops.linear, args)
    result.meta.update(site.node.meta)
    site.node.replace_all_uses_with(result)
    gm.graph.erase_node(site.node)
    site.node = call
    return Operand((site,), call, get_kernel("reference"), inputs)


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
