"""inline: torch's attention becomes the calls that it is made of, among them its linears.

Dynamo keeps F.multi_head_attention_forward as one call that takes the weights of its projections. It is
run once more on the example values, and each call that it makes of torch becomes a node.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gptq_fx.spelling import ATTENTION, attention


class _Unknown(Exception):
    """Something that has no place in a graph."""


def inline(gm: fx.GraphModule, weights: Collection[fx.Node]) -> None:
    """Every attention on `weights`, in place. One that depends on sizes that are not known stays."""
    for node in list(gm.graph.nodes):
        if node.target is ATTENTION and any(n in weights for n in node.all_input_nodes):
            _inline(gm, node)


def _inline(gm: fx.GraphModule, node: fx.Node) -> None:
    parts = [user for user in node.users if user.users]
    with gm.graph.inserting_before(node), torch.no_grad():
        recorder = _Recorder(gm.graph, node)
        try:
            with recorder:
                outputs = attention(
                    *tree_map(recorder.value, node.args), **tree_map(recorder.value, node.kwargs)
                )
            if any(user.target is not operator.getitem for user in parts):
                raise _Unknown
            found = [recorder.argument(outputs[user.args[1]]) for user in parts]
            if not all(isinstance(new, fx.Node) for new in found):
                raise _Unknown
        except _Unknown:
            for new in reversed(recorder.made):
                gm.graph.erase_node(new)
            return
    for user, new in zip(parts, found, strict=True):
        user.replace_all_uses_with(new)
    for user in list(node.users):
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


class _Recorder(TorchFunctionMode):
    """Makes a node of every call that gives tensors. made: these nodes."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        super().__init__()
        self.graph, self.meta = graph, {k: v for k, v in node.meta.items() if k != "example_value"}
        self.made: list[fx.Node] = []
        self.nodes: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # so that no other value takes the id of one

    def value(self, argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        value = argument.meta.get("example_value")
        if value is None:
            raise _Unknown
        if isinstance(value, Tensor):
            self._know(value, argument)
        return value

    def argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self.nodes:
                raise _Unknown
            return self.nodes[id(value)]
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _Unknown
        return value

    def _know(self, value: Tensor, node: fx.Node) -> None:
        self.nodes.setdefault(id(value), node)
        self.kept.append(value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if func.__name__ == "__get__":
            raise _Unknown
        node = self._add(func, tree_map(self.argument, args), tree_map(self.argument, kwargs or {}), result)
        if isinstance(result, (list, tuple)):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._know(part, self._add(operator.getitem, (node, i), {}, part))
        else:
            self._know(result, node)
        return result

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        node = self.graph.call_function(func, tuple(args), dict(kwargs))
        node.meta.update({**self.meta, "example_value": result})
        self.made.append(node)
        return node
