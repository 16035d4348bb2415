"""Where the time of a calibration goes: forward, Hessian, factorize, quantize, pack, transfer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


class Phases:
    """seconds: name -> how long the device worked on it, as far as `settle` has come.

    Where work is queued on an accelerator, its events are read once a stage is done, so that nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[list[str], torch.Event, torch.Event]] = []
        self._within: list[str] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self.seconds.setdefault(name, 0.0)
        names = [name, *self._within[-1:]]
        self._within.append(name)
        try:
            if self.device.type == "cpu":
                start = time.perf_counter()
                yield
                self._add(names, time.perf_counter() - start)
                return
            first, last = (torch.Event(self.device, enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._open.append((names, first, last))
        finally:
            self._within.pop()

    def _add(self, names: list[str], seconds: float) -> None:
        self.seconds[names[0]] += seconds
        for outer in names[1:]:  # it counted them too
            self.seconds[outer] -= seconds

    def settle(self) -> None:
        """Wait for what was measured so far, and add it up."""
        for names, first, last in self._open:
            last.synchronize()
            self._add(names, first.elapsed_time(last) / 1000)
        self._open.clear()

    def __str__(self) -> str:
        """forward 7.9 s, Hessian 6.5 s, ..."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


_current: ContextVar[Phases | None] = ContextVar("gptq_fx_phases", default=None)


@contextmanager
def measuring(phases: Phases) -> Iterator[None]:
    """Let `phase` count for these."""
    token = _current.set(phases)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done here counts as `name`, where somebody measures; not as the phase that it is within."""
    phases = _current.get()
    if phases is None:
        yield
        return
    with phases.measure(name):
        yield


def settle() -> None:
    """Add up what was measured so far, where somebody measures."""
    phases = _current.get()
    if phases is not None:
        phases.settle()
