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
from collections.abc import Callable, Iterable, Sequence

from torch import fx

from gptq_fx.errors import ConfigError, unknown
from gptq_fx.passes import dump
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

# Passes that need not run, so that a wrong one can be found. Without `swap` nothing is replaced; without
# `reorder`, `choose` takes kernels that know act-order; without `lower`, all runs on the canonical tensors.
SKIPPABLE = tuple(step.__name__ for step in (swap, reorder, fuse, attention, lower))

log = logging.getLogger(__name__)
_timings: dict[str, float] = {}


def run(gm: fx.GraphModule, plan: Plan, passes: Sequence[Pass] = PIPELINE) -> None:
    """Rewrite the graph in place, with a file for each stage where plan.dump or GPTQ_FX_DUMP names a folder.

    Passes in plan.skip or in GPTQ_FX_SKIP=fuse,attention do not run. Raises ConfigError on a wrong name.
    """
    plan.skip |= checked_skip(filter(None, os.environ.get("GPTQ_FX_SKIP", "").replace(" ", "").split(",")))
    write = dump.Dump(plan.dump or os.environ.get(dump.VARIABLE))
    write("before", gm, plan)
    for step in passes:
        name = step.__name__
        if name in plan.skip:
            log.info("%s: skipped", name)
            continue
        start = time.perf_counter()
        changes = step(gm, plan)
        verify(gm, plan)
        _timings[name] = _timings.get(name, 0.0) + time.perf_counter() - start
        log.info("%s: %d changes", name, changes)
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s:\n%s", name, gm.graph)
        write(name, gm, plan)
    gm.recompile()


def checked_skip(names: Iterable[str]) -> frozenset[str]:
    """The names of passes, all of which can be skipped. Raises ConfigError."""
    given = frozenset(names)
    for name in sorted(given - set(SKIPPABLE)):
        if name not in {step.__name__ for step in PIPELINE}:
            raise unknown("pass", name, SKIPPABLE)
        raise ConfigError(
            f"pass {name!r} cannot be skipped: all others need what it finds. Legal: {', '.join(SKIPPABLE)}"
        )
    return given


def timings() -> dict[str, float]:
    """Seconds spent in each pass since reset_timings."""
    return dict(_timings)


def reset_timings() -> None:
    _timings.clear()


__all__ = ["PIPELINE", "SKIPPABLE", "Pass", "Plan", "checked_skip", "reset_timings", "run", "timings"]
