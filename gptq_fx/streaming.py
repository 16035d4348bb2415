"""Streaming: calibrate on a device that the model does not fit, with what one stage needs at a time.

The weights of a stage are copied to the device when a node first reads them, and dropped at its end.
Between two stages the activations of all batches are in host memory; one batch at a time is on the device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gptq_fx.errors import ConfigError, OutOfMemoryError
from gptq_fx.passes.calibrate import Run
from gptq_fx.phases import phase

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# fp32 matrices [K, K] that factorizing a Hessian holds beside it, and, once it has left two of them, [N, K]
# that rounding a weight does.
FACTORS, COPIES = 5, 5


def parse_bytes(text: object) -> int:
    """ "8GB" -> 8 * 10**9. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)\s*", str(text), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found and isinstance(text, str) else 0
    if size <= 0:
        raise ConfigError(
            f"max_memory={text!r}. Legal: a number above 0 and KB, MB, GB, KiB, MiB or GiB, as in '8GB'"
        )
    return size


@dataclass(frozen=True)
class Need:
    """Bytes that a stage takes on the device, as far as its shapes tell.

    hessians: all the time. solving: what factorizing and rounding hold beside them, estimated.
    """

    stage: str
    hessians: int
    solving: int


def need(stage: str, shapes: Sequence[Sequence[int]], together: int, drift: bool) -> Need:
    """shapes: [N, K] of each weight of one input, or [E, N, K], of which `together` are solved at a time."""
    experts, K = (1 if len(shapes[0]) == 2 else shapes[0][0]), shapes[0][-1]
    rows = max(s[1] for s in shapes) if experts > 1 else sum(s[-2] for s in shapes)
    matrix = 4 * K * K
    return Need(
        stage,
        experts * matrix * (1 + (drift and experts == 1)),
        min(experts, together) * max(FACTORS * matrix, 2 * matrix + COPIES * 4 * rows * K),
    )


class Mover:
    """What is on the device during a stage, moved and counted. Hessians are elsewhere, but counted here.

    budget: bytes. peak: the most that was counted, of all stages.
    """

    def __init__(self, device: torch.device, budget: int) -> None:
        self.device, self.budget, self.peak = device, budget, 0
        self.need: Need | None = None
        self.moved: dict[int, tuple[Tensor, Tensor]] = {}
        self.beside: Sequence[Tensor] = ()
        self.counting, self._largest = True, -1

    def check(self, needs: Iterable[Need]) -> None:
        """Raise ConfigError, naming the stage that needs most, if that is more than there is."""
        most = max(needs, key=lambda n: n.hessians + n.solving, default=None)
        if most is not None and most.hessians + most.solving > self.budget:
            raise ConfigError(
                f"max_memory: {most.stage} needs {most.hessians + most.solving:,} bytes to be solved "
                f"({most.hessians:,} of them its Hessians), found {self.budget:,}. "
                f"Legal: at least as much, and room for one batch"
            )

    def begin(self, need: Need) -> None:
        """A new stage: the weights of the one before are dropped."""
        self.drop()
        self.need, self._largest = need, -1
        self.peak = max(self.peak, need.hessians + need.solving)

    def drop(self) -> None:
        """Forget the copies of weights."""
        self.moved.clear()

    def here(self, tensor: Tensor) -> Tensor:
        """The tensor on the device; copied once in a stage."""
        if id(tensor) not in self.moved:
            with phase("transfer"):
                self.moved[id(tensor)] = (tensor, tensor.detach().to(self.device))
        return self.moved[id(tensor)][1]

    def bring(self, run: Run, beside: Sequence[Tensor]) -> None:
        """The activations of a batch to the device. What shared its memory does so again.

        beside: what else is held there meanwhile. The largest batch so far is counted.
        """
        there: dict[int, torch.UntypedStorage] = {}

        def fetch(value: Any) -> Any:
            if not isinstance(value, _Parked):
                return value
            key = id(value.bytes)
            if key not in there:
                there[key] = value.bytes.to(self.device, non_blocking=True).untyped_storage()
            tensor = torch.empty(0, dtype=value.dtype, device=self.device)
            return tensor.set_(there[key], value.offset, value.shape, value.stride)

        with phase("transfer"):
            for node in _computed(run):
                run.env[node] = pytree.tree_map(fetch, run.env[node])
            run.tokens = {node: (count, fetch(numbers)) for node, (count, numbers) in run.tokens.items()}
        inputs = [v for v in run.inputs.values() if not isinstance(v, nn.Parameter)]
        size = _nbytes([*_tensors(inputs), *_tensors(run.env[n] for n in _computed(run)), *beside])
        self.beside, self.counting = beside, size > self._largest
        self._largest = max(size, self._largest)

    def park(self, run: Run) -> None:
        """The activations of a batch to host memory."""
        hosts: dict[int, Tensor] = {}

        def put(tensor: Tensor) -> _Parked:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in hosts:
                flat = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                pin = self.device.type != "cpu"
                host = torch.empty(len(flat), dtype=torch.uint8, pin_memory=pin)
                hosts[storage.data_ptr()] = host.copy_(flat, non_blocking=True)
            host = hosts[storage.data_ptr()]
            return _Parked(host, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())

        with phase("transfer"):
            for node in _computed(run):
                run.env[node] = pytree.tree_map_only(Tensor, put, run.env[node])
            run.tokens = {node: (count, put(numbers)) for node, (count, numbers) in run.tokens.items()}  # type: ignore[misc]

    def count(self, env: dict[fx.Node, Any]) -> None:
        """What is on the device once a node has run. Raise OutOfMemoryError if that is more than allowed.

        What a node takes while it runs, and gives back, is not seen.
        """
        if not self.counting:
            return
        assert self.need is not None
        computed = _tensors(value for node, value in env.items() if node.op != "placeholder")
        weights = [copy for _, copy in self.moved.values()]
        held = self.need.hessians + _nbytes([*weights, *computed, *self.beside])
        self.peak = max(self.peak, held)
        if held > self.budget:
            raise OutOfMemoryError(
                f"max_memory: {self.need.stage} needs {held:,} bytes and more for its weights and one batch "
                f"({self.need.hessians:,} of them its Hessians), found {self.budget:,}; the model is as it "
                "was. Legal: more; or batches of fewer tokens"
            )


@dataclass(frozen=True)
class _Parked:
    """A tensor in host memory, as a part of the bytes of what it shares its memory with."""

    bytes: Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


def _computed(run: Run) -> list[fx.Node]:
    return [node for node in run.env if node.op != "placeholder"]


def _nbytes(tensors: Sequence[Tensor]) -> int:
    """Of the memory that they hold; what they share counts once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]
