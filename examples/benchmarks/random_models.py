"""Models of real sizes, with random weights."""

from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

LLAMA_3_1 = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
CONFIGS = {
    "llama-3.1-8b": partial(
        LlamaConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        **LLAMA_3_1,
    ),
    "llama-3.1-70b": partial(
        LlamaConfig,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        **LLAMA_3_1,
    ),
    "qwen3-30b-a3b": partial(
        Qwen3MoeConfig,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=151936,
        max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "tiny": partial(  # to try a program, not to measure
        LlamaConfig,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=4096,
    ),
}


def configure(name: str, layers: int | None = None) -> PretrainedConfig:
    """layers: None for as many as the model has."""
    return CONFIGS[name](**({"num_hidden_layers": layers} if layers else {}))


def build(
    config: PretrainedConfig, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)
