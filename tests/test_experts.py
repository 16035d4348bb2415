"""Mixtures of experts: every form in which they reach a graph, quantized, calibrated, run and reported."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXPERTS, VOCABULARY, output, relative
from tolerances import LINEAR
from torch import Tensor, nn

import gptq_fx
from gptq_fx import GPTQConfig, QuantizedParameter, Report
from gptq_fx.experts import quantized_experts
from gptq_fx.gptq import Settings, gptq
from gptq_fx.grid import round_to_nearest
from gptq_fx.hessian import Hessian
from gptq_fx.kernels import choose_kernel, get_kernel, grouped
from gptq_fx.kernels.block import ACTIVATIONS
from gptq_fx.packed import PackedWeight, run_experts
from gptq_fx.report import SiteRecord
from gptq_fx.scheme import Scheme

CONFIG = GPTQConfig(group_size=32)
CROSS_SECTION = ("mixtral", "deepseek_v3", "gpt_oss", "llama4")
FORMS = ("grouped_mm", "batched_mm")
BLOCK = "gptq_fx"  # what quantize sets


def _every(forms: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(name, form, marks=() if name in CROSS_SECTION else pytest.mark.slow)
        for name in EXPERTS
        for form in forms
        if name != "llama4" or form == "grouped_mm"  # it has one form, of its own
    ]


def build(name: str, form: str | None = None, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    model = EXPERTS[name].build(dtype, **config)
    if form is not None and name != "llama4":
        model.set_experts_implementation(form)  # type: ignore[operator]
    return model


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    options = {"group_size": 32, "inner_backend": "eager", **options}
    model.compile(backend="gptq", options=options, fullgraph=True)
    return model


def quantize(model: nn.Module, data: Any = None, **config: Any) -> Report:
    return gptq_fx.quantize(model, GPTQConfig(**{"group_size": 32, **config}), data, progress=False)


def data(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 24), generator=generator)} for _ in range(count)]


def twin(dense: nn.Module, quantized: nn.Module) -> nn.Module:
    """The dense model on the numbers of the quantized one."""
    result = copy.deepcopy(dense)
    for name, parameter in quantized.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            numbers = parameter.dequantize().to(result.get_parameter(name).dtype)
            result.get_parameter(name).data = numbers.contiguous()
    return result


def stacks(report: Report) -> list[SiteRecord]:
    return [site for site in report.sites if len(site.shape) == 3]


# --- every family, in every form


@pytest.mark.parametrize(("name", "form"), _every(FORMS))
def test_compiled_lazily_all_experts_are_quantized_and_right(name: str, form: str) -> None:
    model, inputs = build(name, form), EXPERTS[name].inputs()
    report = gptq_fx.explain(model, config=CONFIG, **inputs)
    found = stacks(report)
    assert found and all(site.kind == "grouped_linear" and site.scheme for site in found)
    assert all(site.scheme is None for site in report.sites if site.kind == "router")
    dense = copy.deepcopy(model)
    for site in report.sites:
        if site.scheme is not None:
            path = site.name if len(site.shape) == 3 else f"{site.name}.weight"
            weight = dense.get_parameter(path)
            owner = dense.get_submodule(path.rpartition(".")[0])
            flipped = weight.ndim == 3 and getattr(owner, "is_transposed", name == "llama4")
            rounded = round_to_nearest(weight.mT if flipped else weight, site.scheme).dequantize()
            weight.data = (rounded.mT if flipped else rounded).contiguous()
    torch._dynamo.reset()
    wanted = output(dense, inputs)
    assert relative(output(compiled(model), inputs), wanted) <= LINEAR[torch.float32]


@pytest.mark.parametrize(("name", "form"), _every((*FORMS, BLOCK)))
@pytest.mark.parametrize("calibrated", [False, True])
def test_quantized_in_place_eager_and_compiled(name: str, form: str, calibrated: bool) -> None:
    if name == "llama4" and not calibrated:
        pytest.skip("no module says which way round its stacks are: see the test of what is reported")
    dense, model, inputs = build(name), build(name), EXPERTS[name].inputs()
    report = quantize(model, data() if calibrated else None)
    if name != "llama4":
        assert model.config._experts_implementation == BLOCK
        model.set_experts_implementation(form)  # type: ignore[operator]
    assert all(site.scheme is not None for site in stacks(report))
    assert all((site.loss is not None) == calibrated for site in stacks(report))
    wanted = output(twin(dense, model), inputs)
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]
    assert relative(output(compiled(model), inputs), wanted) <= LINEAR[torch.float32]


def _some(names: tuple[str, ...]) -> list[Any]:
    """Every family of transformers' expert modules; those not named are slow."""
    return [
        pytest.param(name, marks=() if name in names else pytest.mark.slow)
        for name in EXPERTS
        if name != "llama4"  # its module takes rows that are routed already
    ]


@pytest.mark.parametrize("name", _some(("mixtral", "qwen3_moe", "gpt_oss")))
@pytest.mark.parametrize("form", [*FORMS, BLOCK])
@pytest.mark.parametrize("tokens", [1, 24], ids=["decode", "prefill"])
def test_bfloat16_with_the_routing_pinned(name: str, form: str, tokens: int) -> None:
    """The experts of one layer by themselves: no rounding in front of them can send a token elsewhere."""
    model = build(name, None, torch.bfloat16)
    exact, dense = copy.deepcopy(model).float(), copy.deepcopy(model)
    quantize(model)
    for each in (model, exact, dense):
        each.set_experts_implementation(form)  # type: ignore[operator]
    path, experts = next((n, m) for n, m in model.named_modules() if hasattr(m, "is_transposed"))
    args = torch.randn(tokens, 64), torch.rand(tokens, 4).topk(2).indices, torch.rand(tokens, 2)
    rounded = args[0].bfloat16(), args[1], args[2].bfloat16()
    widened = rounded[0].float(), args[1], rounded[2].float()
    with torch.no_grad():
        wanted = twin(exact, model).get_submodule(path)(*widened)
        bound = 1.5 * relative(twin(dense, model).get_submodule(path)(*rounded), wanted)
        assert relative(experts(*rounded), wanted) <= bound
        assert relative(compiled(experts)(*rounded), wanted) <= bound


@pytest.mark.parametrize("name", _some(("mixtral", "gpt_oss")))
@pytest.mark.parametrize("form", [*FORMS, BLOCK])
def test_prefill_and_decode_give_the_tokens_of_the_dense_twin(name: str, form: str) -> None:
    dense, model = build(name, "grouped_mm"), build(name, "grouped_mm")
    quantize(model)
    model.set_experts_implementation(form)  # type: ignore[operator]
    numbers, ids = twin(dense, model), EXPERTS[name].inputs()["input_ids"]
    arguments = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"}
    wanted = numbers.generate(ids, disable_compile=True, **arguments)  # type: ignore[operator]
    found = compiled(model).generate(ids, disable_compile=True, **arguments)  # type: ignore[operator]
    assert torch.equal(found, wanted)


def test_the_loop_over_experts_is_right_after_quantize() -> None:
    dense, model = build("mixtral", "eager"), build("mixtral", "eager")
    quantize(model, data())
    model.set_experts_implementation("eager")  # type: ignore[operator]
    inputs = EXPERTS["mixtral"].inputs()
    wanted = output(twin(dense, model), inputs)
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]


def test_the_loop_over_experts_becomes_the_block() -> None:
    model = build("mixtral", "eager")
    quantize(model)
    assert model.config._experts_implementation == BLOCK
    report = gptq_fx.explain(model, config=CONFIG, **EXPERTS["mixtral"].inputs())
    assert {site.kind for site in stacks(report)} == {"experts"}
    assert all(site.scheme is not None for site in stacks(report))


def test_the_loop_over_experts_is_reported_with_what_to_do() -> None:
    model = build("mixtral", "eager")
    report = gptq_fx.explain(model, config=CONFIG, **EXPERTS["mixtral"].inputs())
    assert all("set_experts_implementation('grouped_mm')" in site.reason for site in stacks(report))
    assert all(site.scheme is None for site in stacks(report))


def test_stacks_of_no_known_module_are_reported_without_calibration() -> None:
    report = quantize(build("llama4"))
    assert stacks(report)
    for site in stacks(report):
        assert site.scheme is None
        assert "compiling sees it in the graph" in site.reason


def test_memory_of_experts() -> None:
    model = build("mixtral", hidden_size=128, intermediate_size=256, dtype=torch.bfloat16)
    report = quantize(model, None, group_size=64)
    for site in stacks(report):
        assert site.bytes <= 0.35 * site.dense_bytes
    output(compiled(model), EXPERTS["mixtral"].inputs())  # packs them for the kernel
    found = [p for p in model.parameters() if isinstance(p, QuantizedParameter) and p.ndim == 3]
    assert sum(p.nbytes for p in found) <= 0.35 * sum(2 * p.numel() for p in found)


def test_a_rule_can_leave_experts_dense() -> None:
    model = build("mixtral")
    report = quantize(model, data(), dynamic={r"-:.*layers\.0\.mlp\.experts": {}})
    kept = {site.name: site.scheme for site in stacks(report)}
    assert kept["model.layers.0.mlp.experts.gate_up_proj"] is None
    assert kept["model.layers.1.mlp.experts.gate_up_proj"] is not None


def test_a_quantized_stack_survives_copies_and_state_dicts() -> None:
    model = build("mixtral")
    quantize(model)
    inputs = EXPERTS["mixtral"].inputs()
    wanted = output(model, inputs)
    other = build("mixtral")
    quantize(other, None)
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert torch.equal(output(other, inputs), wanted)


# --- the whole block


def test_other_backends_trace_the_block() -> None:
    dense, model, inputs = build("mixtral"), build("mixtral"), EXPERTS["mixtral"].inputs()
    quantize(model)
    wanted = output(twin(dense, model), inputs)
    model.compile(backend="aot_eager", fullgraph=True)
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]


def test_experts_left_dense_run_in_the_grouped_form() -> None:
    dense, model, inputs = build("mixtral"), build("mixtral"), EXPERTS["mixtral"].inputs()
    quantize(model, dynamic={r"-:.*layers\.0\.mlp\.experts\.down": {}})
    wanted = output(twin(dense, model), inputs)
    kinds = {s.name: s.kind for s in stacks(gptq_fx.explain(model, config=CONFIG, **inputs))}
    assert kinds["model.layers.0.mlp.experts.gate_up_proj"] == "grouped_linear"
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == "experts"
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]
    model.compile(backend="gptq", options={"inner_backend": "eager"}, fullgraph=True)
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]


def test_an_activation_that_no_kernel_knows_keeps_the_grouped_form() -> None:
    dense, model = build("mixtral", hidden_act="relu"), build("mixtral", hidden_act="relu")
    inputs = EXPERTS["mixtral"].inputs()
    quantize(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert relative(output(model, inputs), output(twin(dense, model), inputs)) <= LINEAR[torch.float32]


def test_a_rule_of_kind_experts_reaches_stacks_however_they_are_called() -> None:
    model = build("mixtral", "grouped_mm")
    report = quantize(model, data(), rules=[gptq_fx.Rule(kind="experts", scheme=Scheme(8, 32))])
    assert {site.scheme.bits for site in stacks(report) if site.scheme} == {8}
    assert {site.scheme.bits for site in report.sites if site.kind == "linear" and site.scheme} == {4}


def test_a_dense_stack_beside_a_quantized_one_is_refused() -> None:
    model = build("mixtral")
    quantize(model)
    experts = model.model.layers[0].mlp.experts  # type: ignore[union-attr,index]
    x, ids = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(gptq_fx.DenseUseError, match="dense stack beside a quantized one"):
        quantized_experts(
            x, ids, torch.ones(3, 1), experts.gate_up_proj, torch.randn(4, 64, 128), None, None, "silu"
        )


def _dense_loop(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Every token, every choice, in float64."""
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        for j, e in enumerate(ids[t].tolist()):
            if e < len(up):
                out[t] += weights[t, j] * (down[e] @ ACTIVATIONS[activation](up[e] @ token))
    return out


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 9),
    experts=st.integers(1, 6),
    top=st.integers(1, 6),
    spread=st.sampled_from(("any", "one", "none")),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bits=st.sampled_from((4, 8)),
    sym=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_block_against_a_dense_loop_in_float64(
    tokens: int, experts: int, top: int, spread: str, activation: str, bits: int, sym: bool, seed: int
) -> None:
    """Experts without tokens, all tokens to one, one expert in all, top-k of all, and none at all."""
    rng = torch.Generator().manual_seed(seed)
    top = min(top, experts)
    scheme = Scheme(bits, 32, sym)
    up = round_to_nearest(torch.randn(experts, 64, 32, generator=rng), scheme)
    down = round_to_nearest(torch.randn(experts, 32, 32, generator=rng), scheme)
    ids = torch.stack([torch.randperm(experts, generator=rng)[:top] for _ in range(tokens)])
    if spread != "any":
        ids[:] = 0 if spread == "one" else experts
    x, weights = torch.randn(tokens, 32, generator=rng), torch.rand(tokens, top, generator=rng)
    packs = [PackedWeight(weight, scheme, None) for weight in (up, down)]
    found = run_experts(x, ids, weights, *packs, None, None, activation)
    numbers = [weight.dequantize(torch.float64) for weight in (up, down)]
    wanted = _dense_loop(x.double(), ids, weights.double(), *numbers, activation)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_block_on_one_token_and_on_many(rows: int, dtype: torch.dtype) -> None:
    scheme = Scheme(4, 32)
    up = round_to_nearest((torch.randn(8, 128, 64) / 8).to(dtype), scheme)
    down = round_to_nearest((torch.randn(8, 64, 64) / 8).to(dtype), scheme)
    packs = [PackedWeight(weight, scheme, None) for weight in (up, down)]
    for packed in packs:
        packed.lower(choose_kernel(packed.spec)[0])
    x, ids = torch.randn(rows, 64).to(dtype), torch.rand(rows, 8).topk(3).indices
    weights = torch.rand(rows, 3).to(dtype)
    found = run_experts(x, ids, weights, *packs, None, None, "silu")
    dense = [weight.dequantize(dtype) for weight in (up, down)]
    numbers = [weight.double() for weight in dense]
    wanted = quantized_experts(x.double(), ids, weights.double(), *numbers, None, None, "silu")
    plain = quantized_experts(x, ids, weights, *dense, None, None, "silu")
    assert relative(found, wanted) <= max(LINEAR[torch.float32], 1.5 * relative(plain, wanted))


# --- hand-written stacks


class Stack(nn.Module):
    def __init__(self, transposed: bool, spelling: str) -> None:
        super().__init__()
        shape = (3, 64, 32) if transposed else (3, 32, 64)
        self.weight = nn.Parameter(torch.randn(shape), requires_grad=False)
        self.transposed, self.spelling = transposed, spelling

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight if self.transposed else self.weight.transpose(-2, -1)
        if self.spelling == "bmm":
            return torch.bmm(x, w)
        if self.spelling == "matmul":
            return x @ w
        return torch.einsum("emk,ekn->emn", x, w)


@pytest.mark.parametrize("spelling", ["bmm", "matmul", "einsum"])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_written_by_hand(transposed: bool, spelling: str) -> None:
    model, x = Stack(transposed, spelling), torch.randn(3, 5, 64)
    report = gptq_fx.explain(model, x, config=CONFIG)
    assert [site.kind for site in report.sites] == ["grouped_linear"]
    assert report.sites[0].scheme is not None
    weight = model.weight.mT if transposed else model.weight
    numbers = round_to_nearest(weight, Scheme(group_size=32)).dequantize()
    torch._dynamo.reset()
    found = compiled(model)(x)
    assert relative(found, torch.bmm(x, numbers.mT)) <= LINEAR[torch.float32]


def test_what_is_no_stack_of_experts_is_left_alone() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 32, 64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("emk,fnk->emfn", x, self.weight)

    report = gptq_fx.explain(Other(), torch.randn(3, 5, 64), config=CONFIG)
    assert [site.scheme for site in report.sites] == [None]
    assert "einsum" in report.sites[0].reason


# --- the ops


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    spare=st.integers(0, 2),
    bits=st.sampled_from((2, 3, 4, 8)),
    sym=st.booleans(),
    seed=st.integers(0, 99),
)
def test_grouped_against_a_loop_in_float64(
    counts: list[int], spare: int, bits: int, sym: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(len(counts), 32, 64, generator=generator)
    weight = round_to_nearest(dense, Scheme(bits, 32, sym))
    packed = PackedWeight(weight, Scheme(bits, 32, sym), None)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    x = torch.randn(int(ends[-1]) + spare, 64, generator=generator)
    wanted = torch.zeros(len(x), 32, dtype=torch.float64)
    numbers, start = weight.dequantize(torch.float64), 0
    for e, end in enumerate(ends.tolist()):
        wanted[start:end] = x[start:end].double() @ numbers[e].T
        start = end
    torch.testing.assert_close(packed.grouped(x, ends).double(), wanted, rtol=1e-4, atol=1e-4)
    ids = torch.randint(len(counts), (7,), generator=generator)
    y = torch.randn(7, 64, generator=generator)
    op, rest = grouped.call(packed.kernel, "indexed", packed.call_tensors(), ids, packed.spec)
    wanted = torch.stack([row.double() @ numbers[e].T for row, e in zip(y, ids, strict=True)])
    torch.testing.assert_close(op(y, *rest).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_rows_to_one_expert(rows: int, dtype: torch.dtype) -> None:
    dense = torch.randn(4, 64, 64).to(dtype)
    packed = PackedWeight(round_to_nearest(dense, Scheme(group_size=32)), Scheme(group_size=32), None)
    if dtype is torch.bfloat16 and get_kernel("cpu_int4").refuses(packed.spec) is None:
        packed.lower(get_kernel("cpu_int4"))
    x = torch.randn(rows, 64).to(dtype)
    ends = torch.tensor([0, 0, rows, rows])
    numbers = packed.unpacked().dequantize(torch.float64)[2]
    found = packed.grouped(x, ends)
    assert relative(found.double(), x.double() @ numbers.T) <= LINEAR[dtype]


def test_packing_experts_for_a_kernel_is_exact() -> None:
    kernel = get_kernel("cpu_int4")
    dense = torch.randn(3, 64, 64).bfloat16()
    weight = round_to_nearest(dense, Scheme(group_size=32, sym=False))
    packed = PackedWeight(weight, Scheme(group_size=32, sym=False), None)
    if kernel.refuses(packed.spec) is not None:
        pytest.skip("no int4 kernel for this CPU")
    packed.lower(kernel)
    back = packed.unpacked()
    assert torch.equal(back.codes(), weight.codes())
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zeros(), weight.zeros())


# --- calibration


def _routed(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """What each expert of the first layer takes, by hooks."""
    block = model.model.layers[0].mlp  # type: ignore[union-attr,index]
    taken: list[list[Tensor]] = [[] for _ in range(4)]

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, index, _weights = args
        for e in range(4):
            taken[e].append(hidden[(index == e).any(-1)])

    handle = block.experts.register_forward_pre_hook(hook)
    for batch in batches:
        model(**batch, use_cache=False)
    handle.remove()
    return [torch.cat(rows) for rows in taken]


@pytest.mark.parametrize("route_all", [False, True])
def test_each_expert_is_calibrated_on_its_own_tokens(route_all: bool) -> None:
    dense, model, batches = build("mixtral"), build("mixtral"), data()
    report = quantize(model, batches, gptaq=0.0, route_all=route_all)
    routed = _routed(model, batches)  # layer 0 behind the quantized attention, as in calibration
    stack = model.model.layers[0].mlp.experts.gate_up_proj.quantized_weight()
    for e in range(4):
        hessian = Hessian(64)
        for rows in routed if route_all else [routed[e]]:
            hessian.add(rows)
        weight = dense.model.layers[0].mlp.experts.gate_up_proj[e]
        wanted = gptq(weight, hessian, Scheme(group_size=32), Settings(gptaq=0.0), torch.float32)
        assert (stack.expert(e).codes() == wanted.codes).float().mean() > 0.98
    site = next(s for s in report.sites if s.name == "model.layers.0.mlp.experts.gate_up_proj")
    assert site.tokens == 2 * 3 * 4 * 24


class Picks(nn.Module):
    """Each token picks two experts by their weights, as batched forms do."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 32))
        self.down = nn.Parameter(torch.randn(4, 32, 48))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        ids = x[..., :4].topk(2).indices.reshape(-1)
        rows = x.reshape(-1, 32).repeat_interleave(2, 0)
        hidden = torch.bmm(self.up[ids], rows.unsqueeze(-1)).relu()
        return torch.bmm(self.down[ids], hidden).view(*x.shape[:-1], 2, 32).sum(-2)


def _padded(batch: dict[str, Tensor], filler: int) -> dict[str, Tensor]:
    """Six positions more on the right, which the mask leaves out."""
    ((name, x),) = batch.items()
    more = torch.full_like(x[:, :1], filler).repeat_interleave(6, 1)
    mask = torch.ones(x.shape[:2], dtype=torch.int64)
    return {name: torch.cat([x, more], 1), "attention_mask": nn.functional.pad(mask, (0, 6))}


@pytest.mark.parametrize("name", ["mixtral", "llama4", "picks"])
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "at once"])
def test_experts_are_calibrated_without_padding(name: str, sequential: bool) -> None:
    if name == "picks":
        short: nn.Module = Picks()
        batches: list[dict[str, Tensor]] = [{"x": torch.randn(2, 24, 32)} for _ in range(3)]
    else:
        short, batches = build(name), data()
    padded = copy.deepcopy(short)
    config = {"gptaq": 0.0, "sequential": sequential, "group_size": 16}
    found = quantize(short, batches, **config)
    report = quantize(padded, [_padded(batch, 3) for batch in batches], **config)
    assert stacks(found) and all(site.tokens for site in stacks(found))
    assert [(s.name, s.tokens) for s in stacks(report)] == [(s.name, s.tokens) for s in stacks(found)]
    for a, b in zip(short.parameters(), padded.parameters(), strict=True):
        if isinstance(a, QuantizedParameter) and isinstance(b, QuantizedParameter):
            same = a.quantized_weight().codes() == b.quantized_weight().codes()
            assert same.float().mean() > 0.99


def test_experts_that_saw_too_little_are_rounded_and_named() -> None:
    dense, model, batches = build("mixtral"), build("mixtral"), data()
    least = 150  # a little above a quarter of the 576 that are routed
    report = quantize(model, batches, min_tokens=least)
    counts = [len(rows) for rows in _routed(model, batches)]
    starved = [e for e, count in enumerate(counts) if count < least]
    assert starved
    site = next(s for s in report.sites if s.name == "model.layers.0.mlp.experts.gate_up_proj")
    assert f"{len(starved)} of 4 experts saw fewer than {least} tokens" in site.reason
    assert site.reason.split("rounded: ")[1].split(";")[0] == ", ".join(map(str, starved))
    for e in starved:
        weight = dense.model.layers[0].mlp.experts.gate_up_proj[e]
        rounded = round_to_nearest(weight, Scheme(group_size=32))
        stack = model.model.layers[0].mlp.experts.gate_up_proj.quantized_weight()
        assert torch.equal(stack.expert(e).codes(), rounded.codes())


def test_calibrated_experts_beat_rounded_ones() -> None:
    dense, batches = build("mixtral"), data(6)
    errors = []
    for calibration in (None, batches):
        model = copy.deepcopy(dense)
        quantize(model, calibration, bits=3)
        errors.append(sum((model(**b).logits - dense(**b).logits).square().mean().item() for b in batches))
    assert errors[1] < 0.7 * errors[0]


def test_experts_in_act_order() -> None:
    dense, model, inputs = build("gpt_oss"), build("gpt_oss"), EXPERTS["gpt_oss"].inputs()
    quantize(model, data(), desc_act=True)
    wanted = output(twin(dense, model), inputs)
    assert relative(output(model, inputs), wanted) <= LINEAR[torch.float32]
