"""transformers' own from_pretrained loads GPTQ checkpoints through our quantizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import llama, logits, quantized
from transformers import AutoModelForCausalLM

import gptq_fx
from gptq_fx import CheckpointError, QuantizedParameter


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [True, False])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_auto_model_loads_a_checkpoint(tied: bool, lm_head: bool, tmp_path: Path) -> None:
    model, _ = quantized(llama(2, tie_word_embeddings=tied), group_size=32, lm_head=lm_head)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=gptq_fx.HFConfig())
    assert isinstance(loaded.model.layers[0].mlp.up_proj.weight, QuantizedParameter)
    assert isinstance(loaded.lm_head.weight, QuantizedParameter) == lm_head
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
    gptq_fx.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(logits(gptq_fx.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_another_dtype(tmp_path: Path) -> None:
    model, _ = quantized(llama(1), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", quantization_config=gptq_fx.HFConfig(), dtype=torch.bfloat16
    )
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    wanted = gptq_fx.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(logits(loaded), logits(wanted))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, ValueError), match="quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=gptq_fx.HFConfig())
