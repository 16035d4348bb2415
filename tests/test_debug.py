"""Switches for people who debug: logs, files of graphs, passes left out, rewrites left out, halving."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXPERTS, MLP, act_ordered, dense_twin, ids, llama, logits, output, quantized, relative
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import gptq_fx
from gptq_fx.kernels import cpu, registry
from gptq_fx.options import Options
from gptq_fx.passes import PIPELINE, SKIPPABLE, Plan, rewrites

int4 = pytest.mark.skipif(bool(cpu.available()), reason=str(cpu.available()))
NAMES = [step.__name__ for step in PIPELINE]
# What two kernels may differ by in bf16, on a whole tiny model.
CLOSE = 0.02
# The CPU's kernel merges weights at multiples of 64 outputs with AVX512, of 32 without.
MERGES: dict[str, Any] = {"num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def counted_anew() -> Iterator[None]:
    rewrites.reset()
    yield
    rewrites.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="gptq", options={"inner_backend": "eager", **options})


def error(model: nn.Module, **options: Any) -> float:
    """Against the dense numbers of the same weights."""
    return relative(logits(compiled(model, **options)), logits(dense_twin(model)))


# --- TORCH_LOGS

SCRIPT = """
import torch
model = torch.nn.Linear(64, 64).requires_grad_(False)
torch.compile(model, backend="gptq", options={"inner_backend": "eager"})(torch.randn(3, 64))
"""


@pytest.mark.parametrize(
    ("setting", "lines", "graphs"), [("+gptq_fx", True, True), ("gptq_fx", True, False), ("", False, False)]
)
def test_torch_logs_shows_the_work_of_each_pass(setting: str, lines: bool, graphs: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    environment |= {"TORCH_LOGS": setting} if setting else {}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, env=environment
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(r"\[0/0\] (\w+): \d+ changes", run.stderr)
    assert found == (NAMES if lines else [])
    assert ("rewrite 1, swap: " in run.stderr) == graphs
    assert ("torch.ops.gptq.linear" in run.stderr) == graphs


# --- files of graphs


@int4
@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_graph_is_written_before_and_behind_each_pass(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = quantized(llama(1, torch.bfloat16, **MERGES))
    folder = tmp_path / "graphs"
    if how == "variable":
        monkeypatch.setenv("GPTQ_FX_DUMP", str(folder))
    assert error(model, **({"dump": folder} if how == "option" else {})) <= CLOSE
    assert [graph.name for graph in folder.iterdir()] == ["graph_0"]
    files = sorted((folder / "graph_0").iterdir())
    assert [f.name for f in files] == [f"{i:02}_{name}.txt" for i, name in enumerate(["before", *NAMES])]
    texts = dict(zip(["before", *NAMES], (f.read_text() for f in files), strict=True))
    calls = {
        name: len(re.findall(r"= torch\.ops\.gptq\.\w+\.default\(|= torch\._C\._nn\.linear\(", t))
        for name, t in texts.items()
    }
    assert calls == {
        "before": 8,
        "match": 8,
        "choose": 8,
        "swap": 8,
        "reorder": 8,
        "fuse": 5,
        "attention": 5,
        "lower": 5,
    }
    for name, text in texts.items():
        compile(text.split("\n\nnode ")[0], name, "exec")  # the code can be read by Python, too
        assert re.search(r"^node +kind +target +arguments +value$", text, re.MULTILINE)
        assert re.search(r"^linear\w* .* bfloat16 \[2, 12, \d+\] cpu$", text, re.MULTILINE)
    site = re.compile(
        r"^model\.layers\.0\.mlp\.down_proj +linear +W4A16 g128 sym +cpu_int4 +\w+", re.MULTILINE
    )
    assert not site.search(texts["match"])
    assert site.search(texts["choose"])


def test_each_graph_has_a_folder_of_its_own(tmp_path: Path) -> None:
    model, _ = quantized(llama(1))
    for _ in range(2):
        error(model, dump=str(tmp_path))
    assert sorted(graph.name for graph in tmp_path.iterdir()) == ["graph_0", "graph_1"]


# --- passes left out


def made(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """A quantized model with what the passes look for, and its inputs."""
    if kind == "experts":
        model = EXPERTS["mixtral"].build(torch.bfloat16, num_hidden_layers=1, **MERGES)
        return quantized(model)[0], {"input_ids": ids(), "use_cache": False}
    mlp = MLP().to(torch.bfloat16).requires_grad_(False)
    model = act_ordered(mlp) if kind == "act-order" else quantized(mlp, sym=kind == "linears")[0]
    return model, {"x": torch.randn(3, 64)}


@pytest.mark.parametrize("skip", [*([name] for name in SKIPPABLE), list(SKIPPABLE), ["fuse", "lower"]])
@pytest.mark.parametrize("kind", ["linears", "experts", "act-order", "zero points"])
def test_without_a_pass_the_numbers_are_the_same(kind: str, skip: list[str], plans: list[Plan]) -> None:
    model, inputs = made(kind)
    assert relative(output(compiled(model, skip=skip), inputs), output(dense_twin(model), inputs)) <= CLOSE
    (plan,) = plans
    ran = {name for name in NAMES if name not in skip}
    assert bool(plan.operands) == ("swap" in ran)
    # Weights in act-order have one input only where it was gathered: else each kernel has its own.
    fusable = {"swap", "fuse"} | ({"reorder"} if kind == "act-order" else set())
    assert any(len(o.sites) > 1 for o in plan.operands) == (fusable <= ran)
    assert bool(plan.orders) == (kind == "act-order" and {"swap", "reorder"} <= ran and not cpu.available())
    if "lower" in skip:
        assert {o.kernel.name for o in plan.operands} <= {"reference"}


def test_a_pass_can_be_left_out_by_a_variable(monkeypatch: pytest.MonkeyPatch, plans: list[Plan]) -> None:
    monkeypatch.setenv("GPTQ_FX_SKIP", "fuse, lower")
    model, _ = quantized(llama(1))
    assert error(model, skip=["attention"]) <= 1e-5
    assert plans[0].skip == {"fuse", "lower", "attention"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fues", "unknown pass 'fues'. Did you mean 'fuse'"),
        ("match", "pass 'match' cannot be skipped.*Legal: swap, reorder"),
    ],
)
def test_a_pass_that_cannot_be_left_out_is_an_error(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(gptq_fx.ConfigError, match=message):
        Options.parse({"skip": [name]}, None)
    monkeypatch.setenv("GPTQ_FX_SKIP", name)
    with pytest.raises(BackendCompilerFailed, match=message):
        error(llama(1))


@pytest.mark.parametrize("options", [{"skip": "fuse"}, {"skip": [1]}, {"dump": 3}])
def test_options_of_a_wrong_type_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(gptq_fx.ConfigError, match="Legal"):
        Options.parse(options, None)


# --- rewrites left out


def test_every_number_of_rewrites_leaves_a_graph_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swaps, gathers, fusions and packs, and blocks of experts between whose stacks the rewrites end."""
    for kind, fewest in (("act-order", 8), ("experts", 9)):
        model, inputs = made(kind)
        wanted = output(dense_twin(model), inputs)
        rewrites.reset()
        assert relative(output(compiled(model), inputs), wanted) <= CLOSE
        last = rewrites.last()
        assert last is not None
        assert last.number >= fewest
        numbers = []
        for number in range(last.number):
            monkeypatch.setenv("GPTQ_FX_STOP_AFTER", str(number))
            rewrites.reset()
            assert relative(output(compiled(model), inputs), wanted) <= CLOSE, number
            found = rewrites.last()
            numbers.append(found.number if found else 0)
        monkeypatch.delenv("GPTQ_FX_STOP_AFTER")
        assert numbers == list(range(last.number))


def test_the_last_rewrite_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("GPTQ_FX_STOP_AFTER", "2")
    error(quantized(llama(1))[0])
    (record,) = (r for r in caplog.records if "STOP_AFTER" in r.message)
    assert record.message == (
        "GPTQ_FX_STOP_AFTER=2: the last was rewrite 2, swap: model.layers.0.self_attn.k_proj; "
        "without rewrite 3, swap: model.layers.0.self_attn.v_proj"
    )


@pytest.mark.parametrize("value", ["-1", "two", "1.5"])
def test_a_limit_that_is_no_number_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_FX_STOP_AFTER", value)
    with pytest.raises(BackendCompilerFailed, match="Legal: a number of rewrites"):
        error(quantized(llama(1))[0])


# --- bisect


@int4
@pytest.mark.parametrize("wrong", ["o_proj", "down_proj"])
def test_bisect_finds_the_rewrite_that_breaks_a_check(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized(llama(2, torch.bfloat16, **MERGES))
    wanted = logits(dense_twin(model))
    inputs, right = {"o_proj": 64, "down_proj": 128}[wrong], registry.get_kernel("cpu_int4").op_args

    def half(spec: registry.LinearSpec) -> tuple[int, ...]:
        """A group size that is wrong for one kind of linear."""
        return (right(spec)[0] // (2 if (spec.in_features, spec.out_features) == (inputs, 64) else 1),)

    broken = dataclasses.replace(registry.get_kernel("cpu_int4"), op_args=half)
    monkeypatch.setitem(registry._KERNELS, "cpu_int4", broken)
    calls = []

    def check() -> bool:
        calls.append(relative(logits(compiled(model)), wanted) <= CLOSE)
        return calls[-1]

    found = gptq_fx.bisect(check)
    assert (found.step, found.what) == (
        "lower",
        f"model.layers.0.{'self_attn' if wrong == 'o_proj' else 'mlp'}.{wrong} by cpu_int4",
    )
    assert len(calls) <= 8
    assert "GPTQ_FX_STOP_AFTER" not in os.environ
    assert rewrites.last() is None


def test_bisect_takes_exceptions_for_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized(llama(1))

    def check() -> None:
        logits(compiled(model))
        last = rewrites.last()
        if last is not None and last.number >= 5:
            raise ValueError("wrong")

    assert str(gptq_fx.bisect(check)) == "rewrite 5, swap: model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("answer", "message"), [(True, "holds with all rewrites"), (False, "fails without any rewrite")]
)
def test_bisect_says_where_there_is_nothing_to_find(answer: bool, message: str) -> None:
    model, _ = quantized(llama(1))

    def check() -> bool:
        logits(compiled(model))
        return answer

    with pytest.raises(gptq_fx.GPTQError, match=message):
        gptq_fx.bisect(check)
