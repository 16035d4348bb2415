"""The facts that decide (design.md, section 5): each of these tests fails where one is violated."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    HEADS,
    MLP,
    MODELS,
    CountingBackend,
    Stack,
    dequantized,
    ids,
    linears,
    llama,
    logits,
    output,
    quantized,
    relative,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import gptq_fx
from gptq_fx import DenseUseError, GPTQError, QuantizedParameter, SchemeMismatchError, WeightError, lazy
from gptq_fx.packed import PackedWeight
from gptq_fx.passes import Plan

EAGER = {"inner_backend": "eager"}
FP32 = 1e-5
BITS8 = {"dynamic": {r"model\.layers\.1\.": {"bits": 8}}}
ways = pytest.mark.parametrize("way", ["lazily", "quantized"])


def prepared(model: nn.Module, way: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """(the model to compile, its options): dense with settings as options, or quantized with them."""
    if way == "lazily":
        return copy.deepcopy(model), {**EAGER, **settings}
    return quantized(model, **settings)[0], EAGER


def compile_layers(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    for layer in model.model.layers:
        layer.compile(backend="gptq", options=options)
    return model


def quantized_parameters(model: nn.Module) -> dict[str, QuantizedParameter]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedParameter)}


# --- 1. one compiled graph serves many layers


@ways
def test_layers_that_share_a_graph_use_their_own_weights(way: str, plans: list[Plan]) -> None:
    dense = llama(3)
    model, options = prepared(dense, way)
    found = logits(compile_layers(model, options))
    assert len(plans) == 1
    assert relative(found, logits(dequantized(dense))) <= FP32


@ways
def test_a_graph_reused_behind_graph_breaks_uses_each_layers_weights(way: str, plans: list[Plan]) -> None:
    dense, x = Stack(4, broken=True).requires_grad_(False), torch.randn(2, 5, 64)
    model, options = prepared(dense, way)
    found = output(torch.compile(model, backend="gptq", options=options), {"x": x})
    assert 0 < sum(bool(plan.operands) for plan in plans) < 4
    assert relative(found, output(dequantized(dense), {"x": x})) <= FP32


@ways
def test_mixtral_with_eager_experts(way: str, plans: list[Plan]) -> None:
    dense = MODELS["mixtral"].build()
    dense.set_experts_implementation("eager")  # type: ignore[operator]
    # The loop is in no graph: what is lazily quantized leaves its weights dense.
    settings = {"dynamic": {r"-:.*experts": {}}} if way == "lazily" else {}
    model, options = prepared(dense, way, **settings)
    found = logits(torch.compile(model, backend="gptq", options=options))
    attentions = [plan for plan in plans if any(s.name.endswith("q_proj") and s.scheme for s in plan.sites)]
    assert 0 < len(attentions) < 3
    assert relative(found, logits(dequantized(dense, **settings))) <= FP32


def test_layers_of_different_schemes_do_not_share_a_graph(plans: list[Plan]) -> None:
    dense = llama(4)
    model, options = prepared(dense, "quantized", **BITS8)
    found = logits(compile_layers(model, options))
    assert len(plans) == 2
    assert relative(found, logits(dequantized(dense, **BITS8))) <= FP32


def test_a_layer_left_dense_does_not_share_a_graph(plans: list[Plan]) -> None:
    dense = llama(3)
    skip = {"dynamic": {r"-:model\.layers\.1\.": {}}}
    model, options = prepared(dense, "quantized", **skip)
    found = logits(compile_layers(model, options))
    assert len(plans) == 2
    assert relative(found, logits(dequantized(dense, **skip))) <= FP32


@pytest.mark.parametrize("rule", [BITS8, {"dynamic": {r"-:model\.layers\.1\.": {}}}], ids=["8 bits", "dense"])
def test_a_shared_graph_refuses_a_dense_weight_that_its_rules_treat_otherwise(rule: dict[str, Any]) -> None:
    model = compile_layers(llama(3), {**EAGER, **rule})
    with pytest.raises(SchemeMismatchError, match=r"model\.layers\.1\..*gptq_fx\.quantize\(model"):
        logits(model)


@ways
def test_a_bad_weight_in_a_shared_graph_is_named_by_its_own_layer(way: str) -> None:
    model = llama(3)
    model.model.layers[2].mlp.down_proj.weight[5, 7] = float("nan")
    with pytest.raises(WeightError, match=r"model\.layers\.2\.mlp\.down_proj: NaN .*\[5, 7\]"):
        if way == "lazily":
            logits(compile_layers(model, EAGER))
        else:
            quantized(model)


# --- 2. names


def test_quantized_parameters_carry_full_paths() -> None:
    model, report = quantized(llama(2))
    for name, parameter in quantized_parameters(model).items():
        assert parameter.fqn == name.removesuffix(".weight")
    assert {s.name for s in report.sites if s.scheme} == linears(model) - HEADS


def test_names_of_sites_are_full_paths_behind_graph_breaks(plans: list[Plan]) -> None:
    model = Stack(2, broken=True).requires_grad_(False)
    output(torch.compile(model, backend="gptq", options=EAGER), {"x": torch.randn(3, 64)})
    assert {site.name for plan in plans for site in plan.sites} <= linears(model)


def test_names_of_sites_are_full_paths_under_layer_compile(plans: list[Plan]) -> None:
    model = compile_layers(llama(2), EAGER)
    logits(model)
    names = {site.name for site in plans[0].sites}
    assert names == {n for n in linears(model) if n.startswith("model.layers.0.")}


def test_the_report_names_every_layer_behind_graph_breaks() -> None:
    model = Stack(3, broken=True).requires_grad_(False)
    report = gptq_fx.explain(model, torch.randn(3, 64))
    assert [s.name for s in report.sites if s.scheme] == [
        f"layers.{i}.{leaf}" for i in range(3) for leaf in ("gate", "up", "down")
    ]


@ways
def test_rules_by_full_path_hit_the_right_layer(way: str, plans: list[Plan]) -> None:
    dense = llama(3)
    model, options = prepared(dense, way, **BITS8)
    found = logits(torch.compile(model, backend="gptq", fullgraph=True, options=options))
    eight = {s.name for s in plans[0].sites if s.scheme and s.scheme.bits == 8}
    assert eight == {n for n in linears(dense) if n.startswith("model.layers.1.")}
    assert relative(found, logits(dequantized(dense, **BITS8))) <= FP32


# --- 3. a dense weight that changes is quantized anew


def add_in_place(weight: nn.Parameter, new: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(0).add_(new)


def set_data(weight: nn.Parameter, new: Tensor) -> None:
    weight.data = new


def load(weight: nn.Parameter, new: Tensor) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": new})


@pytest.mark.parametrize("change", [add_in_place, set_data, load])
def test_a_changed_weight_is_quantized_anew(change: Callable[[nn.Parameter, Tensor], None]) -> None:
    model, x = MLP().requires_grad_(False), torch.randn(3, 64)
    compiled = torch.compile(model, backend="gptq", options=EAGER)
    before = output(compiled, {"x": x})
    for weight in (model.up.weight, model.down.weight):  # merged with another, and alone
        change(weight, torch.randn_like(weight))
    after = output(compiled, {"x": x})
    assert relative(after, output(dequantized(model), {"x": x})) <= FP32
    assert relative(after, before) > 0.1


def test_an_unchanged_weight_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    rounding = lazy.round_to_nearest

    def counting(weight: Tensor, scheme: gptq_fx.Scheme, name: str) -> gptq_fx.QuantizedWeight:
        made.append(name)
        return rounding(weight, scheme, name)

    monkeypatch.setattr(lazy, "round_to_nearest", counting)
    model = MLP().requires_grad_(False)
    compiled = torch.compile(model, backend="gptq", options=EAGER)
    for rows in (3, 3, 4, 5):  # the third compiles once more
        output(compiled, {"x": torch.randn(rows, 64)})
    assert sorted(made) == ["down", "gate", "up"]


# --- 4. tied weights


@ways
@pytest.mark.parametrize("lm_head", [False, True])
def test_tied_weights(way: str, lm_head: bool, plans: list[Plan]) -> None:
    dense = llama(1, tie_word_embeddings=True)
    table = dense.model.embed_tokens.weight.clone()
    wanted = logits(dequantized(dense, lm_head=lm_head))
    model, options = prepared(dense, way, lm_head=lm_head)
    if way == "quantized":
        assert relative(logits(model), wanted) <= FP32  # eager
    found = logits(torch.compile(model, backend="gptq", fullgraph=True, options=options))
    assert relative(found, wanted) <= FP32
    assert torch.equal(model.model.embed_tokens.weight, table)
    (head,) = (site for site in plans[-1].sites if site.kind == "lm_head")
    assert (head.name, head.scheme is not None) == ("lm_head", lm_head)
    if way == "quantized":
        assert isinstance(model.lm_head.weight, QuantizedParameter) is lm_head
        assert model.config.tie_word_embeddings is not lm_head  # type: ignore[union-attr]


@ways
def test_two_linears_on_one_weight(way: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.first(x) * self.second(x)

    dense, x = Twice().requires_grad_(False), torch.randn(3, 64)
    model, options = prepared(dense, way)
    found = output(torch.compile(model, backend="gptq", options=options), {"x": x})
    assert relative(found, output(dequantized(dense), {"x": x})) <= FP32


# --- 5. Dynamo's graph stays; packs are static inputs; caches hit


@ways
def test_dynamos_graph_is_not_touched(way: str) -> None:
    model, options = prepared(MLP().requires_grad_(False), way)
    seen = []

    def watching(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nodes = [(n, n.op, n.target, n.args, dict(n.meta)) for n in gm.graph.nodes]
        result = gptq_fx.backend(gm, inputs, options=options)
        seen.append(nodes == [(n, n.op, n.target, n.args, dict(n.meta)) for n in gm.graph.nodes])
        return result

    output(torch.compile(model, backend=watching), {"x": torch.randn(3, 64)})
    assert seen == [True]


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packs_are_static_inputs(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx as inductor

    compile_fx, seen = inductor.compile_fx, []

    def traced(gm: torch.fx.GraphModule, inputs: list[Tensor], **kwargs: Any) -> Any:
        seen.append([tuple(t.shape) for i, t in enumerate(inputs) if i not in kwargs["static_input_idxs"]])
        seen.append(len(inputs))
        return gm.forward

    monkeypatch.setattr(
        inductor, "compile_fx", lambda *args, **kwargs: compile_fx(*args, **kwargs, inner_compile=traced)
    )
    model, _ = prepared(MLP(bias=True).to(dtype).requires_grad_(False), way)
    # A hit in the cache would not call `traced`.
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(model, backend="gptq")(torch.randn(3, 64, dtype=dtype))
    moving, number = seen
    assert moving == [(3, 64)]
    assert number == 1 + 3 + 2 * 2  # x, biases, two tensors each for gate with up, and down


CACHES = """
import sys, json, torch, gptq_fx
from torch._dynamo.utils import counters
sys.path.insert(0, sys.argv[1])
from models import MLP, quantized

def counts(model):
    counters.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="gptq")(torch.ones(2, 64, dtype=torch.bfloat16))
    names = ("fxgraph_cache_miss", "fxgraph_cache_hit", "fxgraph_cache_bypass")
    aot = ("autograd_cache_miss", "autograd_cache_hit", "autograd_cache_bypass")
    return [counters["inductor"][n] for n in names] + [counters["aot_autograd"][n] for n in aot]

torch.manual_seed(0)
dense = MLP().bfloat16().requires_grad_(False)
packed, _ = quantized(dense)
print(json.dumps([counts(packed), counts(packed), counts(dense)]))
"""


def test_a_second_compile_hits_both_caches_also_in_a_second_process(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CACHES, str(Path(__file__).parent)]

    def process() -> list[list[int]]:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        result: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
        return result

    miss, hit = [1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0]
    cold, again, _ = process()
    assert (cold, again) == (miss, hit)
    assert process() == [hit, hit, hit]


# --- 6. no dense operation, no NaN

DENSE_OPERATIONS: dict[str, Callable[[QuantizedParameter], object]] = {
    "add": lambda p: p + 1,
    "add_": lambda p: p.add_(1),
    "mul by a tensor": lambda p: torch.ones(64) * p,
    "sum": lambda p: p.sum(),
    "item": lambda p: p.amax().item(),
    "index": lambda p: p[0],
    "slice": lambda p: p[:, :8],
    "view": lambda p: p.view(-1),
    "cat": lambda p: torch.cat([p, p]),
    "equal": lambda p: torch.equal(p, torch.zeros(128, 64)),
    "isnan": lambda p: p.isnan().any(),
    "copy to dense": lambda p: torch.zeros(128, 64).copy_(p),
    "zeros_like": lambda p: torch.zeros_like(p),
    "embedding": lambda p: F.embedding(torch.tensor([1]), p),
    "weight on the left": lambda p: p @ torch.ones(64),
    "weight times weight": lambda p: F.linear(p, p),
    "other way round": lambda p: torch.ones(2, 128) @ p,
    "conv1d": lambda p: F.conv1d(torch.ones(1, 128, 9), p.view(64, 128, 1)),
    "addmm with alpha": lambda p: torch.addmm(torch.ones(128), torch.ones(2, 64), p.t(), alpha=2),
    "storage": lambda p: p.storage(),
}


@pytest.mark.parametrize("name", DENSE_OPERATIONS)
def test_a_dense_operation_is_refused(name: str) -> None:
    module = nn.Linear(64, 128).requires_grad_(False)
    gptq_fx.quantize(module, progress=False)
    with torch.no_grad(), pytest.raises(DenseUseError, match=r"dense|dimension"):
        DENSE_OPERATIONS[name](module.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name, read",
    [
        ("numpy", lambda p: p.numpy()),
        ("tolist", lambda p: p.tolist()),
        ("untyped_storage", lambda p: bytes(p.untyped_storage())),
    ],
)
def test_bytes_that_do_not_exist_cannot_be_read(name: str, read: Callable[[Tensor], object]) -> None:
    module = nn.Linear(64, 128).requires_grad_(False)
    gptq_fx.quantize(module, progress=False)
    with pytest.raises((DenseUseError, RuntimeError, TypeError, NotImplementedError)):
        read(module.weight)


# --- 7. generate

GREEDY = {"max_new_tokens": 6, "do_sample": False}
STATIC = {**GREEDY, "cache_implementation": "static"}


def test_generate_of_a_wrapper_never_reaches_the_backend() -> None:
    counting = CountingBackend()
    torch.compile(llama(1), backend=counting).generate(ids(1, 7), **STATIC, disable_compile=True)
    assert counting.calls == 0


@ways
def test_generate_after_model_compile_reaches_the_backend(way: str) -> None:
    dense = llama(2)
    model, options = prepared(dense, way)
    counting = CountingBackend(options)
    wanted = dequantized(dense).generate(ids(1, 7), **GREEDY)  # type: ignore[operator]
    model.compile(backend=counting)
    found = model.generate(ids(1, 7), **STATIC, disable_compile=True)  # type: ignore[operator]
    assert counting.calls > 0
    assert torch.equal(found, wanted)


def test_eager_prefill_of_transformers_own_compilation(plans: list[Plan]) -> None:
    from transformers import CompileConfig

    dense = llama(2)
    model, _ = quantized(dense)
    compile_config = CompileConfig(backend="gptq", mode=None, options=EAGER, fullgraph=True)
    compile_config._compile_all_devices = True
    found = model.generate(ids(1, 7), **STATIC, compile_config=compile_config)  # type: ignore[operator]
    assert plans
    assert torch.equal(found, dequantized(dense).generate(ids(1, 7), **GREEDY))  # type: ignore[operator]


def test_a_quantized_model_is_right_in_eager() -> None:
    for name in ("llama", "gpt2", "falcon"):
        tiny = MODELS[name]
        dense = tiny.build()
        model, _ = quantized(dense)
        assert relative(output(model, tiny.inputs()), output(dequantized(dense), tiny.inputs())) <= FP32


# --- 8. grad mode


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_grad_mode_runs_forward_and_refuses_backward(inner: str) -> None:
    model, x = MLP().requires_grad_(True), torch.randn(3, 64)
    compiled = torch.compile(model, backend="gptq", options={"inner_backend": inner})
    y = compiled(x)
    assert y.requires_grad
    wanted = output(dequantized(model), {"x": x})
    assert relative(y.detach(), wanted) <= FP32
    assert relative(output(compiled, {"x": x}), wanted) <= FP32
    with pytest.raises(GPTQError, match=r"backward .*quantized while.*requires_grad_\(False\)"):
        y.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_grad_mode_of_a_quantized_model() -> None:
    dense, x = MLP(bias=True), torch.randn(3, 64, requires_grad=True)
    model, _ = quantized(dense)
    compiled = torch.compile(model, backend="gptq", options=EAGER)
    y = compiled(x)
    assert relative(y.detach(), output(dequantized(dense), {"x": x.detach()})) <= FP32
    y.sum().backward()  # tests/test_lora.py says of what
    assert x.grad is not None


# --- 10. memory: one copy of the bytes, and none of a model that is gone


def compiled_and_forgotten(way: str, dtype: torch.dtype) -> list[weakref.ref[Any]]:
    """Weak references to the model, its parameters, packs and packed tensors."""
    model, options = prepared(llama(1, dtype), way)
    logits(torch.compile(model, backend="gptq", options=options))
    packs = [p.packed for p in quantized_parameters(model).values()]
    own = [lazy._FORMS[id(p)] for p in model.parameters() if id(p) in lazy._FORMS]
    packs += [pack for forms in own for pack in forms.by_scheme.values()]
    packs += [pack.merged for pack in packs if pack.merged]
    assert len(packs) > 7
    tensors = [t for pack in packs for t in pack.tensors if t is not None]
    return [weakref.ref(o) for o in (model, *model.parameters(), *packs, *tensors)]


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_deleted_model_is_collected_with_its_packs(way: str, dtype: torch.dtype) -> None:
    before = len(lazy._FORMS)
    watched = compiled_and_forgotten(way, dtype)
    gc.collect()
    assert [type(ref()).__name__ for ref in watched if ref() is not None] == []
    assert len(lazy._FORMS) <= before


def stored(parameters: list[QuantizedParameter]) -> int:
    """Bytes of the storages that the packs keep alive, each once."""
    storages = {}
    for parameter in parameters:
        for tensor in parameter.packed.tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def real_tensors(dtype: torch.dtype) -> list[Tensor]:
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) is Tensor and o.dtype == dtype and o.numel() > 4096]
    return [t for t in found if not isinstance(t, FakeTensor) and t.device.type == "cpu"]


def test_bytes_of_the_weights_are_held_once() -> None:
    dense = llama(1, torch.bfloat16, hidden_size=256, intermediate_size=512)
    model, _ = quantized(dense, group_size=64)
    parameters = list(quantized_parameters(model).values())
    limit = 0.35 * 2 * sum(p.numel() for p in parameters)
    assert stored(parameters) <= limit
    assert real_tensors(torch.int32)
    logits(torch.compile(model, backend="gptq", options=EAGER))
    assert {p.packed.kernel.name for p in parameters} == {"cpu_int4"}
    assert any(p.packed.merged for p in parameters)
    assert stored(parameters) <= limit
    assert sum(p.nbytes for p in parameters) <= limit
    assert not real_tensors(torch.int32)  # the canonical form is gone


def test_lazily_quantized_weights_stay_dense_and_a_note_says_so(caplog: pytest.LogCaptureFixture) -> None:
    sys.modules["gptq_fx.backend"]._warn_of_dense_weights.cache_clear()  # it is given once in a process
    model = MLP().requires_grad_(False)
    before = dict(model.named_parameters())
    copies = {name: p.clone() for name, p in before.items()}
    output(torch.compile(model, backend="gptq", options=EAGER), {"x": torch.randn(2, 64)})
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert torch.equal(parameter, copies[name])
    (note,) = (r.getMessage() for r in caplog.records if r.name.startswith("gptq_fx"))
    assert "dense weights are quantized beside their dense form" in note
    assert "gptq_fx.quantize" in note


# --- models whose packs were merged can still be copied, moved and saved


@pytest.fixture
def merged() -> nn.Module:
    """A bf16 model that was compiled: q/k/v and gate/up of it are views of one pack each."""
    model, _ = quantized(llama(1, torch.bfloat16, num_key_value_heads=4))
    logits(torch.compile(model, backend="gptq", options=EAGER))
    assert sum(p.packed.merged is not None for p in quantized_parameters(model).values()) == 5
    return model


def integers(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.quantized_weight().codes() for n, p in quantized_parameters(model).items()}


def same_integers(one: nn.Module, other: nn.Module) -> bool:
    a, b = integers(one), integers(other)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_deepcopy_of_a_merged_model(merged: nn.Module) -> None:
    wanted = logits(merged)
    twin = copy.deepcopy(merged)
    merged.model.layers[0].mlp.up_proj.weight.packed.tensors[0].zero_()
    assert torch.equal(logits(twin), wanted)
    assert torch.equal(logits(torch.compile(twin, backend="gptq", options=EAGER)), wanted)


def test_dtype_of_a_merged_model(merged: nn.Module) -> None:
    before = integers(merged)
    wide = copy.deepcopy(merged).float()
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    assert all(torch.equal(t, before[n]) for n, t in integers(wide).items())
    found = logits(torch.compile(wide, backend="gptq", options=EAGER))
    assert relative(found, logits(wide)) <= FP32
    assert relative(logits(merged), found) < 0.03  # bf16


def test_state_dict_of_a_merged_model(merged: nn.Module) -> None:
    wanted = logits(merged)
    other, _ = quantized(llama(1, torch.bfloat16, num_key_value_heads=4, initializer_range=0.1))
    compiled = torch.compile(other, backend="gptq", options=EAGER)
    assert not torch.equal(logits(compiled), wanted)
    other.load_state_dict(merged.state_dict())
    assert same_integers(other, merged)
    assert relative(logits(other), wanted) < 0.03  # bf16, another kernel
    assert torch.equal(logits(compiled), wanted)  # the graph from before sees the new numbers


def test_save_and_load_of_a_merged_model(merged: nn.Module) -> None:
    wanted, file = logits(merged), io.BytesIO()
    torch.save(merged.state_dict(), file)
    assert file.tell() < 1.3 * sum(p.nbytes for p in merged.state_dict().values()) + 2**16
    file.seek(0)
    other = llama(1, torch.bfloat16, num_key_value_heads=4)
    other.load_state_dict(torch.load(file), assign=True)
    assert same_integers(other, merged)
    assert torch.equal(logits(torch.compile(other, backend="gptq", options=EAGER)), wanted)


def test_eager_and_compiled_use_alternate_on_a_merged_model(merged: nn.Module) -> None:
    wanted = logits(merged)
    compiled = torch.compile(merged, backend="gptq", options=EAGER)
    for _ in range(2):
        assert torch.equal(logits(compiled), wanted)
        assert torch.equal(logits(merged), wanted)
    whole: PackedWeight = merged.model.layers[0].mlp.up_proj.weight.packed.merged
    assert merged.model.layers[0].mlp.gate_proj.weight.packed.merged is whole
    assert re.fullmatch("cpu_int4", whole.kernel.name)
