"""One MoE block on a GPU: whole-block ops of the registry's kernels against transformers' experts in bf16.

Microseconds a block behind its router, medians of a CUDA graph over several routings, so that few tokens do
not find their experts in the L2 cache; the relative error against fp32 at 8 tokens beside the name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from gptq_fx import Scheme
from gptq_fx.kernels import Kernel, LinearSpec, Tensors, kernels
from gpu import DEVICE, error, microseconds, random_weight, runnable
from table import conditions, markdown, parser, publish

# experts, top k, hidden size, middle size
MODELS = {"Qwen3-30B-A3B": (128, 8, 2048, 768), "Mixtral-8x7B": (8, 2, 4096, 14336)}
TOKENS = (1, 8, 64, 512, 4096)
ROUTINGS = {1: 16, 8: 8, 64: 6, 512: 4, 4096: 2}
BATCHED_TOKENS = 8  # batched_mm gathers a copy of the weights for each row

Block = Callable[[Tensor, Tensor, Tensor], Tensor]


def stacks(spec: LinearSpec, names: list[str]) -> tuple[Tensor, dict[str, Tensors]]:
    """The dense stack [E, N, K] in bf16, and the pack of each kernel, expert by expert: memory is short."""
    assert spec.experts is not None
    packs: dict[str, list[Tensors]] = {name: [] for name in names}
    N, K = spec.out_features, spec.in_features
    dense = torch.empty(spec.shape, device=DEVICE, dtype=spec.dtype)
    one = LinearSpec(K, N, spec.scheme, spec.dtype, spec.device)
    whole = {k.name: k for k in kernels() if k.name in names}
    for e in range(spec.experts):
        weight = random_weight(N, K, spec.scheme, spec.dtype, e)
        dense[e] = weight.dequantize()
        for name, kernel in whole.items():
            packs[name].append(kernel.pack(weight, one))
    joined = {
        name: tuple(None if p[0] is None else torch.stack(p) for p in zip(*parts, strict=True))
        for name, parts in packs.items()
    }
    return dense, joined


def transformers_block(model: str, implementation: str, gate_up: Tensor, down: Tensor) -> Block:
    E, k, H, middle = MODELS[model]
    if model.startswith("Qwen"):
        sizes = {"moe_intermediate_size": middle, "num_experts": E, "num_experts_per_tok": k}
        config, cls = Qwen3MoeConfig(hidden_size=H, **sizes), Qwen3MoeExperts
    else:
        sizes = {"intermediate_size": middle, "num_local_experts": E, "num_experts_per_tok": k}
        config, cls = MixtralConfig(hidden_size=H, **sizes), MixtralExperts
    config._experts_implementation = implementation
    with torch.device("meta"):
        block = cls(config)
    block.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    block.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return lambda x, ids, weights: block(x, ids, weights.to(x.dtype))


def specs(model: str, args) -> tuple[LinearSpec, LinearSpec]:
    """Of gate_up and down."""
    E, _, H, middle = MODELS[model]
    scheme = Scheme(args.bits, args.group_size)
    up = LinearSpec(H, 2 * middle, scheme, torch.bfloat16, DEVICE, E)
    return up, LinearSpec(middle, H, scheme, torch.bfloat16, DEVICE, E)


def whole_block_kernels(up: LinearSpec, down: LinearSpec, names: list[str]) -> dict[str, Kernel]:
    found = {}
    for name, kernel in runnable(names, up, kernels()).items():
        own = kernel.expert_ops(up)
        if own is not None and own.block is not None and own.block_supports(up, down, "silu") is None:
            found[name] = kernel
        else:
            print(f"{name} has no op for the whole block", flush=True)
    return found


def own_block(kernel: Kernel, up: LinearSpec, down: LinearSpec, packs: tuple[Tensors, Tensors]) -> Block:
    op = kernel.experts.block
    rest = None, None, "silu", list(kernel.op_args(up)), list(kernel.op_args(down))
    return lambda x, ids, weights: op(x, ids, weights, list(packs[0]), list(packs[1]), *rest)


def routing(tokens: int, model: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    E, k, H, _ = MODELS[model]
    rng = torch.Generator(DEVICE).manual_seed(1000 * tokens + seed)
    scores, ids = torch.randn(tokens, E, generator=rng, device=DEVICE).topk(k, 1)
    x = torch.randn(tokens, H, generator=rng, device=DEVICE).to(torch.bfloat16)
    return x, ids, scores.softmax(-1)


def in_fp32(block: tuple[Tensor, Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(x.shape, device=x.device)
    for t, (row, experts, shares) in enumerate(zip(x.float(), ids.tolist(), weights, strict=True)):
        for e, share in zip(experts, shares, strict=True):
            gate, up = (block[0][e].float() @ row).chunk(2)
            out[t] += share * (block[1][e].float() @ (torch.nn.functional.silu(gate) * up))
    return out


def measure(model: str, args) -> list[list[str]]:
    up, down = specs(model, args)
    found = whole_block_kernels(up, down, args.kernels)
    dense_up, up_packs = stacks(up, list(found))
    dense_down, down_packs = stacks(down, list(found))
    blocks = {
        f"transformers {name}": transformers_block(model, name, dense_up, dense_down)
        for name in ("grouped_mm", "batched_mm")
    }
    for name, kernel in found.items():
        blocks[name] = own_block(kernel, up, down, (up_packs[name], down_packs[name]))
    few = routing(8, model, 0)
    expected = in_fp32((dense_up, dense_down), *few)
    lines = []
    for name, block in blocks.items():
        worst, times = error(block(*few), expected), []
        for tokens in args.tokens:
            if name.endswith("batched_mm") and tokens > BATCHED_TOKENS:
                times.append("")
                continue
            inputs = [routing(tokens, model, seed) for seed in range(ROUTINGS.get(tokens, 2))]
            times.append(f"{microseconds([partial(block, *i) for i in inputs]):.1f}")
        lines.append([f"{model}, {name}", f"{worst:.4f}", *times])
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    cli = parser(__doc__)
    cli.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    cli.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    cli.add_argument("--kernels", nargs="*", default=[], help="of the registry (default: all that run)")
    cli.add_argument("--bits", type=int, default=4)
    cli.add_argument("--group-size", type=int, default=128)
    cli.add_argument("--seconds", type=float, default=500, help="no model begins after so many")
    args = cli.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    start, lines = time.monotonic(), []
    for model in args.models:
        if time.monotonic() - start < args.seconds:
            lines += measure(model, args)
            torch.cuda.empty_cache()
            head = ["block", "error", *map(str, args.tokens)]
            title = f"One MoE block on the GPU, {args.bits} bits, group {args.group_size}: µs by tokens"
            publish(f"{conditions(title)}\n\n{markdown(head, lines)}", args.out)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
