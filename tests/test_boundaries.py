"""No device is named outside gptq_fx/kernels: read from the syntax trees."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*ROOT.glob("gptq_fx/*.py"), *ROOT.glob("gptq_fx/checkpoint/*.py"), *ROOT.glob("passes/*.py")])
WORD = re.compile(r"(?<![a-z])(torch_)?(is_)?(cuda|npu|hip|xpu)(?![a-z])", re.IGNORECASE)


def _words(node):
    """The names and strings that one node of a syntax tree holds."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=word):
            yield word or ""
        case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word) | ast.ClassDef(name=word):
            yield word
        case ast.alias(name=word, asname=other):
            yield from (word, other or "")
        case ast.ImportFrom(module=word):
            yield word or ""
        case ast.Constant(value=str(word)):
            yield word


def device_words(source):
    """(line, word) of every device that code names; prose may."""
    tree = ast.parse(source)
    prose = {
        id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    }
    nodes = (node for node in ast.walk(tree) if id(node) not in prose)
    return [(getattr(n, "lineno", 0), word) for n in nodes for word in _words(n) if WORD.search(word)]


def test_the_files_are_found():
    assert {"backend.py", "parameter.py", "match.py"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_device_is_named(path):
    assert device_words(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "x.cuda()",
        "torch.cuda.synchronize()",
        "if x.is_cuda: pass",
        "x.to('cuda')",
        "x.to('cuda:0')",
        "x.device.type == 'npu'",
        "import torch_npu",
        "from torch.cuda import Stream",
        "from torch import cuda as gpu",
        "f(cuda=1)",
        "def is_npu(): pass",
        "s = f'{x} on npu'",
    ],
)
def test_a_device_would_be_noticed(source):
    assert device_words(source)


@pytest.mark.parametrize(
    "source", ["'''Runs on cuda.'''", "def f():\n    'As on npu.'", "barracuda = input_unit"]
)
def test_prose_and_parts_of_words_are_no_devices(source):
    assert not device_words(source)
