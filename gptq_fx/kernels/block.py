"""gptq::experts, the whole block of a mixture of experts behind its router: route, gate and up, activation,
down, weighted sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_fx.kernels.grouped import body
from gptq_fx.kernels.registry import Kernel, LinearSpec, Tensors, get_kernel
from gptq_fx.ops import define_opaque

# A linear of expert e: (e, its rows [R, K]) -> [R, N].
ExpertLinear = Callable[[int, Tensor], Tensor]


def _silu(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _gelu_tanh(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def _gpt_oss(y: Tensor) -> Tensor:
    gate, up = y[..., ::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


# What stands between gate_up and down: [*, 2I] -> [*, I].
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "gpt_oss": _gpt_oss,
}


def run_block(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: ExpertLinear,
    down: ExpertLinear,
    activation: str,
    experts: int,
) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H]: the sum over k of weights * down(activation(gate_up(x))).

    Only experts that are hit do anything. An id of `experts` or more stands for no expert.
    """
    T, k = ids.shape
    order = ids.reshape(-1).argsort(stable=True)
    ends = torch.bincount(ids.reshape(-1), minlength=experts)[:experts].cumsum(0).tolist()
    spans = [
        (e, slice(*span)) for e, span in enumerate(zip([0, *ends], ends, strict=False)) if span[1] > span[0]
    ]
    result = x.new_zeros(T * k, x.shape[-1])
    if spans:
        chosen = order[: ends[-1]]
        rows = x.expand(len(chosen), -1) if T == 1 else x[chosen // k]
        hidden = ACTIVATIONS[activation](torch.cat([gate_up(e, rows[span]) for e, span in spans]))
        # Where autocast is on, linears may have another dtype than x.
        result[chosen] = torch.cat([down(e, hidden[span]) for e, span in spans]).to(x.dtype)
    weighted = result.view(T, k, -1) * weights.unsqueeze(-1)
    return weighted.sum(1).to(x.dtype)


# The arguments of a kernel's own op for the block: those of gptq::experts less the names of the kernels.
BLOCK_ARGUMENTS = (
    "Tensor x, Tensor ids, Tensor weights, Tensor?[] gate_up, Tensor?[] down, Tensor? gate_up_bias, "
    "Tensor? down_bias, str activation, int[] gate_up_args, int[] down_args"
)


def block_fake(x: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define_opaque(f"experts({BLOCK_ARGUMENTS}, str gate_up_kernel, str down_kernel) -> Tensor", fake=block_fake)
def experts(
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
    gate_up_kernel: str,
    down_kernel: str,
) -> Tensor:
    """x [T, H], ids and weights [T, k] -> [T, H].

    gate_up, down: stacks [E, 2I, H] and [E, H, I] as packed by their kernels, whose further arguments follow.
    gate_up_bias [E, 2I], down_bias [E, H]. activation: of ACTIVATIONS. An id of E stands for no expert.
    """

    def linear(kernel: str, tensors: Tensors, bias: Tensor | None, args: Sequence[int]) -> ExpertLinear:
        run = body(kernel)

        def call(e: int, rows: Tensor) -> Tensor:
            own = [None if t is None else t[e] for t in tensors]
            return run(rows, *own, None if bias is None else bias[e], *args)

        return call

    count = next(t.shape[0] for t in gate_up if t is not None)
    first = linear(gate_up_kernel, gate_up, gate_up_bias, gate_up_args)
    second = linear(down_kernel, down, down_bias, down_args)
    return run_block(x, ids, weights, first, second, activation, count)


# Where gptq::experts has the stacks, and what belongs to each: (tensors, further arguments, kernel).
GATE_UP, DOWN = (3, 8, 10), (4, 9, 11)


def own_op(gate_up: LinearSpec, down: LinearSpec, kernels: tuple[Kernel, Kernel], activation: str) -> Any:
    """The op by which one kernel runs the whole block, or None."""
    first, second = kernels
    own = first.expert_ops(gate_up)
    if own is None or first is not second or own.block is None or second.expert_ops(down) is None:
        return None
    return own.block if own.block_supports(gate_up, down, activation) is None else None


def call(
    names: tuple[str, str], args: Sequence[Any], gate_up: LinearSpec, down: LinearSpec
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    """The op for the arguments of gptq::experts less the names of the kernels, and its arguments."""
    kernels = get_kernel(names[0]), get_kernel(names[1])
    own = own_op(gate_up, down, kernels, args[7])
    return (own, tuple(args)) if own is not None else (experts, (*args, *names))
