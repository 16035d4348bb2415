"""match: find every weight of the graph that is a linear, or could be taken for one.

How a linear can be spelled is told by the rows of `gptq_fx.spelling`. A weight that is no site gets
one too, with the reason, so that the report names every matrix of the model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptq_fx import spelling
from gptq_fx.passes import experts
from gptq_fx.passes.inline import inline
from gptq_fx.passes.plan import Plan, Site

aten = torch.ops.aten

EMBEDDINGS = (F.embedding, torch.embedding, aten.embedding.default)
# Calls that put a weight to another use -> (kind, why it stays dense).
OTHER_USES: dict[Any, tuple[str, str]] = {
    **{call: ("embedding", "embedding tables are looked up, not multiplied") for call in EMBEDDINGS},
    **{
        conv: ("conv", "convolutions are not quantized")
        for conv in (
            *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
            *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default),
        )
    },
}
# Parts of the names of calls that multiply by a stack of matrices.
STACKED_CALLS = ("grouped_mm", "bmm", "einsum", "matmul")
# Calls between a router's linear and its choice of experts.
ROUTER_STEPS = 16


def match(gm: fx.GraphModule, plan: Plan) -> int:
    """Fill plan.sites, in the order of the graph; how many of them are linears."""
    weights = {n: None for n, v in plan.values.items() if _is_matrix(v)}
    inline(gm, weights)
    for node in list(gm.graph.nodes):
        _turn(gm, node, weights)
    found = [site for node in gm.graph.nodes for site in _sites_at(node, weights)]
    vocabulary = _largest_table(gm)
    for site in found:
        assert site.node is not None
        site.name = _site_name(site.node, site.weight, plan)
        if site.experts is None:
            site.kind = _kind(site, vocabulary if site is found[-1] else None, plan)
    plan.sites += found
    claimed = {site.weight for site in found}
    for weight in (w for w in weights if w not in claimed):
        kind, reason = _other_use(weight, plan.tensor(weight))
        name = plan.names(weight)[0].removesuffix(".weight")
        plan.sites.append(Site(weight, kind, name, reason))
    return len(found)


def _is_matrix(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(value, torch.nn.Parameter)
        and value.ndim >= 2
        and (value.is_floating_point())
    )


def _turn(gm: fx.GraphModule, node: fx.Node, weights: dict[fx.Node, None]) -> None:
    """W @ x becomes linear(x^T, W)^T: whatever comes later knows weights on one side only."""
    spelled = read(node) if node.op in ("call_function", "call_method") else None
    if spelled is None or not spelled.transposed or spelled.bias is not None:
        return
    W, x = spelled.x, spelled.weight
    if through_transposes(W)[0] not in weights or _ndim(W) != 2 or not isinstance(x, fx.Node):
        return
    if through_transposes(x)[0] in weights or _ndim(x) < 2:
        return
    with gm.graph.inserting_before(node):
        flipped = gm.graph.call_function(getattr, (x, "mT"))
        linear = gm.graph.call_function(F.linear, (flipped, W))
        result = gm.graph.call_function(getattr, (linear, "mT"))
    flipped.meta["example_value"] = x.meta["example_value"].mT
    for new, example in ((linear, node.meta["example_value"].mT), (result, node.meta["example_value"])):
        new.meta.update({**node.meta, "example_value": example})
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _ndim(node: Any) -> int:
    example = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return example.ndim if isinstance(example, Tensor) else 0


def _sites_at(node: fx.Node, weights: dict[fx.Node, None]) -> list[Site]:
    linear = _linear_at(node, weights)
    return [linear] if linear is not None else _experts_at(node, weights)


def _linear_at(node: fx.Node, weights: dict[fx.Node, None]) -> Site | None:
    if node.op not in ("call_function", "call_method"):
        return None
    spelled = read(node)
    if spelled is None or not isinstance(spelled.x, fx.Node):
        return None
    weight, flipped = through_transposes(spelled.weight)
    if weight not in weights or spelled.x in weights:
        return None
    assert weight is not None
    example = weight.meta.get("example_value")
    if example is None or example.ndim != 2:
        return None
    bias = spelled.bias
    if bias is not None and not _is_bias(bias):
        return None
    return Site(weight, "linear", "", "", spelled.transposed != flipped, node)


def _experts_at(node: fx.Node, weights: dict[fx.Node, None]) -> list[Site]:
    stacks = {w for w in weights if getattr(w.meta.get("example_value"), "ndim", 0) == 3}
    if not stacks:
        return []
    block = experts.read_block(node, stacks)
    if block:
        return [Site(weight, "experts", "", "", False, node, call) for weight, call in block]
    found = experts.read(node, stacks, through_transposes)
    if found is None:
        return []
    weight, transposed, call = found
    return [Site(weight, "grouped_linear", "", "", transposed, node, call)]


def read(node: fx.Node) -> spelling.Spelled | None:
    """The linear that a call of the graph says, or None."""
    call = getattr(Tensor, node.target, None) if node.op == "call_method" else node.target  # type: ignore[arg-type]
    return spelling.read(call, node.args, dict(node.kwargs))


def _is_bias(bias: Any) -> bool:
    example = bias.meta.get("example_value") if isinstance(bias, fx.Node) else None
    return isinstance(example, Tensor) and example.ndim == 1


def through_transposes(node: Any) -> tuple[fx.Node | None, bool]:
    """The first node behind calls that swap the last two dimensions, and whether their number is odd."""
    flipped = False
    while isinstance(node, fx.Node):
        source = _transposed(node)
        if source is None:
            return node, flipped
        node, flipped = source, not flipped
    return None, False


def _transposed(node: fx.Node) -> fx.Node | None:
    """What the node swaps the last two dimensions of, if that is what it does."""
    name: Any
    if node.op == "call_function" and node.target is getattr:
        source, name, *args = node.args
    elif node.op in ("call_method", "call_function") and node.args:
        source, *args = node.args
        name = call_name(node)
    else:
        return None
    args += node.kwargs.values()
    if not isinstance(source, fx.Node):
        return None
    ndim = getattr(source.meta.get("example_value"), "ndim", 0)
    return source if spelling.swaps_two_dims(str(name), tuple(args), ndim) else None


# --- names and kinds


def module_path(node: fx.Node) -> str:
    """The path of the module that made the call, from the root of the graph."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    parts = [p.strip("'\"[]") for p in _split(path.replace("_modules", ""))]
    return ".".join(p for p in parts if p and p not in ("L", "self", "G"))


def _split(path: str) -> list[str]:
    return [p for chunk in path.split(".") for p in chunk.replace("]", "").split("[")]


def _site_name(node: fx.Node, weight: fx.Node, plan: Plan) -> str:
    """The path of the weight, less ".weight"; of several (tied), the one of the calling module."""
    paths = [p.removesuffix(".weight") for p in plan.names(weight)]
    caller = module_path(node)
    if len(paths) > 1 or _is_tied(weight, plan):
        near = [p for p in paths if caller and (p == caller or p.endswith("." + caller))]
        if near or caller:
            return near[0] if near else caller
    return paths[0]


def _is_tied(weight: fx.Node, plan: Plan) -> bool:
    return id(plan.tensor(weight)) in plan.tables or any(user.target in EMBEDDINGS for user in weight.users)


def _kind(site: Site, vocabulary: int | None, plan: Plan) -> str:
    """lm_head: tied to an embedding, named so, or the last linear of the graph with one output for
    each row of the largest embedding table (`vocabulary`).
    router: followed by a choice of experts, or named so."""
    assert site.node is not None
    leaf = site.name.rpartition(".")[2]
    outputs = site.weight.meta["example_value"].shape[1 if site.transposed else 0]
    if _is_tied(site.weight, plan) or leaf in ("lm_head", "embed_out") or outputs == vocabulary:
        return "lm_head"
    return "router" if leaf == "router" or _routes(site.node) else "linear"


def _largest_table(gm: fx.GraphModule) -> int | None:
    calls = [n for n in gm.graph.nodes if n.target in EMBEDDINGS and len(n.args) > 1]
    tables = [n.args[1] if n.target is F.embedding else n.args[0] for n in calls]
    return max((t.meta["example_value"].shape[0] for t in tables if "example_value" in t.meta), default=None)


def _routes(node: fx.Node) -> bool:
    """Whether a choice of the largest outputs (topk) follows within a few calls that keep the values
    apart: softmax, sigmoid, a bias, casts and views, but no other linear."""
    seen, front = {node}, [node]
    for _ in range(ROUTER_STEPS):
        step = [user for n in front for user in n.users if user not in seen]
        for user in step:
            if call_name(user) == "topk":
                return True
        front = [u for u in step if u.op != "output" and u.target not in spelling.LINEAR]
        front = [u for u in front if len(u.users) <= 8]
        seen.update(front)
    return False


def _other_use(weight: fx.Node, value: Tensor) -> tuple[str, str]:
    """(kind, why it stays dense) of a matrix that is no linear's weight."""
    calls = [_through_views(user) for user in weight.users]
    for call in calls:
        if call.target in OTHER_USES:
            return OTHER_USES[call.target]
    names = sorted({call_name(call) for call in calls})
    if value.ndim == 3 and any(part in name for name in names for part in STACKED_CALLS):
        return (
            "grouped_linear",
            f"experts in one stack, used by {', '.join(names)} in a way that is not known",
        )
    if not names:
        return "other", "not used by the graph"
    return "other", f"used by {', '.join(names)}, which is no known spelling of a linear"


def _through_views(call: fx.Node) -> fx.Node:
    """The first call behind transposes, and behind the lookup of some experts out of a stack."""
    while len(call.users) == 1 and call_name(call) in (*spelling.TRANSPOSES, "getattr", "getitem"):
        call = next(iter(call.users))
    return call


def call_name(call: fx.Node) -> str:
    """The name of a function, method or op of aten."""
    if isinstance(call.target, torch._ops.OpOverload):
        return spelling.call_name(call.target).removeprefix("aten.")
    return call.target if isinstance(call.target, str) else getattr(call.target, "__name__", str(call.target))
