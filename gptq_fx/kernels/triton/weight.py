"""A packed weight as the kernels are called with it, and the facts of the device that they ask for."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptq_fx.kernels.registry import Tensors


@dataclass(frozen=True)
class Packed:
    """The tensors of layout.py, of one weight or a stack."""

    w: Tensor
    high: Tensor | None
    scales: Tensor
    zeros: Tensor | None
    bits: int

    @classmethod
    def of(cls, tensors: Tensors, bits: int) -> Packed:
        w, high, scales, zeros = tensors
        assert w is not None and scales is not None
        return cls(w, high, scales, zeros, bits)

    @property
    def N(self) -> int:
        return self.w.shape[-2]

    @property
    def experts(self) -> int:
        return self.w.shape[0]

    def sizes(self, K: int) -> tuple[int, int, int, int, int]:
        """N, K, G, KB, group_size: what the kernels want to know."""
        groups = self.scales.shape[-2]
        return self.N, K, groups, self.w.shape[-3], K // groups

    def constants(self, K: int) -> dict[str, int]:
        """BITS, SLABS, RUN."""
        slabs = (32 if self.bits != 3 else 48) // self.bits
        groups = self.scales.shape[-2]
        run = slabs if groups == 1 else math.gcd(K // groups, 16 * slabs) // 16
        return {"BITS": self.bits, "SLABS": slabs, "RUN": run}


@dataclass(frozen=True)
class Tile:
    """BM rows by BN outputs (of gemv: BB blocks of K at a time), and options of the launch."""

    BN: int
    BM: int = 0
    BB: int = 0
    warps: int = 4
    stages: int = 3


@functools.cache
def processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 4  # Triton's interpreter


@functools.cache
def speaks_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    if x.device.type == "xpu" and x.device.index != torch.xpu.current_device():
        return torch.xpu.device(x.device)
    return nullcontext()


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
