"""Time on a GPU: medians of CUDA graphs, with weights that are not in the L2 cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import Kernel, LinearSpec, Tensors
from gptq_fx.weight import pack_int32

DEVICE = "cuda"
COLD = 288 << 20  # bytes of weights that a graph walks over: several times an L2 cache


def copies(nbytes: int) -> int:
    """How many copies of a weight of this size are more than the L2 cache keeps."""
    return max(2, min(32, -(-COLD // nbytes)))


def microseconds(calls: Sequence[Callable[[], object]], budget_ms: float = 30.0) -> float:
    """One of the `calls` that a graph holds in turn: the median of as many replays as fit the budget."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
        calls[-1]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    replay()
    rounds = int(max(5, min(60, budget_ms / max(replay(), 1e-3))))
    return 1000 * median(replay() for _ in range(rounds)) / len(calls)


def random_weight(N: int, K: int, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> QuantizedWeight:
    """Random codes and scales on the GPU, such that x @ W^T of normal x is of the size of 1."""
    rng = torch.Generator(DEVICE).manual_seed(seed)
    size = K if scheme.group_size == -1 else scheme.group_size
    codes = torch.randint(0, 2**scheme.bits, (K, N), generator=rng, device=DEVICE, dtype=torch.uint8)
    scales = 0.75 + 0.5 * torch.rand(K // size, N, generator=rng, device=DEVICE)
    scales *= 3.4 / 2**scheme.bits / K**0.5
    zeros = None
    if not scheme.sym:
        zeros = torch.randint(
            0, 2**scheme.bits, scales.shape, generator=rng, device=DEVICE, dtype=torch.uint8
        )
        zeros = pack_int32(zeros.mT, scheme.bits).mT.contiguous()
    return QuantizedWeight(scheme.bits, K, pack_int32(codes, scheme.bits), scales.to(dtype), zeros)


def clones(tensors: Tensors, count: int) -> list[Tensors]:
    return [tensors] + [tuple(None if t is None else t.clone() for t in tensors) for _ in range(count - 1)]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def runnable(names: Sequence[str], spec: LinearSpec, every: Sequence[Kernel]) -> dict[str, Kernel]:
    """The kernels of these names (none: all of the device) that take the spec; says why the others do not."""
    found = {}
    for kernel in every:
        if kernel.device == spec.device and (not names or kernel.name in names):
            reason = kernel.refuses(spec)
            if reason is None:
                found[kernel.name] = kernel
            else:
                print(f"{kernel.name} does not take {list(spec.shape)} {spec.scheme}: {reason}", flush=True)
    return found
