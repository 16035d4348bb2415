"""The Hessian of one input, summed up over calibration batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gptq_fx.errors import CalibrationError
from gptq_fx.kernels.solver import solver_for


class Hessian:
    """H of one input, summed up over batches.

    matrix: fp32 [K, K], sum of x x^T. drift: the same of x (x0 - x)^T, or None: no x0 was given.
    tokens: how many x they hold. traces: (batch, a number [] that is finite while all x are).
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(in_features, in_features, device=device)
        self.drift: Tensor | None = None
        self.tokens = 0
        self.traces: list[tuple[int, Tensor]] = []

    def add(self, x: Tensor, original: Tensor | None = None, batch: int = 0) -> None:
        """x [*, K] of any float dtype, and x0 of the dense model.

        Inputs of 16 bits are multiplied as they are where the device sums them up in fp32; x0 - x is then
        rounded to 16 bits too. Nothing waits for the device: `check` tells whether x were finite.
        """
        solver = solver_for(self.matrix.device)
        x = x.reshape(-1, x.shape[-1]).to(self.matrix.device)
        if solver is None or x.dtype not in (torch.bfloat16, torch.float16):
            x = x.float()
        add_product = _add_product if solver is None else solver.add_product
        add_product(self.matrix, x, x)
        self.tokens += x.shape[0]
        self.traces.append((batch, self.matrix.diagonal().sum()))
        if original is not None:
            if self.drift is None:
                self.drift = torch.zeros_like(self.matrix)
            add_product(self.drift, x, original.reshape(x.shape).to(x) - x)

    @staticmethod
    def sum(parts: Iterable[Hessian]) -> Hessian:
        """The Hessian of all inputs that the parts have seen."""
        parts = list(parts)
        if len(parts) == 1:
            return parts[0]
        total = Hessian(len(parts[0].matrix), parts[0].matrix.device)
        for part in parts:
            total.matrix += part.matrix
            total.tokens += part.tokens
            total.traces += part.traces
            if part.drift is not None:
                total.drift = part.drift if total.drift is None else total.drift + part.drift
        return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a.T, b)


def check(hessians: Sequence[Hessian]) -> None:
    """Raise CalibrationError, naming the batch, if there was NaN or Inf among the inputs."""
    batches = [batch for hessian in hessians for batch, _ in hessian.traces]
    traces = [trace for hessian in hessians for _, trace in hessian.traces]
    if not traces:
        return
    found = torch.stack(traces).tolist()
    bad = [(batch, x) for batch, x in zip(batches, found, strict=True) if not math.isfinite(x)]
    if bad:
        first = min(batch for batch, _ in bad)
        nan = any(math.isnan(x) for batch, x in bad if batch == first)
        raise CalibrationError(f"{'NaN' if nan else 'Inf'} among the activations, in batch {first}")
