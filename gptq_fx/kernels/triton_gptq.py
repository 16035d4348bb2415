"""GPTQ on an NVIDIA GPU: 16-bit inputs multiplied into fp32, and the columns of a block in one kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from gptq_fx.grid import BLOCK, PARTS, Columns, Search, Static
from gptq_fx.kernels import triton
from gptq_fx.kernels.solver import Solver, register_solver

ROWS = 16  # outputs of one program: 4 for each warp, whose threads share the columns
CHUNK = 128  # columns that the search for scales looks at together


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a.mT, b)
    else:
        torch.addmm(total, a.mT, b, out_dtype=torch.float32, out=total)


def columns(
    W: Tensor, U: Tensor, importance: Tensor, search: Search, group_size: int, static: Static | None
) -> Columns:
    """See gptq_fx/columns.py. A block lies in one group: the search for its scale is a kernel apart."""
    from gptq_fx.kernels import triton_gptq_code as code
    from gptq_fx.kernels.triton.weight import on

    E, N, K = W.shape
    assert W.is_contiguous() and U.is_contiguous()
    codes = torch.empty(E, N, K, dtype=torch.uint8, device=W.device)
    loss = torch.zeros(E, N, device=W.device)
    if static is None:
        scales = torch.empty(E, K // group_size, N, device=W.device)
        zeros = None if search.sym else torch.empty_like(scales)
    else:
        scales, zeros = static.scales.contiguous(), static.zeros
        zeros = None if zeros is None else zeros.contiguous()
    group_of = None if static is None else static.group_of.contiguous()
    importance, parts = importance.contiguous(), _parts(W.device)
    programs = (-(-N // ROWS), E)
    spans = list(_blocks(K, group_size if static is None else BLOCK))
    width = 1 << max(4, (max(stop - start for start, stop in spans) - 1).bit_length())
    Err = torch.empty(E, N, width, device=W.device)
    groups = scales.shape[1]
    with on(W):
        for start, stop in spans:
            if static is None and start % group_size == 0:
                code.search[programs](
                    W, importance, parts, scales, zeros, start, N, K, groups, group_size, search.norm or 2.0,
                    BITS=search.bits, DTYPE=_NAMES[search.dtype], SQUARE=search.norm == 2.0,
                    PARTS=0 if search.norm is None else len(PARTS) + 1,
                    ROWS=ROWS, CHUNK=min(CHUNK, 1 << max(4, (group_size - 1).bit_length())), num_warps=4,
                )  # fmt: skip
            code.columns[programs](
                W, U, scales, zeros, group_of, codes, Err, loss,
                start, stop - start, N, K, groups, start // group_size,
                BITS=search.bits, ROWS=ROWS, WIDTH=width, num_warps=4,
            )  # fmt: skip
            if stop < K:
                W[:, :, stop:].baddbmm_(Err[:, :, : stop - start], U[:, start:stop, stop:], alpha=-1)
    return Columns(search.bits, codes.mT, scales, zeros, loss)


def _blocks(K: int, group_size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most BLOCK columns, none of which crosses the border of a group."""
    for first in range(0, K, group_size):
        last = min(first + group_size, K)
        for start in range(first, last, BLOCK):
            yield start, min(start + BLOCK, last)


_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@functools.cache
def _parts(device: torch.device) -> Tensor:
    return torch.tensor([1.0, *PARTS], device=device)


register_solver("cuda", Solver(triton.available, add_product, columns))
