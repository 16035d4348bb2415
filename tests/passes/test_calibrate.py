"""calibrate: stages of a graph, and running it as far as each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import name
from models import MODELS
from torch import Tensor, fx, nn

from gptq_fx.backend import make_plan
from gptq_fx.batches import for_calibration
from gptq_fx.config import GPTQConfig
from gptq_fx.observe import observe
from gptq_fx.passes import run as run_passes
from gptq_fx.passes.calibrate import Run, Stage, StagedGraph
from gptq_fx.passes.capture import capture
from gptq_fx.passes.match import match


def staged(gm: fx.GraphModule, values: Sequence[Any], skip: str = "lm_head") -> StagedGraph:
    """The graph with a stage for every linear but those whose name holds `skip`."""
    graph, values = capture(gm, values)
    plan = make_plan(graph, values, GPTQConfig(), root=None)
    run_passes(graph, plan, [match])
    return StagedGraph(graph, plan, lambda site: None if skip in site.name else "quantize")


def start(model: nn.Module, *args: Any, **kwargs: Any) -> Run:
    """A run of the one graph of model(*args, **kwargs)."""
    runs: list[Run] = []

    def keep(gm: fx.GraphModule, values: tuple[Any, ...]) -> Any:
        runs.append(staged(gm, values).start(values))
        return gm.forward(*values)

    with for_calibration(model):
        observe(model, args, kwargs, keep, fullgraph=True)
    (run,) = runs
    return run


def same(weight: Tensor) -> Tensor:
    return weight


def nothing(run: Run, stage: Stage, x: fx.Node) -> None:
    """A tap that takes nothing."""


def sites(run: Run) -> list[list[str]]:
    return [[site.name for site in stage.sites] for stage in run.graph.stages]


# --- replay


@pytest.mark.parametrize("model", ["llama", "gemma3", "qwen3", "gpt2", "whisper", "t5", "vit"])
def test_replay_in_stages_is_the_forward_of_the_model(model: str) -> None:
    tiny = MODELS[model]
    built, inputs = tiny.build(attn_implementation="eager"), tiny.inputs()
    run = start(built, **inputs)
    with for_calibration(built):
        wanted = built(**inputs)
        for stage in run.graph.stages:
            run.graph.advance(run, stage, nothing, same)
        outputs = run.graph.advance(run, None, nothing, same)
    assert len(run.graph.stages) > 6
    wanted = wanted.logits if hasattr(wanted, "logits") else wanted.last_hidden_state
    (found,) = [o for o in outputs if isinstance(o, Tensor) and o.shape == wanted.shape]
    assert torch.equal(found, wanted)


def test_taps_see_what_linears_take() -> None:
    tiny = MODELS["llama"]
    model, inputs = tiny.build(), tiny.inputs()
    taken: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, path=path: taken.update({path: args[0]}))
    with for_calibration(model):
        model(**inputs)
        wanted = dict(taken)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    seen: dict[str, Tensor] = {}

    def tap(run: Run, stage: Stage, x: fx.Node) -> None:
        seen.update({site.name: run.env[x] for site in stage.sites})

    run = start(model, **inputs)
    run.graph.advance(run, None, tap, same)
    assert seen.keys() == wanted.keys() - {"lm_head"}
    for path, x in seen.items():
        torch.testing.assert_close(x, wanted[path])


# --- stages


def test_linears_of_one_input_share_a_stage() -> None:
    tiny = MODELS["llama"]
    found = sites(start(tiny.build(), **tiny.inputs()))
    layer = "model.layers.0"
    assert found[:4] == [
        [f"{layer}.self_attn.{x}_proj" for x in "qkv"],
        [f"{layer}.self_attn.o_proj"],
        [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"],
        [f"{layer}.mlp.down_proj"],
    ]
    assert len(found) == 8


def test_cross_attention_of_all_layers_shares_the_output_of_the_encoder() -> None:
    tiny = MODELS["whisper"]
    found = sites(start(tiny.build(decoder_layers=2), **tiny.inputs()))
    (shared,) = [stage for stage in found if "model.decoder.layers.0.encoder_attn.k_proj" in stage]
    assert sorted(shared) == sorted(
        f"model.decoder.layers.{i}.encoder_attn.{x}_proj" for i in (0, 1) for x in "kv"
    )


class Twice(nn.Module):
    """One layer that runs twice, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.shared(self.shared(x).relu()).relu())


def test_a_weight_that_is_used_twice_is_ready_at_its_last_use() -> None:
    model, x = Twice(), torch.randn(3, 16)
    run = start(model, x)
    assert sites(run) == [["shared"], ["last"]]
    seen: list[Tensor] = []
    first = run.graph.stages[0]
    run.graph.advance(run, first, lambda run, stage, at: seen.append(run.env[at]), same)
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], model.shared(x).relu())


class Written(nn.Module):
    """Two linears on one tensor that is written to between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.a(x)
        x.add_(1)
        return y + self.b(x)


def test_an_input_that_is_written_to_is_another_input() -> None:
    model, x = Written(), torch.randn(3, 16)
    run = start(model, x)
    assert sites(run) == [["a"], ["b"]]
    seen: list[Tensor] = []
    result = run.graph.advance(run, None, lambda run, stage, at: seen.append(run.env[at].clone()), same)
    torch.testing.assert_close(seen, [x, x + 1])
    torch.testing.assert_close(result[0], model(x))


class Views(nn.Module):
    """One input in two layouts, weights [K, N] and [N, K], transposes made before they are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(16, 8), requires_grad=False)
        self.b = nn.Parameter(torch.randn(8, 16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        turned = self.b.t()
        y = x.reshape(-1, 16) @ self.a
        return y + F.relu(x.view(-1, 16)) @ turned


def test_a_transpose_reads_the_weight_where_the_linear_does() -> None:
    model, x = Views(), torch.randn(2, 3, 16)
    run = start(model, x)
    assert sites(run) == [["a"], ["b"]]
    for stage in run.graph.stages:
        run.graph.advance(run, stage, nothing, lambda weight: weight * 2)
    result = run.graph.advance(run, None, nothing, lambda weight: weight * 2)
    torch.testing.assert_close(result[0], 2 * model(x))


def test_layouts_of_one_input_are_one_input() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x.view(-1, 16)) + self.b(x.reshape(6, 16))

    assert sites(start(Model(), torch.randn(2, 3, 16))) == [["a", "b"]]


# --- what is kept


def test_dead_values_are_dropped() -> None:
    tiny = MODELS["llama"]
    run = start(tiny.build(num_hidden_layers=6), **tiny.inputs())
    weights = {site.weight for stage in run.graph.stages for site in stage.sites}
    live = []
    for stage in run.graph.stages:
        run.graph.advance(run, stage, nothing, same)
        activations = [
            v
            for n, v in run.env.items()
            if isinstance(v, Tensor) and not isinstance(v, nn.Parameter) and n.op != "placeholder"
        ]
        live.append(sum(v.numel() for v in activations))
        assert {n for n in weights if n not in run.env} == {
            n for n in weights if run.graph.position[_last(run, n)] < run.place
        }
    assert max(live[8:]) <= max(live[:8])  # the later layers hold no more than the first two


def _last(run: Run, weight: fx.Node) -> fx.Node:
    return max(weight.users, key=lambda node: run.graph.position[node])


def test_a_run_can_start_again() -> None:
    tiny = MODELS["llama"]
    model = tiny.build()
    run = start(model, **tiny.inputs())
    with for_calibration(model):
        first = run.graph.advance(run, None, nothing, same)
        again = run.again()
        for stage in run.graph.stages:
            run.graph.advance(again, stage, nothing, same)
        second = run.graph.advance(again, None, nothing, same)
    assert torch.equal(first[0], second[0])


def test_descendants_are_all_that_depends_on_a_node() -> None:
    run = start(Twice(), torch.randn(3, 16))
    (x,) = [n for n, v in run.inputs.items() if not isinstance(v, nn.Parameter)]
    names = [name(n) for n in run.graph.nodes if n in run.graph.descendants((x,))]
    assert names == ["linear", "relu", "linear", "relu", "linear"]
    assert run.graph.descendants(()) == frozenset()
