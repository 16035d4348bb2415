"""choose: every site gets a scheme and a kernel, or a reason."""

from __future__ import annotations

import pytest
import torch
from graphs import after
from models import MLP, Stack, llama, quantized
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import gptq_fx
from gptq_fx import KernelError, Rule

X = torch.randn(3, 64)


def mlp() -> nn.Module:
    return MLP().requires_grad_(False)


def test_the_graph_stays_and_the_number_is_that_of_the_schemes() -> None:
    stage = after("choose", mlp(), X, dynamic={"-:up": {}})
    assert stage.before == stage.after == ["linear", "silu", "linear", "mul", "linear"]
    assert stage.changes == 2
    reasons = {s.name: s.decision.reason for s in stage.plan.sites if s.decision and not s.scheme}
    assert list(reasons) == ["up"]
    assert "left dense by rule" in reasons["up"]


def test_the_group_size_is_made_to_fit_and_the_reason_says_so() -> None:
    decisions = {s.name: s.decision for s in after("choose", mlp(), X).plan.sites}
    assert {n: d.scheme.group_size for n, d in decisions.items()} == {"gate": 64, "up": 64, "down": 128}
    assert "group_size 64 in place of 128" in decisions["gate"].reason
    assert "group_size" not in decisions["down"].reason


def test_the_first_rule_that_matches_wins() -> None:
    rules = [Rule("down", scheme=None), Rule("down|gate", scheme=gptq_fx.W8A16)]
    sites = after("choose", mlp(), X, rules=rules).plan.sites
    assert {s.name: s.scheme and s.scheme.bits for s in sites} == {"gate": 8, "up": 4, "down": None}


@pytest.mark.parametrize("dtype, kernel", [(torch.float32, "reference"), (torch.bfloat16, "cpu_int4")])
def test_auto_takes_the_fastest_kernel_that_can_and_says_what_was_passed_over(
    dtype: torch.dtype, kernel: str
) -> None:
    sites = after("choose", mlp().to(dtype), X.to(dtype)).plan.sites
    assert {s.decision.kernel.name for s in sites} == {kernel}
    assert all(("cpu_int4" in s.decision.reason) is (kernel == "reference") for s in sites)


def test_a_demanded_kernel_is_taken_where_it_can_run() -> None:
    sites = after("choose", mlp().bfloat16(), X.bfloat16(), kernel="reference").plan.sites
    assert {s.decision.kernel.name for s in sites} == {"reference"}


def test_a_demanded_kernel_that_cannot_run_is_refused_with_the_site_and_every_reason() -> None:
    with pytest.raises(BackendCompilerFailed) as failed:
        after("choose", mlp(), X, kernel="cpu_int4")
    error = failed.value.inner_exception
    assert isinstance(error, KernelError)
    for part in ("gate", "cpu_int4", "bfloat16 only", "reference: could run it"):
        assert part in str(error)


def test_a_quantized_weight_keeps_its_scheme_and_the_reason_tells_of_other_options() -> None:
    model, _ = quantized(mlp(), bits=8)
    for options, differs in (({}, False), ({"bits": 8}, False), ({"bits": 3}, True)):
        sites = after("choose", model, X, **options).plan.sites
        assert {s.scheme.bits for s in sites} == {8}
        assert all(("quantized before" in s.decision.reason) is differs for s in sites)
        torch._dynamo.reset()


def test_what_quantize_left_dense_stays_so_unless_options_ask() -> None:
    model, _ = quantized(Stack(1).requires_grad_(False), dynamic={r"-:.*up": {}})
    left = {s.name for s in after("choose", model, X).plan.sites if not s.scheme}
    assert left == {"layers.0.up"}
    torch._dynamo.reset()
    assert all(s.scheme for s in after("choose", model, X, bits=4).plan.sites)


def test_embeddings_and_output_projections_have_their_reasons() -> None:
    sites = after("choose", llama(1), torch.tensor([[4, 5]])).plan.sites
    dense = {s.name: s.decision.reason for s in sites if not s.scheme}
    assert set(dense) == {"lm_head", "model.embed_tokens"}
    assert "lm_head=True" in dense["lm_head"]
    assert "looked up" in dense["model.embed_tokens"]
