"""explain: what the backend would do with every weight of a model, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from gptq_fx.backend import make_plan
from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision, decide, marks_for_now
from gptq_fx.names import names_by_id
from gptq_fx.observe import observe
from gptq_fx.passes import run
from gptq_fx.passes.match import match
from gptq_fx.passes.plan import Site
from gptq_fx.report import Report
from gptq_fx.scheme import Rule
from gptq_fx.sketch import GraphRecord, sketch

EXPERTS_LOOP = (
    "experts in a Python loop, which breaks the graph: model.set_experts_implementation('grouped_mm') "
    "makes it one call"
)
UNREACHED = "no graph reached it: code that cannot be traced, or not used by these inputs"


def explain(model: nn.Module, *args: Any, config: GPTQConfig | None = None, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once, and report what `backend="gptq"` would do with each weight.

    Nothing is changed. Every graph is observed, also those that several layers share, and weights
    that no graph reaches are named. The graphs before and after the passes are in `report.graphs`, with
    stand-ins for what would be quantized. Raises KernelError and ConfigError as compiling would.
    """
    config = config or GPTQConfig()
    seen: list[tuple[Site, Tensor]] = []
    sites: dict[fx.GraphModule, list[tuple[Site, int]]] = {}
    graphs: list[GraphRecord] = []

    def note(gm: fx.GraphModule, values: tuple[Any, ...]) -> Any:
        if gm not in sites:
            sites[gm] = _sites(gm, values, model)
            graphs.append(sketch(gm, values, config, model))
        seen.extend((site, values[i]) for site, i in sites[gm])
        return gm.forward(*values)

    with marks_for_now(model), torch.no_grad():
        observe(model, args, kwargs, note)
        report = _report(model, seen, config)
    report.graphs = graphs
    return report


def _sites(gm: fx.GraphModule, values: tuple[Any, ...], model: nn.Module) -> list[tuple[Site, int]]:
    """What `match` finds in a graph, with the position of its weight among the inputs."""
    plan = make_plan(gm, values, GPTQConfig(), root=model)
    run(gm, plan, [match])
    position = {node: i for i, node in enumerate(plan.values)}
    return [(site, position[site.weight]) for site in plan.sites]


def _report(model: nn.Module, seen: Sequence[tuple[Site, Tensor]], config: GPTQConfig) -> Report:
    """One record for each use of a weight that was seen, and one for each matrix that was not."""
    names = names_by_id(model)
    report = Report()
    rules: set[Rule | None] = set()
    multiplied = {id(weight) for site, weight in seen if not site.refusal}
    done: set[tuple[str, str]] = set()
    for site, weight in seen:
        paths = [path.removesuffix(".weight") for path in names.get(id(weight), (site.name,))]
        name = next((path for path in paths if path.endswith(site.name)), paths[0])
        if (name, site.kind) in done or (site.refusal and id(weight) in multiplied):
            continue
        done.add((name, site.kind))
        decision = Decision(None, None, site.refusal)
        if not site.refusal:
            decision = decide(
                weight, name, site.kind, config, transposed=site.transposed, sortable=not site.in_block
            )
            rules.add(decision.rule)
        report.add(name, site.kind, weight, decision)
    reached = {id(weight) for _, weight in seen}
    for parameter in model.parameters():
        if parameter.ndim >= 2 and parameter.is_floating_point() and id(parameter) not in reached:
            path = names[id(parameter)][0]
            looped = hasattr(model.get_submodule(path.rpartition(".")[0]), "is_transposed")
            reason = EXPERTS_LOOP if looped and parameter.ndim == 3 else UNREACHED
            report.add(path.removesuffix(".weight"), "other", parameter, Decision(None, None, reason))
    report.note_unused(config, rules)
    report.note_lazy()
    return report
