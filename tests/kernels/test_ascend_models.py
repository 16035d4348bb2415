"""The Ascend kernel in whole models: the graph that the inner backend gets, and its numbers by emulation."""

import copy
import itertools
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import npu_emulation
import pytest
import torch
from expecttest import assert_expected_inline
from graphs import after
from tolerances import LINEAR, relative_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, KernelError, Scheme
from gptq_fx.grid import round_to_nearest
from gptq_fx.kernels import ascend, registry
from gptq_fx.measure import perplexity
from gptq_fx.parameter import QuantizedParameter

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The kernel is chosen on the CPU, where the emulation is, before all others."""
    kernel = replace(ascend.ASCEND, device="cpu", order=1)
    monkeypatch.setattr(registry, "_KERNELS", {**registry._KERNELS, "ascend": kernel})
    with npu_emulation.emulated():
        yield kernel


needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is missing")


class Block(nn.Module):
    """A block of a decoder, without the parts that hold no weight."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(128, 128), nn.Linear(128, 64), nn.Linear(128, 64)
        self.o = nn.Linear(128, 128, bias=False)
        self.gate, self.up = nn.Linear(128, 192, bias=False), nn.Linear(128, 192, bias=False)
        self.down = nn.Linear(192, 128)

    def forward(self, x):
        h = self.q(x) * torch.cat([self.k(x), self.v(x)], -1)
        x = x + self.o(h)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def make(dtype):
    return Block().to(dtype).requires_grad_(False)


def exact(model, scheme, x):
    """The output in float64 on the rounded weights."""
    rounded = Block().double().requires_grad_(False)
    rounded.load_state_dict(model.state_dict())
    for name, linear in rounded.named_children():
        weight = model.get_submodule(name).weight
        fitted, _ = scheme.fitted(weight.shape[1])
        linear.weight.data = round_to_nearest(weight, fitted).dequantize(torch.float64)
    return rounded(x.double())


def line(node):
    """Name, shapes and dtypes of a call; no name of the tracer's."""

    def show(arg):
        if isinstance(arg, (list, tuple)) and any(isinstance(a, torch.fx.Node) for a in arg):
            return f"[{', '.join(map(show, arg))}]"
        if not isinstance(arg, torch.fx.Node):
            return "-" if arg is None else str(arg)
        value = arg.meta.get("example_value", arg.meta.get("val"))
        if not isinstance(value, torch.Tensor):
            return "y"
        short = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"{short}{list(value.shape)}"

    named = [f"{key}={show(value)}" for key, value in node.kwargs.items()]
    op = str(node.target).removesuffix(".default").replace("npu.npu_", "npu.")
    return f"{op}({', '.join([*map(show, node.args), *named])})"


def ops_of(graph, library):
    return "\n".join(line(node) for node in graph.graph.nodes if str(node.target).startswith(f"{library}."))


def test_a_block_after_lower():
    stage = after(
        "lower", make(torch.bfloat16), torch.randn(2, 3, 128).bfloat16(), bits=4, group_size=64, sym=False
    )
    assert_expected_inline(
        ops_of(stage.graph, "gptq"),
        """\
gptq.ascend_linear(bf16[2, 3, 128], i32[128, 32], bf16[2, 256], bf16[2, 256], -, -, 64)
gptq.ascend_linear(bf16[2, 3, 128], i32[128, 16], bf16[2, 128], bf16[2, 128], -, -, 64)
gptq.ascend_linear(bf16[2, 3, 128], i32[128, 48], bf16[2, 384], bf16[2, 384], -, -, 64)
gptq.ascend_linear(bf16[2, 3, 192], i32[192, 16], bf16[3, 128], bf16[3, 128], -, bf16[128], 64)""",
    )


def named(monkeypatch, name, backend):
    """Let Dynamo know a backend by a name, even one of torch_npu's."""
    backend._tags = ()
    known = torch._dynamo.backends.registry
    monkeypatch.setitem(known._COMPILER_FNS, name, backend)
    monkeypatch.setitem(known._BACKENDS, name, None)


def test_what_a_compiler_behind_aot_gets(monkeypatch):
    """Only ops of torch_npu are left of the quantized linears."""
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    named(monkeypatch, "keep", aot_autograd(fw_compiler=keep, inference_compiler=keep))
    options = {"group_size": 64, "inner_backend": "keep", "sym": False}
    compiled = torch.compile(make(torch.bfloat16), backend="gptq", options=options)
    compiled(torch.randn(2, 3, 128).bfloat16())
    (graph,) = graphs
    assert ops_of(graph, "gptq") == ""
    left = [str(node.target) for node in graph.graph.nodes]
    assert not [target for target in left if target.startswith("aten.") and "mm" in target]
    assert_expected_inline(
        ops_of(graph, "npu"),
        """\
npu.weight_quant_batchmatmul(bf16[6, 128], i32[128, 32], bf16[2, 256], bf16[2, 256], -, -, -, 64)
npu.weight_quant_batchmatmul(bf16[6, 128], i32[128, 16], bf16[2, 128], bf16[2, 128], -, -, -, 64)
npu.weight_quant_batchmatmul(bf16[6, 128], i32[128, 48], bf16[2, 384], bf16[2, 384], -, -, -, 64)
npu.weight_quant_batchmatmul(bf16[6, 192], i32[192, 16], bf16[3, 128], bf16[3, 128], -, -, f32[128], 64)""",
    )


def taking(calls):
    """A backend that notes the ops and the inputs that it gets, and the grad mode."""

    def backend(gm, inputs):
        calls.append((ops_of(gm, "gptq").count("gptq.ascend_linear("), len(inputs), torch.is_grad_enabled()))
        return gm.forward

    return backend


def run(model, x, **options):
    return torch.compile(model, backend="gptq", options={"group_size": 64, "kernel": "ascend", **options})(x)


# x and four biases; q, k and v are one linear, gate and up too; each has weight and scales
HANDED_OVER = [(4, 5 + 4 * 2, False)]


@pytest.mark.parametrize("name", ["npugraph_ex", "npu", "aot_eager"])
def test_the_graph_is_handed_to_the_named_backend(name, monkeypatch):
    """Those of torch_npu start only on an NPU: one of our own takes the name."""
    calls = []
    named(monkeypatch, name, taking(calls))
    model, x = make(torch.bfloat16), torch.randn(5, 128).bfloat16()
    y = run(model, x, inner_backend=name)
    assert calls == HANDED_OVER
    assert relative_error(y, exact(model, Scheme(4, 64), x)) <= 2 * LINEAR[torch.bfloat16]


@pytest.mark.parametrize("mode", [None, "max-autotune-no-cudagraphs"])
def test_inductor_is_called_as_torch_compile_does(mode, monkeypatch):
    """torch_npu sets its code generation up in that class, and nowhere else."""
    calls, configs = [], []

    def call(self, gm, inputs):
        configs.append(self.config)
        return taking(calls)(gm, inputs)

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", call)
    run(make(torch.bfloat16), torch.randn(5, 128).bfloat16(), inner_backend="inductor", mode=mode)
    assert calls == HANDED_OVER
    assert configs == [torch._inductor.list_mode_options(mode) if mode else {}]


@pytest.mark.parametrize(
    ("preferred", "taken"),
    [
        (("npugraph_ex", "aot_eager"), "npugraph_ex"),
        (("no_such_backend", "aot_eager"), "aot_eager"),
        ((), "inductor"),
    ],
)
def test_what_the_device_prefers_is_the_default(preferred, taken, monkeypatch):
    calls = []
    monkeypatch.setattr(registry, "_INNER_BACKENDS", {"cpu": preferred, "npu": ("eager",)})
    if taken == "inductor":
        monkeypatch.setattr(
            torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: taking(calls)(gm, inputs)
        )
    else:
        named(monkeypatch, taken, taking(calls))
    run(make(torch.bfloat16), torch.randn(5, 128).bfloat16())
    assert calls == HANDED_OVER


def test_a_mode_of_inductor_asks_for_inductor(monkeypatch):
    monkeypatch.setattr(registry, "_INNER_BACKENDS", {"cpu": ("aot_eager",)})
    calls = []
    monkeypatch.setattr(
        torch._TorchCompileInductorWrapper, "__call__", lambda self, gm, inputs: taking(calls)(gm, inputs)
    )
    run(make(torch.bfloat16), torch.randn(5, 128).bfloat16(), mode="max-autotune-no-cudagraphs")
    assert calls == HANDED_OVER


def test_what_the_npu_prefers(monkeypatch):
    """torch_npu recommends npugraph_ex for inference; without it, ops run one by one."""
    assert registry._INNER_BACKENDS["npu"] == ("npugraph_ex", "aot_eager")
    assert registry.default_inner_backend(["cpu"]) == "inductor"
    with pytest.raises(KernelError, match="inner backends for npu are registered already"):
        registry.prefer_inner_backends("npu", "inductor")
    named(monkeypatch, "npugraph_ex", taking([]))
    assert registry.default_inner_backend(["cpu", "npu"]) == "npugraph_ex"


def test_a_backend_that_does_not_load_says_so(monkeypatch):
    """As torchair's does where npugraph_ex was loaded before it."""

    class Broken:
        def load(self):
            raise ImportError("op_broadcast")

    known = torch._dynamo.backends.registry
    monkeypatch.setattr(known, "_BACKENDS", {**known._BACKENDS, "broken": Broken()})
    with pytest.raises(BackendCompilerFailed) as failed:
        run(make(torch.bfloat16), torch.randn(5, 128).bfloat16(), inner_backend="broken")
    assert isinstance(failed.value.inner_exception, ConfigError)
    assert "inner_backend 'broken' is registered, but does not load: op_broadcast" in str(failed.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("size", [32, 64, -1])
def test_numbers_of_a_model(bits, sym, size, dtype):
    model, x = make(dtype), torch.randn(2, 3, 128).to(dtype)
    options = {"bits": bits, "sym": sym, "group_size": size, "inner_backend": "eager", "kernel": "ascend"}
    y = torch.compile(model, backend="gptq", options=options)(x)
    # the errors of five layers, one behind the other
    assert relative_error(y, exact(model, Scheme(bits, size, sym), x)) <= 2 * LINEAR[dtype]


def test_a_quantized_model_eager_and_compiled(here):
    """Merged packs are cut for eager use; the integers survive both ways."""
    model, x = make(torch.bfloat16), torch.randn(2, 3, 128).bfloat16()
    gptq_fx.quantize(model, GPTQConfig(group_size=64, sym=False), progress=False)
    before = {name: p.quantized_weight().tensors for name, p in model.named_parameters() if "weight" in name}
    with torch.no_grad():
        y = torch.compile(model, backend="gptq", options={"inner_backend": "aot_eager"})(x)
        assert model.k.weight.packed.kernel is here
        assert model.k.weight.packed.merged is not None
        assert relative_error(model(x), y) <= 2 * LINEAR[torch.bfloat16]
    for name, tensors in before.items():
        now = model.get_parameter(name).quantized_weight().tensors
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(now, tensors, strict=True)), name


def test_act_order_from_calibration(here):
    torch.manual_seed(3)
    model, x = make(torch.bfloat16), torch.randn(4, 16, 128).bfloat16() * (torch.arange(128) % 7 + 1)
    config = GPTQConfig(group_size=32, desc_act=True)
    gptq_fx.quantize(model, config, [{"x": x}], progress=False)
    assert model.q.weight.quantized_weight().g_idx is not None
    dense = {n: p.dequantize() for n, p in model.named_parameters() if "weight" in n}
    other = make(torch.bfloat16)
    other.load_state_dict({**{n: p for n, p in model.named_parameters() if "bias" in n}, **dense})
    y = torch.compile(model, backend="gptq", options={"inner_backend": "eager", "kernel": "ascend"})(x)
    assert model.q.weight.packed.kernel is here
    assert relative_error(y, other(x)) <= 2 * LINEAR[torch.bfloat16]


# --- mixtures of experts

FORMS = ["gptq_fx", "grouped_mm", "batched_mm"]  # the whole block, as quantize sets it, and its two linears


def sparse(name, dtype=torch.bfloat16, form=None, top=4, **scheme):
    """A tiny model, quantized to nearest: (the model, its numbers in float32, its inputs).

    All experts take every token where top is 4, so that no rounding can send one elsewhere.
    """
    from models import EXPERTS

    tiny = EXPERTS[name]
    model, dense = tiny.build(dtype, num_experts_per_tok=top), tiny.build(num_experts_per_tok=top)
    gptq_fx.quantize(model, GPTQConfig(**{"group_size": 32, **scheme}), progress=False)
    model.set_experts_implementation(form or FORMS[0])
    for path, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            dense.get_parameter(path).data = parameter.dequantize().float().contiguous()
    return model, dense, tiny.inputs()


def compiled(model, inner="eager"):
    options = {"inner_backend": inner, "kernel": "ascend"}
    model.compile(backend="gptq", fullgraph=True, options=options)
    return model


def check_numbers(model, dense, inputs):
    """No further off than 1.5 times what the dense model is in the same dtype, on the same numbers."""
    from models import output

    wanted = output(dense, inputs)
    plain = relative_error(output(copy.deepcopy(dense).to(model.dtype), inputs), wanted)
    assert relative_error(output(compiled(model), inputs), wanted) <= 1.5 * plain


MATRIX = [
    pytest.param(*row, marks=[] if row[1] == FORMS[0] or row[::2] == ("mixtral", 4) else pytest.mark.slow)
    for row in itertools.product(["mixtral", "qwen3_moe", "gpt_oss"], FORMS, [4, 8])
]


@needs_transformers
@pytest.mark.parametrize(("name", "form", "bits"), MATRIX)
@pytest.mark.parametrize("sym", [pytest.param(True, marks=pytest.mark.slow), False], ids=["sym", "asym"])
def test_models_with_experts(name, form, bits, sym, here):
    model, dense, inputs = sparse(name, form=form, bits=bits, sym=sym)
    check_numbers(model, dense, inputs)
    packs = [p.packed for p in model.parameters() if isinstance(p, QuantizedParameter)]
    assert {pack.kernel for pack in packs} == {here}
    assert any(pack.spec.experts for pack in packs)


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_a_block_of_a_model_on_one_token_and_on_4096(name, dtype, tokens):
    """One expert of the four gets no token."""
    model, dense, _ = sparse(name, dtype, top=2)
    ours, theirs = (m.model.layers[0].mlp.experts for m in (model, dense))
    x, weights = torch.randn(tokens, 64).to(dtype), torch.rand(tokens, 2).to(dtype)
    ids = torch.rand(tokens, 3).topk(2).indices
    ids[ids == 1] = 3
    graph = after("lower", ours, x, ids, weights, kernel="ascend").graph
    assert ops_of(graph, "gptq").startswith("gptq.ascend_experts(")
    with torch.no_grad():
        wanted = theirs(x.float(), ids, weights.float())
        plain = relative_error(copy.deepcopy(theirs).to(dtype)(x, ids, weights), wanted)
        assert relative_error(compiled(ours)(x, ids, weights), wanted) <= 1.5 * plain


@needs_transformers
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_tokens_of_prefill_and_decode(name):
    model, dense, inputs = sparse(name, torch.float16, top=2)
    arguments = {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    wanted = dense.generate(inputs["input_ids"], cache_implementation="static", **arguments)
    found = compiled(model).generate(inputs["input_ids"], cache_implementation="static", **arguments)
    assert torch.equal(found, wanted)


def moe_block(name="mixtral", form=None, **scheme):
    return sparse(name, form=form, top=2, **scheme)[0].model.layers[0].mlp


def lowered(form=None, **scheme):
    """The ops that `lower` leaves of a block of experts."""
    return ops_of(
        after("lower", moe_block(form=form, **scheme), torch.randn(1, 3, 64).bfloat16()).graph, "gptq"
    )


@needs_transformers
def test_a_block_of_experts_after_lower():
    assert_expected_inline(
        lowered(),
        """gptq.ascend_experts(bf16[3, 64], i64[3, 2], f32[3, 2], [i32[4, 64, 32], bf16[4, 2, 256], bf16[4, 2, 256], -], [i32[4, 128, 8], bf16[4, 4, 64], bf16[4, 4, 64], -], -, -, silu, [32], [32])""",
    )


@needs_transformers
def test_sorted_rows_after_lower():
    assert_expected_inline(
        lowered("grouped_mm"),
        """\
gptq.ascend_grouped_linear(bf16[6, 64], i32[4, 64, 32], bf16[4, 2, 256], bf16[4, 2, 256], -, i32[4], 32)
gptq.ascend_grouped_linear(bf16[6, 128], i32[4, 128, 8], bf16[4, 4, 64], bf16[4, 4, 64], -, i32[4], 32)""",
    )


@needs_transformers
def test_rows_with_ids_after_lower():
    assert_expected_inline(
        lowered("batched_mm"),
        """\
gptq.ascend_indexed_linear(y, i32[4, 64, 32], bf16[4, 2, 256], bf16[4, 2, 256], -, i64[6], 32)
gptq.ascend_indexed_linear(y, i32[4, 128, 8], bf16[4, 4, 64], bf16[4, 4, 64], -, i64[6], 32)""",
    )


@needs_transformers
def test_what_grouped_matmul_does_not_take_runs_one_by_one():
    """8 bits in groups: the block stays one op, whose experts run the op for linears."""
    assert_expected_inline(
        lowered(bits=8, sym=False),
        """gptq.experts(bf16[3, 64], i64[3, 2], f32[3, 2], [i8[4, 64, 256], bf16[4, 2, 256], bf16[4, 2, 256], -], [i8[4, 128, 64], bf16[4, 4, 64], bf16[4, 4, 64], -], -, -, silu, [32], [32], ascend, ascend)""",
    )


@needs_transformers
@pytest.mark.parametrize(("bits", "size", "reason"), [(4, 32, ""), (8, -1, ""), (8, 32, "one by one")])
def test_what_the_report_says_of_experts(bits, size, reason):
    from models import EXPERTS

    model = EXPERTS["mixtral"].build(torch.bfloat16)
    report = gptq_fx.quantize(model, GPTQConfig(bits=bits, group_size=size), progress=False)
    stacks = [site for site in report.sites if len(site.shape) == 3]
    assert stacks and {site.kernel for site in stacks} == {"ascend"}
    assert all((reason in site.reason) if reason else "ascend" not in site.reason for site in stacks)


@needs_transformers
def test_a_whole_model_has_ops_of_torch_npu_where_they_fit():
    """Layer 0 has experts that npu_grouped_matmul refuses, layer 1 has not; the routers are dense."""
    from models import EXPERTS

    tiny = EXPERTS["mixtral"]
    model, rules = tiny.build(torch.bfloat16), {r".*layers\.0\.mlp\.experts": {"bits": 8}}
    gptq_fx.quantize(model, GPTQConfig(group_size=32, dynamic=rules), progress=False)
    stage = after("lower", model.model, tiny.inputs()["input_ids"])
    ops = [name for name in stage.after if name.startswith("gptq") or name == "linear"]
    linears = ["gptq.ascend_linear"] * 2  # q, k and v as one, and o
    assert ops == [*linears, "linear", "gptq.experts", *linears, "linear", "gptq.ascend_experts"]


@needs_transformers
def test_what_a_compiler_behind_aot_gets_of_experts(monkeypatch):
    """The ops of torch_npu, and nothing of ours."""
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm)
        return gm.forward

    named(monkeypatch, "keep", aot_autograd(fw_compiler=keep, inference_compiler=keep))
    torch.compile(moe_block(), backend="gptq", options={"inner_backend": "keep"})(
        torch.randn(1, 3, 64).bfloat16()
    )
    (graph,) = graphs
    assert ops_of(graph, "gptq") == ""
    assert_expected_inline(
        ops_of(graph, "npu"),
        """\
npu.moe_init_routing_v2(bf16[3, 64], i32[3, 2], expert_num=5, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, 5])
npu.grouped_matmul([bf16[6, 64]], [i32[4, 64, 32]], antiquant_scale=[bf16[4, 2, 256]], antiquant_offset=[bf16[4, 2, 256]], group_list=i64[4], split_item=2, group_type=0)
npu.swiglu(bf16[6, 256])
npu.grouped_matmul([bf16[6, 128]], [i32[4, 128, 8]], antiquant_scale=[bf16[4, 4, 64]], antiquant_offset=[bf16[4, 4, 64]], group_list=i64[4], split_item=2, group_type=0)
npu.moe_finalize_routing(bf16[6, 64], -, -, -, bf16[3, 2], i32[6], -, 2)""",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "sym"), [(4, False), (8, True)])
def test_perplexity_of_a_real_model(bits, sym, here, monkeypatch):
    """SmolLM2-135M by emulation in fp16 against `reference` in fp32, on the same integers."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import smollm2
    import texts

    folder = smollm2.checkpoint()
    windows, _ = texts.windows(transformers.AutoTokenizer.from_pretrained(folder), 2, 1, length=256)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    gptq_fx.quantize(model, GPTQConfig(bits=bits, sym=sym, group_size=64), progress=False)
    models = {"reference": copy.deepcopy(model).float(), "ascend": model}
    found = {}
    for kernel, model in models.items():
        torch._dynamo.reset()
        options = {"kernel": kernel, "inner_backend": "eager"}
        model.forward = torch.compile(model.forward, backend="gptq", options=options)
        found[kernel] = perplexity(model, windows, show=False)
        used = {p.packed.kernel.name for p in model.parameters() if isinstance(p, QuantizedParameter)}
        assert used == {kernel}
    assert abs(found["ascend"] / found["reference"] - 1) <= 1e-3, found
