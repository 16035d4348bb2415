"""Quantize the weights of one stage, whose inputs are known by their Hessians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.gptq import Result, Settings, gptq, gptq_stack
from gptq_fx.grid import relative_error, round_to_nearest
from gptq_fx.hessian import Hessian
from gptq_fx.linear import Linear, Measured, Quantized
from gptq_fx.phases import phase
from gptq_fx.ranks import ALONE, Ranks
from gptq_fx.scheme import Scheme
from gptq_fx.shard import cut
from gptq_fx.weight import QuantizedWeight

# fp32 numbers of one matrix [E, K, K] or [E, N, K]: so many experts are solved together.
TOGETHER = 2**27


def together(N: int, K: int) -> int:
    """How many experts [N, K] are solved at a time."""
    return max(1, TOGETHER // (K * max(N, K)))


def solve(linears: Sequence[Linear], hessian: Hessian, settings: Settings, ranks: Ranks = ALONE) -> None:
    """Rows of W do not know of each other: weights of one input are quantized as one, and cut apart.

    Each of the ranks does some rows.
    """
    start = time.perf_counter()
    device, scheme = hessian.matrix.device, linears[0].scheme
    assert scheme is not None
    with phase("transfer"):
        dense = [linear.dense().to(device) for linear in linears]
    rows = torch.cat(dense)
    solved = gptq(rows[ranks.part(len(rows))], hessian, scheme, settings, dense[0].dtype)
    solved = _joined(solved, ranks, len(rows))
    seconds = (time.perf_counter() - start) / len(linears)
    first = 0
    with phase("pack"):
        for linear, W in zip(linears, dense, strict=True):
            part = slice(first, first := first + W.shape[0])
            zeros = None if solved.zeros is None else solved.zeros[:, part]
            weight = QuantizedWeight.from_codes(
                solved.codes[:, part], solved.scales[:, part], zeros, scheme.bits, solved.g_idx
            )
            loss = float(solved.error[part].sum() / solved.energy[part].sum().clamp_min(1e-30))
            measured = Measured(loss, hessian.tokens, solved.damp, seconds)
            error = relative_error(W, weight)
            linear.quantized = _kept(linear, weight, error, measured, ranks)


def _kept(
    linear: Linear, weight: QuantizedWeight, relative: float, measured: Measured, ranks: Ranks, note: str = ""
) -> Quantized:
    """The weight, or this rank's part of it, where the parameter is. Raises WeightError as `cut`."""
    scheme = linear.scheme
    assert scheme is not None
    if linear.split is not None:
        with ranks.together():
            try:
                weight, scheme = cut(weight, scheme, linear.split.part)
            except WeightError as error:
                raise WeightError(f"{linear.name}: {error}") from None
    return Quantized(weight.to(linear.parameter.device), scheme, relative, measured, note)


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
    start = time.perf_counter()
    scheme, device = linear.scheme, hessians[0].matrix.device
    assert scheme is not None
    dense = linear.dense()
    E, N, K = dense.shape
    tokens = [hessian.tokens for hessian in hessians]
    if share:
        hessians = [Hessian.sum(hessians)] * E
    seen = [e for e in range(E) if hessians[e].tokens >= least]
    starved = [e for e in range(E) if hessians[e].tokens < least]
    parts: dict[int, QuantizedWeight] = {
        e: round_to_nearest(dense[e], replace(scheme, desc_act=False), linear.name) for e in starved
    }
    mine, at_a_time = seen[ranks.part(len(seen))], together(N, K)
    stacks, measures = [], []
    for first in range(0, len(mine), at_a_time):
        some = mine[first : first + at_a_time]
        with phase("transfer"):
            W = torch.stack([dense[e].to(device) for e in some])
        solved = _solve_stack(W, [hessians[e] for e in some], scheme, settings, share)
        with phase("pack"):
            codes, scales, zeros = solved.codes, solved.scales, solved.zeros
            stacks.append(QuantizedWeight.from_codes(codes, scales, zeros, scheme.bits, solved.g_idx))
        losses = zip(solved.error.sum(1).tolist(), solved.energy.sum(1).tolist(), strict=True)
        measures += [(*loss, solved.damp) for loss in losses]
    error = energy = damp = 0.0
    if seen:
        tensors = [
            None if t[0] is None else torch.cat(t) for t in zip(*(s.tensors for s in stacks), strict=True)
        ]
        joined = [None if t is None else ranks.join(t, 0, len(seen)) for t in tensors]
        everyone = QuantizedWeight(scheme.bits, K, *joined)  # type: ignore[arg-type]
        stacked = everyone.to(linear.parameter.device)
        parts |= {e: stacked.expert(i) for i, e in enumerate(seen)}
        measures = ranks.join_list(measures, len(seen))
        counts = [hessians[e].tokens for e in seen]
        error = sum(m[0] * t for m, t in zip(measures, counts, strict=True))
        energy = sum(m[1] * t for m, t in zip(measures, counts, strict=True))
        damp = max(m[2] for m in measures)
    with phase("pack"):
        stack = [_with_g_idx(parts[e]) if scheme.desc_act else parts[e] for e in range(E)]
        weight = QuantizedWeight.stack(stack)
        relative = relative_error(dense, weight)
    seconds = time.perf_counter() - start
    measured = Measured(error / max(energy, 1e-30), sum(tokens), damp, seconds)
    note = ""
    if starved:
        named = ", ".join(map(str, starved))
        note = f"{len(starved)} of {E} experts saw fewer than {least} tokens: rounded: {named}"
    linear.quantized = _kept(linear, weight, relative, measured, ranks, note)


def _solve_stack(
    W: Tensor, hessians: Sequence[Hessian], scheme: Scheme, settings: Settings, share: bool
) -> Result:
    """gptq of W [E, N, K]; where they share their Hessian, as one matrix [E * N, K]."""
    if not share:
        return gptq_stack(W, hessians, scheme, settings, W.dtype)
    found = gptq(W.flatten(0, 1), hessians[0], scheme, settings, W.dtype)
    apart = (len(W), -1)
    return Result(
        found.codes.unflatten(1, apart).movedim(1, 0),
        found.scales.unflatten(1, apart).movedim(1, 0),
        None if found.zeros is None else found.zeros.unflatten(1, apart).movedim(1, 0),
        None if found.g_idx is None else found.g_idx.expand(len(W), -1),
        found.error.unflatten(0, apart),
        found.energy.unflatten(0, apart),
        found.damp,
    )


def _with_g_idx(weight: QuantizedWeight) -> QuantizedWeight:
    """Where one expert is in act-order, all are: a stack has one layout."""
    if weight.g_idx is not None:
        return weight
    groups = torch.arange(weight.in_features, dtype=torch.int32, device=weight.scales.device)
    return replace(weight, g_idx=groups // weight.group_size)
