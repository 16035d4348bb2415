"""Tiny configs of transformers' architectures, made of their default ones by the names of their fields."""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 96
WIDTH = 64
# Field -> the most it may be; the first pattern that matches the whole name. Fields that none matches keep
# their default. Sizes are multiples of 32, so that every linear has whole groups.
LIMITS: list[tuple[str, int]] = [
    (r"type_vocab_size", 8),
    (r"(.*_)?vocab_size(_.*)?", VOCABULARY),
    (r"(.*_)?num_(key_value|kv|key)_heads|linear_num_key_heads", 2),
    (r"(.*_)?(num_)?(attention_)?heads?|(.*_)?n_heads?", 4),
    (r"(.*_)?head_dim|d_kv|d_head|(.*_)?rotary_dim", 16),
    (r"(.*_)?num_(experts|local_experts)|n_routed_experts", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|expert_capacity", 2),
    (r"(.*_)?(num|n)_(.*_)?(layers?|blocks|stages)|(.*_)?(encoder|decoder)_layers|(.*_)?depth", 2),
    (r"(.*_)?(intermediate|ffn|feedforward|mlp)_(size|dim)(_mlp)?|n_inner|d_ff|d_inner", 2 * WIDTH),
    (r"(.*_)?lora_rank|(.*_)?time_step_rank|mamba_dt_rank", 32),
    (r"(.*_)?state_size|(.*_)?d_state", 16),
    (r"(.*_)?max_.*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|seq_length", 64),
    (r"(.*_)?chunk_size|block_size|sliding_window", 8),
    (
        r"(.*_)?(hidden|embed|embedding|projection|proj|model|input|output|key|value|codevector)_(size|dim)",
        WIDTH,
    ),
    (r"(.*_)?hidden_size_per_layer_input|pooler_output_size|out_hidden_size|lru_width", WIDTH),
    (r"d_model|n_embd|dim|d_latents|width|(.*_)?(latents?|channels?)_dim", WIDTH),
    (r"image_size", 32),
    (r"(.*_)?patch_size", 8),
]


def limit(name: str, value: int) -> int:
    """What a field of a default config is made."""
    for pattern, most in LIMITS:
        if re.fullmatch(pattern, name):
            return min(value, most)
    # Ids of special tokens must be in the vocabulary, and unlike each other.
    if re.fullmatch(r".*_(token_)?(id|index)", name) and value >= VOCABULARY:
        return VOCABULARY - 1
    return value


def shrink(config: type[PreTrainedConfig], **overrides: Any) -> PreTrainedConfig:
    """config() with its sizes as small as the rows above say, and `overrides` as given.

    A field of `overrides` that is a config itself takes a dict of what to override in the tiny one.
    """
    return config(**_fields(config(), overrides))


def _fields(default: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    tiny: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = {"model_type": value.model_type, **_fields(value, overrides.get(name) or {})}
        elif isinstance(value, int) and not isinstance(value, bool) and not name.startswith("_"):
            small = limit(name, value)
            if small != value:
                tiny[name] = small
    nested = {name for name, value in tiny.items() if isinstance(value, dict)}
    return {**tiny, **{name: value for name, value in overrides.items() if name not in nested}}
