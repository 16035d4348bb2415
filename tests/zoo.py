"""The zoo: many architectures, each as a tiny random model. One row each; most need no more than a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
import zoo_modules
from models import ids, spread
from shrink import shrink
from torch import Tensor, nn

Inputs = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Row:
    """model: a class of transformers, or of zoo_modules. family: the heading it stands under in the table.

    inputs: config -> keyword arguments of forward. config: what differs from the tiny config of its class.
    gap: a part of what is wrong with it, where it does not pass fully.
    """

    model: str
    family: str
    inputs: Inputs
    config: dict[str, Any] = field(default_factory=dict)
    gap: str = ""

    @property
    def known(self) -> bool:
        """Whether this version of transformers has it."""
        return hasattr(zoo_modules, self.model) or hasattr(transformers, self.model)

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model in eval mode and fp32, and what to call it with."""
        torch.manual_seed(0)
        if hasattr(zoo_modules, self.model):
            model, config = getattr(zoo_modules, self.model)(), None
        else:
            cls = getattr(transformers, self.model)
            config = shrink(cls.config_class, **self.config)
            model = cls(config)
            for each in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
                each.use_cache = False  # as calibration has it, so that Dynamo makes one graph for both
        return spread(model).float().eval().requires_grad_(False), self.inputs(config)


def rows(family: str, inputs: Inputs, names: str) -> list[Row]:
    return [Row(name, family, inputs) for name in names.split()]


# --- inputs


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens(config: Any) -> dict[str, Any]:
    return {"input_ids": ids()}


def translation(config: Any) -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 6)}


def image(config: Any) -> dict[str, Any]:
    return {"pixel_values": normal(2, 3, 32, 32)}


def large_image(config: Any) -> dict[str, Any]:
    return {"pixel_values": normal(1, 3, 64, 64)}


def image_and_text(config: Any) -> dict[str, Any]:
    return {"pixel_values": normal(2, 3, 32, 32), "input_ids": ids()}


def video(config: Any) -> dict[str, Any]:
    return {"pixel_values": normal(2, config.num_frames, 3, 32, 32)}


def wave(config: Any) -> dict[str, Any]:
    return {"input_values": normal(2, 2000)}


def spectrum(config: Any) -> dict[str, Any]:
    return {"input_features": normal(2, 64, config.num_mel_bins)}


def patches_of_sound(config: Any) -> dict[str, Any]:
    return {"input_values": normal(2, config.max_length, config.num_mel_bins)}


def speech(config: Any) -> dict[str, Any]:
    features = normal(2, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": ids(2, 6)}


def vector(config: Any) -> dict[str, Any]:
    return {"x": normal(2, 12, 64)}


def picture(config: Any) -> dict[str, Any]:
    return {"x": normal(2, 3, 32, 32)}


# --- rows

MLA = {"num_key_value_heads": 4}  # its keys and values are those of every head
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 8}
SPEECH = {
    "conv_dim": [32, 32],
    "conv_kernel": [10, 3],
    "conv_stride": [5, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
STAGES = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 32, "window_size": 4, "out_features": None}

ZOO = [
    *rows(
        "decoder",
        tokens,
        """
        ApertusForCausalLM BitNetForCausalLM BloomForCausalLM
        Cohere2ForCausalLM 
        DiffLlamaForCausalLM Exaone4ForCausalLM FalconForCausalLM
        GPT2LMHeadModel GPTJForCausalLM GPTNeoXForCausalLM GemmaForCausalLM
        Gemma3ForCausalLM Gemma4ForCausalLM Glm4ForCausalLM
        HrmTextForCausalLM LlamaForCausalLM
        MptForCausalLM NanoChatForCausalLM OPTForCausalLM 
        Olmo2ForCausalLM OpenAIGPTLMHeadModel PhiForCausalLM Phi3ForCausalLM
        Qwen3ForCausalLM StableLmForCausalLM
        Starcoder2ForCausalLM 
        """,
    ),
    Row("CTRLLMHeadModel", "decoder", tokens, {"dff": 128}),
    Row("GPTNeoForCausalLM", "decoder", tokens, {"attention_types": [[["global", "local"], 1]]}),
    Row("MiniCPM3ForCausalLM", "decoder", tokens, MLA),
    Row("NemotronForCausalLM", "decoder", tokens, {"num_key_value_heads": 2}),
    *rows(
        "mixture of experts",
        tokens,
        """
        AfmoeForCausalLM AriaTextForCausalLM
        Ernie4_5_MoeForCausalLM Glm4MoeForCausalLM
        GptOssForCausalLM GraniteMoeForCausalLM
        Llama4ForCausalLM MixtralForCausalLM
        OlmoeForCausalLM PhimoeForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM 
        """,
    ),
    Row("DeepseekV4ForCausalLM", "mixture of experts", tokens, gap="o_a_proj.weight: used by view"),
    Row("JetMoeForCausalLM", "mixture of experts", tokens, gap="experts.input_linear.weight: used by linear"),
    Row("DeepseekV2ForCausalLM", "mixture of experts", tokens, {**MLA, "num_experts_per_tok": 2}),
    Row("DeepseekV3ForCausalLM", "mixture of experts", tokens, MLA),
    *rows(
        "recurrent and hybrid",
        tokens,
        """
        MambaForCausalLM MiniMaxForCausalLM OlmoHybridForCausalLM Lfm2ForCausalLM
        RwkvForCausalLM ZayaForCausalLM
        """,
    ),
    Row("BambaForCausalLM", "recurrent and hybrid", tokens, {**MAMBA, "attn_layer_indices": [1]}),
    Row("FalconH1ForCausalLM", "recurrent and hybrid", tokens, {**MAMBA, "mamba_d_ssm": 128}),
    Row(
        "GraniteMoeHybridForCausalLM",
        "recurrent and hybrid",
        tokens,
        {**MAMBA, "layer_types": ["mamba", "attention"]},
    ),
    Row("JambaForCausalLM", "recurrent and hybrid", tokens, {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Row("Mamba2ForCausalLM", "recurrent and hybrid", tokens, {"num_heads": 8, "head_dim": 16}),
    Row("Qwen3NextForCausalLM", "recurrent and hybrid", tokens, HYBRID),
    Row("RecurrentGemmaForCausalLM", "recurrent and hybrid", tokens, {"num_hidden_layers": 3}),
    *rows(
        "encoder",
        tokens,
        """
        AlbertForMaskedLM BertForMaskedLM BigBirdForMaskedLM CanineModel
        ConvBertForMaskedLM DebertaForMaskedLM DebertaV2ForMaskedLM DistilBertForMaskedLM
        EuroBertForMaskedLM FNetForMaskedLM FunnelForMaskedLM
        LayoutLMForMaskedLM LongformerForMaskedLM
        ModernBertForMaskedLM
        RoFormerForMaskedLM
        SqueezeBertForMaskedLM YosoForMaskedLM
        """,
    ),
    Row("EsmForMaskedLM", "encoder", tokens, {"vocab_size": 96, "pad_token_id": 1}),
    Row("XLNetLMHeadModel", "encoder", tokens, {"d_head": 16}),
    *rows(
        "encoder and decoder",
        translation,
        """
        BartForConditionalGeneration 
        EncoderDecoderModel LongT5ForConditionalGeneration
        M2M100ForConditionalGeneration 
        NllbMoeForConditionalGeneration 
        PegasusXForConditionalGeneration ProphetNetForConditionalGeneration
        SwitchTransformersForConditionalGeneration T5ForConditionalGeneration T5GemmaForConditionalGeneration
        
        """,
    ),
    *rows(
        "vision",
        image,
        """
        Aimv2VisionModel BeitForImageClassification DINOv3ViTModel DPTModel 
        Dinov2ForImageClassification GLPNModel PvtV2ForImageClassification
        SegformerForImageClassification SwiftFormerModel ViTForImageClassification ViTMAEModel
        VitDetModel YolosModel
        """,
    ),
    Row(
        "ConvNextV2ForImageClassification",
        "vision",
        image,
        {"depths": [1, 1], "hidden_sizes": [32, 64], "num_stages": 2},
    ),
    Row("SwinForImageClassification", "vision", image, STAGES),
    Row("Swinv2ForImageClassification", "vision", image, STAGES),
    Row(
        "HieraForImageClassification",
        "vision",
        large_image,
        {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 32, "num_query_pool": 1, "image_size": [64, 64]},
    ),
    Row("MobileNetV2Model", "vision", image),
    Row("VideoMAEForVideoClassification", "vision", video),
    Row("TimesformerForVideoClassification", "vision", video),
    Row("HubertForCTC", "audio", wave, SPEECH),
    Row("Wav2Vec2ForCTC", "audio", wave, SPEECH),
    Row("Wav2Vec2ConformerForCTC", "audio", wave, {**SPEECH, "vocab_size": 96}),
    Row("WavLMForCTC", "audio", wave, SPEECH),
    Row("Wav2Vec2BertModel", "audio", spectrum, {"feature_projection_input_dim": 64, "num_mel_bins": 64}),
    Row("ASTForAudioClassification", "audio", patches_of_sound, {"max_length": 64, "num_mel_bins": 32}),
    Row("WhisperForConditionalGeneration", "audio", speech),
    *rows(
        "multimodal",
        image_and_text,
        """
        AltCLIPModel BlipModel CLIPModel SiglipModel GitForCausalLM
        """,
    ),
    *rows("plain PyTorch", vector, "Bare Attention Shared Broken"),
    Row("TorchTransformer", "plain PyTorch", vector, gap="used by _transformer_encoder_layer_fwd"),
    Row("Recurrent", "plain PyTorch", vector, gap="no graph reached it"),
    Row("Looped", "plain PyTorch", vector, gap="no graph reached it"),
    *rows("plain PyTorch", picture, "VisionTransformer Mixer ConvNet SwinBlock"),
]

# The rows of `make test`: one of each family, of those that are quick.
FAST = (
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Lfm2ForCausalLM",
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Bare",
    "Attention",
    "Broken",
    "ConvNet",
)
