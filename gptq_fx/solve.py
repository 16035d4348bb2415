"""Quantize the weights of one stage, whose inputs are known by their Hessians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from gptq_fx.gptq import Hessian, Result, Settings, gptq
from gptq_fx.grid import relative_error, round_to_nearest
from gptq_fx.linear import Linear, Measured, Quantized
from gptq_fx.ranks import ALONE, Ranks
from gptq_fx.weight import QuantizedWeight


def solve(linears: Sequence[Linear], hessian: Hessian, settings: Settings, ranks: Ranks = ALONE) -> None:
    """Rows of W do not know of each other: weights of one input are quantized as one, and cut apart.

    Each of the ranks does some rows.
    """
    start = time.perf_counter()
    device, scheme = hessian.matrix.device, linears[0].scheme
    assert scheme is not None
    dense = [linear.dense.to(device) for linear in linears]
    rows = torch.cat(dense)
    solved = gptq(rows[ranks.part(len(rows))], hessian, scheme, settings, dense[0].dtype)
    solved = _joined(solved, ranks, len(rows))
    seconds = (time.perf_counter() - start) / len(linears)
    first = 0
    for linear, W in zip(linears, dense, strict=True):
        part = slice(first, first := first + W.shape[0])
        zeros = None if solved.zeros is None else solved.zeros[:, part]
        weight = QuantizedWeight.from_codes(
            solved.codes[:, part], solved.scales[:, part], zeros, scheme.bits, solved.g_idx
        )
        loss = float(solved.error[part].sum() / solved.energy[part].sum().clamp_min(1e-30))
        measured = Measured(loss, hessian.tokens, solved.damp, seconds)
        error = relative_error(W, weight)
        linear.quantized = Quantized(weight.to(linear.parameter.device), error, measured)


def _joined(solved: Result, ranks: Ranks, rows: int) -> Result:
    """The rows of all ranks, which agree on g_idx and damp."""
    return replace(
        solved,
        codes=ranks.join(solved.codes, 1, rows),
        scales=ranks.join(solved.scales, 1, rows),
        zeros=None if solved.zeros is None else ranks.join(solved.zeros, 1, rows),
        error=ranks.join(solved.error, 0, rows),
        energy=ranks.join(solved.energy, 0, rows),
    )


def solve_experts(
    linear: Linear,
    hessians: Sequence[Hessian],
    settings: Settings,
    ranks: Ranks = ALONE,
    *,
    least: int,
    share: bool,
) -> None:
    """Each expert on the tokens that were routed to it; one that saw fewer than `least` is rounded
    to nearest. Each of the ranks does some experts.

    share: each on the tokens of all. Every token comes as often as experts take it, so that the sum of
    their Hessians is that of all tokens, but for a factor.
    """
    if share:
        hessians = [Hessian.sum(hessians)] * len(hessians)
    start = time.perf_counter()
    scheme, device = linear.scheme, hessians[0].matrix.device
    assert scheme is not None
    seen = [e for e, hessian in enumerate(hessians) if hessian.tokens >= least]
    starved = [e for e, hessian in enumerate(hessians) if hessian.tokens < least]
    unordered = replace(scheme, desc_act=False)
    found = {e: round_to_nearest(linear.dense[e], unordered, linear.name) for e in starved}
    error = energy = damp = 0.0
    if seen:
        mine = seen[ranks.part(len(seen))]
        solved = [
            gptq(linear.dense[e].to(device), hessians[e], scheme, settings, linear.dense.dtype) for e in mine
        ]
        stack = QuantizedWeight.stack(
            [QuantizedWeight.from_codes(r.codes, r.scales, r.zeros, scheme.bits, r.g_idx) for r in solved]
        )
        measures = [(float(r.error.sum()), float(r.energy.sum()), r.damp) for r in solved]
        joined = [None if t is None else ranks.join(t, 0, len(seen)) for t in stack.tensors]
        measures = ranks.join_list(measures, len(seen))
        stack = QuantizedWeight(scheme.bits, stack.in_features, *joined)  # type: ignore[arg-type]
        found |= {e: stack.expert(i).to(linear.parameter.device) for i, e in enumerate(seen)}
        tokens = [hessians[e].tokens for e in seen]
        error = sum(m[0] * t for m, t in zip(measures, tokens, strict=True))
        energy = sum(m[1] * t for m, t in zip(measures, tokens, strict=True))
        damp = max(m[2] for m in measures)
    parts = [found[e] for e in range(len(hessians))]
    if scheme.desc_act:
        parts = [_with_g_idx(part) for part in parts]
    weight = QuantizedWeight.stack(parts)
    seconds = time.perf_counter() - start
    total = hessians[0].tokens if share else sum(h.tokens for h in hessians)
    measured = Measured(error / max(energy, 1e-30), total, damp, seconds)
    note = ""
    if starved:
        named = ", ".join(map(str, starved))
        note = f"{len(starved)} of {len(parts)} experts saw fewer than {least} tokens: rounded: {named}"
    linear.quantized = Quantized(weight, relative_error(linear.dense, weight), measured, note)


def _with_g_idx(weight: QuantizedWeight) -> QuantizedWeight:
    """Where one expert is in act-order, all are: a stack has one layout."""
    if weight.g_idx is not None:
        return weight
    groups = torch.arange(weight.in_features, dtype=torch.int32, device=weight.scales.device)
    return replace(weight, g_idx=groups // weight.group_size)
