"""What holds while the bytes of weights are made: none of the caller's modes, and one thread at a time.

Whoever runs a model first packs its weights, in whatever mode and thread that happens to be.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_lock = threading.RLock()


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """No gradients, no autocast (which would round what weights are made of), and no inference mode
    (whose tensors autograd refuses later)."""
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        yield


def as_autocast(run: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """run(x) of a linear. Where autocast is on, the result has its dtype, as that of a dense linear has; it
    is computed in `dtype`, that of the quantized weight, which is all that kernels know."""
    device = x.device.type
    known = torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device)
    if not known or not torch.is_autocast_enabled(device):
        return run(x)
    with torch._C._DisableAutocast():
        return run(x.to(dtype)).to(torch.get_autocast_dtype(device))


@contextlib.contextmanager
def packing() -> Iterator[None]:
    """Plain modes, and no other thread that packs weights."""
    with _lock, plain():
        yield


def _unlock() -> None:
    """A forked process has only the thread that forked it: nobody would release the lock of another."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_unlock)
