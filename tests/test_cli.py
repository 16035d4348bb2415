"""The command line on tiny models: what it prints, writes and returns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import gptq_fx
from gptq_fx import cli

TEXT = " ".join(f"w{3 + (i * i) % (VOCABULARY - 3)}" for i in range(400))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with a tokenizer of words w0, w1, ..., and a text of them."""
    folder = tmp_path_factory.mktemp("dense")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    llama(1).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def checkpoint(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "q"
    result = run("quantize", dense, out, "--group-size", 32)
    assert result.exit_code == 0, result.output
    return out


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def as_json(*arguments: Any) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_quantize_writes_a_checkpoint_with_its_tokenizer(checkpoint: Path) -> None:
    assert (checkpoint / "tokenizer.json").is_file()
    gptq_fx.from_pretrained(checkpoint)


def test_explain_writes_a_page_with_the_graphs(dense: Path, tmp_path: Path) -> None:
    result = run("explain", dense, "--group-size", 32, "--html", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "model.layers.0.mlp.up_proj" in page


def test_quantize_with_calibration(dense: Path, tmp_path: Path) -> None:
    options = (
        "--group-size",
        32,
        "--asym",
        "--calibration",
        dense / "text.txt",
        "--length",
        32,
        "--samples",
        3,
    )
    rules = json.dumps({"-:.*down_proj": {}})
    found = as_json("quantize", dense, tmp_path / "q", *options, "--dynamic", rules)
    sites = {s["name"]: s for s in found["quantized"]["sites"]}
    assert sites["model.layers.0.mlp.up_proj"]["loss"] is not None
    assert sites["model.layers.0.mlp.up_proj"]["tokens"] == 96
    assert sites["model.layers.0.mlp.down_proj"]["scheme"] is None
    assert found["saved"]["path"] == str(tmp_path / "q")
    model = gptq_fx.from_pretrained(tmp_path / "q")
    assert not model.model.layers[0].mlp.up_proj.weight.scheme.sym


def test_quantize_streams_where_memory_is_given(dense: Path, tmp_path: Path) -> None:
    options = ("--group-size", 32, "--calibration", dense / "text.txt", "--length", 32, "--samples", 3)
    where = ("--device", "cpu", "--max-memory")
    found = as_json("quantize", dense, tmp_path / "q", *options, *where, "1GB")
    assert all(s["tokens"] == 96 for s in found["quantized"]["sites"] if s["scheme"] is not None)
    failed("to be solved", "quantize", dense, tmp_path / "p", *options, *where, "10KB")


def test_explain(dense: Path, checkpoint: Path) -> None:
    sites = {s["name"]: s for s in as_json("explain", dense, "--group-size", 32)["sites"]}
    assert sites["model.layers.0.mlp.up_proj"]["scheme"]["bits"] == 4
    assert sites["lm_head"]["scheme"] is None
    assert (
        "model.layers.*.mlp" in run("explain", checkpoint).stdout or "up_proj" in run("explain", dense).stdout
    )


def test_eval(dense: Path, checkpoint: Path) -> None:
    options = ("--text", dense / "text.txt", "--length", 64, "--windows", 2)
    of_dense = as_json("eval", dense, *options)
    of_packed = as_json("eval", checkpoint, *options)
    assert of_dense["windows"] == 2
    assert abs(of_dense["perplexity"] / of_packed["perplexity"] - 1) < 0.2
    assert "perplexity" in run("eval", checkpoint, *options).stdout


def test_eval_with_tasks_needs_lm_eval(checkpoint: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        failed("lm-eval", "eval", checkpoint, "--tasks", "arc_easy")


def test_generate(checkpoint: Path) -> None:
    found = as_json("generate", checkpoint, "w5 w6 w7", "--new-tokens", 4, "--no-compile")
    assert 1 <= len(found["tokens"]) <= 4
    assert run("generate", checkpoint, "w5", "--new-tokens", 2, "--no-compile").exit_code == 0


def test_bench(checkpoint: Path) -> None:
    options = ("--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 1, "--no-compile")
    found = as_json("bench", checkpoint, *options)
    assert found["prefill"] > 0 and found["decode"] > 0 and found["weight_bytes"] > 0
    assert "tokens/s" in run("bench", checkpoint, *options).stdout


def test_inspect(checkpoint: Path) -> None:
    found = as_json("inspect", checkpoint)
    assert len(found["modules"]) == 7 and not found["problems"]
    assert found["modules"][0]["scheme"]["bits"] == 4
    text = run("inspect", checkpoint).stdout
    assert "7 x W4A16 g32 sym" in text and "vLLM: yes" in text


def test_inspect_lists_all_problems(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bad"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = torch.nan
    tensors["model.layers.0.mlp.down_proj.g_idx"][0] = 99
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    result = run("inspect", folder, "--json")
    assert result.exit_code == 1
    problems = json.loads(result.stdout)["problems"]
    assert len(problems) == 3
    for part in ("NaN", "found group 99", "model.norm.weight: missing"):
        assert any(part in problem for problem in problems)


def failed(message: str, *arguments: Any) -> None:
    """The command fails with one line on stderr, and nothing on stdout."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    ours = [line for line in result.stderr.splitlines() if line.startswith("gptq-fx: ")]
    assert len(ours) == 1
    assert "Traceback" not in result.output and not result.stdout


def test_errors_are_one_line(dense: Path, checkpoint: Path, tmp_path: Path) -> None:
    failed("bits=5", "quantize", dense, tmp_path / "q", "--bits", 5)
    failed("no JSON", "quantize", dense, tmp_path / "q", "--dynamic", "{")
    failed("overwrite=True", "quantize", dense, checkpoint)
    failed("found 400 tokens", "eval", dense, "--text", dense / "text.txt", "--length", 4096)
    (tmp_path / "bad.jsonl").write_text("{}")
    failed("Legal: lines of JSON", "eval", dense, "--text", tmp_path / "bad.jsonl")
    failed("--dtype int4", "generate", dense, "w1", "--dtype", "int4")
    failed("no GPTQ checkpoint", "inspect", dense)
    failed("no such folder", "inspect", tmp_path / "nowhere" / "at" / "all")
    assert not (tmp_path / "q").exists()


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("generate").exit_code == 2
    assert run("nonesuch").exit_code == 2
