"""Models that transformers splits between ranks compute what one process computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from models import MODELS, ids, logits
from ranks import needs_transformers_5_23, on_ranks
from torch import Tensor, nn
from transformers.distributed import DistributedConfig

import gptq_fx

# group_size 128 is cut by the border between ranks; heads for four ranks.
CONFIG = gptq_fx.GPTQConfig(group_size=128, lm_head=True)
OPTIONS = {"inner_backend": "eager", "kernel": "reference"}
TINY = {"num_hidden_layers": 1, "num_key_value_heads": 4, "intermediate_size": 256}


@pytest.fixture(scope="module", params=["llama", pytest.param("mixtral", marks=needs_transformers_5_23)])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with a model, dense and quantized, and the logits of the quantized one."""
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param].build(**TINY)
    model.save_pretrained(folder / "dense")
    gptq_fx.quantize(model, CONFIG, progress=False)
    gptq_fx.save_pretrained(model, folder / "gptq")
    return folder, logits(model)


def split(folder: Path) -> nn.Module:
    config = DistributedConfig(tp_size=dist.get_world_size())
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", distributed_config=config)


def every_way(folder: Path, compiled: bool) -> dict[str, Any]:
    """Logits of a model quantized by this rank and by a checkpoint; and what is held here."""
    model = split(folder)
    gptq_fx.quantize(model, CONFIG, progress=False)
    found: dict[str, Any] = {"quantized": logits(model)}
    found["recording gradients"] = model(ids(), use_cache=False).logits.detach()
    loaded = gptq_fx.from_pretrained(folder / "gptq", distributed_config={"tp_size": dist.get_world_size()})
    found["loaded"] = logits(loaded)
    if compiled:
        loaded.compile(backend="gptq", options=OPTIONS, fullgraph=True)
        found["compiled"] = logits(loaded)
    held = [
        {n: p for n, p in m.named_parameters() if isinstance(p, gptq_fx.QuantizedParameter)}
        for m in (model, loaded)
    ]
    found["same integers"] = held[0].keys() == held[1].keys() and all(
        torch.equal(p.quantized_weight().codes(), held[1][n].quantized_weight().codes())
        for n, p in held[0].items()
    )
    found["bytes"] = sum(p.nbytes for p in held[1].values())
    with pytest.raises(gptq_fx.CheckpointError, match="this rank holds a part"):
        gptq_fx.save_pretrained(model, folder / "part")
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_split_model_is_the_model_of_one_process(saved: tuple[Path, Tensor], ranks: int) -> None:
    folder, wanted = saved
    whole = sum(
        p.nbytes
        for p in gptq_fx.from_pretrained(folder / "gptq").parameters()
        if isinstance(p, gptq_fx.QuantizedParameter)
    )
    for found in on_ranks(ranks, every_way, folder, ranks == 2):
        assert found.pop("same integers")
        assert found.pop("bytes") < 1.25 * whole / ranks  # scales of groups that were cut are held twice
        for way, got in found.items():
            assert (got - wanted).abs().max() < 1e-5, way


def refused(folder: Path) -> list[str]:
    model, errors = split(folder), []
    with pytest.raises(gptq_fx.ConfigError) as error:
        group = dist.group.WORLD
        gptq_fx.quantize(model, CONFIG, [{"input_ids": ids()}], progress=False, process_group=group)
    errors.append(str(error.value))
    with pytest.raises(gptq_fx.ConfigError) as error:
        gptq_fx.from_pretrained(folder / "gptq", distributed_config={"fsdp_size": 2})
    errors.append(str(error.value))
    with pytest.raises(gptq_fx.WeightError) as error:  # groups of 8 in parts of 68 inputs
        gptq_fx.quantize(model, gptq_fx.GPTQConfig(group_size=8), progress=False)
    errors.append(str(error.value))
    return errors


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    MODELS["llama"].build(intermediate_size=136).save_pretrained(tmp_path / "dense")
    gptq_fx.save_pretrained(_quantized(), tmp_path / "gptq")
    for calibrated, fsdp, cut in on_ranks(2, refused, tmp_path):
        assert "process_group: the model is split" in calibrated and "distributed_config=" in calibrated
        assert "fsdp_size=2. Legal: tp_size" in fsdp
        assert "pieces of 4. Legal: a multiple of 8" in cut


def _quantized() -> nn.Module:
    model = MODELS["llama"].build(num_hidden_layers=1)
    gptq_fx.quantize(model, CONFIG, progress=False)
    return model
