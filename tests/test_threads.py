"""Threads and processes that share models: every number is right, whoever packs first."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import MLP, Stack, dense_twin, quantized, relative
from torch import Tensor, nn

import gptq_fx
from gptq_fx import modes
from gptq_fx.kernels import cpu, get_kernel, registry
from gptq_fx.lazy import quantized as lazily
from gptq_fx.merged import merge
from gptq_fx.packed import PackedWeight
from gptq_fx.resolve import Resolver
from gptq_fx.scheme import Scheme

X = torch.randn(3, 64)
int4 = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
THREADS = 4


def together(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the jobs return, all started at once, each in a thread of its own."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait()
        with torch.no_grad():
            return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [done.result() for done in [pool.submit(run, job) for job in jobs]]


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="gptq", options={"inner_backend": "eager", **options})


@pytest.fixture
def slow_packing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packing that lets other threads in; the name of each kernel that packed."""
    packed: list[str] = []
    pack_all = registry.Kernel.pack_all

    def slowly(self: registry.Kernel, *args: Any) -> Any:
        packed.append(self.name)
        time.sleep(0.05)
        return pack_all(self, *args)

    monkeypatch.setattr(registry.Kernel, "pack_all", slowly)
    return packed


def test_threads_compile_and_run_models_at_once() -> None:
    models = [quantized(MLP().requires_grad_(False))[0] for _ in range(THREADS)]
    wanted = [dense_twin(model) for model in models]

    def job(model: nn.Module, dense: nn.Module) -> float:
        run, worst = compiled(model), 0.0
        for n in (3, 5, 1, 7):
            x = torch.randn(n, 64)
            worst = max(worst, relative(run(x), dense(x)))
        return worst

    jobs = [lambda m=m, d=d: job(m, d) for m, d in zip(models, wanted, strict=True)]
    assert max(together(jobs)) <= 1e-5


@int4
def test_threads_run_one_model_by_different_kernels_and_in_eager() -> None:
    """Without care: tensors of one layout are read as those of the other."""
    model = MLP().to(torch.bfloat16).requires_grad_(False)
    gptq_fx.quantize(model, progress=False)
    dense, x = dense_twin(model), X.bfloat16()
    runs = [compiled(model, kernel="cpu_int4"), compiled(model, kernel="reference"), model]
    with torch.no_grad():
        wanted = dense(x)
        for run in runs:
            run(x)
    worst = together([lambda run=run: max(relative(run(x), wanted) for _ in range(40)) for run in runs])
    assert max(worst) <= 0.02


@int4
def test_a_pack_is_read_as_one_while_another_thread_replaces_it(slow_packing: list[str]) -> None:
    """The layout, the kernel and the tensors of a pack that was asked for are those that were asked for."""
    model, _ = quantized(nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16).requires_grad_(False))
    packed = model[0].weight.packed
    dense = packed.unpacked().dequantize()

    def job(name: str) -> bool:
        pack = packed.lower(get_kernel(name))
        same = torch.equal(pack.unpacked().dequantize(), dense)
        return pack.kernel.name == name and same

    assert all(together([lambda name=name: job(name) for name in ("cpu_int4", "reference") * 3]))


def test_a_dense_weight_is_rounded_once_for_all_threads(slow_packing: list[str]) -> None:
    weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    found = together([lambda: lazily(weight, Scheme(4, 32), "w", False) for _ in range(THREADS)])
    assert all(one is found[0] for one in found)
    assert slow_packing == ["reference"]


def test_siblings_are_merged_once_for_all_threads(slow_packing: list[str]) -> None:
    model, _ = quantized(MLP().requires_grad_(False))
    parts = [model.gate.weight.packed, model.up.weight.packed]
    found = together([lambda: merge(parts, get_kernel("reference")) for _ in range(THREADS)])
    assert all(whole is found[0] for whole in found)


def test_threads_run_different_layers_of_one_graph() -> None:
    """Without care: the weights of one layer are taken for the tensors of another."""
    stack = Stack(layers=THREADS).requires_grad_(False)
    gptq_fx.quantize(stack, progress=False)
    wanted = [dense_twin(layer) for layer in stack.layers]
    torch._dynamo.reset()
    for layer in stack.layers:
        layer.compile(backend="gptq", options={"inner_backend": "eager"})
    with torch.no_grad():
        for layer in stack.layers:
            layer(X)

    def job(layer: nn.Module, dense: nn.Module) -> float:
        return max(relative(layer(X), dense(X)) for _ in range(100))

    jobs = [lambda a=a, b=b: job(a, b) for a, b in zip(stack.layers, wanted, strict=True)]
    assert max(together(jobs)) <= 1e-5


def test_a_change_during_a_look_up_is_seen_at_the_next_call() -> None:
    """Without care: what was found before the change is remembered as what is right behind it."""
    model, _ = quantized(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False))
    weight = model[0].weight

    class Source:
        def tensors(self, weights: Sequence[Any]) -> list[Tensor]:
            found = [t for t in weights[0].packed.tensors if t is not None]
            if not seen:  # another thread, just now
                seen.append(found)
                pack = weights[0].packed.pack
                tensors = tuple(None if t is None else t.clone() for t in pack.tensors)
                weights[0].packed.pack = replace(pack, tensors=tensors)
            return found

    seen: list[list[Tensor]] = []
    resolver = Resolver([(Source(), (0,))])  # type: ignore[list-item]
    resolver([weight])
    for one, other in zip(resolver([weight]), weight.packed.call_tensors(), strict=False):
        assert one is other


def test_every_change_has_a_number_of_its_own() -> None:
    """Without care, two threads count one."""
    before = PackedWeight.changes
    together([lambda: [PackedWeight.count_change() for _ in range(2000)] for _ in range(THREADS)])
    PackedWeight.count_change()
    assert PackedWeight.changes == before + 2000 * THREADS + 1


# --- fork


def forked(job: Callable[[], bool], seconds: float = 60.0) -> bool:
    """What the job says in a forked process; False, too, if it hangs."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if job() else 1)
        finally:
            os._exit(2)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_runs_the_compiled_model() -> None:
    model, _ = quantized(MLP().requires_grad_(False))
    run, dense = compiled(model), dense_twin(model)
    with torch.no_grad():
        wanted = dense(X)
        run(X)

        def job() -> bool:
            new, _ = quantized(MLP().requires_grad_(False))  # and quantizes and compiles another
            right = relative(compiled(new)(X), dense_twin(new)(X)) <= 1e-5
            return right and relative(run(X), wanted) <= 1e-5

        assert forked(job)
        assert relative(run(X), wanted) <= 1e-5


@fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_is_forked_while_a_thread_packs_can_pack() -> None:
    """Without care: it waits for ever for the lock of a thread that it does not have."""
    model, _ = quantized(MLP().requires_grad_(False))
    held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with modes.packing():
            held.set()
            let_go.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(10)
        parts = [model.gate.weight.packed, model.up.weight.packed]
        assert forked(lambda: merge(parts, get_kernel("reference")).spec.out_features == 256, 20)
    finally:
        let_go.set()
        thread.join()
