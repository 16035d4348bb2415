"""The passes from a graph of dense linears to a graph of quantized kernels.

    capture   one form of graph, whichever tracer made it         (before the pipeline: it makes the graph)
    match     which weights are linears, and what the others are
    choose    scheme and kernel of each, by the rules
    swap      linear -> gptq::linear
    reorder   act-order: g_idx of each weight -> one gather for each input
    fuse      gptq::linear x n on one input -> one
    attention attention on repeated keys and values -> on the keys and values
    lower     gptq::linear -> the op of the chosen kernel, on packed weights
    exported  a program of torch.export as a graph for these passes, and made of it again (around them)

A pass is a function of (GraphModule, Plan) that returns how many changes it made.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence

from torch import fx

from gptq_fx.passes.attention import attention
from gptq_fx.passes.choose import choose
from gptq_fx.passes.fuse import fuse
from gptq_fx.passes.lower import lower
from gptq_fx.passes.match import match
from gptq_fx.passes.plan import Plan
from gptq_fx.passes.reorder import reorder
from gptq_fx.passes.swap import swap
from gptq_fx.passes.verify import verify

Pass = Callable[[fx.GraphModule, Plan], int]

PIPELINE: tuple[Pass, ...] = (match, choose, swap, reorder, fuse, attention, lower)

OPTIONAL: tuple[Pass, ...] = (fuse, attention)

log = logging.getLogger(__name__)
_timings: dict[str, float] = {}


def run(gm: fx.GraphModule, plan: Plan, passes: Sequence[Pass] = PIPELINE) -> None:
    """Rewrite the graph in place. GPTQ_FX_SKIP=fuse,attention turns passes off (only these can be)."""
    skipped = os.environ.get("GPTQ_FX_SKIP", "").split(",")
    for step in passes:
        name = step.__name__
        if name in skipped and step in OPTIONAL:
            continue
        start = time.perf_counter()
        changes = step(gm, plan)
        verify(gm, plan)
        _timings[name] = _timings.get(name, 0.0) + time.perf_counter() - start
        log.info("%s: %d changes", name, changes)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", name, gm.graph)
    gm.recompile()


def timings() -> dict[str, float]:
    """Seconds spent in each pass since reset_timings."""
    return dict(_timings)


def reset_timings() -> None:
    _timings.clear()


__all__ = ["PIPELINE", "Pass", "Plan", "reset_timings", "run", "timings"]
