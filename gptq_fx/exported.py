"""quantize_exported: the passes on the graph of torch.export, with the packed tensors as its buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from gptq_fx import passes
from gptq_fx.backend import make_plan
from gptq_fx.batches import bind
from gptq_fx.calibration import calibrate_graph
from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision
from gptq_fx.errors import ConfigError
from gptq_fx.grid import check_finite
from gptq_fx.kernels import get_kernel
from gptq_fx.linear import Linear
from gptq_fx.parameter import QuantizedParameter, as_parameter
from gptq_fx.passes import Plan
from gptq_fx.passes.choose import choose
from gptq_fx.passes.exported import capture_exported, follow_names, input_values, rebuild
from gptq_fx.passes.match import match
from gptq_fx.passes.plan import Site
from gptq_fx.progress import progress as with_progress
from gptq_fx.quantize import pack
from gptq_fx.report import Report
from gptq_fx.scheme import Scheme

REPORT = "gptq_report"  # where the graph module of the result keeps it, in `meta`


def quantize_exported(
    program: ExportedProgram,
    config: GPTQConfig | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    kernel: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = True,
) -> ExportedProgram:
    """A program with the linears of `program` (of torch.export.export) quantized, and lowered to kernels.

    Where the model was quantized before it was exported, its weights are taken as they are.

    The packed tensors are buffers of the result; the dense weights, which nothing uses any more, are left
    out. Inputs, outputs and dynamic shapes stay. `torch.export.save` writes it; a process that loads it
    has to import gptq_fx, which brings the ops. `program` is not changed.

    calibration: batches, dicts of all the program's inputs by the names of the arguments; tensors have the
        shapes that the program allows. None rounds to nearest.
    kernel: "auto", or the name every site must take.
    device: where to solve; the weights stay on their own.

    `result.graph_module.meta["gptq_report"]` is the Report.
    Raises ConfigError on what is no such program, or not legal; CalibrationError on batches that it does not
    take; WeightError on NaN or Inf in a weight; KernelError where no kernel, or not `kernel`, can run a site.
    """
    explicit = config is not None
    config = config or GPTQConfig()
    if kernel != "auto":
        get_kernel(kernel)
    _check(program)
    linears: dict[int, Linear] = {}
    with torch.no_grad():
        values = input_values(program)

        def plan_for(graph: fx.GraphModule) -> Plan:
            return make_plan(graph, values, config, root=None, kernel=kernel, explicit=explicit)

        if calibration is not None:
            graph = capture_exported(program)
            batches = bind(program, calibration, values)
            linears = calibrate_graph(graph, plan_for(graph), batches, device=device, progress=progress)
        graph = capture_exported(program)
        plan, renamed = plan_for(graph), follow_names(graph)
        decisions = _decide(graph, plan, linears)
        weights = {site: plan.tensor(site.weight) for site in plan.sites}
        _quantize(plan, decisions, linears, device, progress)
        passes.run(graph, plan, passes.PIPELINE[1:])
        result = rebuild(program, graph, plan, renamed)
    result.graph_module.meta[REPORT] = _report(plan, decisions, linears, weights)
    return result


def _check(program: object) -> None:
    if not isinstance(program, ExportedProgram):
        raise ConfigError(
            f"quantize_exported: found {type(program).__name__}. Legal: an ExportedProgram, as "
            "torch.export.export(model, args) returns it; gptq_fx.quantize takes a model"
        )
    report = program.graph_module.meta.get(REPORT)
    if report is not None:
        raise ConfigError(
            "quantize_exported: the program was made by quantize_exported. Legal: the one that was exported"
        )


def _decide(graph: fx.GraphModule, plan: Plan, linears: Mapping[int, Linear]) -> dict[Site, Decision]:
    """What happens to each weight: as calibration decided, where it saw the weight, else by the rules."""
    passes.run(graph, plan, [match, choose])
    decisions = {}
    for site in plan.sites:
        linear = linears.get(id(plan.tensor(site.weight)))
        assert site.decision is not None
        decisions[site] = site.decision if linear is None or site.refusal else linear.decision
    return decisions


def _quantize(
    plan: Plan,
    decisions: Mapping[Site, Decision],
    linears: Mapping[int, Linear],
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """QuantizedParameters in place of the dense values of the plan; a weight of several sites has one."""
    chosen = [
        site
        for site, decision in decisions.items()
        if decision.scheme is not None and not isinstance(plan.tensor(site.weight), QuantizedParameter)
    ]
    for site in chosen:
        check_finite(plan.tensor(site.weight), site.name)
    made: dict[tuple[int, bool, Scheme], QuantizedParameter] = {}
    for site in with_progress(chosen, "quantizing", show=progress):
        dense, scheme = plan.tensor(site.weight), decisions[site].scheme
        assert scheme is not None
        if isinstance(dense, QuantizedParameter):  # at another of its sites
            continue
        key = (id(dense), site.transposed, scheme)
        if key not in made:
            linear = linears.get(id(dense))
            calibrated = linear.quantized if linear is not None else None
            packed = pack(dense, scheme, site.name, site.transposed, calibrated, device)
            made[key] = as_parameter(QuantizedParameter(packed, site.name, site.transposed))
        plan.values[site.weight] = made[key]


def _report(
    plan: Plan,
    decisions: Mapping[Site, Decision],
    linears: Mapping[int, Linear],
    weights: Mapping[Site, Tensor],
) -> Report:
    """One record for each weight; `weights` has them as they were."""
    report = Report()
    uses = {(site.name, site.kind): (site, decision) for site, decision in decisions.items()}
    for site, decision in uses.values():
        linear = linears.get(id(weights[site]))
        measured = linear.quantized.measured if linear is not None and linear.quantized else None
        report.add(site.name, site.kind, plan.tensor(site.weight), decision, measured)
    report.note_unused(plan.config, {decision.rule for decision in decisions.values()})
    return report
