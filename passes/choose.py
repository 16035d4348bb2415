"""choose: the scheme and the kernel of every site, by the rules."""

from __future__ import annotations

from torch import fx

from gptq_fx.decide import Decision, decide
from gptq_fx.passes.plan import Plan


def choose(gm: fx.GraphModule, plan: Plan) -> int:
    """Fill the decision of every site; how many get a scheme."""
    for site in plan.sites:
        if site.refusal:
            site.decision = Decision(None, None, site.refusal)
            continue
        site.decision = decide(
            plan.tensor(site.weight),
            site.name,
            site.kind,
            plan.config,
            kernel=plan.kernel,
            transposed=site.transposed,
            explicit=plan.explicit,
            sortable=not site.in_block and "reorder" not in plan.skip,
        )
    return sum(site.decision is not None and site.decision.scheme is not None for site in plan.sites)
