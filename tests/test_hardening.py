"""What long-lived programs do to a compiled model: modes, moves, resets, memory. Threads: test_threads.py."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    EXPERTS,
    MLP,
    CountingBackend,
    Stack,
    dense_twin,
    llama,
    logits,
    output,
    quantized,
    relative,
)
from torch import Tensor, nn

import gptq_fx
from gptq_fx.kernels import cpu, get_kernel
from gptq_fx.lazy import _FORMS
from gptq_fx.packed import PackedWeight, living

X = torch.randn(3, 64)
# Of results in bf16, on MLPs and tiny models.
CLOSE = 0.02
int4 = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Module:
    return MLP(bias=bias).to(dtype).requires_grad_(False)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="gptq", options={"inner_backend": "eager", **options})


@torch.no_grad()
def error(found: Callable[..., Tensor], wanted: Callable[..., Tensor], x: Tensor = X) -> float:
    return relative(found(x), wanted(x))


# --- modes of the caller


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["eager", "compiled", "compiled lazily", "aot"])
def test_under_autocast_a_linear_is_as_a_dense_one(how: str, dtype: torch.dtype) -> None:
    """Without care: the bias makes it fp32, and packing fp16 weights fails inside torch."""
    dense = mlp(dtype)
    model, _ = quantized(dense)
    wanted = dense_twin(model)
    inner = "aot_eager" if how == "aot" else "eager"
    run = model if how == "eager" else compiled(dense if "lazily" in how else model, inner_backend=inner)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = run(X.to(dtype))
        assert y.dtype == wanted(X.to(dtype)).dtype == torch.bfloat16
        assert relative(y, wanted(X.to(dtype))) <= CLOSE
    assert run(X.to(dtype)).dtype == dtype  # and without it as before
    assert error(run, wanted, X.to(dtype)) <= CLOSE


def test_autocast_casts_one_input_once(plans: list[Any]) -> None:
    """Two casts of one x would keep the linears of x apart: gate and up would not be one."""
    model, _ = quantized(mlp(torch.bfloat16))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = compiled(model)(X)
        assert relative(y, dense_twin(model)(X)) <= CLOSE
    assert sorted(len(o.sites) for o in plans[0].operands) == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_experts_under_autocast(inner: str, dtype: torch.dtype) -> None:
    """Without care: an index_put of two dtypes."""
    model, _ = quantized(EXPERTS["mixtral"].build(dtype, num_hidden_layers=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(logits(compiled(model, inner_backend=inner)), logits(dense_twin(model))) <= CLOSE


def test_weights_are_the_same_whatever_mode_they_are_made_in() -> None:
    """Autocast would round Hessians to bf16."""
    calibration = [{"x": torch.randn(8, 64)} for _ in range(4)]
    made = []
    for on in (False, True):
        torch.manual_seed(0)
        model = mlp()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            gptq_fx.quantize(model, gptq_fx.GPTQConfig(), calibration, progress=False)
        made.append(
            [p.packed.tensors for p in model.parameters() if isinstance(p, gptq_fx.QuantizedParameter)]
        )
    for one, other in zip(*made, strict=True):
        for s, t in zip(one, other, strict=True):
            assert s is t is None or torch.equal(s, t)


@pytest.mark.parametrize("lazily", [False, True])
def test_what_inference_mode_packs_can_be_used_outside(lazily: bool) -> None:
    """Without care: the packs are inference tensors, which autograd refuses to save."""
    model = mlp()
    with torch.inference_mode():
        if not lazily:
            gptq_fx.quantize(model, progress=False)
        run = compiled(model)
        inside = run(X)
    packs = [t for weight in living() for t in weight.tensors if t is not None]
    assert packs
    assert not any(t.is_inference() for t in packs)
    assert relative(run(X), inside.clone()) <= 1e-6
    if not lazily:
        x = X.clone().requires_grad_()
        model(x).sum().backward()  # eager: the gradient goes through the quantized linears
        assert x.grad is not None


@pytest.mark.parametrize("enter", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_one_compiled_model_runs_in_every_grad_mode(enter: Callable[[], Any]) -> None:
    """No care was needed beyond that of the backend: whichever comes first, the others follow."""
    model, _ = quantized(mlp())
    wanted, run = dense_twin(model), compiled(model)
    for mode in (enter, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert relative(run(X), wanted(X)) <= 1e-5


def test_a_default_device_moves_nothing_of_ours() -> None:
    """Without care: handles and tables are made on that device, here one that has no numbers."""
    models = [mlp(dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.device("meta"):
        for dense in models:
            dtype = next(dense.parameters()).dtype
            model, _ = quantized(dense)
            assert all(weight.handle.device.type == "cpu" for weight in living())
            for rows in (3, 40):
                x = torch.randn(rows, 64, device="cpu").to(dtype)
                assert error(compiled(model), dense_twin(model), x) <= CLOSE


# --- moves, dtypes, options, resets


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_compiled_model_can_be_moved(inner: str) -> None:
    """Without care: torch cannot swap parameters to which Dynamo's graph, or ours, has weak references."""
    model, _ = quantized(mlp())
    run = compiled(model, inner_backend=inner)
    assert error(run, dense_twin(model)) <= 1e-5
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        assert not any(weakref.getweakrefs(p) for p in model.parameters() if p.ndim == 2)
        model.to(dtype)
        wanted = dense_twin(model)
        with torch.no_grad():
            assert run(X.to(dtype)).dtype == dtype
        assert error(run, wanted, X.to(dtype)) <= (CLOSE if dtype == torch.bfloat16 else 1e-5)
    model.to("meta")
    assert run(X.to("meta", torch.bfloat16)).device.type == "meta"


def test_a_lazily_quantized_model_can_be_moved() -> None:
    """No care was needed: `parameter.data = ...` gives another address, by which the old form is known."""
    model = mlp()
    run = compiled(model)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert error(run, dense_twin(quantized(model)[0]), X.to(dtype)) <= (
            CLOSE if dtype == torch.bfloat16 else 1e-5
        )


@int4
def test_graphs_with_different_options_share_a_model() -> None:
    """Each has the layout of its own kernel whenever it runs, in whatever order, and so has eager code."""
    model, _ = quantized(mlp(torch.bfloat16))
    wanted, x = dense_twin(model), X.bfloat16()
    runs = [compiled(model, kernel=kernel) for kernel in ("cpu_int4", "reference")]
    for run in (*runs, model, *runs[::-1], model, *runs):
        assert error(run, wanted, x) <= CLOSE
    dense = mlp()
    bits = {b: (compiled(dense, bits=b), dense_twin(quantized(dense, bits=b)[0])) for b in (2, 4, 8)}
    for b in (2, 8, 4, 2, 8):
        assert error(*bits[b]) <= 1e-5


def test_after_a_reset_the_packs_are_the_old_ones() -> None:
    """No care was needed: packs belong to the parameters, not to the graphs."""
    model, _ = quantized(mlp())
    dense = dense_twin(model)
    error(compiled(model), dense)
    packs = [
        [id(t) for t in p.packed.tensors]
        for p in model.parameters()
        if isinstance(p, gptq_fx.QuantizedParameter)
    ]
    changes = PackedWeight.changes
    for _ in range(3):
        torch._dynamo.reset()
        assert error(compiled(model), dense) <= 1e-5
        assert packs == [
            [id(t) for t in p.packed.tensors]
            for p in model.parameters()
            if isinstance(p, gptq_fx.QuantizedParameter)
        ]
    assert PackedWeight.changes == changes


# --- shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_hundred_lengths_have_a_handful_of_graphs(kind: str, dtype: torch.dtype) -> None:
    """No care was needed: only kernels that choose by the rows (cpu_int4) add one to Dynamo's three."""
    model = llama(1, dtype) if kind == "llama" else EXPERTS[kind].build(dtype, num_hidden_layers=1)
    gptq_fx.quantize(model, progress=False)
    backend = CountingBackend()
    run = torch.compile(model, backend=backend)
    for n in range(100):
        logits(
            run, torch.randint(3, 90, (1, 1 + n * 37 % 60)) if n < 60 else torch.randint(3, 90, (2, n - 40))
        )
    assert backend.calls <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0, 3, 0), (3, 0, 40)])
def test_empty_batches(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """No care was needed here: kernels are asked for no rows in their contract, too."""
    model, _ = quantized(mlp(dtype))
    wanted, run = dense_twin(model), compiled(model)
    for n in rows:
        x = torch.randn(n, 64).to(dtype)
        for found in (run, model):
            assert found(x).shape == (n, 64)
            assert n == 0 or error(found, wanted, x) <= CLOSE


# --- memory


@pytest.mark.parametrize(("way", "lazily"), [("compiled", False), ("compiled", True), ("eager", False)])
def test_ten_thousand_calls_keep_nothing(way: str, lazily: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    if not lazily:
        gptq_fx.quantize(model, progress=False)
    run = compiled(model) if way == "compiled" else model

    def calls(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                run(X)
        gc.collect()

    calls(100)
    objects, weights = len(gc.get_objects()), len(living())
    tracemalloc.start()
    try:
        calls(10)
        before = tracemalloc.get_traced_memory()[0]
        calls(10_000)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 16 * 10_000  # no object is smaller than 16 bytes: no call has left one
    assert len(gc.get_objects()) - objects < 100
    assert len(living()) == weights


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("kind", ["quantized", "lazy", "shared graph"])
def test_the_packs_of_a_deleted_model_are_freed(kind: str, reset: bool) -> None:
    """Also while its compiled graph lives on, and the function that compiled it.

    Without care: names.running_module leaves a copy of the locals in this very frame.
    """
    gc.collect()
    others = {id(weight) for weight in living()}
    forms = len(_FORMS)
    model: nn.Module = Stack(2, broken=True).requires_grad_(False) if kind == "shared graph" else mlp()
    if kind != "lazy":
        gptq_fx.quantize(model, progress=False)
    run = compiled(model)
    output(run, {"x": X})  # type: ignore[arg-type]
    output(run, {"x": X})  # type: ignore[arg-type]
    mine = [weight for weight in living() if id(weight) not in others]
    tensors = [weakref.ref(t) for weight in mine for t in weight.tensors if t is not None]
    assert tensors
    del model, run, mine
    if reset:
        torch._dynamo.reset()
    gc.collect()
    assert not any(ref() is not None for ref in tensors)
    assert {id(weight) for weight in living()} <= others
    assert len(_FORMS) == forms


def test_a_replaced_layout_is_freed() -> None:
    model, _ = quantized(mlp())
    old = [weakref.ref(t) for t in model.gate.weight.packed.tensors if t is not None]
    error(compiled(model), model)  # gate and up become one pack
    gc.collect()
    assert model.gate.weight.packed.merged is not None
    assert all(ref() is None for ref in old)
    assert model.gate.weight.packed.lower(get_kernel("reference")).merged is not None


@pytest.mark.cuda
def test_cuda_graphs_give_the_memory_of_a_deleted_model_back() -> None:
    """Memory that the process keeps for good, such as cuBLAS's, is far less than the packs."""

    def allocated() -> int:
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    before = allocated()
    model = MLP(4096, 11008).requires_grad_(False).to("cuda", torch.bfloat16)
    gptq_fx.quantize(model, progress=False)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(model, backend="gptq", options={"mode": "reduce-overhead"})
    with torch.no_grad():
        for _ in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            y = run(x).clone()
    assert y.isfinite().all()
    parameters = [p for p in model.parameters() if isinstance(p, gptq_fx.QuantizedParameter)]
    packs = sum(p.nbytes for p in parameters)
    tensors = [weakref.ref(t) for p in parameters for t in p.packed.tensors if t is not None]
    assert packs > 60e6
    del model, run, parameters, x, y
    after = allocated()
    assert not any(ref() is not None for ref in tensors)
    assert after - before < packs / 2
