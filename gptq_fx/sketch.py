"""What the passes make of a graph, without quantizing a weight: for reports and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from gptq_fx.backend import make_plan
from gptq_fx.config import GPTQConfig
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes import PIPELINE, Plan, run
from gptq_fx.passes.capture import capture
from gptq_fx.passes.choose import choose
from gptq_fx.passes.lower import lower
from gptq_fx.passes.match import match
from gptq_fx.passes.plan import Site
from gptq_fx.passes.swap import canonical_examples
from gptq_fx.weight import QuantizedWeight


@dataclass(frozen=True)
class Call:
    """One call of a graph.

    node: its name in the graph. op: what it calls. output: dtype and shape of its result, such as
    "bfloat16[1, 8, 64]". inputs: positions of the calls whose results it takes.
    weights: paths of the linears whose weights it multiplies by. fate: "W4A16 g128 sym, cpu_int4" where
    those are to be quantized; why not where they stay dense; "" where there are none.
    quantized: which of the two.
    """

    node: str
    op: str
    output: str
    inputs: tuple[int, ...]
    weights: tuple[str, ...] = ()
    fate: str = ""
    quantized: bool = False


@dataclass(frozen=True)
class GraphRecord:
    """The calls of one graph as it was captured, and behind all passes but `lower`.

    `lower` puts the op of each kernel in the place of gptq::linear; which one, `fate` says.
    """

    before: tuple[Call, ...]
    after: tuple[Call, ...]


def sketch(gm: fx.GraphModule, values: Sequence[Any], config: GPTQConfig, root: nn.Module) -> GraphRecord:
    """The record of a captured graph; `gm`, `values` (its real inputs) and their kernels stay as they are.

    Raises KernelError as compiling would.
    """
    graph, values = capture(gm, values)
    plan = make_plan(graph, values, config, root=root)
    run(graph, plan, [match, choose])
    before = _calls(graph, plan)
    for site in plan.sites:
        _stand_in(site, plan)
    run(graph, plan, [step for step in PIPELINE if step not in (match, choose, lower)])
    return GraphRecord(before, _calls(graph, plan))


def _stand_in(site: Site, plan: Plan) -> None:
    """Take a weight of fake tensors for one that is dense and would be quantized."""
    dense = plan.tensor(site.weight)
    if site.decision is None or site.decision.spec is None or isinstance(dense, QuantizedParameter):
        return
    spec = site.decision.spec
    qweight, scales, qzeros, g_idx = canonical_examples(spec, plan)
    assert qweight is not None and scales is not None
    weight = QuantizedWeight(spec.scheme.bits, spec.in_features, qweight, scales, qzeros, g_idx)
    packed = PackedWeight(weight, spec.scheme, None)
    plan.values[site.weight] = QuantizedParameter(packed, site.name, site.transposed)


def _calls(gm: fx.GraphModule, plan: Plan) -> tuple[Call, ...]:
    sites: dict[fx.Node, list[Site]] = {}
    for site in plan.sites:
        if site.node is not None:
            sites.setdefault(site.node, []).append(site)
    nodes = [node for node in gm.graph.nodes if node.op.startswith("call_")]
    position = {node: i for i, node in enumerate(nodes)}
    return tuple(_call(node, position, sites.get(node, [])) for node in nodes)


def _call(node: fx.Node, position: dict[fx.Node, int], sites: list[Site]) -> Call:
    decisions = [site.decision for site in sites if site.decision is not None]
    kernels = {d.kernel.name: d for d in decisions if d.kernel is not None}
    fates = [f"{d.scheme}, {name}" for name, d in kernels.items()] or [d.reason for d in decisions]
    return Call(
        node=node.name,
        op=_op(node),
        output=_shape(node.meta.get("example_value")),
        inputs=tuple(position[n] for n in node.all_input_nodes if n in position),
        weights=tuple(site.name for site in sites),
        fate="; ".join(dict.fromkeys(fates)),
        quantized=bool(kernels),
    )


def _op(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", str(node.target))
    module = str(getattr(node.target, "namespace", ""))  # of an op, "gptq" or "aten"
    return f"{module}.{name.partition('.')[0]}" if module else name


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f"{str(value.dtype).removeprefix('torch.')}{[str(n) for n in value.shape]}".replace("'", "")
