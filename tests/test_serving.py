"""Our checkpoints against what vLLM and SGLang ask of one: their settings, names, shapes and fused linears.

The engines themselves need a GPU. What they ask is written down here as they document and check it, apart
from gptq_fx.checkpoint.readers, whose verdict it tests.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS
from safetensors import safe_open

import gptq_fx

LARGE = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4, "vocab_size": 128}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
BY_INPUTS = ("o_proj", "down_proj", "w2")
EXPERTS = re.compile(r"\.block_sparse_moe\.experts\.\d+\.w[123]$")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))


def save(folder: Path, name: str = "llama", **settings: Any) -> Path:
    model = MODELS[name].build(torch.float16, num_hidden_layers=2, **LARGE)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(**settings), progress=False)
    gptq_fx.save_pretrained(model, folder / "out")
    return folder / "out"


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    return config


def headers(folder: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def scheme(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """The settings of a linear under the name an engine gives it; None: it is dense. First rule wins."""
    for rule, override in (config["dynamic"] or {}).items():
        sign, pattern = (rule[:2], rule[2:]) if rule[:2] in ("+:", "-:") else ("+:", rule)
        if re.match(pattern, module):
            return None if sign == "-:" else {**config, **override}
    return config


def check(folder: Path, ranks: int) -> None:
    """Raise AssertionError, naming a tensor, where an engine would refuse the checkpoint."""
    config, tensors = settings_of(folder), headers(folder)
    assert config["quant_method"] == "gptq" and config["checkpoint_format"] == "gptq"
    assert [type(config[key]) for key in ("bits", "group_size")] == [int, int]
    assert [type(config[key]) for key in ("sym", "desc_act", "lm_head")] == [bool, bool, bool]
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    linears = {n.removesuffix(".weight") for n, (_, shape) in tensors.items() if len(shape) == 2}
    linears = {n for n in linears if n.endswith(("_proj", "lm_head"))}
    for module in sorted(modules | linears):
        parent, _, leaf = module.rpartition(".")
        found = scheme(config, module)
        if leaf in FUSED:
            assert found == scheme(config, f"{parent}.{FUSED[leaf]}"), module
        if module not in modules:
            assert found is None or module == "lm_head", module
            continue
        assert found is not None, module
        bits, group = found["bits"], found["group_size"]
        assert bits in (4, 8) and found["sym"] and group in (-1, 32, 64, 128), module
        assert group == -1 or not found["desc_act"], module
        _, (words, N) = tensors[f"{module}.qweight"]
        K = words * 32 // bits
        G = 1 if group == -1 else K // group
        assert tensors[f"{module}.qweight"] == ("I32", [K * bits // 32, N])
        assert tensors[f"{module}.qzeros"] == ("I32", [G, N * bits // 32])
        assert tensors[f"{module}.scales"][0] in ("F16", "BF16")
        assert tensors[f"{module}.scales"][1] == [G, N]
        assert tensors[f"{module}.g_idx"] == ("I32", [K])
        by_inputs = leaf in BY_INPUTS
        part_K, part_N = (K // ranks, N) if by_inputs else (K, N // ranks)
        assert part_K % 128 == 0 and part_K % max(group, 1) == 0 and part_N % 64 == 0, module


@pytest.mark.parametrize(
    ("name", "settings", "ranks"),
    [
        ("llama", {}, 1),
        ("llama", {}, 2),
        ("llama", {"bits": 8, "group_size": -1}, 2),
        ("llama", {"dynamic": {r".*down_proj": {"bits": 8}, r"-:.*layers\.1\.self_attn": {}}}, 2),
        ("llama", {"lm_head": True}, 1),
        ("mixtral", {}, 2),
    ],
)
def test_engines_can_read_what_we_write(
    tmp_path: Path, name: str, settings: dict[str, Any], ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, name, **settings)
    check(folder, ranks)
    if name == "mixtral":
        experts = [n for n in headers(folder) if ".experts." in n and n.endswith(".qweight")]
        assert experts and all(EXPERTS.search(n.removesuffix(".qweight")) for n in experts)
    importlib.import_module("serve").main([str(folder), "--ranks", str(ranks)])
    printed = capsys.readouterr().out
    assert f"vllm serve {folder} --tensor-parallel-size {ranks}" in printed
    assert printed.count("  yes") == 2, printed


@pytest.mark.parametrize(
    ("settings", "ranks", "reason"),
    [
        ({"bits": 3}, 1, "not 4 or 8 bits"),
        ({"sym": False}, 1, "asymmetric"),
        ({}, 4, "256 inputs do not make 4 parts of a multiple of 128"),
        ({}, 8, "256 outputs do not make 8 parts of a multiple of 64"),
    ],
)
def test_what_engines_refuse_is_said_before(
    tmp_path: Path, settings: dict[str, Any], ranks: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path, **settings)
    with pytest.raises(AssertionError):
        check(folder, ranks)
    with pytest.raises(SystemExit, match="vLLM cannot serve"):
        importlib.import_module("serve").main([str(folder), "--ranks", str(ranks), "--run", "vllm"])
    assert reason in capsys.readouterr().out


def test_an_engine_takes_the_place_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, started = save(tmp_path), []
    serve = importlib.import_module("serve")
    monkeypatch.setattr(serve.os, "execvp", lambda program, words: started.append((program, words)))
    serve.main([str(folder), "--run", "sglang", "--port", "30000"])
    assert started[0][1][:3] == ["python", "-m", "sglang.launch_server"] and "30000" in started[0][1]
    assert sys.modules["serve"] is serve
