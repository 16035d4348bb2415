"""Tiny random models: one row each for the architectures of the coverage table, and plain modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn

import gptq_fx
from gptq_fx.grid import round_to_nearest
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import as_parameter
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

VOCABULARY = 96
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    **TOKENS,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}


def ids(*shape: int) -> Tensor:
    """Token ids that are no special tokens, the same at every call."""
    return torch.randint(3, VOCABULARY, shape or (2, 12), generator=torch.Generator().manual_seed(0))


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def decoder_text() -> dict[str, Any]:
    return {"input_ids": ids(), "use_cache": False}


def image() -> dict[str, Any]:
    return {"pixel_values": _normal(2, 3, 32, 32)}


def speech() -> dict[str, Any]:
    return {"input_features": _normal(2, 80, 64), "decoder_input_ids": ids(), "use_cache": False}


def translation() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 6), "use_cache": False}


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Tiny:
    """model: a class of transformers; its config class is made with `config`. inputs: keyword arguments."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]] = decoder_text

    def build(self, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
        cls = getattr(transformers, self.model)
        config = cls.config_class(**{**self.config, **overrides})
        torch.manual_seed(0)
        return spread(cls(config)).to(dtype).eval().requires_grad_(False)


MODELS = {
    "llama": Tiny("LlamaForCausalLM", {**DECODER, "num_hidden_layers": 2}),
    "mistral": Tiny("MistralForCausalLM", {**DECODER, "num_hidden_layers": 2, "sliding_window": 8}),
    "qwen2": Tiny("Qwen2ForCausalLM", {**DECODER, "num_hidden_layers": 2}),
    "qwen3": Tiny(
        "Qwen3ForCausalLM", {**DECODER, "num_hidden_layers": 2, "head_dim": 16, "tie_word_embeddings": True}
    ),
    "gemma2": Tiny(
        "Gemma2ForCausalLM", {**DECODER, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8}
    ),
    "gemma3": Tiny(
        "Gemma3ForCausalLM", {**DECODER, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 8}
    ),
    "phi3": Tiny("Phi3ForCausalLM", {**DECODER, "num_hidden_layers": 2, "sliding_window": None}),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **TOKENS},
    ),
    "gpt_neox": Tiny("GPTNeoXForCausalLM", {**ENCODER, **TOKENS}),
    "opt": Tiny(
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "ffn_dim": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 64,
            **TOKENS,
        },
    ),
    "bloom": Tiny(
        "BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, **TOKENS}
    ),
    "falcon": Tiny(
        "FalconForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **TOKENS,
        },
    ),
    "bert": Tiny("BertModel", ENCODER, text),
    "vit": Tiny("ViTModel", {**ENCODER, "image_size": 32, "patch_size": 8}, image),
    "whisper": Tiny(
        "WhisperForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_source_positions": 32,
            "max_target_positions": 32,
            "decoder_start_token_id": 1,
            **TOKENS,
        },
        speech,
    ),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        translation,
    ),
    # Not in the coverage table: their experts are a later job.
    "mixtral": Tiny(
        "MixtralForCausalLM",
        {
            **DECODER,
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    ),
}


MOE = {**DECODER, "num_hidden_layers": 2, "num_experts_per_tok": 2}
DEEPSEEK = {
    **MOE,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
}
EXPERTS = {
    "mixtral": Tiny("MixtralForCausalLM", {**MOE, "num_local_experts": 4}),
    "qwen2_moe": Tiny(
        "Qwen2MoeForCausalLM",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
    ),
    "qwen3_moe": Tiny(
        "Qwen3MoeForCausalLM", {**MOE, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}
    ),
    "deepseek_v2": Tiny("DeepseekV2ForCausalLM", {**DEEPSEEK, "head_dim": 16}),
    "deepseek_v3": Tiny("DeepseekV3ForCausalLM", DEEPSEEK),
    "olmoe": Tiny("OlmoeForCausalLM", {**MOE, "num_experts": 4}),
    "granitemoe": Tiny("GraniteMoeForCausalLM", {**MOE, "num_local_experts": 4}),
    "phimoe": Tiny("PhimoeForCausalLM", {**MOE, "num_local_experts": 4}),
    "gpt_oss": Tiny(
        "GptOssForCausalLM", {**MOE, "num_local_experts": 4, "head_dim": 16, "sliding_window": 8}
    ),
    "glm4_moe": Tiny(
        "Glm4MoeForCausalLM",
        {
            **MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 16,
        },
    ),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeForCausalLM",
        {
            **MOE,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        {
            **MOE,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "intermediate_size_mlp": 128,
            "head_dim": 16,
            "interleave_moe_layer_step": 1,
        },
    ),
}


def spread(model: nn.Module) -> nn.Module:
    """Biases and norms as unlike their initial zeros and ones as those of a trained model."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith("_bias"):
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        elif parameter.ndim == 3:  # stacks of experts start as uninitialised memory
            parameter.data.normal_(0, 0.05)
    return model


def llama(layers: int = 2, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    return MODELS["llama"].build(dtype, num_hidden_layers=layers, **overrides)


def byte_checkpoint(folder: Path) -> Path:
    """A folder with a tiny llama and a tokenizer that knows bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytes_only = Tokenizer(BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    model = llama(1, torch.bfloat16, vocab_size=len(vocabulary), max_position_embeddings=512)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


HEADS = {"lm_head", "embed_out", "proj_out"}


def linears(model: nn.Module) -> set[str]:
    """Paths of all modules that are a linear."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def quantized(
    model: nn.Module, config: gptq_fx.GPTQConfig | None = None, **settings: Any
) -> tuple[nn.Module, gptq_fx.Report]:
    """A quantized copy, and its report."""
    twin = copy.deepcopy(model)
    return twin, gptq_fx.quantize(twin, config or gptq_fx.GPTQConfig(**settings), progress=False)


def act_ordered(
    model: nn.Module,
    seeds: dict[str, int] | None = None,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
) -> nn.Module:
    """A copy with every matrix in act-order: rounded in groups of random inputs.

    seeds: weights of one seed and one width have one order; by the last name of their path, else 0.
    """
    twin = copy.deepcopy(model)
    for name, dense in list(twin.named_parameters()):
        if dense.ndim < 2:
            continue
        owner, _, leaf = name.rpartition(".")
        seed = (seeds or {}).get(owner.rpartition(".")[2] if leaf == "weight" else leaf, 0)
        parts = [
            _act_ordered(matrix, Scheme(bits, group_size, sym), 100 * seed + e)
            for e, matrix in enumerate(dense if dense.ndim == 3 else dense[None])
        ]
        weight = QuantizedWeight.stack(parts) if dense.ndim == 3 else parts[0]
        packed = PackedWeight(weight, Scheme(bits, group_size, sym, True), None)
        setattr(twin.get_submodule(owner), leaf, as_parameter(gptq_fx.QuantizedParameter(packed, name)))
    return twin


def _act_ordered(dense: Tensor, scheme: Scheme, seed: int) -> QuantizedWeight:
    K = dense.shape[1]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_nearest(dense[:, order], scheme)
    codes, g_idx = torch.empty_like(rounded.codes()), torch.empty(K, dtype=torch.int32)
    codes[order] = rounded.codes()
    g_idx[order] = (torch.arange(K) // scheme.group_size).to(torch.int32)
    return QuantizedWeight.from_codes(codes, rounded.scales, rounded.zeros(), scheme.bits, g_idx)


def dense_twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A dense copy in `dtype` that computes with the numbers of the quantized weights."""
    twin = copy.deepcopy(model)
    for name, weight in list(twin.named_parameters(remove_duplicate=False)):
        if isinstance(weight, gptq_fx.QuantizedParameter):
            dense = weight.quantized_weight().dequantize(dtype)
            dense = dense.mT if weight.transposed else dense
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, nn.Parameter(dense.contiguous(), requires_grad=False))
    return twin.to(dtype)


def dequantized(
    model: nn.Module,
    config: gptq_fx.GPTQConfig | None = None,
    dtype: torch.dtype | None = None,
    **settings: Any,
) -> nn.Module:
    """A dense copy in `dtype` that computes with the numbers of the quantized weights."""
    return dense_twin(quantized(model, config, **settings)[0], dtype)


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The first output, run without gradients."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cast = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    with torch.no_grad():
        result = model(**cast)
    return result if isinstance(result, Tensor) else result[0]


def logits(model: nn.Module, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids() if tokens is None else tokens, use_cache=False).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, in double precision."""
    wanted = wanted.double()
    return float((found.double() - wanted).norm() / wanted.norm())


# --- plain modules


class MLP(nn.Module):
    """gate, up, down; `bias` on all or none."""

    def __init__(self, width: int = 64, inner: int = 128, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, bias)
        self.up = nn.Linear(width, inner, bias)
        self.down = nn.Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    """Layers one behind the other, each a graph of its own if `broken`."""

    def __init__(self, layers: int = 3, broken: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP(bias=bias) for _ in range(layers))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


@dataclass(eq=False)
class CountingBackend:
    """gptq_fx.backend, counting its calls."""

    options: dict[str, Any] = field(default_factory=lambda: {"inner_backend": "eager"})
    calls: int = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.calls += 1
        return gptq_fx.backend(gm, inputs, options=self.options)
