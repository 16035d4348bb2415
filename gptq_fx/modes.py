"""What holds while the bytes of weights are made: none of the caller's modes, and one thread at a time.

Whoever runs a model first packs its weights, in whatever mode and thread that happens to be. And what holds
while they are used: autocast, and who watches the ops.
"""

from __future__ import annotations

import contextlib
import functools
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


# What a thread adds to the dispatch keys of its tensors while no mode is on: outside, and in inference mode.
_KEY, _KEYS = torch._C.DispatchKey, torch._C.DispatchKeySet
_QUIET = {
    (_KEYS(_KEY.BackendSelect) | _KEYS(_KEY.ADInplaceOrView)).raw_repr(),
    _KEYS(_KEY.BackendSelect).raw_repr(),
}


@functools.cache
def plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of a tensor on a type of device that is nothing but its storage: no subclass, and
    neither batched, functional, nested, sparse nor a negative view. One that was made in inference mode has
    fewer. To be asked while `quiet`: a mode would decide what is found, for the whole process."""
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


def quiet() -> bool:
    """Whether no dispatch mode, transform of torch.func or tracer is on in this thread."""
    return torch._C._dispatch_tls_local_include_set().raw_repr() in _QUIET


def are_plain(x: Tensor, bias: Tensor | None, keys: frozenset[int]) -> bool:
    """Whether the tensors are plain (`keys`). Where that holds while `quiet`, nobody could tell an op from
    the function behind it. Gradients are for the caller to ask about."""
    # One comparison each: this is done at every eager call of a linear.
    return torch._C._dispatch_keys(x).raw_repr() in keys and (
        bias is None or torch._C._dispatch_keys(bias).raw_repr() in keys
    )


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
