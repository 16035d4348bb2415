"""Quantize the weights of one stage, whose inputs are known by their Hessians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from gptq_fx.gptq import Hessian, Settings, gptq
from gptq_fx.grid import relative_error, round_to_nearest
from gptq_fx.linear import Linear, Measured, Quantized
from gptq_fx.weight import QuantizedWeight


def solve(linears: Sequence[Linear], hessian: Hessian, settings: Settings) -> None:
    """Rows of W do not know of each other: weights of one input are quantized as one, and cut apart."""
    start = time.perf_counter()
    device, scheme = hessian.matrix.device, linears[0].scheme
    assert scheme is not None
    dense = [linear.dense.to(device) for linear in linears]
    solved = gptq(torch.cat(dense), hessian, scheme, settings, dense[0].dtype)
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


def solve_experts(
    linear: Linear, hessians: Sequence[Hessian], settings: Settings, *, least: int, share: bool
) -> None:
    """Each expert on the tokens that were routed to it; one that saw fewer than `least` is rounded
    to nearest.

    share: each on the tokens of all. Every token comes as often as experts take it, so that the sum of
    their Hessians is that of all tokens, but for a factor.
    """
    if share:
        hessians = [Hessian.sum(hessians)] * len(hessians)
    start = time.perf_counter()
    scheme, device = linear.scheme, hessians[0].matrix.device
    assert scheme is not None
    starved, parts, error, energy, damp = [], [], 0.0, 0.0, 0.0
    for e, (W, hessian) in enumerate(zip(linear.dense, hessians, strict=True)):
        if hessian.tokens < least:
            starved.append(e)
            parts.append(round_to_nearest(W, replace(scheme, desc_act=False), linear.name))
            continue
        solved = gptq(W.to(device), hessian, scheme, settings, W.dtype)
        codes, scales, zeros = solved.codes, solved.scales, solved.zeros
        part = QuantizedWeight.from_codes(codes, scales, zeros, scheme.bits, solved.g_idx)
        parts.append(part.to(W.device))
        error += float(solved.error.sum()) * hessian.tokens
        energy += float(solved.energy.sum()) * hessian.tokens
        damp = max(damp, solved.damp)
    if scheme.desc_act:
        parts = [_with_g_idx(part) for part in parts]
    weight = QuantizedWeight.stack(parts)
    seconds = time.perf_counter() - start
    tokens = hessians[0].tokens if share else sum(h.tokens for h in hessians)
    measured = Measured(error / max(energy, 1e-30), tokens, damp, seconds)
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
