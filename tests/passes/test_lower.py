"""lower: gptq::linear becomes the op of the kernel, on its layout."""

from __future__ import annotations

import pytest
import torch
from graphs import after
from models import MLP, dequantized, output, quantized, relative
from torch import nn

X = torch.randn(2, 3, 64)
HEAD = ["split_with_sizes", "getitem", "silu", "getitem", "mul"]


def mlp(dtype: torch.dtype) -> nn.Module:
    return MLP().to(dtype).requires_grad_(False)


@pytest.mark.parametrize(
    "dtype, op, tolerance",
    [(torch.float32, "gptq.linear", 1e-6), (torch.bfloat16, "gptq.cpu_int4_linear", 1e-2)],
)
def test_the_semantic_op_becomes_the_kernels(dtype: torch.dtype, op: str, tolerance: float) -> None:
    model, x = mlp(dtype), X.to(dtype)
    stage = after("lower", model, x)
    assert stage.before == ["gptq.linear", *HEAD, "gptq.linear"]
    assert stage.after == [op, *HEAD, op]
    assert stage.changes == 2
    assert relative(stage.run(), output(dequantized(model), {"x": x})) <= tolerance


def test_inputs_are_the_tensors_of_the_pack_and_nothing_of_the_canonical_form_stays() -> None:
    stage = after("lower", mlp(torch.bfloat16), X.bfloat16())
    inputs = [node for operand in stage.plan.operands for node in operand.inputs]
    assert {node.meta["example_value"].dtype for node in inputs} == {torch.uint8, torch.bfloat16}
    assert not [
        n for n in stage.graph.graph.nodes if getattr(n.meta.get("val"), "dtype", None) == torch.int32
    ]
    for operand in stage.plan.operands:
        tensors = operand.packed([stage.plan.tensor(s.weight) for s in operand.sites]).tensors
        shapes = [tuple(node.meta["example_value"].shape) for node in operand.inputs]
        assert shapes == [tuple(t.shape) for t in tensors]


def test_a_quantized_weight_takes_the_layout_in_place() -> None:
    model, _ = quantized(mlp(torch.bfloat16))
    assert {p.packed.kernel.name for p in model.parameters()} == {"reference"}
    after("lower", model, X.bfloat16())
    assert {p.packed.kernel.name for p in model.parameters()} == {"cpu_int4"}
    assert {n for n, p in model.named_parameters() if p.packed.merged} == {"gate.weight", "up.weight"}


def test_no_sites_no_changes() -> None:
    stage = after("lower", nn.Sequential(nn.ReLU()), X)
    assert (stage.before, stage.after, stage.changes) == (["relu"], ["relu"], 0)
