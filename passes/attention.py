"""attention: keys and values that were repeated for grouped queries are read as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gptq_fx import spelling
from gptq_fx.kernels.attention import grouped_queries_pay
from gptq_fx.passes.plan import Plan
from gptq_fx.passes.rewrites import allowed

SDPA = torch.nn.functional.scaled_dot_product_attention


def attention(gm: fx.GraphModule, plan: Plan) -> int:
    """scaled_dot_product_attention(q, repeated(k), repeated(v), ...) becomes

    scaled_dot_product_attention(q, k, v, ..., enable_gqa=True), where repeated(k) is
    k[:, :, None].expand(B, heads, times, S, D).reshape(B, heads * times, S, D).
    """
    return sum(_rewrite(gm, node) for node in list(gm.graph.nodes) if node.target is SDPA)


def _rewrite(gm: fx.GraphModule, node: fx.Node) -> bool:
    operands = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
    query = _value(operands["query"])
    if operands.get("enable_gqa") or query is None or query.ndim != 4:
        return False
    if not grouped_queries_pay(query.device.type, query.shape[2]):
        return False
    repeated = operands["key"], operands["value"]
    plain = [_before_repeat(r) for r in repeated]
    if plain[0] is None or plain[1] is None or _shape(plain[0])[1] != _shape(plain[1])[1]:
        return False
    if not allowed("attention", str(node)):
        return False
    node.args = (operands["query"], *plain, *node.args[3:])
    kept = {name: value for name, value in node.kwargs.items() if name not in ("query", "key", "value")}
    node.kwargs = {**kept, "enable_gqa": True}
    for end in repeated:
        _erase_unused(gm, end)
    return True


def _before_repeat(node: Any) -> fx.Node | None:
    """k [B, heads, S, D] of a reshape to [B, heads * times, S, D] that repeats each head `times` times."""
    if not _is(node, "reshape"):
        return None
    expanded = node.args[0]
    if not _is(expanded, "expand"):
        return None
    inserted = expanded.args[0]
    if _is(inserted, "unsqueeze"):
        if inserted.args[1:] not in ((2,), (-3,)):
            return None
    elif not _is(inserted, "getitem") or not _inserts_third(inserted.args[1]):
        return None
    source = inserted.args[0]
    if _value(source) is None or len(_shape(source)) != 4:
        return None
    B, heads, S, D = _shape(source)
    times = _shape(expanded)[2]
    if _shape(expanded) != (B, heads, times, S, D) or _shape(node) != (B, heads * times, S, D):
        return None
    assert isinstance(source, fx.Node)
    return source


def _is(node: Any, name: str) -> bool:
    """A call of the function or the method of that name."""
    return (
        isinstance(node, fx.Node)
        and node.op in ("call_function", "call_method")
        and spelling.call_name(node.target) == name
        and not node.kwargs
        and _value(node) is not None
    )


def _inserts_third(index: Any) -> bool:
    """x[:, :, None], with or without the slices behind it."""
    everything = slice(None)
    return (
        isinstance(index, tuple)
        and index[:3] == (everything, everything, None)
        and all(part == everything for part in index[3:])
    )


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _shape(node: Any) -> tuple[Any, ...]:
    value = _value(node)
    assert value is not None
    return tuple(value.shape)


def _erase_unused(gm: fx.GraphModule, end: Any) -> None:
    """Erase reshape, expand and indexing where nothing else uses them."""
    for _ in range(3):
        source = end.args[0]
        if end.users:
            return
        gm.graph.erase_node(end)
        end = source
