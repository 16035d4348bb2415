"""What becomes of one model: its graphs, which matrices stay dense and why, and how right its outputs are."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from models import relative
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptq_fx
from gptq_fx import lazy, passes
from gptq_fx.names import names_by_id
from gptq_fx.observe import observe
from gptq_fx.passes import Plan

OPTIONS = {"bits": 8, "group_size": 32, "kernel": "reference", "inner_backend": "eager"}
# Kinds of matrices that are no linear's: tables are looked up, kernels are convolved.
NO_LINEAR = ("embedding", "conv")


@dataclass(frozen=True)
class Census:
    """graphs: how many the backend was given. sites: the matrices that are quantized in them.

    share: of the elements of all matrices that the model uses, tables and convolutions left out.
    dense: each matrix that is used and stays dense -> its kind, and the reason of the report.
    unknown: matrices that are used, but stand in no report.
    error8, error4: ||y - y_dense|| / ||y_dense|| of the model's first output at 8 and 4 bits.
    replay: the same of the compiled model against the uncompiled one with the same numbers, at 8 bits.
    seconds: of one CPU, for all of this.
    """

    graphs: int
    sites: tuple[str, ...]
    share: float
    dense: dict[str, tuple[str, str]]
    unknown: tuple[str, ...]
    error8: float
    error4: float
    replay: float
    seconds: float


def examine(model: nn.Module, inputs: dict[str, Any]) -> Census:
    """model: in eval mode and fp32; it is quantized in the end. Raises what running it anyhow raises.

    At 8 bits the compiled model rounds its dense weights itself; at 4 bits it was calibrated on the inputs.
    """
    start = time.process_time()
    torch._dynamo.reset()
    with _Used(model) as used:
        dense = run(model, inputs)
    told = _told(model, gptq_fx.explain(model, **inputs))
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.ndim >= 2 and n in used.names}

    with _plans() as plans:
        compiled = run(_Compiled(model), inputs)
    rounded = {name: made for name, p in model.named_parameters() if (made := _rounded(p)) is not None}
    uncompiled = run(_with(model, rounded), inputs)

    # Stages have an order only where there is one graph.
    config = gptq_fx.GPTQConfig(bits=4, group_size=32, sequential=len(plans) == 1)
    gptq_fx.quantize(model, config, [inputs], progress=False)
    calibrated = run(model, inputs)
    linear = {n: size for n, size in sizes.items() if n in rounded or told.get(n, ("",))[0] not in NO_LINEAR}
    return Census(
        len(plans),
        tuple(rounded),
        sum(size for n, size in linear.items() if n in rounded) / max(sum(linear.values()), 1),
        {n: told[n] for n in sizes if n in told and n not in rounded},
        tuple(n for n in sizes if n not in told),
        relative(compiled, dense),
        relative(calibrated, dense),
        relative(compiled, uncompiled),
        time.process_time() - start,
    )


def run(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """The first output that is a tensor of floats, by the same random numbers at every call."""
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = tree_leaves(model(**copy.deepcopy(inputs)))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


class _Compiled:
    """The model by our backend, from the graphs that `explain` had Dynamo make: it is slow at that."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.graphs: dict[torch.fx.GraphModule, Callable[..., Any]] = {}

    def __call__(self, **inputs: Any) -> Any:
        return observe(self.model, (), inputs, self._run)

    def _run(self, gm: torch.fx.GraphModule, args: tuple[Any, ...]) -> Any:
        if gm not in self.graphs:
            self.graphs[gm] = gptq_fx.backend(gm, args, options=OPTIONS)
        return self.graphs[gm](*args)


class _Used(TorchDispatchMode):
    """names: of the parameters that any op takes while this is on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.of = {id(p): name for name, p in model.named_parameters()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.names.update(self.of[id(leaf)] for leaf in leaves if id(leaf) in self.of)
        return func(*args, **(kwargs or {}))


@contextmanager
def _plans() -> Iterator[list[Plan]]:
    """The plan of every graph that the backend is given."""
    made: list[Plan] = []
    original = passes.run

    def recording(gm: torch.fx.GraphModule, plan: Plan, *args: Any) -> None:
        made.append(plan)
        original(gm, plan, *args)

    with mock.patch.object(passes, "run", recording):
        yield made


def _told(model: nn.Module, report: gptq_fx.Report) -> dict[str, tuple[str, str]]:
    """Parameter -> the kind and the reason that a report gives."""
    by_name = {site.name: (site.kind, site.reason) for site in report.sites}
    told: dict[str, tuple[str, str]] = {}
    for names in names_by_id(model).values():
        paths = [path for name in names if (path := name.removesuffix(".weight")) in by_name]
        for path in sorted(paths, key=lambda path: by_name[path][0] not in NO_LINEAR):
            told[names[0]] = by_name[path]  # of several, that of a linear
    return told


def _rounded(parameter: Tensor) -> Tensor | None:
    """What the compiled model multiplies by in place of the parameter, in the parameter's shape."""
    forms = lazy._FORMS.get(id(parameter))
    if forms is None or forms.parameter() is not parameter:
        return None
    ((_, transposed), packed), *rest = forms.by_scheme.items()
    assert not rest
    dense = packed.unpacked().dequantize()
    return dense.mT.contiguous() if transposed else dense


def _with(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A copy with other numbers in some of its weights."""
    twin = copy.deepcopy(model)
    for name, parameter in list(twin.named_parameters()):
        if name in weights:
            parameter.data = weights[name]
    return twin
