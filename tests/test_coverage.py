"""Which models are covered, and how right they are: every linear is swapped, and the numbers hold."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import HEADS, MODELS, dequantized, ids, linears, llama, output, quantized, relative

from gptq_fx import GPTQConfig, Report
from gptq_fx.passes import Plan

TABLE = [name for name in MODELS if name != "mixtral"]
EAGER = {"inner_backend": "eager"}
FP32 = 1e-5  # fp32 rounding of a different order of summation
BF16 = 1.5  # of the error that bf16 alone makes


def compiled(model: torch.nn.Module, inputs: dict[str, object], **options: object) -> torch.Tensor:
    """The output of one full graph."""
    call = torch.compile(model, backend="gptq", fullgraph=True, options={**EAGER, **options})
    return output(call, inputs)  # type: ignore[arg-type]


def swapped(plan: Plan) -> set[str]:
    return {site.name for operand in plan.operands for site in operand.sites}


def quantized_sites(report: Report) -> set[str]:
    return {site.name for site in report.sites if site.scheme is not None}


def eligible(model: torch.nn.Module) -> set[str]:
    return linears(model) - HEADS


@pytest.mark.parametrize("name", TABLE)
def test_every_linear_is_swapped_lazily(name: str, plans: list[Plan]) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.inputs()
    found = compiled(model, inputs, group_size=32, kernel="reference")
    assert len(plans) == 1
    assert swapped(plans[0]) == eligible(model)
    dense = {site.name for site in plans[0].sites if site.scheme is None and site.kind == "linear"}
    assert not dense
    wanted = output(dequantized(model, group_size=32), inputs)
    assert relative(found, wanted) <= FP32
    assert relative(output(model, inputs), wanted) > 100 * FP32  # the test would see a weight left dense


@pytest.mark.parametrize("name", TABLE)
def test_every_linear_is_swapped_after_quantize(name: str, plans: list[Plan]) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(torch.bfloat16), tiny.inputs()
    packed, report = quantized(model, group_size=32)
    assert quantized_sites(report) == eligible(model)
    found = compiled(packed, inputs)
    assert swapped(plans[0]) == eligible(model)
    exact = output(dequantized(model, dtype=torch.float32, group_size=32), inputs)
    alone = relative(output(dequantized(model, group_size=32), inputs), exact)
    assert relative(found, exact) <= BF16 * alone


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_both_ways_agree_in_both_dtypes(name: str) -> None:
    tiny = MODELS[name]
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = tiny.build(dtype), tiny.inputs()
        lazily = compiled(model, inputs, group_size=32)
        torch._dynamo.reset()
        before = compiled(quantized(model, group_size=32)[0], inputs)
        assert torch.equal(lazily, before)


GRID = list(itertools.product((2, 3, 4, 8), (True, False), (-1, 32, 48, 64, 128)))
# Two group sizes for each of the others, in turn.
SPREAD = [row for i, row in enumerate(GRID) if (i % 5 - i // 5) % 5 in (0, 2)]


def grid_rows() -> list[object]:
    return [pytest.param(*row, marks=[] if row in SPREAD else pytest.mark.slow) for row in GRID]


@pytest.mark.parametrize("bits, sym, group_size", grid_rows())
def test_schemes(bits: int, sym: bool, group_size: int) -> None:
    config = GPTQConfig(bits=bits, sym=sym, group_size=group_size)
    scheme = {"bits": bits, "sym": sym, "group_size": group_size}
    inputs = {"input_ids": ids(), "use_cache": False}
    wide = {"hidden_size": 384, "intermediate_size": 384, "layers": 1}

    model = llama(**wide)  # type: ignore[arg-type]
    wanted = output(dequantized(model, config), inputs)
    assert relative(compiled(model, inputs, **scheme), wanted) <= FP32

    model = model.bfloat16()
    packed, report = quantized(model, config)
    assert {(s.scheme.bits, s.scheme.sym, s.scheme.group_size) for s in report.sites if s.scheme} == {
        (bits, sym, group_size)
    }
    exact = output(dequantized(model, config, dtype=torch.float32), inputs)
    alone = relative(output(dequantized(model, config), inputs), exact)
    assert relative(compiled(packed, inputs), exact) <= BF16 * alone
