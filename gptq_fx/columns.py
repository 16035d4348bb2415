"""The column loop of GPTQ in plain torch: on devices without a kernel for it, and what that is tested by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_fx.grid import BLOCK, Columns, Search, Static


def columns(
    W: Tensor, U: Tensor, importance: Tensor, search: Search, group_size: int, static: Static | None
) -> Columns:
    """W fp32 [E, N, K], columns in the order of work; used up. U [E, K, K]. importance [E, K], diag(H).

    Scales of a group are found when its first column is reached, unless they are static.
    """
    E = len(W)
    found = [
        _columns(
            W[e].T.contiguous(),
            U[e],
            importance[e],
            search,
            group_size,
            None if static is None else _expert(static, e),
        )
        for e in range(E)
    ]
    zeros = [one.zeros for one in found if one.zeros is not None]
    return Columns(
        search.bits,
        torch.stack([one.codes for one in found]),
        torch.stack([one.scales for one in found]),
        torch.stack(zeros) if zeros else None,
        torch.stack([one.loss for one in found]),
    )


def _expert(static: Static, e: int) -> Static:
    zeros = None if static.zeros is None else static.zeros[e]
    return Static(static.scales[e], zeros, static.group_of[e])


def _columns(
    W: Tensor, U: Tensor, importance: Tensor, search: Search, group_size: int, static: Static | None
) -> Columns:
    """One matrix, as W^T [K, N]: a column of W is then contiguous."""
    K, N = W.shape
    top, middle = 2**search.bits - 1, float(2 ** (search.bits - 1))
    codes = torch.empty(K, N, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(N, device=W.device)
    if static is None:
        scales = torch.empty(K // group_size, N, device=W.device)
        zeros = None if search.sym else torch.empty_like(scales)
        row_of = [i // group_size for i in range(K)]
    else:
        scales, zeros, row_of = static.scales, static.zeros, static.group_of.tolist()
    diagonal = U.diagonal().tolist()
    for start, stop in _spans(K, group_size):
        block, Ub = W[start:stop], U[start:stop, start:stop]
        Err = torch.empty_like(block)
        for i in range(start, stop):
            w, group, row = block[i - start], row_of[i], i - start
            if static is None and i % group_size == 0:
                ahead = slice(i, i + group_size)
                scales[group], own = search(W[ahead], importance[ahead])
                if zeros is not None and own is not None:
                    zeros[group] = own
            s = scales[group]
            z = middle if zeros is None else zeros[group]
            q = (w / s).round_().add_(z).clamp_(0, top)
            codes[i] = q
            error = torch.sub(w, q.sub_(z).mul_(s), out=Err[row]).div_(diagonal[i])
            block[row + 1 :].addr_(Ub[row, row + 1 :], error, alpha=-1)
        loss += Err.square().sum(0)
        W[stop:].addmm_(U[start:stop, stop:].T, Err, alpha=-1)
    return Columns(search.bits, codes, scales, zeros, loss)


def _spans(K: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most BLOCK columns; groups start where runs start, or lie within one."""
    span = group_size if group_size > BLOCK else BLOCK // group_size * group_size
    for first in range(0, K, span):
        last = min(first + span, K)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)
