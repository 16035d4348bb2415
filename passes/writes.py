"""Which calls of a graph write to a tensor in place: two reads of one node around one may differ."""

from __future__ import annotations

import torch
from torch import fx

# Operators of Python that write to their first operand.
IN_PLACE = {
    "setitem",
    "delitem",
    *(f"i{n}" for n in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
}
IN_PLACE |= {"iand", "ior", "ixor", "ilshift", "irshift", "imatmul"}


def writes_before(gm: fx.GraphModule) -> dict[fx.Node, int]:
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
    if getattr(node.target, "__module__", "") == "_operator":
        return name in IN_PLACE  # and_, or_, not_ only avoid the names of keywords
    return node.op.startswith("call") and (
        (name.endswith("_") and not name.startswith("_")) or name == "__setitem__"
    )
