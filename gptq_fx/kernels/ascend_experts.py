"""Stacks of experts on Ascend NPUs, by npu_grouped_matmul: sorted rows, rows with ids, whole blocks.

A block is route, gate and up, activation, down, weighted sum:

    npu_moe_init_routing_v2   x [T, H], ids [T, k] -> rows [T k, H] sorted by expert, where each went, counts
    npu_grouped_matmul        [T k, H] -> [T k, 2 I]
    npu_swiglu                [T k, 2 I] -> [T k, I]; plain torch for other activations than silu
    npu_grouped_matmul        [T k, I] -> [T k, H]
    npu_moe_finalize_routing  -> [T, H], the sum over k of weights * rows

Shapes hang on no value of a tensor, and nothing waits for the device. npu_moe_token_unpermute could end a
block as well; but its kernel for autograd sets the device, so that nothing traces it without an NPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false

from gptq_fx.kernels.block import ACTIVATIONS, BLOCK_ARGUMENTS
from gptq_fx.kernels.registry import Tensors
from gptq_fx.ops import define


@define(
    "ascend_grouped_linear(Tensor x, Tensor weight, Tensor scales, Tensor? offsets, Tensor? order, "
    "Tensor ends, int group_size) -> Tensor"
)
def ascend_grouped_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    order: Tensor | None,
    ends: Tensor,
    group_size: int,
) -> Tensor:
    """x fp16 or bf16 [S, K], the tensors of `pack` for a stack, ends [E] of any integers -> [S, N].

    Rows ends[e - 1] to ends[e] (from 0 for the first) meet expert e. Rows behind the last end give zeros.
    """
    if guard_or_false(x.shape[0] == 0):  # the ops take no empty tensor
        return x.new_empty(0, scales.shape[-1])
    y = _grouped(x, (weight, scales, offsets, order), ends)
    rows = torch.arange(x.shape[0], device=x.device)
    return torch.where((rows < ends.select(0, -1)).unsqueeze(-1), y, 0)


@define(
    "ascend_indexed_linear(Tensor x, Tensor weight, Tensor scales, Tensor? offsets, Tensor? order, "
    "Tensor ids, int group_size) -> Tensor"
)
def ascend_indexed_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    order: Tensor | None,
    ids: Tensor,
    group_size: int,
) -> Tensor:
    """x fp16 or bf16 [S, K], the tensors of `pack` for a stack, ids [S] of any integers -> [S, N].

    Row s meets expert ids[s].
    """
    if guard_or_false(x.shape[0] == 0):
        return x.new_empty(0, scales.shape[-1])
    rows, places, ends = _route(x, ids.unsqueeze(-1), weight.shape[0])
    return _grouped(rows, (weight, scales, offsets, order), ends).index_select(0, places)


@define(f"ascend_experts({BLOCK_ARGUMENTS}) -> Tensor")
def ascend_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Sequence[Tensor | None],
    down: Sequence[Tensor | None],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_up_args: Sequence[int],
    down_args: Sequence[int],
) -> Tensor:
    """x fp16 or bf16 [T, H], ids [T, k] of any integers, weights [T, k] -> [T, H].

    gate_up, down: the tensors of `pack` for stacks [E, 2I, H] and [E, H, I]; biases [E, 2I] and [E, H].
    Token t meets experts ids[t], their outputs are summed by weights[t]; an id of E is no expert.
    """
    if guard_or_false(x.shape[0] == 0):
        return x.new_empty(0, x.shape[1])
    packed = gate_up[0]
    assert packed is not None
    E = packed.shape[0]
    # Rows for nobody are sorted behind the others, as rows of an expert E. Leaving them out would leave
    # memory of the output unwritten, and 0 * NaN is no 0.
    rows, places, ends = _route(x, ids, E + 1)
    ends = ends.narrow(0, 0, E)
    expert = None
    if gate_up_bias is not None or down_bias is not None:
        expert = torch.empty_like(places).scatter(0, places.long(), ids.reshape(-1).to(places.dtype))
        expert = expert.clamp_max(E - 1)
    h = _activate(_biased(_grouped(rows, gate_up, ends), gate_up_bias, expert), activation)
    real = torch.arange(h.shape[0], device=x.device) < ends.select(0, -1)
    h = torch.where(real.unsqueeze(-1), h, 0)  # the last expert took the others, and might have overflown
    y = _biased(_grouped(h, down, ends), down_bias, expert)
    weights = torch.where(ids < E, weights, 0).to(x.dtype)
    result: Tensor = torch.ops.npu.npu_moe_finalize_routing(
        y,
        None,  # nothing to add
        None,
        None,  # no biases
        weights,
        places,
        None,  # whose biases
        drop_pad_mode=2,  # no row is dropped, and `places` goes by tokens, not by slots
    )
    return result


def _grouped(x: Tensor, tensors: Sequence[Tensor | None] | Tensors, ends: Tensor) -> Tensor:
    """x [S, K] by the stack; what lies behind the last end goes through the last expert."""
    weight, scales, offsets, order = tensors
    assert weight is not None and scales is not None and offsets is not None
    assert order is None, "act-order of a stack"  # refused by supports_stack
    # The op demands that its groups cover x.
    covered = torch.cat([ends.narrow(0, 0, ends.shape[0] - 1), ends.new_full((1,), x.shape[0])])
    if scales.shape[-2] == 1:  # per output, the op wants [E, N]
        scales, offsets = scales.squeeze(-2), offsets.squeeze(-2)
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [weight],
        antiquant_scale=[scales],
        antiquant_offset=[offsets],
        group_list=covered.to(torch.int64),
        split_item=2,  # one tensor for all groups, in and out
        group_type=0,  # groups of rows
        group_list_type=0,  # as cumulative sums: counts may not be a list of one
    )
    result: Tensor = y
    return result


def _route(x: Tensor, ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, k] -> rows [T k, H] sorted by expert, place of (t, j) in them int32 [T k], ends."""
    rows, places, counts, _ = torch.ops.npu.npu_moe_init_routing_v2(
        x.contiguous(),
        ids.to(torch.int32),
        active_num=-1,  # all of them; their number may be a symbol, and this is an int
        expert_num=experts,
        expert_tokens_num_type=1,  # counts: not every release has cumulative ones
        expert_tokens_num_flag=True,
        active_expert_range=[0, experts],
        quant_mode=-1,  # none
        row_idx_type=0,  # indices to gather by, as npu_moe_finalize_routing takes them
    )
    return rows, places, counts.cumsum(0)


def _biased(y: Tensor, bias: Tensor | None, expert: Tensor | None) -> Tensor:
    """The op takes biases, too, but its documents contradict each other on their shape."""
    if bias is None:
        return y
    assert expert is not None
    return y + bias.index_select(0, expert).to(y.dtype)


def _activate(h: Tensor, activation: str) -> Tensor:
    """[S, 2 I] -> [S, I]"""
    if activation == "silu":
        y: Tensor = torch.ops.npu.npu_swiglu(h.contiguous())
        return y
    return ACTIVATIONS[activation](h)
