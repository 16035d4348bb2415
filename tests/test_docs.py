"""What README and docs say is so: blocks of Python run, links lead somewhere, options and errors exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from models import byte_checkpoint, quantized

from gptq_fx import Scheme
from gptq_fx.checkpoint.describe import describe
from gptq_fx.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path) -> list[str]:
    """The Python blocks, at the lines where they stand; those marked `<!-- not run: reason -->` left out."""
    text = page.read_text()
    return [
        "\n" * text[: found.start(2)].count("\n") + found[2] for found in BLOCK.finditer(text) if not found[1]
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, with a tiny model for what the page speaks of, and without Inductor."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["gptq_fx.backend"], "default_inner_backend", lambda devices: "eager")
    name = str(byte_checkpoint(tmp_path / "tiny"))
    texts = ["The sky is blue because it is made of air. " * 2] * 2
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).requires_grad_(False)
    known: dict[str, Any] = {
        "name": name,
        "texts": texts,
        "tokenizer": tokenizer,
        "model": model,
        "inputs": dict(tokenizer(texts[0], return_tensors="pt")),
        "quantized": quantized(model)[0],
        "gptq_fx": sys.modules["gptq_fx"],
    }
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), known)


@every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert ROOT in file.parents, target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_commands_and_their_options_exist(page: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for line in page.read_text().splitlines():
        if (found := re.search(r"gptq-fx (?!\[)([a-z]+)\b(.*)", line)) and found[1] != "is":
            assert found[1] in commands, line
            legal = {o for p in commands[found[1]].params for o in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"(?<!-)--[a-z][a-z-]*", found[2])) <= legal, line


@every_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(
        r"\b((?:examples|tests|gptq_fx|passes|docs)/[\w/.]+\.(?:py|md|sh|svg))\b", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_fields_of_a_checkpoint_are_those_of_its_page() -> None:
    text = (ROOT / "docs" / "checkpoints-and-serving.md").read_text()
    table = text.partition("| field | value |")[2].partition("\n\n")[0]
    fields = {
        name
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert fields == set(describe({"a.q_proj": Scheme()}, [], set(), []))


SOURCES = [*ROOT.glob("gptq_fx/**/*.py"), *ROOT.glob("passes/*.py")]


def test_errors_of_the_troubleshooting_page_are_raised_so() -> None:
    """Indented lines are errors, and the tables have reasons; words in capitals stand for values."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    errors = re.findall(r"^    (.+)$", text, re.MULTILINE)
    reasons = re.findall(r"^\| `(?:\w+: )?(.+?)` \|", text, re.MULTILINE)
    code = "".join(path.read_text() for path in SOURCES)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # strings that go on in the next line
    code = re.sub(r"\{[^{}]*\}", "VALUE", code)
    values = r"[A-Z]{2,}|torch\.float32|\b\d+(?=-bit codes)"
    assert len(errors) >= 10
    assert len(reasons) >= 6
    missing = [
        part.strip()
        for said in (*errors, *reasons)
        for part in re.split(values, said)
        if part.strip(" .,:'") and part.strip() not in code
    ]
    assert missing == []
