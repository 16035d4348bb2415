"""The tensors of a call are looked up once, and again whenever anything moved."""

import gc
import sys
import types
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from gptq_fx import GPTQConfig, quantize

backend = sys.modules["gptq_fx.backend"]


def make():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    quantize(model, GPTQConfig(group_size=32))
    return model


@pytest.fixture
def looked_up(monkeypatch):
    """One entry for each slow look-up."""
    calls = []
    look_up = backend.Resolver._look_up

    def counting(self, *args):
        calls.append(self)
        return look_up(self, *args)

    monkeypatch.setattr(backend.Resolver, "_look_up", counting)
    return calls


def compiled(model):
    return torch.compile(model, backend="gptq", options={"inner_backend": "eager"})


@torch.no_grad()
def test_what_was_found_is_found_again(looked_up):
    model, x = make(), torch.randn(3, 64)
    run = compiled(model)
    first = run(x)
    for _ in range(3):
        assert torch.equal(run(x), first)
    assert len(looked_up) == 1


@torch.no_grad()
@pytest.mark.parametrize("how", ["load", "replace", "other layout", "other model"])
def test_whatever_changes_is_seen(looked_up, how):
    model, other, x = make(), make(), torch.randn(3, 64)
    expected, before = other(x), model(x)
    run = compiled(model)
    assert torch.allclose(run(x), before, atol=1e-5)
    if how == "load":
        model.load_state_dict(other.state_dict())
    elif how == "replace":
        for mine, theirs in zip(model, other, strict=True):
            mine.weight, mine.bias = theirs.weight, theirs.bias
    elif how == "other layout":
        expected = before
        for layer in model:
            packed = layer.weight.packed
            tensors = tuple(None if t is None else t.clone() for t in packed.tensors)
            packed.pack = replace(packed.pack, tensors=tensors)
    else:
        make()  # any new weight of the process: looked up again, and the same
        expected = before
    assert torch.allclose(run(x), expected, atol=1e-5)
    assert len(looked_up) >= 2


@torch.no_grad()
def test_dense_weights_are_looked_up_every_time(looked_up):
    model, x = nn.Linear(64, 64, bias=False).eval(), torch.randn(3, 64)
    run = compiled(model)
    run(x)
    model.weight.zero_()
    assert not run(x).any()
    assert len(looked_up) == 2


def test_nothing_is_kept_alive():
    """A resolver that has answered does not hold the model."""
    model = make()
    operand = types.SimpleNamespace(
        tensors=lambda weights: [t for t in weights[0].packed.call_tensors() if t is not None]
    )
    resolver = backend.Resolver([(operand, (0,))])
    found = [resolver([model[0].weight]), resolver([model[0].weight])]
    assert all(a is b for a, b in zip(*found, strict=True))
    tensors = [weakref.ref(t) for t in found[0]]
    del model, found
    gc.collect()
    assert tensors
    assert all(t() is None for t in tensors)
