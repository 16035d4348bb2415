"""One calibration: its batches, and what is known of each weight so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from gptq_fx.batches import Batch, valid_expert_rows, valid_rows
from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision, decide
from gptq_fx.errors import CalibrationError
from gptq_fx.gptq import Settings
from gptq_fx.grid import check_finite
from gptq_fx.hessian import Hessian, check
from gptq_fx.linear import Linear
from gptq_fx.parallel import gathered
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.passes import run as run_passes
from gptq_fx.passes.calibrate import Run, Stage, StagedGraph, Tap
from gptq_fx.passes.match import match
from gptq_fx.passes.plan import Plan, Site
from gptq_fx.passes.retarget import retarget
from gptq_fx.phases import phase
from gptq_fx.ranks import ALONE, Ranks
from gptq_fx.solve import solve, solve_experts, together
from gptq_fx.split import Split
from gptq_fx.streaming import Mover, Need, need

# The linears of one stage, by the ids of their parameters: graphs of other shapes have the same.
Key = tuple[int, ...]
# What linears took: one [tokens, K], or one for each expert.
Rows = Sequence[Tensor]
Take = Callable[[Key, Rows], None]
# Tokens that an expert must have seen, where the config does not say.
MIN_TOKENS = 1


@dataclass
class Job:
    """What both ways of calibration share: the batches, and the weights found so far."""

    names: dict[int, tuple[str, ...]]  # of parameters, by id
    batches: Sequence[Batch]
    config: GPTQConfig
    device: torch.device | str | None
    progress: bool
    ranks: Ranks = ALONE
    mover: Mover | None = None
    splits: Mapping[int, Split] = field(default_factory=dict)  # of parameters, by id
    linears: dict[int, Linear] = field(default_factory=dict)
    graphs: dict[fx.GraphModule, StagedGraph] = field(default_factory=dict)
    hessians: dict[Key, list[Hessian]] = field(default_factory=dict)
    shareable: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        c = self.config
        self.settings = Settings(
            c.damp_percent, c.act_group_aware, c.static_groups, c.scale_search, c.mse, c.gptaq
        )

    def stage(self, graph: fx.GraphModule, plan: Plan) -> StagedGraph:
        """The stages of a graph."""
        run_passes(graph, plan, [match])
        found = {site: self.find(site, plan.tensor(site.weight)) for site in plan.sites}
        if self.config.sequential:
            if self.mover is None:
                return StagedGraph(graph, plan, lambda site: found[site].scheme)
            retarget(graph, torch.device("cpu"), self.mover.device)
            return StagedGraph(
                graph, plan, lambda site: found[site].scheme, self.mover.here, self.mover.count
            )
        # This graph may be called with the weights of other layers, for which rules say otherwise.
        return StagedGraph(graph, plan, lambda site: None if site.refusal else "linear")

    def find(self, site: Site, weight: Tensor) -> Linear:
        """The record of a weight; that of a linear if it is one in any graph."""
        found = self.linears.get(id(weight))
        if found is None or (found.refused and not site.refusal):
            name, decision = self._name(site, weight), self._decide(site, weight)
            split = self.splits.get(id(weight))
            found = Linear(
                weight, name, site.kind, site.transposed, decision, bool(site.refusal), split=split
            )
            self.linears[id(weight)] = found
        return found

    def _name(self, site: Site, weight: Tensor) -> str:
        paths = [path.removesuffix(".weight") for path in self.names.get(id(weight), (site.name,))]
        return next((path for path in paths if path.endswith(site.name)), paths[0])

    def _decide(self, site: Site, weight: Tensor) -> Decision:
        if site.refusal:
            return Decision(None, None, site.refusal)
        name, split = self._name(site, weight), self.splits.get(id(weight))
        whole = weight if split is None else split.weight
        decision = decide(
            whole, name, site.kind, self.config, transposed=site.transposed, explicit=True, calibrated=True
        )
        if decision.scheme is not None and not isinstance(weight, QuantizedParameter):
            check_finite(gathered(whole), name)
        return decision

    def observe(self, run: Run, take: Take) -> Any:
        """Run a batch to the end, by the dense weights."""
        return run.graph.advance(run, None, self.tap(take), lambda weight: weight)

    def tap(self, take: Take) -> Tap:
        """Take what reaches linears whose weights are still to be quantized."""

        def see(run: Run, stage: Stage, x: fx.Node) -> None:
            pairs = zip(stage.sites, run.weights(stage), strict=True)
            linears = [self.find(site, weight) for site, weight in pairs]
            key = tuple(id(linear.parameter) for linear in linears if linear.waiting)
            call, batch = stage.sites[0].experts, self.batches[run.index]
            if stage.shareable:
                self.shareable.update(key)
            if key and call is not None:
                take(key, valid_expert_rows(run, call, linears[0].shape[0], batch))
            elif key:
                take(key, [valid_rows(run, x, batch)])

        return see

    def add(self, key: Key, index: int, rows: Rows, originals: Rows | None = None) -> None:
        """Add what the linears of a stage take in batch `index` to their Hessians, on one of its ranks."""
        first = self.linears[key[0]]
        if key not in self.hessians:
            device = self.device or first.parameter.device
            self.hessians[key] = [Hessian(first.shape[-1], device) for _ in rows]
        if len(first.shape) == 3:
            originals = None  # the dense model routes other tokens to the expert
        adder, split = self.ranks.adder(index), first.split
        if split is not None and split.inputs:
            rows = split.whole(rows, self.ranks, adder)
            originals = None if originals is None else split.whole(originals, self.ranks, adder)
        if adder != self.ranks.rank:
            return
        with phase("Hessian"):
            for i, (hessian, x) in enumerate(zip(self.hessians[key], rows, strict=True)):
                if len(x):
                    hessian.add(x, None if originals is None else originals[i], index)

    def need(self, key: Key) -> Need:
        """Bytes of a stage on the device."""
        linears = [self.linears[i] for i in key]
        shapes = [linear.shape for linear in linears]
        _, N, K = (1, *shapes[0]) if len(shapes[0]) == 2 else shapes[0]
        return need(linears[0].name, shapes, together(N, K), bool(self.settings.gptaq))

    def solve(self, key: Key, hessians: list[Hessian]) -> list[Linear]:
        """Quantize the weights of a stage; those of one scheme together."""
        linears = [self.linears[i] for i in key]
        with self.ranks.together():
            try:
                check(hessians)
            except CalibrationError as error:
                raise CalibrationError(f"{linears[0].name}: {error}") from None
        self.ranks.reduce(hessians)
        groups: dict[object, list[Linear]] = {}
        for linear in linears:
            groups.setdefault((linear.scheme, linear.parameter.dtype), []).append(linear)
        for group in groups.values():
            if len(group[0].shape) == 3:
                share = bool(self.config.route_all) and key[0] in self.shareable
                least = MIN_TOKENS if self.config.min_tokens is None else self.config.min_tokens
                for linear in group:
                    solve_experts(linear, hessians, self.settings, self.ranks, least=least, share=share)
            else:
                solve(group, hessians[0], self.settings, self.ranks)
        return linears
