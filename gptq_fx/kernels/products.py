"""The dtype in which a device multiplies matrices fast."""

from __future__ import annotations

import torch

from gptq_fx.kernels.cpu import FAST_BF16


def fast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or a wider one where the device (its type) has only plain loops for it."""
    slow = device == "cpu" and dtype == torch.bfloat16 and not FAST_BF16
    return torch.float32 if slow else dtype
