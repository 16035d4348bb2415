"""What the launch op of humming-kernels computes, in plain torch: the kernel's ops run with it on the CPU.

Memory that the library would not write is left as NaN, so that who reads it is found out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from gptq_fx.kernels import LinearSpec, humming, humming_experts, humming_library
from gptq_fx.kernels.humming_layout import unpack
from gptq_fx.kernels.humming_library import Problem
from gptq_fx.scheme import Scheme

# The same kernel for tensors of the CPU, where the emulation is.
HERE = replace(humming.HUMMING, device="cpu", available=lambda: None, prepare=lambda specs: None)

TILE = 16
TRITON = "gptq_fx.kernels.humming_triton"


@dataclass(frozen=True)
class Table:
    configs: Problem

    def tile(self, rows: int) -> int:
        return TILE if self.configs.form == "indexed" else 0


def launch(
    problem,
    x,
    weight,
    scales,
    bs2,
    as_,
    as2,
    zeros,
    bias,
    out,
    rows,
    owners,
    used,
    layout,
    locks,
    top_k,
    M,
):
    assert x.is_contiguous()
    assert out.is_contiguous()
    assert M == out.shape[0] == x.shape[0] * top_k
    assert bs2 is as_ is as2 is bias is None
    group = problem.group_size or -1
    spec = LinearSpec(
        problem.in_features,
        problem.out_features - problem.padding,
        Scheme(problem.bits, group, not problem.zeros),
        problem.dtype,
        "cpu",
        problem.experts or None,
    )
    W = unpack((weight, scales, zeros), spec).dequantize(torch.float32)
    x = x.float()
    out.fill_(torch.nan) if layout is None else None
    if problem.form == "dense":
        out.copy_(x @ W.T)
    elif problem.form == "indexed":
        for tile in range(int(used) // TILE):
            mine = rows[tile * TILE : (tile + 1) * TILE].long()
            mine = mine[mine < out.shape[0]]
            out[mine] = (x[mine // top_k] @ W[owners[tile]].T).to(out.dtype)
    else:
        assert layout.shape == (problem.experts + 1,)
        for e, (start, stop) in enumerate(zip(layout[:-1].tolist(), layout[1:].tolist(), strict=True)):
            out[start:stop] = (x[start:stop] @ W[e].T).to(out.dtype)


def align(ids: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """humming_experts.align, in plain torch."""
    rows, owners = [], []
    for e in range(experts):
        mine = (ids == e).nonzero().flatten().tolist()
        for start in range(0, len(mine), tile):
            part = mine[start : start + tile]
            rows += part + [len(ids)] * (tile - len(part))
            owners.append(e)
    capacity = min(len(ids), len(ids) // tile + experts)
    used = len(owners) * tile
    rows += [len(ids)] * (capacity * tile - used)
    owners += [0] * (capacity - len(owners))
    return (*(torch.tensor(t, dtype=torch.int32) for t in (rows, owners, [used])),)


def activate(both, hidden, ids, bias, activation, experts):
    both = both.double()
    if bias is not None:
        both = both + bias.double()[ids.clamp(max=experts - 1)]
    hidden.copy_(act(both, activation))


def act(both: Tensor, activation: str) -> Tensor:
    """The documented function of ExpertOps.block."""
    if activation == "gpt_oss":
        gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = both.chunk(2, -1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def combine(y, ids, weights, bias, place, out, experts):
    y = y.double()
    if place is not None:
        y = y[place]
    if bias is not None:
        y = y + bias.double()[ids.clamp(max=experts - 1)]
    y = y.masked_fill((ids == experts)[:, None], 0)
    out.copy_((y.unflatten(0, weights.shape) * weights.double()[..., None]).sum(1))
    return out


@contextmanager
def emulated() -> Iterator[None]:
    triton = mock.Mock(activate=activate, combine=combine)
    with (
        mock.patch.object(humming_library, "launcher", lambda: launch),
        mock.patch.object(humming_library, "table", lambda key: Table(Problem(*key))),
        mock.patch.object(humming_library, "current_locks", lambda device: None),
        mock.patch.object(humming_experts, "align", align),
    ):
        # Not mock.patch.dict: that would forget every module that is imported meanwhile.
        before = sys.modules.get(TRITON)
        sys.modules[TRITON] = triton
        try:
            yield
        finally:
            del sys.modules[TRITON]
            if before is not None:
                sys.modules[TRITON] = before
