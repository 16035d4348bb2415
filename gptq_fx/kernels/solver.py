"""What GPTQ does by kernels of its own on devices that have them; elsewhere plain torch does the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_fx.errors import KernelError
from gptq_fx.grid import Columns, Search, Static

# columns(W [E, N, K], U [E, K, K], importance [E, K], search, group_size, static): see gptq_fx/columns.py.
RoundColumns = Callable[[Tensor, Tensor, Tensor, Search, int, Static | None], Columns]


@dataclass(frozen=True)
class Solver:
    """available: None, or why this machine cannot run `columns`. Cheap.

    add_product: total [K, K] fp32 += a^T b, of a, b [T, K] in one dtype; what is of 16 bits stays so, but is
        summed up in fp32.
    columns: the column loop.
    """

    available: Callable[[], str | None]
    add_product: Callable[[Tensor, Tensor, Tensor], object]
    columns: RoundColumns


_SOLVERS: dict[str, Solver] = {}


def register_solver(device: str, solver: Solver) -> None:
    """Say how GPTQ runs on a device type. Raises KernelError if somebody did."""
    if device in _SOLVERS:
        raise KernelError(f"a solver for {device} is registered already")
    _SOLVERS[device] = solver


def solver_for(device: torch.device) -> Solver | None:
    """The solver of a device, or None: plain torch."""
    solver = _SOLVERS.get(device.type)
    return solver if solver is not None and solver.available() is None else None
