"""The expert modules of transformers: a block of quantized experts is one call, in eager and in graphs.

transformers looks up how experts run by a name in the config. Under the name IMPLEMENTATION there is
`forward`, which says gptq::quantized_experts. A module whose block is not one that kernels know keeps the
grouped form, whose linears are matched one by one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.kernels.block import ACTIVATIONS, run_block
from gptq_fx.ops import define_opaque
from gptq_fx.parameter import QuantizedParameter

IMPLEMENTATION = "gptq_fx"
# What `install` leaves on an expert module: the name of its activation.
ACTIVATION = "_gptq_activation"


@define_opaque(
    "quantized_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def quantized_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """gptq::experts on stacks [E, 2I, H] and [E, H, I] as a model holds them: what graphs say before `swap`.

    QuantizedParameters run the op of their kernel; this body is for dense stacks.
    """

    def linear(stack: Tensor, bias: Tensor | None) -> Any:
        return lambda e, rows: nn.functional.linear(rows, stack[e], None if bias is None else bias[e])

    first, second = linear(gate_up, gate_up_bias), linear(down, down_bias)
    return run_block(x, ids, weights, first, second, activation, gate_up.shape[0])


def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    activation = getattr(module, ACTIVATION, None)
    both = isinstance(module.down_proj, QuantizedParameter)
    if activation is None or not (both and isinstance(module.gate_up_proj, QuantizedParameter)):
        from transformers.integrations.moe import grouped_mm_experts_forward

        y: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return y
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    return quantized_experts(  # type: ignore[no-any-return]
        hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, *biases, activation
    )


def install(model: nn.Module) -> None:
    """Let every block of experts with quantized stacks be one call."""
    moe = sys.modules.get("transformers.integrations.moe")
    if moe is None:
        return
    moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    for module in model.modules():
        activation = _activation(module) if _is_block(module) else None
        if activation is not None:
            setattr(module, ACTIVATION, activation)
            module.config._experts_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]


def _is_block(module: nn.Module) -> bool:
    """Whether it is an expert module of transformers with a gate and nothing behind down, all quantized.

    Experts in act-order keep the grouped form: there each linear has its place for a gather in front.
    """
    parts: list[Any] = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return (
        all(isinstance(part, QuantizedParameter) and not part.scheme.desc_act for part in parts)
        and getattr(module, "has_gate", False)
        and not getattr(module, "has_post_expert_norm", False)
    )


def _activation(module: nn.Module) -> str | None:
    """The activation that gives the same as the module's own on random numbers, or None.

    A module may have any: only what it computes tells.
    """
    sample = 6 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0), device="cpu")
    with torch.no_grad():
        wanted = module._apply_gate(sample)  # type: ignore[operator]
    for name, act in ACTIVATIONS.items():
        found = act(sample)
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            return name
    return None
