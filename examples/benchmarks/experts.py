"""Mixture of experts on the CPU: decode and prefill of bf16 with Inductor, and of gptq_fx at 4 bits."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from decode import compare, with_gptq_fx, with_inductor
from table import conditions, parser, publish


def random_moe(layers: int) -> PreTrainedModel:
    config = Qwen3MoeConfig(
        hidden_size=1024,
        num_hidden_layers=layers,
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def main() -> None:
    cli = parser(__doc__.splitlines()[0])
    cli.add_argument("--rounds", type=int, default=9)
    cli.add_argument("--prompt", type=int, default=64, help="tokens of context before decode")
    cli.add_argument("--layers", type=int, default=8)
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    variants = {"bf16, Inductor": with_inductor, "gptq_fx, 4 bits": with_gptq_fx}
    text = compare(random_moe(args.layers), 128, args.rounds, args.prompt, variants)
    title = f"Random MoE: hidden 1024, 64 experts, top 8, ffn 512, {args.layers} layers; batch 1"
    rounds = f"* medians of {args.rounds} rounds: {args.prompt} tokens of prefill, then 32 of decode"
    publish("\n".join((conditions(title), rounds, "", text)), args.out)


if __name__ == "__main__":
    main()
