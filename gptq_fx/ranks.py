"""Calibration by several processes: who does what, and how it comes together.

Ranks that each hold the whole model run their share of the batches. Those that hold parts of one run all of
them together, and one of them adds each batch to its Hessians. Hessians are summed up over all ranks; each
rank then solves some outputs of a weight, or some experts of a stack, and gets the others'. What a rank
decides by, it has from a collective, which gives all ranks the same numbers: so they end with the same
integers. Against one process only the order of sums differs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from gptq_fx.errors import CalibrationError
from gptq_fx.hessian import Hessian
from gptq_fx.parameter import QuantizedParameter

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, of which this is number `rank`; one alone without a group.

    parts: each holds a part of one model, which they run together; otherwise each the whole of it.
    """

    group: Any = None
    parts: bool = False

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that this rank runs, dealt out in turn, or all."""
        return list(items) if self.parts else list(items[self.rank :: self.size])

    def adder(self, index: int) -> int:
        """The rank that adds to the Hessians what comes from the batch `index` of those it runs."""
        return index % self.size if self.parts else self.rank

    def part(self, count: int) -> slice:
        """Which of `count` rows this rank works on: all of them, where there is not one for each rank."""
        if count < self.size:
            return slice(0, count)
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def join(self, rows: Tensor, dim: int, count: int) -> Tensor:
        """The rows of `part` of all ranks, along `dim`: `count` in all."""
        if self.size == 1 or count < self.size:
            return rows
        most = -(-count // self.size)
        rows = rows.movedim(dim, 0)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        borders = [count * rank // self.size for rank in range(self.size + 1)]
        lengths = [stop - start for start, stop in itertools.pairwise(borders)]
        return torch.cat([p[:n] for p, n in zip(parts, lengths, strict=True)]).movedim(0, dim)

    def join_list(self, rows: list[T], count: int) -> list[T]:
        """`join` for small values that are no tensors."""
        return rows if self.size == 1 or count < self.size else self.gather(rows, flat=True)

    def collect(self, part: Tensor, widths: Sequence[int], to: int) -> list[Tensor]:
        """The [tokens, widths[rank]] of all ranks, on rank `to`; nothing on the others."""
        padded = functional.pad(part, (0, max(widths) - part.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in widths] if self.rank == to else None
        dist.gather(padded, parts, dst=dist.get_global_rank(self.group, to), group=self.group)
        return [p[:, :width] for p, width in zip(parts or (), widths, strict=bool(parts))]

    def reduce(self, hessians: Sequence[Hessian]) -> None:
        """Add up, in place, what all ranks have seen."""
        if self.size == 1:
            return
        drifts = any(self.gather([h.drift is not None for h in hessians], flat=True))
        for hessian in hessians:
            dist.all_reduce(hessian.matrix, group=self.group)
            if drifts:
                if hessian.drift is None:
                    hessian.drift = torch.zeros_like(hessian.matrix)
                dist.all_reduce(hessian.drift, group=self.group)
        tokens = torch.tensor([h.tokens for h in hessians], device=hessians[0].matrix.device)
        dist.all_reduce(tokens, group=self.group)
        for hessian, count in zip(hessians, tokens.tolist(), strict=True):
            hessian.tokens = count

    def gather(self, value: Any, flat: bool = False) -> list[Any]:
        """A small value of every rank; `flat`: lists, joined."""
        if self.size == 1:
            return value if flat else [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return [x for part in found for x in part] if flat else found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is done here succeeds on all ranks, or raises on all: none waits for one that failed.

        Raises CalibrationError on the ranks where nothing went wrong, with the error of the first other.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        if self.size > 1:
            said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
            failed = next((rank for rank, what in enumerate(said) if what is not None), None)
            if failed is not None and error is None:
                raise CalibrationError(f"rank {failed} failed: {said[failed]}")
        if error is not None:
            raise error

    def forward(self) -> contextlib.AbstractContextManager[None]:
        """`together`, for what runs the model.

        Where the model has collectives of its own, a rank that fails alone cannot tell those that wait in
        one: it ends, and whoever started the ranks ends them.
        """
        return contextlib.nullcontext() if self.parts else self.together()

    def check_same(self, what: str, value: Any) -> None:
        """Raise CalibrationError on every rank where the ranks do not have the same."""
        values = self.gather(value)
        other = next((rank for rank, found in enumerate(values) if found != values[0]), None)
        if other is not None:
            raise CalibrationError(f"rank {other} has other {what} than rank 0. Legal: the same everywhere")

    def check_replicas(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Raise CalibrationError where ranks have other weights, other batches, or nothing to do.

        Of parts of one model only the batches can be compared.
        """
        if self.size == 1:
            return
        with self.together():
            state = {} if self.parts else model.state_dict()
            weights = {name: _checksum(t) for name, t in state.items()}
            inputs = [{key: _checksum(value) for key, value in batch.items()} for batch in batches]
            if len(batches) < self.size and not self.parts:
                raise CalibrationError(
                    f"calibration: found {len(batches)} batches. Legal: one for each of {self.size} ranks"
                )
        self.check_same("weights", weights)
        self.check_same("batches", inputs)


# Integers as wide as the numbers of a tensor, by the bytes of one.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ALONE = Ranks()


def _checksum(value: Any) -> object:
    """The same for the same numbers on any machine: those of a tensor are added up as integers."""
    if not isinstance(value, Tensor) or isinstance(value, QuantizedParameter):
        return repr(value)
    flat = value.detach().contiguous().flatten()
    if flat.numel():
        flat = flat.view(INTEGERS[flat.element_size()])
    return str(value.dtype), tuple(value.shape), int(flat.sum(dtype=torch.int64))
