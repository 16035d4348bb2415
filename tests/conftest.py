"""What every test starts from."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from gptq_fx import passes
from gptq_fx.passes import Plan

# Tiny models gain nothing from threads, and lose much where another process holds a core.
torch.set_num_threads(1)
# pytest would keep its records, and with them every tensor that they speak of.
logging.getLogger("torch.__trace").propagate = False


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No compiled code of another test, and the same random numbers whichever tests run."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plan of every call of the backend, in order."""
    made: list[Plan] = []
    run = passes.run

    def recording(gm: torch.fx.GraphModule, plan: Plan, *args: object) -> None:
        made.append(plan)
        run(gm, plan, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(passes, "run", recording)
    return made


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--zoo-table", help="where tests/test_zoo.py writes what it found, as a table")
