"""The examples run, on a tiny model in place of the real one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from models import byte_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return byte_checkpoint(tmp_path)


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
    """As a script: with its own folder in the path, and no module of another example's doing."""
    monkeypatch.setattr(sys, "path", [str(path.parent), *(p for p in sys.path if p != str(EXAMPLES))])
    for other in set(EXAMPLES.rglob("*.py")) - {path}:  # itself may register an op, once in a process
        monkeypatch.delitem(sys.modules, other.stem, raising=False)
    module = importlib.import_module(path.stem)
    if not hasattr(module, "main"):
        return
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_picture(checkpoint: Path) -> None:
    out = checkpoint / "graph.svg"
    importlib.import_module("picture").main(["--model", str(checkpoint), "--out", str(out)])
    assert {"q", "k", "v", "down"} <= set(re.findall(r">([a-z]+)</text>", out.read_text()))
