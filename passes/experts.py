"""Calls on a stack of experts: how they are found in a graph, and what takes their place.

_grouped_mm(x, W^T, ends)                  rows sorted by experts (transformers: grouped_mm)
bmm(W[ids], x[S, K, 1]), bmm(x[S, 1, K], W[ids])        each row picks its own (batched_mm)
bmm(x[E, M, K], W), x @ W, einsum          each expert has as many rows
gptq::quantized_experts                    the whole block, of transformers' models that are quantized
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from gptq_fx import spelling
from gptq_fx.kernels import LinearSpec, block, get_kernel, grouped
from gptq_fx.passes.plan import ExpertsCall

aten = torch.ops.aten

BMM = {"bmm", "matmul", "__matmul__", "aten.bmm", "aten.matmul"}
# W[ids]
PICKING = (operator.getitem, torch.Tensor.__getitem__, "__getitem__", aten.index.Tensor)

# (the stack's placeholder, whether it is [E, K, N], how it is called)
Found = tuple[fx.Node, bool, ExpertsCall]
# The node behind transposes, and whether their number is odd.
Through = Callable[[Any], tuple[fx.Node | None, bool]]


def read(node: fx.Node, stacks: Collection[fx.Node], through: Through) -> Found | None:
    """The call on one of `stacks` (placeholders of [E, *, *]) that a node of the graph is, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    call = spelling.read_grouped(node.target, node.args, dict(node.kwargs))
    if call is not None:
        weight, flipped = through(call.weight)
        if weight not in stacks or not isinstance(call.x, fx.Node):
            return None
        assert weight is not None
        return weight, call.transposed != flipped, ExpertsCall("grouped", call.x, call.ends)
    pair = _product(node)
    if pair is None:
        return None
    left, right = pair
    for x, other, transposed in ((left, right, True), (right, left, False)):
        weight, flipped = through(other)
        if weight in stacks and transposed and _ndim(x) == 3:
            assert weight is not None
            return weight, transposed != flipped, ExpertsCall("stacked", x, None)
        found = _picked(other, stacks, through)
        if found is not None and _one_row(x, -2 if transposed else -1):
            weight, ids, flipped = found
            return weight, transposed != flipped, ExpertsCall("indexed", x, ids)
    return None


def read_block(node: fx.Node, stacks: Collection[fx.Node]) -> list[tuple[fx.Node, ExpertsCall]]:
    """The two stacks of the whole block that a node of the graph is, and how they are called, or nothing."""
    call = (
        spelling.read_block(node.target, node.args, dict(node.kwargs)) if node.op == "call_function" else None
    )
    if call is None or call.gate_up not in stacks or call.down not in stacks:
        return []
    return [
        (call.gate_up, ExpertsCall("gate_up", call.x, call.ids)),
        (call.down, ExpertsCall("down", call.x, call.ids)),
    ]


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(a, b) of a batched a @ b."""
    args = (*node.args, *node.kwargs.values())
    if spelling.call_name(node.target) in ("einsum", "aten.einsum"):
        equation, *args = args  # type: ignore[assignment]
        if len(args) == 1 and isinstance(args[0], (list, tuple)):
            args = tuple(args[0])
        if len(args) != 2 or not _is_product(equation):
            return None
    elif spelling.call_name(node.target) not in BMM or len(args) != 2:
        return None
    a, b = args
    return (a, b) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def _is_product(equation: Any) -> bool:
    """emk,ekn->emn, whatever the letters."""
    if not isinstance(equation, str):
        return False
    letters = [c for c in equation if c.isalpha()]
    e, m, k = dict.fromkeys(letters[:3]) if len(set(letters[:3])) == 3 else ("", "", "")
    n = letters[5] if len(letters) == 9 else ""
    return bool(n) and equation.replace(" ", "") == f"{e}{m}{k},{e}{k}{n}->{e}{m}{n}"


def _picked(node: Any, stacks: Collection[fx.Node], through: Through) -> tuple[fx.Node, fx.Node, bool] | None:
    """(W, ids, flipped) of W[ids], with one expert for each row."""
    picked, outer = through(node)
    if picked is None or picked.target not in PICKING or len(picked.args) != 2:
        return None
    weight, inner = through(picked.args[0])
    ids: Any = picked.args[1]
    if picked.target is aten.index.Tensor and len(ids) == 1:
        (ids,) = ids
    if weight not in stacks or not isinstance(ids, fx.Node) or _ndim(ids) != 1:
        return None
    assert weight is not None
    return weight, ids, outer != inner


def _one_row(x: fx.Node, dim: int) -> bool:
    return _ndim(x) == 3 and x.meta["example_value"].shape[dim] == 1


def _ndim(node: fx.Node) -> int:
    return getattr(node.meta.get("example_value"), "ndim", 0)


# --- what takes their place


def insert(
    gm: fx.GraphModule, call: ExpertsCall, inputs: Sequence[fx.Node | None], spec: LinearSpec
) -> tuple[fx.Node, fx.Node]:
    """The op on the canonical tensors, and the node with the shape of the call it replaces."""

    def op(form: str, x: fx.Node, which: fx.Node) -> fx.Node:
        target, rest = grouped.call(get_kernel("reference"), form, inputs, which, spec)
        return gm.graph.call_function(target, (x, *rest))

    function = gm.graph.call_function
    if call.form == "grouped":
        assert call.which is not None
        node = op("grouped", call.x, call.which)
        return node, node
    if call.form == "indexed":
        assert call.which is not None
        dim = 1 if call.x.meta["example_value"].shape[1] == 1 else 2
        node = op("indexed", function(aten.squeeze.dim, (call.x, dim)), call.which)
        return node, function(aten.unsqueeze.default, (node, dim))
    rows = function(aten.sym_size.int, (call.x, 1))
    count = function(operator.mul, (rows, spec.experts))
    stop = function(operator.add, (count, 1))
    device = {"device": call.x.meta["example_value"].device}
    ends = function(aten.arange.start_step, (rows, stop, rows), device)
    node = op("grouped", function(aten.reshape.default, (call.x, [-1, spec.in_features])), ends)
    return node, function(aten.reshape.default, (node, [spec.experts, rows, spec.out_features]))


def insert_block(
    gm: fx.GraphModule, node: fx.Node, stacks: Sequence[tuple[Sequence[fx.Node | None], LinearSpec]]
) -> fx.Node:
    """gptq::experts on the canonical tensors of both stacks, in place of gptq::quantized_experts."""
    call = spelling.read_block(node.target, node.args, dict(node.kwargs))
    assert call is not None
    reference = get_kernel("reference")
    tensors = [list(inputs) for inputs, _ in stacks]
    args = [list(reference.op_args(spec)) for _, spec in stacks]
    biases = (call.gate_up_bias, call.down_bias)
    arguments = (call.x, call.ids, call.weights, *tensors, *biases, call.activation, *args)
    return gm.graph.call_function(block.experts, (*arguments, reference.name, reference.name))


# --- whose rows they are

# Calls whose result has the rows of their first argument, in other places or more than once.
MOVES = {*PICKING, "index_select", "repeat", "repeat_interleave"}
STAYS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "contiguous"}
CASTS = {"to", "type_as", "float", "half", "bfloat16"}


def moves_to(x: fx.Node) -> list[fx.Node]:
    """The calls, in order, that make rows of experts x out of tokens; none where x is no such thing."""
    path: list[fx.Node] = []
    while _name(x) in MOVES | STAYS | CASTS and isinstance(x.args[0], fx.Node):
        path.append(x)
        x = x.args[0]
    moves = [n for n in path if _name(n) in MOVES]
    picks = all(_by_one_node(n.args[1]) for n in moves if n.target in PICKING)
    return path[::-1] if moves and picks else []


def _by_one_node(index: Any) -> bool:
    (index,) = index if isinstance(index, (list, tuple)) and len(index) == 1 else (index,)
    return isinstance(index, fx.Node)


def _name(node: fx.Node) -> Any:
    return node.target if node.target in PICKING else spelling.call_name(node.target)


def expert_rows(form: str, experts: int, x: torch.Tensor, which: torch.Tensor | None) -> list[torch.Tensor]:
    """The inputs [rows, K] of each expert, of those x of a call of that form; `which` as the call has it."""
    if which is None:
        return list(x)
    if form == "grouped":
        ends = which.tolist()
        return [x[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    rows = x.flatten(1)
    return [rows[which == e] for e in range(experts)]
