"""The graph of a tiny llama after swap, fuse and lower. EXPECTTEST_ACCEPT=1 accepts new ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import Stage, after, name
from models import EXPERTS, llama
from ranks import needs_transformers_5_23, on_ranks
from torch import fx
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import gptq_fx
from gptq_fx.kernels.cpu import CPU_INT4

# The rest is the model's own arithmetic, which no pass touches and versions of transformers change.
SHOWN = re.compile(r"gptq\.|linear$|split_with_sizes$|_?grouped_mm|bmm$|.*all_reduce|redistribute$")


def snapshot(last: str, dtype: torch.dtype) -> str:
    # One head for k and v: 16 outputs, where no version of the int4 layout can be cut.
    model = llama(1, dtype, num_key_value_heads=1)
    return shown(after(last, model.model, torch.tensor([[3, 4, 5]])))


def experts(last: str, name: str, implementation: str | None) -> str:
    model = EXPERTS[name].build(num_hidden_layers=1)
    if implementation is not None:
        model.set_experts_implementation(implementation)  # type: ignore[operator]
    block = model.model.layers[0]  # type: ignore[union-attr,index]
    block = block.mlp if name != "llama4" else block.feed_forward  # type: ignore[union-attr]
    return shown(after(last, block, torch.randn(1, 3, 64)))


def block(last: str, name: str, dtype: torch.dtype = torch.float32) -> str:
    model = EXPERTS[name].build(dtype, num_hidden_layers=1)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(group_size=32), progress=False)
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr,index]
    return shown(after(last, mlp, torch.randn(1, 3, 64, dtype=dtype)))


def shown(stage: Stage) -> str:
    """One line for each call that matters: name, shapes and weights. No name of the tracer's is in it."""
    named = _inputs(stage)
    lines = [_line(node, named) for node in stage.graph.graph.nodes if node.op.startswith("call_")]
    return "\n".join(line for line in lines if line)


def _inputs(stage: Stage) -> dict[fx.Node, str]:
    """Inputs of the packs, by the last part of the site names: q|k|v.0"""
    named = {}
    for operand in stage.plan.operands:
        leaves = "|".join(site.name.rpartition(".")[2].removesuffix("_proj") for site in operand.sites)
        for i, node in enumerate(operand.inputs):
            if node is not None:
                named[node] = f"{leaves}.{i} {_shape(node)}"
    return named


def _line(node: fx.Node, named: dict[fx.Node, str]) -> str:
    if not SHOWN.match(name(node)):
        return ""
    args = [_argument(a, named) for a in node.args]
    return f"{name(node)}({', '.join(a for a in args if a)})"


def _argument(arg: object, named: dict[fx.Node, str]) -> str:
    if isinstance(arg, (list, tuple)) and any(isinstance(a, fx.Node) for a in arg):
        return f"[{', '.join(_argument(a, named) for a in arg if a is not None)}]"
    if isinstance(arg, fx.Node):
        return named.get(arg, _shape(arg))
    return "" if arg is None else str(arg)


def _shape(node: fx.Node) -> str:
    example = node.meta.get("example_value")
    if isinstance(example, torch.Tensor):
        short = str(example.dtype).removeprefix("torch.").replace("float", "f")
        return f"{short}{list(example.shape)}"
    return "y"


def test_swap() -> None:
    assert_expected_inline(
        snapshot("swap", torch.float32),
        """\
gptq.linear(f32[1, 3, 64], q.0 int32[8, 64], q.1 f32[1, 64], 4)
gptq.linear(f32[1, 3, 64], k.0 int32[8, 16], k.1 f32[1, 16], 4)
gptq.linear(f32[1, 3, 64], v.0 int32[8, 16], v.1 f32[1, 16], 4)
gptq.linear(f32[1, 3, 64], o.0 int32[8, 64], o.1 f32[1, 64], 4)
gptq.linear(f32[1, 3, 64], gate.0 int32[8, 128], gate.1 f32[1, 128], 4)
gptq.linear(f32[1, 3, 64], up.0 int32[8, 128], up.1 f32[1, 128], 4)
gptq.linear(f32[1, 3, 128], down.0 int32[16, 64], down.1 f32[1, 64], 4)""",
    )


def test_fuse() -> None:
    assert_expected_inline(
        snapshot("fuse", torch.float32),
        """\
gptq.linear(f32[1, 3, 64], q|k|v.0 int32[8, 96], q|k|v.1 f32[1, 96], 4)
split_with_sizes(y, [64, 16, 16], -1)
gptq.linear(f32[1, 3, 64], o.0 int32[8, 64], o.1 f32[1, 64], 4)
gptq.linear(f32[1, 3, 64], gate|up.0 int32[8, 256], gate|up.1 f32[1, 256], 4)
split_with_sizes(y, [128, 128], -1)
gptq.linear(f32[1, 3, 128], down.0 int32[16, 64], down.1 f32[1, 64], 4)""",
    )


def test_fuse_where_the_int4_layout_cannot_be_cut_behind_k() -> None:
    assert_expected_inline(
        snapshot("fuse", torch.bfloat16),
        """\
gptq.linear(bf16[1, 3, 64], q.0 int32[8, 64], q.1 bf16[1, 64], 4)
gptq.linear(bf16[1, 3, 64], k.0 int32[8, 16], k.1 bf16[1, 16], 4)
gptq.linear(bf16[1, 3, 64], v.0 int32[8, 16], v.1 bf16[1, 16], 4)
gptq.linear(bf16[1, 3, 64], o.0 int32[8, 64], o.1 bf16[1, 64], 4)
gptq.linear(bf16[1, 3, 64], gate|up.0 int32[8, 256], gate|up.1 bf16[1, 256], 4)
split_with_sizes(y, [128, 128], -1)
gptq.linear(bf16[1, 3, 128], down.0 int32[16, 64], down.1 bf16[1, 64], 4)""",
    )


def test_lower_to_reference() -> None:
    assert_expected_inline(
        snapshot("lower", torch.float32),
        """\
gptq.linear(f32[1, 3, 64], q|k|v.0 int32[8, 96], q|k|v.1 f32[1, 96], 4)
split_with_sizes(y, [64, 16, 16], -1)
gptq.linear(f32[1, 3, 64], o.0 int32[8, 64], o.1 f32[1, 64], 4)
gptq.linear(f32[1, 3, 64], gate|up.0 int32[8, 256], gate|up.1 f32[1, 256], 4)
split_with_sizes(y, [128, 128], -1)
gptq.linear(f32[1, 3, 128], down.0 int32[16, 64], down.1 f32[1, 64], 4)""",
    )


@pytest.mark.skipif(CPU_INT4.available() is not None, reason="no int4 kernel for this CPU")
def test_lower_to_int4() -> None:
    assert_expected_inline(
        snapshot("lower", torch.bfloat16),
        """\
gptq.cpu_int4_linear(bf16[1, 3, 64], q.0 uint8[64, 32], q.1 bf16[1, 64, 2], 64)
gptq.cpu_int4_linear(bf16[1, 3, 64], k.0 uint8[16, 32], k.1 bf16[1, 16, 2], 64)
gptq.cpu_int4_linear(bf16[1, 3, 64], v.0 uint8[16, 32], v.1 bf16[1, 16, 2], 64)
gptq.cpu_int4_linear(bf16[1, 3, 64], o.0 uint8[64, 32], o.1 bf16[1, 64, 2], 64)
gptq.cpu_int4_linear(bf16[1, 3, 64], gate|up.0 uint8[256, 32], gate|up.1 bf16[1, 256, 2], 64)
split_with_sizes(y, [128, 128], -1)
gptq.cpu_int4_linear(bf16[1, 3, 128], down.0 uint8[64, 64], down.1 bf16[1, 64, 2], 128)""",
    )


def test_experts_sorted_by_rows_after_swap() -> None:
    assert_expected_inline(
        experts("swap", "mixtral", "grouped_mm"),
        """\
linear(f32[3, 64], f32[4, 64])
gptq.grouped_linear(f32[6, 64], [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], int32[4], 256, reference, [4])
gptq.grouped_linear(f32[6, 128], [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], int32[4], 64, reference, [4])""",
    )


def test_experts_sorted_by_rows_after_lower() -> None:
    assert_expected_inline(
        experts("lower", "gpt_oss", "grouped_mm"),
        """\
linear(f32[3, 64], f32[4, 64], f32[4])
gptq.grouped_linear(f32[6, 64], [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], int32[4], 256, reference, [4])
gptq.grouped_linear(f32[6, 128], [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], int32[4], 64, reference, [4])""",
    )


def test_experts_picked_by_each_row_after_swap() -> None:
    assert_expected_inline(
        experts("swap", "mixtral", "batched_mm"),
        """\
linear(f32[3, 64], f32[4, 64])
gptq.indexed_linear(y, [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], int64[6], 256, reference, [4])
gptq.indexed_linear(y, [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], int64[6], 64, reference, [4])""",
    )


def test_experts_picked_by_each_row_after_lower() -> None:
    assert_expected_inline(
        experts("lower", "gpt_oss", "batched_mm"),
        """\
linear(f32[3, 64], f32[4, 64], f32[4])
gptq.indexed_linear(y, [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], int64[6], 256, reference, [4])
gptq.indexed_linear(y, [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], int64[6], 64, reference, [4])""",
    )


def test_experts_with_as_many_rows_each_after_swap() -> None:
    assert_expected_inline(
        experts("swap", "llama4", None),
        """\
linear(f32[3, 64], f32[4, 64])
gptq.grouped_linear(y, [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], y, 256, reference, [4])
gptq.grouped_linear(y, [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], y, 64, reference, [4])
gptq.linear(f32[3, 64], gate.0 int32[8, 128], gate.1 f32[1, 128], 4)
gptq.linear(f32[3, 64], up.0 int32[8, 128], up.1 f32[1, 128], 4)
gptq.linear(f32[3, 128], down.0 int32[16, 64], down.1 f32[1, 64], 4)""",
    )


def test_experts_with_as_many_rows_each_after_lower() -> None:
    assert_expected_inline(
        experts("lower", "llama4", None),
        """\
linear(f32[3, 64], f32[4, 64])
gptq.grouped_linear(y, [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 1, 256]], y, 256, reference, [4])
gptq.grouped_linear(y, [down.0 int32[4, 16, 64], down.1 f32[4, 1, 64]], y, 64, reference, [4])
gptq.linear(f32[3, 64], gate|up.0 int32[8, 256], gate|up.1 f32[1, 256], 4)
split_with_sizes(y, [128, 128], -1)
gptq.linear(f32[3, 128], down.0 int32[16, 64], down.1 f32[1, 64], 4)""",
    )


def test_a_whole_block_after_swap() -> None:
    assert_expected_inline(
        block("swap", "gpt_oss"),
        """\
linear(f32[3, 64], f32[4, 64], f32[4])
gptq.experts(f32[3, 64], int64[3, 2], f32[3, 2], [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 2, 256]], [down.0 int32[4, 16, 64], down.1 f32[4, 4, 64]], f32[4, 256], f32[4, 64], gpt_oss, [4], [4], reference, reference)""",
    )


def test_a_whole_block_after_lower() -> None:
    assert_expected_inline(
        block("lower", "mixtral"),
        """\
linear(f32[3, 64], f32[4, 64])
gptq.experts(f32[3, 64], int64[3, 2], f32[3, 2], [gate_up.0 int32[4, 8, 256], gate_up.1 f32[4, 2, 256]], [down.0 int32[4, 16, 64], down.1 f32[4, 4, 64]], silu, [4], [4], reference, reference)""",
    )


def split(folder: Path) -> str:
    """The graph of one rank of two."""
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(lm_head=True), progress=False)
    return shown(after("lower", model, torch.tensor([[3, 4, 5]])))


@needs_transformers_5_23  # writes down where it splits and gathers
def test_one_rank_of_two(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path)
    first, second = on_ranks(2, split, tmp_path)
    assert first == second
    assert_expected_inline(
        first,
        """\
redistribute(f32[1, 3, 64])
gptq.linear(f32[1, 3, 64], q|k|v.0 int32[8, 64], q|k|v.1 f32[1, 64], 4)
split_with_sizes(y, [32, 16, 16], -1)
gptq.linear(f32[1, 3, 32], o.0 int32[4, 64], o.1 f32[1, 64], 4)
all_reduce(f32[1, 3, 64], sum, 0)
gptq.linear(f32[1, 3, 64], gate|up.0 int32[8, 128], gate|up.1 f32[1, 128], 4)
split_with_sizes(y, [64, 64], -1)
gptq.linear(f32[1, 3, 64], down.0 int32[8, 64], down.1 f32[1, 64], 4)
all_reduce(f32[1, 3, 64], sum, 0)
gptq.linear(f32[1, 3, 64], lm_head.0 int32[8, 48], lm_head.1 f32[1, 48], 4)
redistribute(f32[1, 3, 96])""",
    )
