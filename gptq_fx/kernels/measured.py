"""What kernels took on GPUs that were measured: the order of those that can run a weight follows from it.

Microseconds, by rows of x: sums over the linears of one layer of Llama-3.1-8B (q/k/v and gate/up merged),
bf16, symmetric, groups of 128, weights not in the L2 cache; all of one entry from the same run. Tables and
commands: examples/benchmarks/results/marlin.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from math import prod

import torch

# What kernels are scored on: decode of 1, 8 and 16 sequences, prefill of 2048 tokens. One that lacks a
# number, or stands alone, keeps its place.
MIX = (1, 8, 16, 2048)

Capability = tuple[int, int]
TIMES: dict[tuple[Capability, int], dict[str, dict[int, float]]] = {
    ((9, 0), 4): {
        "marlin": {1: 41.3, 8: 48.4, 16: 58.9},
        "humming": {1: 57.4, 8: 59.2, 16: 65.9},
    },
}


def scores(capability: Capability, bits: int) -> Mapping[str, float]:
    """The geometric mean of MIX for each kernel that has all of it: us, the smaller the better."""
    entry = TIMES.get((capability, bits), {})
    return {
        name: prod(times[rows] for rows in MIX) ** (1 / len(MIX))
        for name, times in entry.items()
        if all(rows in times for rows in MIX)
    }


@functools.cache
def capability() -> Capability | None:
    """Of the current NVIDIA GPU, None where there is none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability()
