"""attention: keys and values are no longer repeated for grouped queries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import after
from torch import Tensor, nn

from gptq_fx import passes
from gptq_fx.kernels import attention as decision

B, HEADS, TIMES, S, D = 2, 2, 3, 5, 8
Q, K, V = torch.randn(B, HEADS * TIMES, 1, D), torch.randn(B, HEADS, S, D), torch.randn(B, HEADS, S, D)
MASK = torch.rand(B, 1, 1, S) > 0.3


@pytest.fixture(autouse=True)
def pays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(decision.FEW_QUERIES, "cpu", 1)


def repeat(x: Tensor) -> Tensor:
    return x[:, :, None, :, :].expand(B, HEADS, TIMES, S, D).reshape(B, HEADS * TIMES, S, D)


def repeat_by_unsqueeze(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(B, HEADS, TIMES, S, D).reshape(B, HEADS * TIMES, S, D)


class Attention(nn.Module):
    def __init__(self, repeat, call=None):
        super().__init__()
        self.repeat = repeat
        self.call = call or CALLS["scaled"]

    def forward(self, q, k, v, mask):
        return self.call(q, self.repeat(k), self.repeat(v), mask)


CALLS = {
    "scaled": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3),
    "positional": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.0, False),
    "by name": lambda q, k, v, m: F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
}
SDPA = "scaled_dot_product_attention"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", [repeat, repeat_by_unsqueeze])
def test_repeated_keys_and_values_are_read_as_they_are(how, call):
    model = Attention(how, CALLS.get(call))
    stage = after("attention", model, Q, K, V, MASK)
    first = "getitem" if how is repeat else "unsqueeze"
    assert stage.before == [first, "expand", "reshape"] * 2 + [SDPA]
    assert stage.after == [SDPA]
    assert stage.changes == 1
    (node,) = (n for n in stage.graph.graph.nodes if n.op == "call_function")
    assert node.kwargs["enable_gqa"] is True
    torch.testing.assert_close(stage.run(), model(Q, K, V, MASK))


def test_what_else_uses_the_repeated_keys_keeps_them():
    def call(q, k, v, m):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m) + k.sum()

    model = Attention(repeat, call)
    stage = after("attention", model, Q, K, V, MASK)
    assert stage.after == ["getitem", "expand", "reshape", SDPA, "sum", "add"]
    torch.testing.assert_close(stage.run(), model(Q, K, V, MASK))


UNLIKE = {
    "heads in turn": lambda x: x[:, None].expand(B, TIMES, HEADS, S, D).reshape(B, HEADS * TIMES, S, D),
    "more positions": lambda x: x[:, :, None].expand(B, HEADS, TIMES, S, D).reshape(B, HEADS, -1, D),
    "not repeated": lambda x: x.reshape(B, HEADS, S, D),
}


@pytest.mark.parametrize("how", UNLIKE)
def test_what_is_another_sum_is_left(how):
    q = Q if how == "heads in turn" else Q[:, :HEADS]
    mask = None if how == "more positions" else MASK
    model = Attention(UNLIKE[how])
    stage = after("attention", model, q, K, V, mask)
    assert stage.changes == 0
    assert stage.after == stage.before


def test_many_queries_are_left():
    q = torch.randn(B, HEADS * TIMES, 4, D)
    stage = after("attention", Attention(repeat), q, K, V, MASK)
    assert stage.changes == 0


def test_only_where_it_pays(monkeypatch):
    monkeypatch.delitem(decision.FEW_QUERIES, "cpu")
    assert after("attention", Attention(repeat), Q, K, V, MASK).changes == 0
    assert decision.grouped_queries_pay("cuda", 1)
    assert not decision.grouped_queries_pay("cuda", 2)
    assert not decision.grouped_queries_pay("cuda", object())


@pytest.mark.parametrize("skip", ["", "attention"])
def test_it_can_be_turned_off(monkeypatch, skip):
    monkeypatch.setenv("GPTQ_FX_SKIP", skip)
    passes.reset_timings()
    compiled = torch.compile(Attention(repeat), backend="gptq", options={"inner_backend": "eager"})
    torch.testing.assert_close(compiled(Q, K, V, MASK), Attention(repeat)(Q, K, V, MASK))
    assert ("attention" in passes.timings()) == (skip == "")
