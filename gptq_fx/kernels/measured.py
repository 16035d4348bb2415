"""What kernels took on GPUs that were measured: the order of those that can run a weight follows from it.

Microseconds, bf16, symmetric, groups of 128, weights not in the L2 cache; all of one entry from the same run.
Tables and commands: examples/benchmarks/results/marlin.md and gpu_moe.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from math import log, prod

import torch

# What kernels are scored on: decode of 1, 8 and 16 sequences, prefill of 2048 tokens. One that lacks a
# number, or stands alone, keeps its place.
MIX = (1, 8, 16, 2048)

Capability = tuple[int, int]
Times = Mapping[str, Mapping[int, float]]  # of each kernel, by rows of x

# Sums over the linears of one layer of Llama-3.1-8B, q/k/v and gate/up merged. By capability and bits.
TIMES: dict[tuple[Capability, int], Times] = {
    ((9, 0), 4): {
        "marlin": {1: 39.9, 8: 49.1, 16: 56.3, 2048: 1488.3},
        "humming": {1: 57.1, 8: 59.7, 16: 65.7, 2048: 1297.0},
    },
}
# Blocks of experts, by how many there are: those of Qwen3-30B-A3B and of Mixtral-8x7B.
BLOCKS: dict[tuple[Capability, int], dict[int, Times]] = {
    ((9, 0), 4): {
        128: {
            "marlin": {1: 14.6, 8: 47.4, 16: 93.8, 2048: 657.6},
            "humming": {1: 27.3, 8: 61.8, 16: 84.7, 2048: 486.1},
        },
        8: {
            "marlin": {1: 58.1, 8: 226.2, 16: 245.4, 2048: 2758.0},
            "humming": {1: 69.0, 8: 195.6, 16: 218.9, 2048: 2231.1},
        },
    },
}


def times(capability: Capability, bits: int, experts: int | None) -> Times:
    """Of one linear, or of the block whose number of experts is nearest, as a ratio."""
    if experts is None:
        return TIMES.get((capability, bits), {})
    blocks = BLOCKS.get((capability, bits), {})
    return blocks[min(blocks, key=lambda n: abs(log(n / experts)))] if blocks else {}


def scores(capability: Capability, bits: int, experts: int | None = None) -> Mapping[str, float]:
    """The geometric mean of MIX for each kernel that has all of it: us, the smaller the better."""
    return {
        name: prod(found[rows] for rows in MIX) ** (1 / len(MIX))
        for name, found in times(capability, bits, experts).items()
        if all(rows in found for rows in MIX)
    }


@functools.cache
def capability() -> Capability | None:
    """Of the current NVIDIA GPU, None where there is none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    return torch.cuda.get_device_capability()
