"""Training on top of quantized weights: gradients pass through them, and are those of the dense numbers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXPERTS, MLP, act_ordered, dense_twin, ids, llama, quantized, relative
from tolerances import LINEAR
from torch import Tensor, nn

import gptq_fx
from gptq_fx import DenseUseError, QuantizedParameter, Scheme
from gptq_fx.grid import round_to_nearest
from gptq_fx.packed import PackedWeight

FP32, BF16 = LINEAR[torch.float32], LINEAR[torch.bfloat16]
Model = Callable[..., Any]


class Adapter(nn.Module):
    """A linear with a low-rank one beside it, which is trained."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(model: nn.Module) -> nn.Module:
    """A copy with an adapter on every linear; all else is frozen."""
    twin = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(0)
    for name, module in list(twin.named_modules()):
        if isinstance(module, nn.Linear):
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, Adapter(module))
    return twin


def compiled(model: Model, inner: str) -> Model:
    return torch.compile(model, backend="gptq", options={"inner_backend": inner})


def input_gradient(model: Model, x: Tensor, *arguments: Any) -> Tensor:
    x = x.detach().clone().requires_grad_()
    y = model(x, *arguments)
    y = y if isinstance(y, Tensor) else y[0]
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    assert x.grad is not None
    return x.grad


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """All of them in one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


# --- gradients of the inputs


WAYS = [None, "eager", "aot_eager"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grid", [{"bits": 4}, {"bits": 3, "sym": False}, {"bits": 8}], ids=str)
def test_the_gradient_is_that_of_the_dense_numbers(grid: dict[str, Any], way: str | None) -> None:
    model, _ = quantized(MLP(bias=True).requires_grad_(False), group_size=32, **grid)
    x = torch.randn(2, 3, 64)
    found = input_gradient(compiled(model, way) if way else model, x)
    assert relative(found, input_gradient(dense_twin(model), x)) <= FP32


def test_the_gradient_through_inductor() -> None:
    model, _ = quantized(MLP().requires_grad_(False))
    x = torch.randn(3, 64)
    run = compiled(model, "inductor")
    assert relative(input_gradient(run, x), input_gradient(dense_twin(model), x)) <= FP32
    with torch.no_grad():
        assert relative(run(x), dense_twin(model)(x)) <= FP32


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_in_act_order(way: str | None) -> None:
    """Also where the kernel sorts the inputs, once for gate and up."""
    model = act_ordered(MLP().bfloat16().requires_grad_(False))
    x = torch.randn(40, 64, dtype=torch.bfloat16)
    exact = input_gradient(dense_twin(model, torch.float32), x.float())
    found = input_gradient(compiled(model, way) if way else model, x)
    assert relative(found, exact) <= 2 * BF16


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("form", ["whole", "grouped_mm", "batched_mm"])
def test_the_gradient_through_experts(name: str, form: str, way: str | None) -> None:
    dense = EXPERTS[name].build(num_hidden_layers=1).model.layers[0].mlp
    model, _ = quantized(dense)
    twin = dense_twin(model)
    twin.experts.config = copy.deepcopy(twin.experts.config)
    twin.experts.config._experts_implementation_internal = "eager"
    if form != "whole":
        model.experts.config._experts_implementation_internal = form
    x = torch.randn(1, 7, 64)
    found = input_gradient(compiled(model, way) if way else model, x)
    assert relative(found, input_gradient(twin, x)) <= FP32


def test_the_gradient_of_biases() -> None:
    model, _ = quantized(MLP(bias=True))
    twin, x = dense_twin(model), torch.randn(2, 3, 64)
    seed = torch.randn(2, 3, 64)
    for run in (model, compiled(model, "aot_eager")):
        found, wanted = (gradients(m, (call(x) * seed).sum()) for m, call in ((model, run), (twin, twin)))
        assert found.numel() == 2 * 128 + 64
        assert relative(found, wanted) <= FP32


def test_gradients_of_gradients() -> None:
    rounded = round_to_nearest(torch.randn(32, 64), Scheme(4, 32), "w").to(dtype=torch.float64)
    weight = QuantizedParameter(PackedWeight(rounded, Scheme(4, 32), None), "w")
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: F.linear(x, weight), x)
    assert torch.autograd.gradgradcheck(lambda x: F.linear(x, weight), x)


@pytest.mark.parametrize("way", [None, "aot_eager"])
def test_training_keeps_no_dense_weight(way: str | None) -> None:
    linear = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    model, _ = quantized(nn.Sequential(linear).requires_grad_(False))
    run = compiled(model, way) if way else model
    kept: list[int] = []
    x = torch.randn(2, 256, dtype=torch.bfloat16, requires_grad=True)
    run(x)  # compiled by now
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        run(x)
    assert kept
    assert sum(kept) <= 8 * len(kept), "more than handles"


# --- adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_get_the_gradients_of_the_dense_numbers(dtype: torch.dtype) -> None:
    model, _ = quantized(MLP().to(dtype), group_size=32)
    x = torch.randn(30, 64, dtype=dtype)

    def of(model: nn.Module, run: Model | None = None) -> Tensor:
        call = model if run is None else run
        return gradients(model, call(x.to(model.gate.up.weight.dtype)).float().square().mean())

    tuned = adapted(model)
    exact = of(adapted(dense_twin(model)).float())
    limit = FP32 if dtype == torch.float32 else 2 * BF16
    assert relative(of(tuned), of(adapted(dense_twin(model, dtype)))) <= limit / 2
    assert relative(of(tuned, compiled(tuned, "aot_eager")), exact) <= limit


def test_adapters_stay_dense_when_compiled() -> None:
    """Trained or frozen: 4 bits would be their end."""
    tuned = adapted(quantized(MLP())[0])
    x = torch.randn(3, 64)
    with torch.no_grad():
        wanted = tuned(x)
        for trained in (True, False):
            for name, parameter in tuned.named_parameters():
                parameter.requires_grad_(trained and "base" not in name)
            assert relative(compiled(tuned, "eager")(x), wanted) <= FP32
    sites = {site.name: site for site in gptq_fx.explain(tuned, x).sites}
    assert sites["gate.down"].scheme is None
    assert "added to a model that was quantized before" in sites["gate.down"].reason
    assert sites["gate.base"].scheme is not None


# --- peft


@functools.cache
def base() -> nn.Module:
    return quantized(llama(1), group_size=32)[0]


def with_peft(model: nn.Module, **settings: Any) -> nn.Module:
    """A copy with the adapters of peft on every linear but the head."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    return peft.get_peft_model(copy.deepcopy(model), config)


def loss(model: Model) -> Tensor:
    return model(input_ids=ids(), labels=ids(), use_cache=False).loss


def test_adapters_of_peft_get_the_gradients_of_the_dense_numbers() -> None:
    tuned = with_peft(base(), init_lora_weights=False)
    twin = with_peft(dense_twin(base()), init_lora_weights=False)
    wanted = gradients(twin, loss(twin))
    assert relative(gradients(tuned, loss(tuned)), wanted) <= FP32
    tuned.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    tuned.train()
    assert relative(gradients(tuned, loss(tuned)), wanted) <= FP32


@pytest.mark.parametrize("way", [None, "aot_eager"])
def test_a_model_with_adapters_of_peft_learns(way: str | None) -> None:
    tuned = with_peft(base())
    if way:
        tuned.compile(backend="gptq", options={"inner_backend": way})
    before = {
        name: p.packed.nbytes for name, p in tuned.named_parameters() if isinstance(p, QuantizedParameter)
    }
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(24):
        optimizer.zero_grad()
        value = loss(tuned)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert len(before) == 7  # still quantized, all of them
    assert before == {
        name: p.packed.nbytes for name, p in tuned.named_parameters() if isinstance(p, QuantizedParameter)
    }
    tuned.eval()
    with torch.no_grad():
        assert loss(tuned) < 0.8 * losses[0]  # the graph for inference has the adapters, too


def test_merging_adapters_into_quantized_weights_is_refused() -> None:
    tuned = with_peft(base())
    with pytest.raises(DenseUseError, match=r"model\.layers\.0\.self_attn\.q_proj.*dequantize"):
        tuned.merge_adapter()
