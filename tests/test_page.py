"""The page and the pictures of a report: right in a real browser, and as text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from models import MODELS, ids, llama, quantized

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, Report, Scheme, SiteRecord
from gptq_fx.draw import repeats, rows, svg
from gptq_fx.page import changes, page
from gptq_fx.plot import by_leaf
from gptq_fx.sketch import Call, GraphRecord

HOSTILE = "<img src=x onerror=throw(1)>"


def record(name: str, error: float | None, bits: int = 4) -> SiteRecord:
    scheme = None if error is None else Scheme(bits, 32)
    return SiteRecord(name, "linear", scheme, "reference", HOSTILE, (64, 64), 8192, 2048, True, error)


@pytest.fixture(scope="module")
def graph() -> GraphRecord:
    (found,) = gptq_fx.explain(llama(3, torch.bfloat16, num_key_value_heads=4), ids(), use_cache=False).graphs
    return found


@pytest.fixture(scope="module")
def report(graph: GraphRecord) -> Report:
    sites = [record("layers.10.up", 0.002), record("layers.2.up", 0.1, 8), record("layers.1.up", 0.03)]
    return Report([*sites, record(HOSTILE, None)], notes=[HOSTILE], graphs=[graph])


SCRIPT = """
const names = () => [...document.querySelectorAll("#sites tbody tr")].filter(row => !row.hidden)
  .map(row => row.cells[0].textContent);
const head = title => [...document.querySelectorAll("#sites th button")].find(b => b.textContent === title);
const click = title => { head(title).click(); return names(); };
const type = text => {
  const filter = document.querySelector("#filter");
  filter.value = text;
  filter.dispatchEvent(new Event("input"));
  return names();
};
const size = document.querySelector("svg").getBoundingClientRect();
return {
  start: names(), rising: click("error"), falling: click("error"), byName: click("site"),
  sorted: [...document.querySelectorAll("th[aria-sort]")].map(th => [th.textContent, th.ariaSort]),
  filtered: type("UP 8"), shown: document.querySelector("#shown").textContent, all: type(""),
  images: document.images.length, size: [size.width, size.height],
  card: getComputedStyle(document.querySelector("svg .packed")).fill,
  packed: document.querySelectorAll("svg .packed").length,
};
"""


@pytest.fixture(scope="module")
def seen(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if browser.find() is None:
        pytest.skip(browser.MISSING)
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(path, "A report")
    return browser.run(path, SCRIPT)


def test_columns_sort_by_number_and_by_natural_order(seen: dict[str, Any]) -> None:
    found = seen["value"]
    up = [f"layers.{i}.up" for i in (10, 1, 2)]  # by error
    assert found["start"] == ["layers.10.up", "layers.2.up", "layers.1.up", HOSTILE]
    assert found["rising"] == [*up, HOSTILE]  # what has no error stays last
    assert found["falling"] == [*up[::-1], HOSTILE]
    assert found["byName"] == [HOSTILE, "layers.1.up", "layers.2.up", "layers.10.up"]
    assert found["sorted"] == [["site", "ascending"]]


def test_the_filter_shows_rows_that_have_all_words(seen: dict[str, Any]) -> None:
    assert seen["value"]["filtered"] == ["layers.2.up"]
    assert seen["value"]["shown"] == "1"
    assert len(seen["value"]["all"]) == 4


def test_the_page_loads_nothing_and_runs_without_errors(seen: dict[str, Any]) -> None:
    assert seen["errors"] == []
    assert seen["loaded"] == []
    assert seen["value"]["images"] == 0  # names are text, whatever they look like


def test_the_picture_is_drawn_in_its_colours(seen: dict[str, Any]) -> None:
    width, height = seen["value"]["size"]
    assert width > 500
    assert height > 500
    assert seen["value"]["card"] == "rgb(209, 250, 229)"
    assert seen["value"]["packed"] == 4  # of one layer: q|k|v (or less of it), o, gate|up, down


def test_the_page_names_no_address_and_escapes_names(report: Report) -> None:
    text = page(report, HOSTILE)
    assert set(re.findall(r"\w+://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert HOSTILE not in text


def test_a_report_without_graphs_says_who_has_them() -> None:
    assert "gptq_fx.explain" in page(Report(), "t")


# --- graphs


def test_explain_records_each_graph_before_and_after(graph: GraphRecord) -> None:
    before = [call for call in graph.before if call.weights]
    after = [call for call in graph.after if call.weights]
    assert [call.op for call in before] == ["linear"] * 22
    assert {call.op for call in after if call.quantized} == {"gptq.linear"}
    assert [w for call in before for w in call.weights] == [w for call in after for w in call.weights]
    assert len(after) < len(before)  # merged
    assert all(i < n for calls in (graph.before, graph.after) for n, c in enumerate(calls) for i in c.inputs)
    assert before[-1].fate.startswith("output projection")
    assert not before[-1].quantized


@pytest.mark.parametrize("name", ["gpt2", "bert", "mixtral"])
def test_the_record_is_the_graph_that_compiling_makes(name: str, plans: list[Any]) -> None:
    tiny = MODELS[name]
    model = tiny.build(torch.bfloat16)
    recorded = [
        (call.weights, call.fate.rpartition(", ")[2])
        for graph in gptq_fx.explain(model, **tiny.inputs()).graphs
        for call in graph.after
        if call.quantized
    ]
    plans.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(**tiny.inputs())
    made = [(tuple(s.name for s in o.sites), o.kernel.name) for plan in plans for o in plan.operands]
    assert sorted(recorded) == sorted(made)


def test_a_quantized_model_is_recorded_with_its_own_schemes() -> None:
    model, _ = quantized(llama(1), bits=3, group_size=32)
    (graph,) = gptq_fx.explain(model, ids(), use_cache=False).graphs
    assert {call.fate for call in graph.after if call.quantized} == {"W3A16 g32 sym, reference"}


def test_changes_are_told_and_unchanged_runs_cut(graph: GraphRecord) -> None:
    told = list(changes(graph))
    gone = [before for kind, before, _ in told if kind == "gone"]
    assert sum(line.startswith("linear(") for line in gone) == 21  # all but lm_head
    assert any("cpu_int4" in after or "reference" in after for kind, _, after in told if kind == "new")
    assert ("same", "...", "...") in told
    assert len(told) < len(graph.before)
    assert not list(changes(GraphRecord(graph.before, graph.before)))


# --- drawing


def chain(*ops: str) -> list[Call]:
    """Calls that each take the result of the one before; "linear" has a weight."""
    return [
        Call(str(i), op, "", (i - 1,) if i else (), (f"l.{i}.w",) if op == "linear" else ())
        for i, op in enumerate(ops)
    ]


def test_linears_are_in_odd_rows_and_all_else_between() -> None:
    calls = [
        *chain("add", "linear", "relu", "mul"),
        Call("4", "linear", "", (0,), ("b",)),
        Call("5", "cat", "", (3, 4)),
    ]
    assert [(row.level, row.calls) for row in rows(calls)] == [(0, (0,)), (1, (1, 4)), (2, (2, 3, 5))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abcabcabcd", [("abc", 3), ("d", 1)]),
        ("xabab", [("x", 1), ("ab", 2)]),
        ("aabaab", [("aab", 2)]),
        ("abc", [("a", 1), ("b", 1), ("c", 1)]),
        ("", []),
    ],
)
def test_runs_that_repeat_are_found(text: str, found: list[tuple[str, int]]) -> None:
    assert [(text[start : start + length], times) for start, length, times in repeats(text)] == found


def test_equal_layers_are_drawn_once() -> None:
    few, many = (
        svg(GraphRecord(calls, calls)) for calls in (tuple(chain(*["linear", "relu"] * n)) for n in (3, 30))
    )
    assert few.replace("3 times", "30 times").replace("6 calls", "60 calls") == many


def test_many_linears_of_one_kind_share_a_box() -> None:
    def drawn(count: int) -> str:
        calls = (*chain("add"), *(Call(str(i), "linear", "", (0,), (f"e.{i}.up",)) for i in range(count)))
        return svg(GraphRecord(calls, calls))

    assert drawn(6).count('class="dense"') == 12
    assert drawn(60).count('class="dense"') == 2
    assert ">up x 60<" in drawn(60)


# --- plot


def test_sites_are_placed_by_their_layer() -> None:
    sites = [record("h.0.mlp.up", 0.1), record("h.1.mlp.up", 0.2), record("head", 0.3), record("x", None)]
    found = {leaf: [(x, s.error) for x, s in line] for leaf, line in by_leaf(Report(sites)).items()}
    assert found == {"mlp.up": [(0, 0.1), (1, 0.2)], "head": [(2, 0.3)]}


@pytest.mark.parametrize("calibrated", [False, True])
def test_plot_draws_error_and_bits_of_each_weight(tmp_path: Path, calibrated: bool) -> None:
    pytest.importorskip("matplotlib")
    batches = [{"input_ids": ids()}] if calibrated else None
    report = gptq_fx.quantize(llama(2), GPTQConfig(group_size=32), batches, progress=False)
    report.plot(tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn.count("<!-- mlp.down_proj -->") == 1  # in the legend
    assert drawn.count("<!-- error of the output -->") == calibrated
    report.plot(str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_nothing_and_without_matplotlib_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install gptq-fx\[plot\]"):
        Report([record("a", 0.1)]).plot(path)
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="no quantized weight"):
        Report([record("a", None)]).plot(path)
