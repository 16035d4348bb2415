"""explain: what would happen to every weight, without doing it."""

from __future__ import annotations

import json

import pytest
import torch
from models import HEADS, MLP, MODELS, Stack, ids, linears, llama, logits, output, quantized

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, QuantizedParameter, explain, lazy

X = torch.randn(3, 64)


def test_every_matrix_of_the_model_has_one_record() -> None:
    model = llama(2)
    report = explain(model, ids(), use_cache=False)
    names = [site.name for site in report.sites]
    assert sorted(names) == sorted(linears(model) | {"model.embed_tokens"})
    assert {s.name for s in report.sites if s.scheme} == linears(model) - HEADS
    assert all(s.reason for s in report.sites if s.scheme is None)


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral"])
def test_it_tells_what_compiling_does(name: str, plans: list[object]) -> None:
    tiny = MODELS[name]
    model = tiny.build()
    report = explain(model, **tiny.inputs())
    told = {s.name: (s.scheme, s.kernel) for s in report.sites if s.scheme}
    plans.clear()
    torch._dynamo.reset()
    output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), tiny.inputs())
    done = {s.name: (s.scheme, s.decision.kernel.name) for p in plans for s in p.sites if s.scheme}
    assert told == done


def marked(model: torch.nn.Module) -> set[str]:
    """Parameters that carry a note of why they were left dense."""
    return {n for n, p in model.named_parameters() if hasattr(p, "_gptq_left_dense")}


@pytest.mark.parametrize("way", ["dense", "quantized"])
def test_it_changes_nothing(way: str) -> None:
    model = llama(1, torch.bfloat16)
    if way == "quantized":
        model, _ = quantized(model)
    before = {n: (p, p._version) for n, p in model.named_parameters()}
    marks = marked(model)
    kernels = [p.packed.kernel.name for p in model.parameters() if isinstance(p, QuantizedParameter)]
    wanted = logits(model)
    explain(model, ids(), use_cache=False)
    after = {n: (p, p._version) for n, p in model.named_parameters()}
    assert all(after[n][0] is p and after[n][1] == version for n, (p, version) in before.items())
    assert kernels == [p.packed.kernel.name for p in model.parameters() if isinstance(p, QuantizedParameter)]
    assert not {id(p) for p in model.parameters()} & set(lazy._FORMS)
    assert torch.equal(logits(model), wanted)
    assert marked(model) == marks


def test_a_compiled_model_runs_on_behind_it() -> None:
    model = MLP().requires_grad_(False)
    compiled = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})
    wanted = output(compiled, {"x": X})
    explain(model, X)
    assert torch.equal(output(compiled, {"x": X}), wanted)


def test_schemes_and_rules_come_from_the_config() -> None:
    config = GPTQConfig(bits=3, dynamic={".*up": {"bits": 8}, "-:.*gate": {}, "nowhere": {"bits": 2}})
    report = explain(Stack(1).requires_grad_(False), X, config=config)
    bits = {s.name.rpartition(".")[2]: s.scheme and s.scheme.bits for s in report.sites}
    assert bits == {"gate": None, "up": 8, "down": 3}
    assert len(report.unused_rules) == 1
    assert "nowhere" in report.unused_rules[0]
    assert "nowhere" in str(report)


def test_weights_that_no_graph_reaches_are_named() -> None:
    class Partly(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate(x)

    reasons = {s.name: s.reason for s in explain(Partly().requires_grad_(False), X).sites}
    assert reasons["down"] == reasons["up"] == gptq_fx.explain.__globals__["UNREACHED"]
    assert "no graph reached it" not in reasons["gate"]


def test_layers_that_share_one_graph_are_all_named() -> None:
    report = explain(Stack(3, broken=True).requires_grad_(False), X)
    assert [s.name for s in report.sites] == [
        f"layers.{i}.{leaf}" for i in range(3) for leaf in ("gate", "up", "down")
    ]


def test_a_second_call_sees_the_same() -> None:
    model = Stack(2, broken=True).requires_grad_(False)
    assert explain(model, X).to_dict() == explain(model, X).to_dict()


def test_the_table_and_the_data() -> None:
    report = explain(llama(2), ids(), use_cache=False)
    text = str(report)
    assert "model.layers.{0..1}.mlp.up_proj" in text
    assert "14 of 16 weights quantized" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["sites"][0]["scheme"]["bits"] == 4


def test_stacks_of_experts_have_a_record_each() -> None:
    report = explain(MODELS["mixtral"].build(), ids(), use_cache=False)
    experts = {s.name: s for s in report.sites if len(s.shape) == 3}
    assert len(experts) == 6
    assert all(s.kind == "grouped_linear" and s.scheme is not None for s in experts.values())
    routers = [s for s in report.sites if s.kind == "router"]
    assert len(routers) == 3
    assert all(s.scheme is None for s in routers)


def test_a_bad_config_is_refused() -> None:
    with pytest.raises(ConfigError):
        explain(MLP(), X, config=GPTQConfig(bits=5))


def test_a_weight_that_several_linears_use() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.linear(x).relu())

    report = explain(Twice(), torch.randn(2, 64), config=GPTQConfig(group_size=32))
    assert [site.name for site in report.sites] == ["linear"]
    (graph,) = report.graphs
    assert [call.weights for call in graph.after if call.quantized] == [("linear",)] * 2
