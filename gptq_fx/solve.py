"""Quantize the weights of one stage, whose inputs are known by their Hessians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gptq_fx.gptq import Result, Settings, gptq, gptq_stack
from gptq_fx.grid import relative_error, round_to_nearest
from gptq_fx.hessian import Hessian
from gptq_fx.linear import Linear, Measured, Quantized
from gptq_fx.phases import phase
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

# fp32 numbers of one matrix [E, K, K] or [E, N, K]: so many experts are solved together.
TOGETHER = 2**27


def together(N: int, K: int) -> int:
    """How many experts [N, K] are solved at a time."""
    return max(1, TOGETHER // (K * max(N, K)))


def solve(linears: Sequence[Linear], hessian: Hessian, settings: Settings) -> None:
    """Rows of W do not know of each other: weights of one input are quantized as one, and cut apart."""
    start = time.perf_counter()
    device, scheme = hessian.matrix.device, linears[0].scheme
    assert scheme is not None
    with phase("transfer"):
        dense = [linear.dense.to(device) for linear in linears]
    solved = gptq(torch.cat(dense), hessian, scheme, settings, dense[0].dtype)
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
            linear.quantized = Quantized(weight.to(linear.parameter.device), error, measured)


def solve_experts(
    linear: Linear, hessians: Sequence[Hessian], settings: Settings, *, least: int, share: bool
) -> None:
    """Each expert on the tokens that were routed to it; one that saw fewer than `least` is rounded
    to nearest.

    share: each on the tokens of all. Every token comes as often as experts take it, so that the sum of
    their Hessians is that of all tokens, but for a factor.
    """
    start = time.perf_counter()
    scheme, device = linear.scheme, hessians[0].matrix.device
    assert scheme is not None
    E, N, K = linear.dense.shape
    tokens = [hessian.tokens for hessian in hessians]
    if share:
        hessians = [Hessian.sum(hessians)] * E
    seen = [e for e in range(E) if hessians[e].tokens >= least]
    starved = [e for e in range(E) if hessians[e].tokens < least]
    parts: dict[int, QuantizedWeight] = {
        e: round_to_nearest(linear.dense[e], replace(scheme, desc_act=False), linear.name) for e in starved
    }
    error, energy, damp = 0.0, 0.0, 0.0
    at_a_time = together(N, K)
    for first in range(0, len(seen), at_a_time):
        some = seen[first : first + at_a_time]
        with phase("transfer"):
            W = torch.stack([linear.dense[e].to(device) for e in some])
        solved = _solve_stack(W, [hessians[e] for e in some], scheme, settings, share)
        with phase("pack"):
            weight = QuantizedWeight.from_codes(
                solved.codes, solved.scales, solved.zeros, scheme.bits, solved.g_idx
            ).to(linear.parameter.device)
            parts |= {e: weight.expert(i) for i, e in enumerate(some)}
        counts = torch.tensor([float(hessians[e].tokens) for e in some], device=device)
        error += float(solved.error.sum(1) @ counts)
        energy += float(solved.energy.sum(1) @ counts)
        damp = max(damp, solved.damp)
    with phase("pack"):
        stack = [_with_g_idx(parts[e]) if scheme.desc_act else parts[e] for e in range(E)]
        weight = QuantizedWeight.stack(stack)
        relative = relative_error(linear.dense, weight)
    seconds = time.perf_counter() - start
    measured = Measured(error / max(energy, 1e-30), sum(tokens), damp, seconds)
    note = ""
    if starved:
        named = ", ".join(map(str, starved))
        note = f"{len(starved)} of {E} experts saw fewer than {least} tokens: rounded: {named}"
    linear.quantized = Quantized(weight, relative, measured, note)


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
