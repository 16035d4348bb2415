"""capture: one form of graph, whichever tracer made it.

Dynamo gives linears as calls on placeholders of real parameters; `torch.fx.symbolic_trace` gives
call_module and get_attr. After this pass there are only placeholders, with example values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of the graph that may be rewritten, and one real input for each of its placeholders.

    Attributes of a symbolically traced module become placeholders behind the inputs; `lifted(gm)`
    gives their values at every call. Dynamo's own graph is never touched: Dynamo reads the metadata
    of its nodes after the backend returns.
    """
    if is_dynamo(gm):
        return _copy(gm), list(example_inputs)
    copied = _copy(gm)
    _inline_modules(copied)
    paths = _lift_attributes(copied)
    copied.meta["gptq_lifted"] = paths
    copied.meta["gptq_root"] = gm
    values = [*example_inputs, *(_attribute(gm, path) for path in paths)]
    _add_example_values(copied, values)
    return copied, values


def is_dynamo(gm: fx.GraphModule) -> bool:
    """Whether Dynamo made the graph: it says of every placeholder where it comes from."""
    return all(hasattr(n, "_dynamo_source") for n in gm.graph.nodes if n.op == "placeholder")


def lifted(gm: fx.GraphModule) -> list[Any]:
    """The values, now, of the placeholders that `capture` made of attributes."""
    root = gm.meta.get("gptq_root")
    return [_attribute(root, path) for path in gm.meta.get("gptq_lifted", ())]


def _attribute(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    old_to_new: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, old_to_new)
    output = graph.output(result)
    output.meta = next(n for n in reversed(gm.graph.nodes) if n.op == "output").meta.copy()
    for old, new in old_to_new.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
            # It holds weak references to parameters, which torch then cannot swap when a model is moved.
            new.meta.pop("grapharg", None)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        copied._param_name_to_source = dict(sources)  # type: ignore[assignment]
    return copied


def _inline_modules(gm: fx.GraphModule) -> None:
    """call_module of a linear becomes F.linear on its attributes."""
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        module = gm.get_submodule(node.target)
        if type(module) is not nn.Linear:
            continue
        with gm.graph.inserting_before(node):
            weight = gm.graph.get_attr(f"{node.target}.weight")
            args = [node.args[0], weight]
            if module.bias is not None:
                args.append(gm.graph.get_attr(f"{node.target}.bias"))
            call = gm.graph.call_function(nn.functional.linear, tuple(args))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)


def _lift_attributes(gm: fx.GraphModule) -> list[str]:
    """get_attr of a tensor becomes a placeholder; one for each attribute."""
    lifted_nodes: dict[str, fx.Node] = {}
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    last = placeholders[-1] if placeholders else None
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or not isinstance(_attribute(gm, node.target), Tensor):
            continue
        if node.target not in lifted_nodes:
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(node.target.replace(".", "_"))
            last.meta["gptq_path"] = node.target
            lifted_nodes[node.target] = last
        node.replace_all_uses_with(lifted_nodes[node.target])
        gm.graph.erase_node(node)
    return list(lifted_nodes)


def _add_example_values(gm: fx.GraphModule, values: Sequence[Any]) -> None:
    """node.meta["example_value"] for every node, as Dynamo leaves it."""
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            n.meta["example_value"] = result = super().run_node(n)
            return result

    with mode:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values]
        Recorder(gm).run(*fakes)
