"""quantize(model): what is replaced, what is freed, what stays, and what is refused."""

import copy
import gc
import weakref

import pytest
import torch
import transformers
from tolerances import LINEAR, relative_error
from torch import nn

import gptq_fx
from gptq_fx import ConfigError, GPTQConfig, KernelError, QuantizedParameter, Rule, Scheme, WeightError
from gptq_fx.grid import round_to_nearest
from gptq_fx.kernels import cpu, get_kernel, registry

EAGER = {"inner_backend": "eager"}


def quantize(model, **config):
    return gptq_fx.quantize(model, GPTQConfig(**{"group_size": 32, **config}), progress=False)


def llama(**config):
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        **config,
    )
    return transformers.LlamaForCausalLM(config).eval()


def site(report, name):
    return next(s for s in report.sites if s.name == name)


def is_quantized(module):
    return isinstance(module.weight, QuantizedParameter)


def snapshot(model):
    """Everything of a model that a refused call must leave alone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {n: (id(p), p._version, dict(vars(p))) for n, p in parameters.items()}


# --- what is replaced


def test_linears_are_replaced_in_place_by_their_rounded_form():
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32, bias=False))
    first = model[0]
    expected = [round_to_nearest(model[i].weight.detach(), Scheme(4, g)) for i, g in ((0, 32), (2, -1))]
    report = quantize(model)
    assert model[0] is first
    for i, weight in zip((0, 2), expected, strict=True):
        p = model[i].weight
        assert isinstance(p, QuantizedParameter)
        assert p.fqn == str(i)
        assert torch.equal(p.quantized_weight().qweight, weight.qweight)
        assert torch.equal(p.quantized_weight().scales, weight.scales)
    assert type(model[0].bias) is nn.Parameter
    assert site(report, "2").scheme == Scheme(4, -1)
    assert "group_size -1 in place of 32, which does not divide 48" in site(report, "2").reason


def test_the_report_holds_the_error_and_the_bytes_of_each_weight():
    model = nn.Sequential(nn.Linear(64, 128).bfloat16())
    W = model[0].weight.detach().clone()
    record = site(quantize(model), "0")
    p = model[0].weight
    assert record.error == pytest.approx(relative_error(p.dequantize(), W), rel=1e-2)
    assert (record.shape, record.dense_bytes, record.bytes) == ((128, 64), 128 * 64 * 2, p.nbytes)
    assert record.kernel == ("reference" if cpu.available() else "cpu_int4")


def test_dense_weights_are_freed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    dense = [weakref.ref(linear.weight) for linear in model]
    storage = [weakref.ref(linear.weight.untyped_storage()) for linear in model]
    report = quantize(model)
    gc.collect()
    assert [ref() for ref in dense + storage] == [None] * 4
    assert report.sites


@pytest.mark.parametrize("layout", ["canonical", "lowered"])
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_quantized_sites_take_at_most_a_third_of_bf16(layout, sym):
    model = nn.Sequential(
        nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 128, bias=False)
    ).bfloat16()
    dense = sum(p.nbytes for p in model.parameters())
    quantize(model, group_size=64, sym=sym)
    packs = [model[i].weight.packed for i in (0, 2)]
    if layout == "lowered":
        with torch.no_grad():
            torch.compile(model, backend="gptq", options=EAGER)(torch.randn(3, 256).bfloat16())
        assert [p.kernel.name for p in packs] == ["reference" if cpu.available() else "cpu_int4"] * 2
    held = [t for pack in packs for t in pack.tensors if t is not None]
    stored = sum(t.untyped_storage().nbytes() for t in held)
    assert stored == sum(p.nbytes for p in model.parameters())
    assert stored <= 0.35 * dense


def test_a_second_call_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model)
    before = snapshot(model)
    report = quantize(model, bits=8)
    assert snapshot(model) == before
    assert site(report, "0").scheme == Scheme(4, 32)
    assert "quantized before; the options ask for W8A16 g32 sym" in site(report, "0").reason


def test_conv1d_of_gpt2():
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(3, 15)[None]
    W = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    report = quantize(model, bits=8)
    p = model.transformer.h[0].mlp.c_fc.weight
    assert p.transposed
    assert p.shape == W.shape == (64, 256)
    assert relative_error(p.dequantize(), W) < 0.01
    assert {s.name.rpartition(".")[2] for s in report.sites if s.scheme} == {"c_attn", "c_proj", "c_fc"}
    dense = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            module = dense.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(parameter.dequantize().contiguous())
    with torch.no_grad():
        assert relative_error(model(ids).logits, dense(ids).logits) <= LINEAR[torch.float32]


def test_a_module_under_two_names_is_quantized_once():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    quantize(model)
    assert is_quantized(model[0])
    assert model[0] is model[2]


def test_tied_linears_stay_tied():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    dense = weakref.ref(model[0].weight)
    report = quantize(model)
    gc.collect()
    assert model[0].weight is model[1].weight
    assert is_quantized(model[0])
    assert dense() is None
    assert [s.name for s in report.sites if s.scheme] == ["0", "1"]


def test_the_report_says_what_tied_linears_with_different_rules_got():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    report = quantize(model, dynamic={"1": {"bits": 8}})
    assert [site(report, name).scheme for name in "01"] == [linear.weight.scheme for linear in model]


# --- what stays dense


def test_embedding_and_lm_head_stay_dense_with_a_reason():
    model = llama()
    report = quantize(model)
    assert not is_quantized(model.lm_head)
    assert not is_quantized(model.model.embed_tokens)
    assert (site(report, "lm_head").kind, site(report, "lm_head").scheme) == ("lm_head", None)
    assert "lm_head=True quantizes it" in site(report, "lm_head").reason
    assert site(report, "model.embed_tokens").kind == "embedding"
    assert "looked up, not multiplied" in site(report, "model.embed_tokens").reason
    assert is_quantized(model.model.layers[1].mlp.up_proj)


class Moe(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 4)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))


def test_routers_stay_dense_with_a_reason_unless_named():
    model = nn.ModuleDict({"mlp": Moe()})
    report = quantize(model)
    assert not is_quantized(model.mlp.gate)
    assert is_quantized(model.mlp.experts[3])
    assert (site(report, "mlp.gate").kind, site(report, "mlp.gate").scheme) == ("router", None)
    assert "router, skipped by default" in site(report, "mlp.gate").reason
    model = nn.ModuleDict({"mlp": Moe()})
    quantize(model, rules=[Rule(kind="router", scheme=Scheme(8, 32))])
    assert model.mlp.gate.weight.scheme == Scheme(8, 32)


def test_a_gate_that_is_no_router_is_quantized():
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(64, 64)})})
    quantize(model)
    assert is_quantized(model.mlp.gate)


@pytest.mark.parametrize("tied", [True, False])
def test_lm_head_true_quantizes_it_and_unties_it(tied):
    model = llama(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    table = model.model.embed_tokens.weight
    report = quantize(model, lm_head=True)
    assert is_quantized(model.lm_head)
    assert model.model.embed_tokens.weight is table
    assert not model.config.tie_word_embeddings
    assert site(report, "lm_head").scheme == Scheme(4, 32)
    model.tie_weights()
    assert is_quantized(model.lm_head)
    with torch.no_grad():
        assert model(torch.arange(3, 9)[None]).logits.isfinite().all()


def test_a_tied_lm_head_that_stays_dense_stays_tied():
    model = llama(tie_word_embeddings=True)
    report = quantize(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert site(report, "lm_head").scheme is None


def test_dynamic_skips_and_a_later_compile_skips_too():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    dense = model[0].weight
    report = quantize(model, dynamic={"-:0": {}})
    assert model[0].weight is dense
    assert site(report, "0").scheme is None
    assert "left dense by rule '0'" in site(report, "0").reason
    check_that_a_compile_leaves_the_first_dense(model)


def test_what_was_left_dense_is_left_dense_in_a_copy_too():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).requires_grad_(False)
    quantize(model, dynamic={"-:0": {}})
    check_that_a_compile_leaves_the_first_dense(copy.deepcopy(model))


def check_that_a_compile_leaves_the_first_dense(model):
    x = torch.randn(3, 64)
    y = torch.compile(model, backend="gptq", options=EAGER)(x)
    expected = nn.functional.linear(model[0](x).relu(), model[2].weight.dequantize(), model[2].bias)
    assert relative_error(y, expected) <= LINEAR[torch.float32]


def test_a_linear_may_feed_another_directly():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))).requires_grad_(False)
    quantize(model)
    x = torch.randn(3, 64)
    assert (
        relative_error(torch.compile(model, backend="gptq", options=EAGER)(x), model(x))
        <= LINEAR[torch.float32]
    )


def test_integer_and_double_weights_stay_dense_with_a_reason():
    model = nn.Sequential(nn.Linear(64, 64).double())
    report = quantize(model)
    assert not is_quantized(model[0])
    assert site(report, "0").reason == "torch.float64 weights are not quantized"


def test_every_matrix_is_in_the_report():
    model = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(4, 4, 3), nn.Embedding(8, 64), nn.LayerNorm(64))
    report = quantize(model)
    assert {s.name: s.kind for s in report.sites} == {"0": "linear", "1": "other", "2": "embedding"}
    assert all(s.reason for s in report.sites if s.scheme is None)


# --- rules


def test_rules_that_match_nothing_are_reported():
    model = nn.Sequential(nn.Linear(64, 64))
    rules = [Rule("0", None, Scheme(8, 32)), Rule("", "experts", Scheme(8, 32))]
    report = quantize(model, dynamic={"layers": {"bits": 8}}, rules=rules)
    assert model[0].weight.scheme == Scheme(8, 32)
    assert report.unused_rules == ["'layers' -> W8A16 g32 sym", "'' (experts) -> W8A16 g32 sym"]
    assert "unused rule: 'layers'" in str(report)


def test_schemes_by_path():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    quantize(model, dynamic={"1": {"bits": 8, "sym": False}, "2": {"group_size": -1}})
    found = [linear.weight.scheme for linear in model]
    assert found == [Scheme(4, 32), Scheme(8, 32, sym=False), Scheme(4, -1)]


def test_act_order_without_data_is_left_out_and_said():
    model = nn.Sequential(nn.Linear(64, 64))
    report = quantize(model, desc_act=True)
    assert model[0].weight.scheme == Scheme(4, 32)
    assert "act-order needs calibration" in site(report, "0").reason


# --- what is refused, with the model left as it was


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "Inf"])
def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was(value, request):
    model = llama(tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    before = snapshot(model)
    kind = request.node.callspec.id
    with pytest.raises(WeightError, match=rf"model\.layers\.1\.mlp\.down_proj: {kind} .*first at \[3, 5\]"):
        quantize(model, lm_head=True)
    assert snapshot(model) == before
    assert model.config.tie_word_embeddings


def test_a_kernel_refusal_is_complete_and_the_model_left_as_it_was(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64).bfloat16())
    before = snapshot(model)
    monkeypatch.setattr(registry, "_KERNELS", {"cpu_int4": get_kernel("cpu_int4")})
    with pytest.raises(
        KernelError, match=r"1: no kernel runs \[64, 64\] W8A16 g32 sym.*cpu_int4: 8-bit codes"
    ):
        quantize(model, dynamic={"1": {"bits": 8}})
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("max_memory", "Legal: a number above 0"),
        ("resume_dir", "only calibration with sequential=True has stages"),
    ],
)
def test_what_cannot_be_done_is_refused(argument, message):
    model = nn.Sequential(nn.Linear(64, 64))
    before = snapshot(model)
    with pytest.raises(ConfigError, match=f"{argument}=.*{message}"):
        gptq_fx.quantize(model, **{argument: "text"}, progress=False)
    assert snapshot(model) == before


def test_settings_of_calibration_without_calibration_are_noted():
    report = quantize(nn.Sequential(nn.Linear(64, 64)), damp_percent=0.1)
    assert report.notes == ["without effect without calibration: damp_percent=0.1"]


def test_progress_can_be_turned_off(capsys):
    quantize(nn.Sequential(nn.Linear(64, 64)))
    assert capsys.readouterr() == ("", "")
