"""exported: the graph of torch.export as the passes want it, and the program made of it again.

Such a graph has placeholders for parameters, buffers and inputs as Dynamo's has, calls of aten, and a
signature that says what each placeholder is. What the passes take as extra inputs, resolved at every call
of a compiled graph, are buffers here: a program has its own weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from gptq_fx.experts import quantized_experts
from gptq_fx.handles import handle_block, handle_linear
from gptq_fx.passes.plan import Operand, Order, Plan


def capture_exported(program: ExportedProgram) -> fx.GraphModule:
    """A copy of the program's graph that may be rewritten; its placeholders take `input_values(program)`."""
    gm = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.PARAMETER:
            node.meta["gptq_path"] = spec.target
    _by_weight(gm)
    for node in gm.graph.nodes:
        if "val" in node.meta:
            node.meta["example_value"] = node.meta["val"]
    return gm


def _by_weight(gm: fx.GraphModule) -> None:
    """Calls by the handle of a QuantizedParameter, which mean nothing to another process, on the parameter.

    handle_linear(x, inner tensor of p, bias, N) -> linear(x, p, bias), and the same for blocks of experts.
    """
    for node in list(gm.graph.nodes):
        owners: list[Any] = [a.args[0] for a in node.args if isinstance(a, fx.Node) and _is_handle(a)]
        if node.target is handle_linear:
            (weight,) = owners
            if weight.meta["val"].transposed:
                with gm.graph.inserting_before(node):
                    weight = gm.graph.call_function(torch.ops.aten.t.default, (weight,))
            node.target, node.args = torch.ops.aten.linear.default, (node.args[0], weight, node.args[2])
        elif node.target is handle_block:
            node.target, node.args = quantized_experts, (*node.args[:3], *owners, *node.args[5:])
    for node in list(gm.graph.nodes):
        if _is_handle(node) and not node.users:
            gm.graph.erase_node(node)


def _is_handle(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target) == "export.access_subclass_inner_tensor.default"


def input_values(program: ExportedProgram) -> list[Any]:
    """For each placeholder its parameter, buffer or constant, or the fake input of the trace."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    values: list[Any] = []
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        value = node.meta.get("val")
        if spec.target is not None:
            held = program.state_dict if spec.target in program.state_dict else program.constants
            value = held[spec.target]
        if spec.kind is InputKind.PARAMETER and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        values.append(value)
    return values


def rebuild(
    program: ExportedProgram, graph: fx.GraphModule, plan: Plan, renamed: Mapping[str, str]
) -> ExportedProgram:
    """The rewritten graph with its signature; packed tensors become buffers, unused weights go."""
    state = dict(program.state_dict)
    signature = program.graph_signature
    specs = dict(zip(plan.values, signature.input_specs, strict=True))
    for weight in dict.fromkeys(site.weight for site in plan.sites if site.scheme is not None):
        _erase_unused(weight)
        if not weight.users:
            del specs[weight]
            graph.graph.erase_node(weight)
    kept = {spec.target for spec in specs.values() if spec.kind is InputKind.PARAMETER}
    state = {name: value for name, value in state.items() if name in kept or name not in signature.parameters}
    buffers: dict[fx.Node, InputSpec] = {}
    for node, name, tensor in _buffers(plan, state):
        state[name] = tensor
        buffers[node] = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
    lifted = [node for node, spec in specs.items() if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)]
    rest = [node for node in specs if node not in lifted]
    ordered = [*lifted, *buffers, *rest]
    for before, node in itertools.pairwise(ordered):
        before.append(node)
    all_specs = {**specs, **buffers}
    _add_values(graph, plan)

    def follow(spec: Any) -> Any:
        """A signature's argument by its node's present name."""
        name = getattr(spec, "name", "")
        return replace(spec, name=renamed[name]) if name in renamed else spec

    outputs = [replace(spec, arg=follow(spec.arg)) for spec in signature.output_specs]
    calls = [
        entry
        if entry.signature is None
        else replace(
            entry,
            signature=replace(
                entry.signature,
                inputs=[follow(a) for a in entry.signature.inputs],
                outputs=[follow(a) for a in entry.signature.outputs],
            ),
        )
        for entry in program.module_call_graph
    ]
    return ExportedProgram(
        root=graph,
        graph=graph.graph,
        graph_signature=ExportGraphSignature([all_specs[node] for node in ordered], outputs),
        state_dict=state,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _erase_unused(source: fx.Node) -> None:
    """Erase what was made of a node for a call that is no more, such as its transpose."""
    for user in list(source.users):
        _erase_unused(user)
        if not user.users and not user.is_impure():
            user.graph.erase_node(user)


def _buffers(plan: Plan, taken: Mapping[str, Any]) -> Iterator[tuple[fx.Node, str, Tensor]]:
    """(placeholder, name, tensor) of what the operands take; one for each tensor."""
    sources: list[Operand | Order] = [*plan.orders, *plan.operands]
    known: dict[int, fx.Node] = {}
    for source in sources:
        inputs = [node for node in source.inputs if node is not None]
        tensors = source.tensors([plan.tensor(site.weight) for site in source.sites])
        stem = _stem([plan.names(site.weight)[0] for site in source.sites])
        kind = source.kernel.name if isinstance(source, Operand) else "order"
        for i, (node, tensor) in enumerate(zip(inputs, tensors, strict=True)):
            first = known.setdefault(id(tensor), node)
            if first is not node:
                node.replace_all_uses_with(first)
                node.graph.erase_node(node)
                continue
            name = f"{stem}_{kind}_{i}"
            while name in taken:
                name += "_"
            yield node, name, tensor


def _stem(weights: Sequence[str]) -> str:
    """layers.0.q_proj.weight, layers.0.k_proj.weight -> layers.0.q_proj_k_proj"""
    paths = [weight.removesuffix(".weight").rpartition(".") for weight in weights]
    parent, dot, _ = paths[0]
    same = [leaf for other, _, leaf in paths if other == parent]
    return f"{parent}{dot}{'_'.join(same)}"


def follow_names(gm: fx.GraphModule) -> dict[str, str]:
    """A mapping that grows while nodes are replaced: name of the old one -> name of what took its place."""
    renamed: dict[str, str] = {}

    def follow(old: fx.Node, new: str, user: fx.Node) -> None:
        renamed[old.name] = new

    gm._register_replace_node_hook(follow)
    return renamed


def _add_values(gm: fx.GraphModule, plan: Plan) -> None:
    """node.meta["val"] of the nodes that passes added, as the program's own nodes have it.

    The output of a linear is told, not traced: a kernel that chooses by the number of rows would bind the
    program to the choice for those it was exported with.
    """
    linears = {
        o.node: sum(s.out_features for s in plan.specs(o))
        for o in plan.operands
        if o.node.target is o.kernel.op
    }
    mode = plan.fake_mode
    assert mode is not None
    for node in gm.graph.nodes:
        value = node.meta.pop("example_value", None)
        if "val" in node.meta or node.op in ("get_attr", "output"):
            continue
        if node.op == "placeholder":
            node.meta["val"] = value
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with mode:
            if node in linears:
                x = args[0]
                node.meta["val"] = x.new_empty(*x.shape[:-1], linears[node])
            else:
                node.meta["val"] = node.target(*args, **kwargs)
