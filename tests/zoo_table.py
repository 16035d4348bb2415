"""What is wrong with a row of the zoo, and the table of all rows, in Markdown."""

from __future__ import annotations

import math
from collections import Counter

import torch
import transformers
from census import NO_LINEAR, Census
from torch import nn
from zoo import Row

# Relative error of the outputs at 8 bits. Tiny random models are worse than trained ones: where one token
# goes to another expert, or to another class, the whole of its output is another.
ERROR8 = 0.05
ERROR8_CHOICE = 0.25
REPLAY = 1e-5  # fp32 rounding of a different order of summation
# Kinds of linears that stay dense unless a rule names them.
SKIPPED = ("lm_head", "router")

INTRODUCTION = """# The zoo

Tiny random models of many architectures, run by `tests/test_zoo.py`, which writes this table:

    python -m pytest tests/test_zoo.py -m "slow or not slow" --zoo-table docs/zoo.md

Every model is called as it comes from its library, in fp32.

- *graphs*: of Dynamo's, that the backend was given
- *sites*: matrices that were quantized in them
- *share*: of the elements of all matrices that the model uses, tables and convolutions left out
- *8 bits*, *4 bits*: relative error of the first output against the dense model, in groups of 32. At 8 bits
  the compiler rounds the weights, at 4 bits GPTQ is calibrated on that one batch. Errors of tiny random
  models say little of trained ones; they would show a weight that is multiplied wrongly.
- *stays dense*: what else the model computes with, with the reason of the report
"""
HEAD = "architecture | graphs | sites | share | 8 bits | 4 bits | stays dense"


def problems(model: nn.Module, found: Census | str) -> list[str]:
    """Why the row does not pass fully. model: what was examined; found: what of it, or the error."""
    if isinstance(found, str):
        return [found]
    wrong = [f"{name} is used, but stands in no report" for name in found.unknown]
    wrong += [f"{name}: {why}" for name, (kind, why) in found.dense.items() if _missed(model, name, kind)]
    wrong += [f"{name} is dense without a reason" for name, (_, why) in found.dense.items() if not why]
    limit = ERROR8_CHOICE if any(kind == "router" for kind, _ in found.dense.values()) else ERROR8
    if not found.error8 <= limit:
        wrong.append(f"error {found.error8:.3f} at 8 bits, above {limit}")
    if not math.isfinite(found.error4):
        wrong.append(f"error {found.error4} at 4 bits")
    if not found.replay <= REPLAY:
        wrong.append(f"compiled and uncompiled differ by {found.replay:.1e}")
    return wrong


def _missed(model: nn.Module, name: str, kind: str) -> bool:
    """Whether a dense matrix is a linear's, or a stack of experts, that nothing told to leave dense."""
    owner, _, _ = name.rpartition(".")
    linear = isinstance(model.get_submodule(owner), (nn.Linear, transformers.pytorch_utils.Conv1D))
    experts = "expert" in name and model.get_parameter(name).ndim == 3
    return (linear or experts) and kind not in (*SKIPPED, *NO_LINEAR)


def markdown(found: dict[Row, Census | str]) -> str:
    """The rows that were run, under headings by family."""
    versions = f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    lines = [INTRODUCTION, f"Made with {versions}.\n"]
    passed = sum(1 for row in found if not row.gap)
    lines.append(f"{passed} of {len(found)} architectures pass fully.\n")
    for family in dict.fromkeys(row.family for row in found):
        lines += [f"## {family[0].upper()}{family[1:]}\n", HEAD, "--- | --- | --- | --- | --- | --- | ---"]
        lines += [_line(row, census) for row, census in found.items() if row.family == family]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row, found: Census | str) -> str:
    if isinstance(found, str):
        return f"{row.model} | | | | | | **{row.gap}**"
    counts = Counter((kind, why) for kind, why in found.dense.values() if kind not in NO_LINEAR)
    told = [f"{n} {_short(kind, why)}" for (kind, why), n in counts.items()]
    share = f"{100 * found.share:.0f} %" if found.sites or told else "no linears"
    gap = [f"**gap: {row.gap}**"] if row.gap else []
    return " | ".join(
        [
            row.model,
            str(found.graphs),
            str(len(found.sites)),
            share,
            f"{found.error8:.4f}",
            f"{found.error4:.3f}",
            ", ".join([*told, *gap]),
        ]
    )


def _short(kind: str, why: str) -> str:
    return kind if kind in SKIPPED else why.replace(", which is no known spelling of a linear", "")
