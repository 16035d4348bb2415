"""The options of the backend: what is legal, what the error says where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MLP, output
from torch._dynamo.exc import BackendCompilerFailed

from gptq_fx import ConfigError, GPTQError, KernelError, WeightError, backend
from gptq_fx.options import CONFIG_KEYS, OWN_KEYS, Options

X = torch.randn(3, 64)

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown option": (
        {"group_sise": 64},
        ["group_sise", "Did you mean 'group_size'", *CONFIG_KEYS, *OWN_KEYS],
    ),
    "option of quantize only": ({"damp_percent": 0.1}, ["damp_percent", "Legal:"]),
    "unknown kernel": ({"kernel": "cpu_int3"}, ["cpu_int3", "'cpu_int4'", "auto", "reference"]),
    "unknown inner backend": ({"inner_backend": "inducter"}, ["inducter", "'inductor'", "aot_eager"]),
    "itself as inner backend": ({"inner_backend": "gptq"}, ["gptq", "Legal:"]),
    "unknown mode": ({"mode": "max-autotun"}, ["max-autotun", "'max-autotune'", "reduce-overhead"]),
    "mode of another backend": (
        {"mode": "max-autotune", "inner_backend": "eager"},
        ["max-autotune", "Inductor", "eager"],
    ),
    "bits": ({"bits": 5}, ["bits=5", "2, 3, 4, 8"]),
    "group size 0": ({"group_size": 0}, ["group_size=0", "multiple of 8"]),
    "group size -2": ({"group_size": -2}, ["group_size=-2", "multiple of 8"]),
    "group size 12": ({"group_size": 12}, ["group_size=12", "multiple of 8"]),
    "regex": ({"dynamic": {"layers.(": {"bits": 8}}}, ["layers.(", "regular expression"]),
    "override": ({"dynamic": {"up": {"bit": 8}}}, ["'bit'", "Did you mean 'bits'"]),
    "rule": ({"rules": ["up"]}, ["'up'", "gptq_fx.Rule"]),
}


@pytest.mark.parametrize("name", BAD)
def test_an_illegal_option_is_named_with_the_legal_ones(name: str) -> None:
    options, parts = BAD[name]
    with pytest.raises(ConfigError) as found:
        Options.parse(options, None)
    for part in parts:
        assert part in str(found.value)


FAILING: dict[str, tuple[dict[str, Any], type[GPTQError], list[str]]] = {
    "option": ({"group_sise": 64}, ConfigError, ["group_size"]),
    "kernel": (
        {"kernel": "cpu_int4"},
        KernelError,
        ["gate", "cpu_int4", "bfloat16 only", "reference: could run it"],
    ),
    "weight": ({}, WeightError, ["up: NaN", "1 non-finite", "[3, 4]"]),
}


@pytest.mark.parametrize("name", FAILING)
def test_an_error_reaches_the_user_and_the_model_is_as_it_was(name: str) -> None:
    options, kind, parts = FAILING[name]
    model = MLP().requires_grad_(False)
    if name == "weight":
        model.up.weight[3, 4] = float("nan")
    before = {n: (p, p.clone(), p._version) for n, p in model.named_parameters()}
    with pytest.raises(BackendCompilerFailed) as failed:
        output(torch.compile(model, backend="gptq", options={"inner_backend": "eager", **options}), {"x": X})
    error = failed.value.inner_exception
    assert type(error) is kind
    for part in parts:
        assert part in str(error)
    for key, parameter in model.named_parameters():
        old, copy, version = before[key]
        assert parameter is old
        assert parameter._version == version
        assert torch.equal(parameter.nan_to_num(), copy.nan_to_num())
    if name != "weight":
        torch._dynamo.reset()
        output(torch.compile(model, backend="gptq", options={"inner_backend": "eager"}), {"x": X})


def test_inf_is_named_too() -> None:
    model = MLP().requires_grad_(False)
    model.down.weight[0, 1] = float("inf")
    with pytest.raises(WeightError, match=r"down: Inf .*\[0, 1\]"):
        backend(torch.fx.symbolic_trace(model), [X], options={"inner_backend": "eager"})


def test_explicit_means_that_something_was_said_about_quantization() -> None:
    assert not Options.parse(None, None).explicit
    assert not Options.parse({"kernel": "reference", "inner_backend": "eager"}, None).explicit
    assert Options.parse({"bits": 4}, None).explicit


def test_options_are_not_changed() -> None:
    given = {"bits": 8, "kernel": "auto", "inner_backend": "eager"}
    Options.parse(given, None)
    assert given == {"bits": 8, "kernel": "auto", "inner_backend": "eager"}
