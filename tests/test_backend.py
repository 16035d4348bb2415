"""backend: the hand-over to the inner backend, and what callers see."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from models import MLP, dequantized, llama, logits, output, relative
from torch import Tensor, nn

import gptq_fx

X = torch.randn(3, 64)


def mlp() -> nn.Module:
    return MLP(bias=True).requires_grad_(False)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_inner_backends_agree(inner: str) -> None:
    model = mlp()
    found = output(torch.compile(model, backend="gptq", options={"inner_backend": inner}), {"x": X})
    assert relative(found, output(dequantized(model), {"x": X})) <= 1e-5


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The config_patches of each call of Inductor's compile_fx, which compiles nothing."""
    seen: list[Any] = []

    def compile_fx(gm: torch.fx.GraphModule, inputs: list[Tensor], config_patches: Any, **more: Any) -> Any:
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


def test_mode_is_passed_on_to_inductor(handed: list[Any]) -> None:
    for settings in (
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"mode": "max-autotune-no-cudagraphs"}},
        {"options": {"bits": 8}},
        {"mode": "default"},
    ):
        torch._dynamo.reset()
        output(torch.compile(mlp(), backend="gptq", **settings), {"x": X})  # type: ignore[call-overload]
    assert handed[0] == handed[1] == torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert handed[0]
    assert not handed[2]
    assert not handed[3]


def test_inductor_is_the_default(handed: list[Any]) -> None:
    output(torch.compile(mlp(), backend="gptq"), {"x": X})
    assert handed == [{}]


def test_the_entry_point_needs_no_import() -> None:
    script = """
import sys, torch
assert "gptq" in torch._dynamo.list_backends(exclude_tags=())
assert "gptq_fx" not in sys.modules
torch.manual_seed(0)
model = torch.nn.Linear(64, 64).requires_grad_(False)
x = torch.randn(3, 64)
y = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(x)
assert "gptq_fx" in sys.modules
error = (y - model(x)).norm() / model(x).norm()
assert 0.01 < error < 0.3, error
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_different_options_compile_anew() -> None:
    model = mlp()
    for bits in (2, 8):
        options = {"inner_backend": "eager", "bits": bits}
        found = output(torch.compile(model, backend="gptq", options=options), {"x": X})
        assert relative(found, output(dequantized(model, bits=bits), {"x": X})) <= 1e-5


@pytest.mark.parametrize("dynamic", [None, True])
def test_shapes_may_change(dynamic: bool | None) -> None:
    model = llama(1)
    wanted = dequantized(model)
    compiled = torch.compile(model, backend="gptq", options={"inner_backend": "eager"}, dynamic=dynamic)
    for shape in ((1, 8), (1, 9), (2, 11), (3, 1)):
        tokens = torch.randint(3, 90, shape)
        assert relative(logits(compiled, tokens), logits(wanted, tokens)) <= 1e-5


def test_a_graph_without_linears_is_passed_on() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(64))
    x = X.clone().requires_grad_()
    y = torch.compile(model, backend="gptq", options={"inner_backend": "aot_eager"})(x)
    y.sum().backward()
    assert x.grad is not None  # nothing was replaced: gradients are as ever
    assert relative(y.detach(), model(X).detach()) <= 1e-6


def test_a_graph_without_inputs_is_passed_on() -> None:
    def function() -> Tensor:
        return torch.arange(5) * 2

    found = torch.compile(function, backend="gptq", options={"inner_backend": "eager"})()
    assert found.tolist() == [0, 2, 4, 6, 8]


def test_inference_mode() -> None:
    model = mlp()
    compiled = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})
    with torch.inference_mode():
        assert relative(compiled(X), output(dequantized(model), {"x": X})) <= 1e-5
        inside = mlp()
        found = torch.compile(inside, backend="gptq", options={"inner_backend": "eager"})(X)
        assert found.isfinite().all()


def test_other_backends_run_a_quantized_model() -> None:
    model = mlp()
    wanted = output(dequantized(model), {"x": X})
    gptq_fx.quantize(model, progress=False)
    for name in ("eager", "aot_eager"):
        torch._dynamo.reset()
        assert relative(output(torch.compile(model, backend=name), {"x": X}), wanted) <= 1e-5
