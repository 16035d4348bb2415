"""Calls that take a stack of experts, on QuantizedParameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptq_fx import spelling
from gptq_fx.errors import DenseUseError
from gptq_fx.gradients import flows, trained_experts
from gptq_fx.handles import handle_block
from gptq_fx.modes import as_autocast
from gptq_fx.packed import run_experts

if TYPE_CHECKING:
    from gptq_fx.parameter import QuantizedParameter

# Calls that multiply a batch of matrices by a stack of experts.
BMM = (
    torch.bmm,
    torch.matmul,
    torch.Tensor.bmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.ops.aten.bmm.default,
)


def run_stack(
    quantized: type[QuantizedParameter], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The result of a call that takes a stack of experts which is `quantized`, or None."""
    whole = spelling.read_block(func, args, kwargs)
    if whole is not None:
        return _block(quantized, whole)
    call = spelling.read_grouped(func, args, kwargs)
    if call is not None and isinstance(call.weight, quantized) and not isinstance(call.x, quantized):
        return call.weight.grouped(call.x, call.ends, call.transposed)
    if func in BMM and isinstance(args[1], quantized) and args[1].ndim == args[0].ndim == 3:
        x, weight = args
        ends = torch.arange(1, x.shape[0] + 1, device=x.device) * x.shape[1]
        y: Tensor = weight.grouped(x.reshape(-1, x.shape[-1]), ends, True)
        return y.reshape(*x.shape[:2], y.shape[-1])
    if func is torch.Tensor.__getitem__ and args[0].ndim == 3 and isinstance(args[0], quantized):
        ids = args[1] if isinstance(args[1], Tensor) else torch.as_tensor(args[1])
        if ids.dtype in (torch.int64, torch.int32):
            return args[0].select(ids)
    return None


def _block(quantized: type[QuantizedParameter], call: spelling.Block) -> Tensor:
    """gptq::quantized_experts on QuantizedParameters."""
    stacks = (call.gate_up, call.down)
    for stack in stacks:
        if not isinstance(stack, quantized) or stack.ndim != 3:
            raise DenseUseError(
                "gptq::quantized_experts: found a dense stack beside a quantized one. Legal: both of a kind"
            )
    packs = [stack._packed for stack in stacks]
    gate_up, down = stacks

    def run(x: Tensor) -> Tensor:
        by_handle = call._replace(x=x, gate_up=gate_up.handle, down=down.handle)
        y: Tensor
        if flows(x, call.weights, call.gate_up_bias, call.down_bias):
            width = gate_up.shape[-1 if gate_up.transposed else -2]
            y = trained_experts(*by_handle, gate_up.shape[0], width)
            return y
        if None in packs or type(x) not in (Tensor, torch.nn.Parameter):
            y = handle_block(*by_handle)
            return y
        return run_experts(*call._replace(x=x, gate_up=packs[0], down=packs[1]))

    return as_autocast(run, call.x, gate_up.dtype).to(call.x.dtype)
