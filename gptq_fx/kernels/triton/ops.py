"""The ops. What imports Triton is imported when one first runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptq_fx.kernels.block import BLOCK_ARGUMENTS, block_fake
from gptq_fx.kernels.registry import Tensors
from gptq_fx.kernels.triton.weight import Packed
from gptq_fx.ops import define_opaque


def _out(x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[-1])


def linear(
    x: Tensor,
    w: Tensor,
    high: Tensor | None,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
) -> Tensor:
    """x [*, K], the tensors of `pack`, bias [N] -> [*, N]."""
    from gptq_fx.kernels.triton.linear import linear

    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = linear(rows, Packed(w, high, scales, zeros, bits), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


triton_linear = define_opaque(
    "triton_linear(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor? bias, int bits) "
    "-> Tensor",
    fake=_out,
)(linear)


@define_opaque(
    "triton_grouped(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor ends, int bits) "
    "-> Tensor",
    fake=_out,
)
def triton_grouped(
    x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, ends: Tensor, bits: int
) -> Tensor:
    """x [S, K], ends [E] -> [S, N]: rows ends[e - 1] to ends[e] meet expert e, those behind give 0."""
    from gptq_fx.kernels.triton import experts

    return experts.grouped(x.contiguous(), Packed(w, high, scales, zeros, bits), ends)


@define_opaque(
    "triton_indexed(Tensor x, Tensor w, Tensor? high, Tensor scales, Tensor? zeros, Tensor ids, int bits) "
    "-> Tensor",
    fake=_out,
)
def triton_indexed(
    x: Tensor, w: Tensor, high: Tensor | None, scales: Tensor, zeros: Tensor | None, ids: Tensor, bits: int
) -> Tensor:
    """x [S, K], ids [S] -> [S, N]: row s meets expert ids[s]."""
    from gptq_fx.kernels.triton import experts

    return experts.indexed(x.contiguous(), Packed(w, high, scales, zeros, bits), ids)


@define_opaque(f"triton_experts({BLOCK_ARGUMENTS}) -> Tensor", fake=block_fake)
def triton_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensors,
    down: Tensors,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gate_up_args: Sequence[int],
    down_args: Sequence[int],
) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]: gptq::experts, on stacks packed by this kernel."""
    from gptq_fx.kernels.triton import experts

    first = Packed.of(gate_up, gate_up_args[0]), gate_up_bias
    second = Packed.of(down, down_args[0]), down_bias
    return experts.block(x.contiguous(), ids, weights, first, second, activation)
