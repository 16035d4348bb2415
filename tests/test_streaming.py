"""quantize(..., max_memory=...): the same integers, with what one stage needs on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MODELS
from test_calibration import batches, codes, llama, same_codes
from torch import Tensor, fx, nn

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, OutOfMemoryError, Report
from gptq_fx import calibration as calibration_module
from gptq_fx import job as job_module
from gptq_fx.batches import for_calibration
from gptq_fx.observe import observe
from gptq_fx.passes.retarget import retarget
from gptq_fx.streaming import Mover, parse_bytes


def quantize(model: nn.Module, data: Any, max_memory: str | None, **config: Any) -> Report:
    where = {} if max_memory is None else {"device": "cpu", "max_memory": max_memory}
    return gptq_fx.quantize(model, GPTQConfig(**{"group_size": 32, **config}), data, progress=False, **where)


@pytest.fixture
def movers(monkeypatch: pytest.MonkeyPatch) -> list[Mover]:
    """All that a test makes."""
    made: list[Mover] = []

    def make(*args: Any) -> Mover:
        made.append(Mover(*args))
        return made[-1]

    monkeypatch.setattr(calibration_module, "Mover", make)
    return made


@pytest.mark.parametrize(
    ("name", "gptaq"), [("llama", 0.0), ("llama", 0.5), ("mixtral", 0.5), ("whisper", 0.5), ("phi3", 0.5)]
)
def test_the_same_integers(name: str, gptaq: float) -> None:
    tiny = MODELS[name]
    data = [tiny.inputs()] * 2
    whole, streamed = tiny.build(), tiny.build()
    quantize(whole, data, None, gptaq=gptaq)
    report = quantize(streamed, data, "1GB", gptaq=gptaq)
    assert codes(whole)
    assert same_codes(whole, streamed)
    assert report.seconds["transfer"] > 0


def test_more_layers_and_batches_need_no_more(movers: list[Mover]) -> None:
    for layers, count in ((2, 2), (6, 2), (2, 8)):
        quantize(llama(num_hidden_layers=layers), batches(count), "1GB", scale_search=False)
    peaks = [mover.peak for mover in movers]
    assert peaks[0] == peaks[1] == peaks[2] > 0
    dense = sum(p.nbytes for p in llama(num_hidden_layers=40).parameters())
    assert peaks[0] < dense


def test_nothing_stays_on_the_device_between_stages(
    movers: list[Mover], monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, seen = job_module.Job.solve, []

    def look(job: Any, key: Any, hessians: Any) -> Any:
        held = [list(run.env.values()) for run in runs]
        seen.append((len(job.mover.moved), [v for env in held for v in env if is_computed(v)]))
        return solve(job, key, hessians)

    def is_computed(value: Any) -> bool:
        return isinstance(value, Tensor) and not any(value is x for run in runs for x in run.inputs.values())

    runs: list[Any] = []
    record = calibration_module.record
    monkeypatch.setattr(calibration_module, "record", lambda *a: runs.extend(record(*a)) or runs)
    monkeypatch.setattr(job_module.Job, "solve", look)
    quantize(llama(), batches(), "1GB")
    assert seen
    assert all(found == (0, []) for found in seen)


def test_what_is_counted_is_what_it_takes(movers: list[Mover]) -> None:
    """One byte less than the peak is refused, and leaves the model as it was."""
    data = batches(2, (8, 64))
    quantize(llama(), data, "1GB")
    peak = movers[0].peak
    quantize(llama(), data, f"{peak / 1000}KB")
    model = llama()
    with pytest.raises(
        OutOfMemoryError, match=r"max_memory: \S*layers\.\d\S* needs [\d,]+ bytes .*fewer tokens"
    ):
        quantize(model, data, f"{(peak - 1) / 1000}KB")
    assert not codes(model)


def test_a_stage_that_cannot_be_solved_is_named_first() -> None:
    model = llama()
    with pytest.raises(
        ConfigError, match=r"max_memory: \S*layers\.\d\S* needs [\d,]+ bytes to be solved .*found 20,000"
    ):
        quantize(model, batches(), "20KB")
    assert not codes(model)


@pytest.mark.parametrize("text", ["8", "8 parsecs", "-1GB", "0GB", "", 8, "1e3MB"])
def test_malformed_sizes(text: object) -> None:
    with pytest.raises(ConfigError, match="Legal: a number above 0 and KB, MB"):
        parse_bytes(text)


def test_sizes() -> None:
    assert parse_bytes("8GB") == 8 * 10**9
    assert parse_bytes(" 1.5 gib ") == 3 * 2**29


def test_what_max_memory_needs() -> None:
    model, data, config = llama(), batches(), GPTQConfig(group_size=32)
    for words, args in (
        ("found no device", {"calibration": data}),
        ("has stages", {"device": "cpu"}),
        ("has stages", {"device": "cpu", "calibration": data, "config": GPTQConfig(sequential=False)}),
    ):
        with pytest.raises(ConfigError, match=words):
            gptq_fx.quantize(model, **{"config": config, "max_memory": "1GB", **args})
    gptq_fx.quantize(model, config, progress=False)
    with pytest.raises(ConfigError, match="holds quantized weights"):
        gptq_fx.quantize(model, config, data, device="cpu", max_memory="1GB")


def graphs_of(model: nn.Module, **inputs: Any) -> list[tuple[fx.GraphModule, tuple[Any, ...]]]:
    found: list[tuple[fx.GraphModule, tuple[Any, ...]]] = []

    def run(gm: fx.GraphModule, args: tuple[Any, ...]) -> Any:
        found.append((gm, args))
        return gm(*args)

    with for_calibration(model):
        observe(model, (), inputs, run)
    return found


def on_meta(gm: fx.GraphModule, args: tuple[Any, ...]) -> list[Any]:
    retarget(gm, torch.device("cpu"), torch.device("meta"))
    moved = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in args]
    outputs = fx.Interpreter(gm).run(*moved)
    return [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "t5", "whisper"])
def test_a_graph_runs_on_the_other_device(name: str) -> None:
    for gm, args in graphs_of(MODELS[name].build(), **MODELS[name].inputs()):
        outputs = on_meta(gm, args)
        assert outputs
        assert all(x.is_meta for x in outputs)


def test_every_way_to_name_a_device() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            there = torch.arange(3, device=torch.device("cpu")) + torch.ones(3, device="cpu") + TABLE
            with torch.autocast("cpu", enabled=False):
                return x.to("cpu") + there

    ((gm, args),) = graphs_of(Model(), x=torch.ones(3))
    assert sum("cpu" in f"{n.args} {n.kwargs}" for n in gm.graph.nodes) == 4
    with pytest.raises(RuntimeError, match="_enter_autocast"):  # which meta has none of
        on_meta(gm, args)
    assert not any("cpu" in f"{n.args} {n.kwargs}" for n in gm.graph.nodes)


TABLE = torch.zeros(3)
