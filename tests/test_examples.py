"""The examples run, on a tiny model in place of the real one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a tiny llama and a tokenizer that knows bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(tmp_path)
    model = llama(1, torch.bfloat16, vocab_size=len(vocabulary), max_position_embeddings=512)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    return tmp_path


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_generate(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(checkpoint / "cache"))
    generate = importlib.import_module("generate")
    generate.main(
        [
            "--model",
            str(checkpoint),
            "--new-tokens",
            "4",
            "--windows",
            "1",
            "--calibration",
            "1",
            "--prompt",
            "sky",
        ]
    )
    printed = capsys.readouterr().out
    assert "7 of" in printed  # of the report: every linear of one layer
    assert "lm_head" in printed
    table = {line.split("  ")[0]: line for line in printed.splitlines() if "  " in line}
    for row in ("prefill [tokens/s]", "decode [tokens/s]", "weights [MB]", "perplexity"):
        *_, dense, packed, ratio = (float(n) for n in re.findall(r"[\d.]+", table[row]))
        assert dense > 0
        assert packed > 0
        if row == "weights [MB]":
            assert ratio < 0.95  # the table rounds: a tiny model's bytes are hardly more than 0.1 MB
        if row == "perplexity":
            assert packed == pytest.approx(dense, rel=0.1)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: path.name)
def test_every_example_shows_its_help(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    module = importlib.import_module(path.stem)
    if not hasattr(module, "main"):
        return
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out
