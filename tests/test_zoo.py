"""Breadth: every matrix of many architectures is quantized or says why, and the outputs hold.

`pytest tests/test_zoo.py -m "slow or not slow" --zoo-table docs/zoo.md` runs all rows and writes the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from census import Census, examine, run
from models import relative
from zoo import FAST, ZOO, Row
from zoo_table import HEAD, markdown, problems

import gptq_fx

DOCS = Path(__file__).parents[1] / "docs" / "zoo.md"
REPLAY = 1e-5  # fp32 rounding of a different order of summation
BY_NAME = {row.model: row for row in ZOO}


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[Row, Census | str]]:
    """What the tests found; written down in the end, if asked for."""
    found: dict[Row, Census | str] = {}
    yield found
    path = request.config.getoption("--zoo-table")
    if path:
        Path(path).write_text(markdown(found), encoding="utf-8")


def architectures() -> list[object]:
    slow = pytest.mark.slow
    return [pytest.param(row, id=row.model, marks=[] if row.model in FAST else slow) for row in ZOO]


@pytest.mark.parametrize("row", architectures())
def test_every_matrix_is_quantized_or_says_why(row: Row, table: dict[Row, Census | str]) -> None:
    if not row.known:
        pytest.skip(f"this version of transformers has no {row.model}")
    model, inputs = row.build()
    try:
        found: Census | str = examine(model, inputs)
    except Exception as error:
        if not row.gap:
            raise
        found = f"{type(error).__name__}: {error}"
    table[row] = found
    wrong = problems(model, found)
    if row.gap:
        assert any(row.gap in problem for problem in wrong), f"the gap of {row.model} is closed, or another"
    else:
        assert not wrong


# Without data only modules are quantized, and Bare has none.
@pytest.mark.parametrize("name", [name for name in FAST if name != "Bare"])
def test_a_quantized_model_compiles_to_the_same(name: str) -> None:
    model, inputs = BY_NAME[name].build()
    dense = run(model, inputs)
    gptq_fx.quantize(model, gptq_fx.GPTQConfig(bits=4, group_size=32), progress=False)
    eager = run(model, inputs)
    options = {"kernel": "reference", "inner_backend": "eager"}
    assert relative(run(torch.compile(model, backend="gptq", options=options), inputs), eager) <= REPLAY
    assert relative(eager, dense) > 100 * REPLAY  # the test would see a weight left dense


def test_the_table_of_the_docs_has_every_row() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    cells = [line.split(" | ")[0] for line in lines if line.count(" | ") == HEAD.count(" | ")]
    assert [c for c in cells if c not in ("architecture", "---")] == [row.model for row in ZOO]
