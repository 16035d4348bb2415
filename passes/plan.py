"""What the passes share beside the graph: the sites, and the packed weights the graph takes as inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision
from gptq_fx.errors import SchemeMismatchError
from gptq_fx.kernels import Kernel, LinearSpec
from gptq_fx.lazy import quantized
from gptq_fx.merged import merge
from gptq_fx.names import full_path
from gptq_fx.packed import Pack, PackedWeight
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Scheme


@dataclass(frozen=True)
class ExpertsCall:
    """A multiplication by a stack of experts W.

    form: "grouped": x [S, K], rows sorted by experts, `which` [E] says where those of each end.
        "indexed": bmm of W[which] with x [S, 1, K] or [S, K, 1]; `which` [S] has the expert of each row.
        "stacked": bmm of x [E, M, K] with W; `which` is None.
        "gate_up", "down": one of the two stacks of a whole block; `which` [T, k] has the experts of each row.
    """

    form: str
    x: fx.Node
    which: fx.Node | None


@dataclass(eq=False)
class Site:
    """A weight of the graph that is, or could be taken for, a linear.

    weight: placeholder of the parameter, [N, K], or [K, N] if `transposed`.
    kind: "linear", "lm_head", "router", ...; what rules go by. name: path, as the graph knows it.
    refusal: why it is no site that can be quantized, whatever the rules; "" where it is one.
    decision: what `choose` found.
    experts: how a stack of experts is called, where it is one.
    node: the call, where it is a linear; what it takes is read from it, since passes rewrite that.
    """

    weight: fx.Node
    kind: str
    name: str
    refusal: str = ""
    transposed: bool = False
    node: fx.Node | None = None
    experts: ExpertsCall | None = None
    decision: Decision | None = None

    @property
    def in_block(self) -> bool:
        """Whether it is one stack of a whole block of experts, between whose linears nothing has a place."""
        return self.experts is not None and self.experts.form in ("gate_up", "down")

    @property
    def scheme(self) -> Scheme | None:
        return self.decision.scheme if self.decision else None

    def quantized(self, weight: Tensor) -> PackedWeight:
        """The quantized form of a weight that the graph is called with at this site."""
        if type(weight) is QuantizedParameter:
            return weight.packed
        assert self.scheme is not None
        return quantized(weight, self.scheme, self.name, self.transposed)


@dataclass(eq=False)
class Operand:
    """A packed weight that the graph takes as extra inputs, resolved anew at every call.

    sites: whose weights it holds, merged along N in this order.
    node: the call that uses it. kernel: the layout of the inputs; sorted: by groups (see `reorder`).
    inputs: placeholders, one for each tensor of the pack, None where the pack has None.
    by_handle: the graph takes the handle of the pack in place of its tensors.
    """

    sites: tuple[Site, ...]
    node: fx.Node
    kernel: Kernel
    inputs: tuple[fx.Node | None, ...]
    sorted: bool = False
    by_handle: bool = False

    @property
    def taken(self) -> list[fx.Node]:
        """The inputs in the order in which the call has them."""
        arguments: list[Any] = []
        fx.node.map_arg(self.node.args, arguments.append)
        return [a for a in arguments if a in self.inputs]

    def packed(self, weights: Sequence[Tensor]) -> Pack:
        """The pack of these weights in the layout of the kernel, made now if need be.

        Every call of the compiled graph comes here for every operand, so that each line counts.
        """
        if len(weights) > 1:
            return self.owner(weights).pack
        return self.owner(weights).lower(self.kernel, self.sorted)

    def owner(self, weights: Sequence[Tensor]) -> PackedWeight:
        """The weight, or what several of them are parts of."""
        if len(weights) > 1:
            parts = [s.quantized(w) for s, w in zip(self.sites, weights, strict=True)]
            return merge(parts, self.kernel)
        return self.sites[0].quantized(weights[0])

    def tensors(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """What the graph takes for its inputs."""
        packed = self.packed(weights)
        if self.by_handle:
            return [self.owner(weights).handle]
        return [t for t in packed.call_tensors() if t is not None]


@dataclass(eq=False)
class Order:
    """An order of inputs that the graph takes as an extra input, resolved anew at every call.

    sites: whose weights are sorted so.
    """

    inputs: tuple[fx.Node, ...]
    sites: list[Site] = field(default_factory=list)

    def tensors(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The order of these weights. Raises SchemeMismatchError if they have several."""
        orders = [s.quantized(w).order for s, w in zip(self.sites, weights, strict=True)]
        first = orders[0]
        for other, weight, site in zip(orders, weights, self.sites, strict=True):
            if other is not first:
                names = [full_path(w, s.name) for w, s in ((weights[0], self.sites[0]), (weight, site))]
                raise SchemeMismatchError(
                    f"{names[0]} and {names[1]} differ in their act-order, but share a compiled graph with "
                    "weights that agree in it. Legal: one torch.compile for the whole model, or "
                    "options={'kernel': 'reference'}"
                )
        assert first is not None
        return [first]


@dataclass
class Plan:
    """The state of one graph on its way through the passes.

    kernel: name of the kernel that every site must take, or "auto".
    values: the real input of each placeholder that the tracer made.
    names: placeholder -> the paths of its parameter.
    explicit: the user gave options (they then apply to weights that `quantize` left dense).
    gradients: some input of the graph asks for a gradient.
    tables: ids of the weights of embeddings, which may stand in other graphs.
    skip: names of passes that do not run. dump: a folder to write the stages of the graph to, or None.
    """

    config: GPTQConfig
    kernel: str
    values: dict[fx.Node, Any]
    names: Callable[[fx.Node], tuple[str, ...]]
    explicit: bool = False
    gradients: bool = False
    tables: frozenset[int] = frozenset()
    skip: frozenset[str] = frozenset()
    dump: str | None = None
    sites: list[Site] = field(default_factory=list)
    operands: list[Operand] = field(default_factory=list)
    orders: list[Order] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._last_input = next(reversed(self.values), None)
        tensors = [v for v in self._example_values() if isinstance(v, Tensor)]
        self.fake_mode = detect_fake_mode(tensors)

    def _example_values(self) -> list[Any]:
        return [node.meta.get("example_value") for node in self.values]

    @property
    def trains(self) -> bool:
        """Whether gradients are to flow through the quantized linears. They do not where one of the weights
        itself asks for a gradient, which it would not get."""
        weights = [self.tensor(site.weight) for operand in self.operands for site in operand.sites]
        return self.gradients and not any(weight.requires_grad for weight in weights)

    def tensor(self, placeholder: fx.Node) -> Tensor:
        value = self.values[placeholder]
        assert isinstance(value, Tensor)
        return value

    def add_inputs(
        self, gm: fx.GraphModule, stem: str, tensors: Sequence[Tensor | None]
    ) -> tuple[fx.Node | None, ...]:
        """New placeholders behind the last one, for tensors (real or fake); None stays None."""
        added: list[fx.Node | None] = []
        for i, tensor in enumerate(tensors):
            if tensor is None:
                added.append(None)
                continue
            with gm.graph.inserting_after(self._last_input):
                node = gm.graph.placeholder(f"{stem}_{i}")
            node.target = node.name  # an argument of the graph's code; a weight may be taken by several calls
            node.meta["example_value"] = self._fake(tensor)
            # AOTAutograd reads both: where the input comes from, and that its address stays.
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
            node._dynamo_source = None
            added.append(node)
            self._last_input = node
        return tuple(added)

    def _fake(self, tensor: Tensor) -> Tensor:
        if self.fake_mode is None or isinstance(tensor, FakeTensor):
            return tensor
        return self.fake_mode.from_tensor(tensor, static_shapes=True)

    def specs(self, operand: Operand) -> list[LinearSpec]:
        """Of the weights of an operand, as they are packed."""
        found = [site.quantized(self.tensor(site.weight)).spec for site in operand.sites]
        return [spec.ordered for spec in found] if operand.sorted else found

    def add_order(self, gm: fx.GraphModule, order: Tensor) -> Order:
        (node,) = self.add_inputs(gm, f"order_{len(self.orders)}", [order])
        assert node is not None
        self.orders.append(Order((node,)))
        return self.orders[-1]

    def remove_inputs(self, gm: fx.GraphModule, operand: Operand) -> None:
        """Erase the placeholders of an operand that nothing uses any more."""
        for node in operand.inputs:
            if node is not None:
                self.remove_input(gm, node)
        operand.inputs = ()

    def remove_input(self, gm: fx.GraphModule, node: fx.Node) -> None:
        """Erase a placeholder that nothing uses any more."""
        if node is self._last_input:
            self._last_input = node.prev
        gm.graph.erase_node(node)
