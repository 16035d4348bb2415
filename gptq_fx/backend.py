"""The Dynamo backend: rewrite the graph, hand it to the inner backend, resolve weights at every call."""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from gptq_fx import passes
from gptq_fx.config import GPTQConfig
from gptq_fx.decide import decide, restore_marks
from gptq_fx.errors import ConfigError, GPTQError, SchemeMismatchError
from gptq_fx.kernels import default_inner_backend
from gptq_fx.names import full_path, parameter_names, running_module
from gptq_fx.options import Options
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes import Plan
from gptq_fx.passes.capture import capture, is_dynamo, lifted
from gptq_fx.passes.plan import Operand, Order, Site
from gptq_fx.resolve import Resolver

log = logging.getLogger(__name__)


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """torch.compile(model, backend="gptq", options={...}).

    gm: a graph of Dynamo's, or of torch.fx.symbolic_trace. example_inputs: its real inputs.
    Returns a function of the graph's inputs. Weights that are still dense are quantized by rounding
    to nearest, and stay; `gptq_fx.quantize` replaces and frees them.
    Raises ConfigError on options that are not legal, KernelError where a demanded kernel cannot run,
    WeightError on NaN or Inf.
    """
    parsed = Options.parse(options, mode)
    graph, values = capture(gm, example_inputs)
    plan = make_plan(
        graph, values, parsed.config, kernel=parsed.kernel, explicit=parsed.explicit, root=running_module()
    )
    plan.skip, plan.dump = parsed.skip, parsed.dump
    passes.run(graph, plan)
    return Compiled(graph, plan, values, parsed)


def make_plan(
    graph: fx.GraphModule,
    values: Sequence[Any],
    config: GPTQConfig,
    *,
    root: nn.Module | None,
    kernel: str = "auto",
    explicit: bool = False,
) -> Plan:
    """root: the module by which a graph of Dynamo's has its parameters named."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    root = root if is_dynamo(graph) else None
    restore_marks(root)
    gradients = any(isinstance(v, Tensor) and v.requires_grad for v in values)
    embeddings = (m for m in root.modules() if isinstance(m, nn.Embedding)) if root else ()
    tables = frozenset(id(m.weight) for m in embeddings)
    return Plan(
        config,
        kernel,
        dict(zip(placeholders, values, strict=True)),
        parameter_names(graph, values, root),
        explicit,
        gradients and torch.is_grad_enabled(),
        tables,
    )


class Compiled:
    """The compiled graph. One graph may serve many layers, so that it holds no weight: the packs are
    looked up from the parameters of each call."""

    def __init__(self, graph: fx.GraphModule, plan: Plan, values: Sequence[Any], options: Options) -> None:
        position = {node: i for i, node in enumerate(plan.values)}
        self.lifted = graph if graph.meta.get("gptq_lifted") else None
        self.options = options
        order = {n: i for i, n in enumerate(graph.graph.nodes) if n.op == "placeholder"}
        sources: list[Operand | Order] = [*plan.orders, *plan.operands]
        sources.sort(key=lambda source: min(order[n] for n in source.inputs if n))
        inputs = [node for source in sources for node in source.inputs if node is not None]
        assert inputs == sorted(inputs, key=order.__getitem__)
        self.packs = Resolver([(s, tuple(position[site.weight] for site in s.sites)) for s in sources])
        swapped = {site.weight for operand in plan.operands for site in operand.sites}
        # A dense weight whose scheme hangs on its path: nothing guards it, so every new one is checked.
        self.watched: list[tuple[int, Site]] = []
        if options.config.by_path:
            self.watched = [
                (position[site.weight], site)
                for site in plan.sites
                if not site.refusal and not isinstance(plan.tensor(site.weight), QuantizedParameter)
            ]
        self.known = {id(w): weakref.ref(w) for w in (plan.tensor(s.weight) for _, s in self.watched)}
        dropped = {node for node in swapped if not node.users}
        for node in dropped:
            graph.graph.erase_node(node)
        # Where gradients flow, the graph is one for training; every other that holds quantized weights is
        # compiled for inference.
        self.infers = bool(plan.operands) and not plan.trains
        if self.infers:
            _drop_grad_modes(graph)
        graph.recompile()
        self.keep = [i for node, i in position.items() if node not in dropped]
        fakes = [node.meta["example_value"] for node in inputs]
        self.inner = self._compile(graph, [*(values[i] for i in self.keep), *fakes])
        if any(not isinstance(plan.tensor(node), QuantizedParameter) for node in swapped):
            _warn_of_dense_weights()

    def _compile(self, graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        with torch.no_grad() if self.infers else contextlib.nullcontext():
            name = self.options.inner_backend
            if name is None:
                name = default_inner_backend(v.device.type for v in inputs if isinstance(v, Tensor))
                log.info("inner backend: %s", name)
            compiled: Callable[..., Any] = _inner_backend(name, self.options.mode)(graph, inputs)
            return compiled

    def __call__(self, *args: Any) -> Any:
        if self.lifted is not None:
            args = (*args, *lifted(self.lifted))
        if self.watched:
            self._check(args)
        packs = self.packs(args)
        inputs = [args[i] for i in self.keep]
        if not self.infers or not torch.is_grad_enabled():
            return self.inner(*inputs, *packs)
        with torch.no_grad():
            outputs = self.inner(*inputs, *packs)
        return _refuse_backward(args, outputs)

    def _check(self, args: Sequence[Any]) -> None:
        for position, site in self.watched:
            weight = args[position]
            known = self.known.get(id(weight))
            if known is not None and known() is weight:
                continue
            name = full_path(weight, site.name)
            decision = decide(
                weight,
                name,
                site.kind,
                self.options.config,
                kernel=self.options.kernel,
                transposed=site.transposed,
                explicit=self.options.explicit,
            )
            if decision.scheme != site.scheme:
                raise SchemeMismatchError(
                    f"{name} is to be {decision.scheme or 'dense'}, but shares a compiled graph with "
                    f"{site.name}, which is {site.scheme or 'dense'}. Call gptq_fx.quantize(model, "
                    "config) before compiling: torch.compile then tells the two apart"
                )
            self.known[id(weight)] = weakref.ref(weight)


def _inner_backend(name: str, mode: str | None) -> Callable[..., Any]:
    if name == "inductor":
        # The way of torch.compile itself: makers of devices hook their part of Inductor in here.
        return torch._TorchCompileInductorWrapper(mode, None, None)
    try:
        return lookup_backend(name)
    except Exception as error:  # an entry point may import anything
        raise ConfigError(f"inner_backend {name!r} is registered, but does not load: {error}") from error


@functools.cache
def _warn_of_dense_weights() -> None:
    """Once in a process."""
    log.warning(
        "dense weights are quantized beside their dense form, which stays in memory; "
        "gptq_fx.quantize(model) would free it, gptq_fx.explain(model, ...) tells how much"
    )


def _drop_grad_modes(graph: fx.GraphModule) -> None:
    """A graph for inference must not turn gradients on again behind some no_grad of the model's."""
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            graph.graph.erase_node(node)


def _refuse_backward(args: Sequence[Any], outputs: Any) -> Any:
    """The outputs, as differentiable as Dynamo expects them, with a backward that explains itself."""
    anchor = next((a for a in args if isinstance(a, Tensor) and a.requires_grad), None)
    if anchor is None:
        return outputs
    marked = [
        _NoBackward.apply(anchor, out)  # type: ignore[no-untyped-call]
        if isinstance(out, Tensor) and out.is_floating_point()
        else out
        for out in outputs
    ]
    return type(outputs)(marked) if isinstance(outputs, (list, tuple)) else marked[0]


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise GPTQError(
            "backward through weights that are quantized while they are compiled, and ask for a gradient, "
            "which they do not get. Legal: model.requires_grad_(False), or gptq_fx.quantize(model), before "
            "compiling, which freeze them; torch.no_grad()"
        )
