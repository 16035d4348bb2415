"""quantize(model, calibration=...): what is quantized on what, what is refused, and what survives."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, VOCABULARY
from torch import Tensor, nn

import gptq_fx
from gptq_fx import CalibrationError, ConfigError, GPTQConfig, QuantizedParameter, Report, WeightError
from gptq_fx import job as job_module
from gptq_fx.gptq import Settings, gptq
from gptq_fx.hessian import Hessian
from gptq_fx.report import SiteRecord
from gptq_fx.scheme import Scheme


def batches(count: int = 4, shape: tuple[int, int] = (2, 16)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, shape, generator=generator)} for _ in range(count)]


def quantize(model: nn.Module, data: Any, **config: Any) -> Report:
    resume = config.pop("resume_dir", None)
    config = {"group_size": 32, **config}
    return gptq_fx.quantize(model, GPTQConfig(**config), data, progress=False, resume_dir=resume)


def codes(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: p.quantized_weight().codes()
        for n, p in model.named_parameters()
        if isinstance(p, QuantizedParameter)
    }


def same_codes(one: nn.Module, other: nn.Module) -> bool:
    a, b = codes(one), codes(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def site(report: Report, name: str) -> SiteRecord:
    return next(s for s in report.sites if s.name == name)


def llama(**config: Any) -> nn.Module:
    return MODELS["llama"].build(**config)


# --- what comes out


@pytest.mark.parametrize("sequential", [True, False])
def test_each_linear_is_quantized_on_what_reaches_it(sequential: bool) -> None:
    """Recomputed by hooks: the input of every linear, in the dense or in the quantized model."""
    dense, model, data = llama(), llama(), batches()
    report = quantize(model, data, sequential=sequential, gptaq=0.0)
    observed = model if sequential else dense
    inputs: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _, args: inputs.setdefault(name, []).append(args[0].detach())

    for name, module in observed.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    for batch in data:
        observed(**batch, use_cache=False)
    for name, found in codes(model).items():
        path = name.removesuffix(".weight")
        hessian = Hessian(inputs[path][0].shape[-1])
        for x in inputs[path]:
            hessian.add(x)
        weight = dense.get_parameter(name)
        wanted = gptq(weight, hessian, Scheme(group_size=32), Settings(gptaq=0.0), torch.float32)
        assert (wanted.codes == found).float().mean() > 0.995, name  # sums in another order: ties
        assert site(report, path).tokens == 4 * 2 * 16


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "vit", "whisper", "t5", "gemma3", "phi3"])
def test_any_kind_of_model(model: str) -> None:
    tiny = MODELS[model]
    built = tiny.build()
    inputs = tiny.inputs()
    data = [
        {k: torch.roll(v, i, -1) if isinstance(v, Tensor) else v for k, v in inputs.items()} for i in range(3)
    ]
    rounded = copy.deepcopy(built)
    known = quantize(rounded, None)
    report = quantize(built, data)
    assert codes(built).keys() == codes(rounded).keys()
    calibrated = {s.name for s in report.sites if s.loss is not None}
    assert calibrated == {s.name for s in known.sites if s.scheme is not None}
    built(**inputs)


def test_better_than_rounding_on_the_calibration_inputs() -> None:
    dense, data = llama(num_hidden_layers=4), batches(8, (4, 24))
    errors = []
    for calibration, config in ((None, {}), (data, {"gptaq": 0.0}), (data, {})):
        model = copy.deepcopy(dense)
        quantize(model, calibration, bits=3, **config)
        errors.append(sum((model(**b).logits - dense(**b).logits).square().mean().item() for b in data))
    assert errors[2] < errors[1] < 0.8 * errors[0]


def test_dense_model_and_training_mode_are_as_before() -> None:
    model = llama().train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    cache = model.config.use_cache
    quantize(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache == cache


def test_the_same_integers_again() -> None:
    one, other = llama(), llama()
    quantize(one, batches())
    quantize(other, batches())
    assert same_codes(one, other)


def test_a_compiled_model_is_calibrated_as_it_is() -> None:
    one, other = llama(), llama()
    one.compile(backend="gptq", options={"inner_backend": "eager"})
    quantize(one, batches())
    quantize(other, batches())
    assert same_codes(one, other)
    one(**batches()[0])


def test_after_calibration_it_compiles() -> None:
    model, data = llama(), batches()
    quantize(model, data)
    eager = model(**data[0]).logits
    model.compile(backend="gptq", options={"inner_backend": "eager"})
    torch.testing.assert_close(model(**data[0]).logits, eager)


def test_batches_of_several_shapes() -> None:
    model = llama()
    report = quantize(model, [*batches(2, (2, 16)), *batches(2, (1, 9)), *batches(1, (3, 21))])
    assert {s.tokens for s in report.sites if s.scheme} == {2 * 32 + 2 * 9 + 63}


def test_padding_is_left_out() -> None:
    """A padded batch gives what its tokens give without padding."""
    short, padded = llama(), llama()
    data = batches(3, (1, 10))
    quantize(short, data, gptaq=0.0)
    longer = [
        {
            "input_ids": nn.functional.pad(b["input_ids"], (0, 6)),
            "attention_mask": nn.functional.pad(torch.ones(1, 10, dtype=torch.long), (0, 6)),
        }
        for b in data
    ]
    report = quantize(padded, longer, gptaq=0.0)
    assert {s.tokens for s in report.sites if s.scheme} == {30}
    a, b = codes(short), codes(padded)
    assert all((a[name] == b[name]).float().mean() > 0.99 for name in a)


def test_the_decoder_goes_by_its_own_mask() -> None:
    tiny = MODELS["t5"]
    inputs = tiny.inputs()
    ids = inputs["input_ids"]
    decoder = torch.ones_like(ids)
    decoder[:, 5:] = 0
    encoder = torch.ones_like(ids)
    encoder[:, 8:] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": encoder,
        "decoder_input_ids": ids.clone(),
        "decoder_attention_mask": decoder,
    }
    report = quantize(tiny.build(), [batch])
    of = {s.name: s.tokens for s in report.sites if s.scheme}
    assert of["encoder.block.0.layer.0.SelfAttention.q"] == ids.shape[0] * 8
    assert of["decoder.block.0.layer.0.SelfAttention.q"] == ids.shape[0] * 5
    assert of["decoder.block.0.layer.1.EncDecAttention.k"] == ids.shape[0] * 8


def test_rules_and_schemes_of_one_stage() -> None:
    model = llama()
    dynamic = {r".*v_proj": {"bits": 8}, r"-:.*layers\.1\.mlp\.up_proj": {}}
    report = quantize(model, batches(), dynamic=dynamic)
    assert site(report, "model.layers.0.self_attn.v_proj").scheme.bits == 8
    assert site(report, "model.layers.0.self_attn.q_proj").scheme.bits == 4
    assert site(report, "model.layers.1.mlp.up_proj").scheme is None
    assert not report.unused_rules
    losses = {s.name: s.loss for s in report.sites if s.loss is not None}
    assert losses["model.layers.0.self_attn.v_proj"] < 0.1 * losses["model.layers.0.self_attn.k_proj"]


def test_desc_act_keeps_its_groups() -> None:
    model = llama()
    report = quantize(model, batches(), desc_act=True)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.scheme.desc_act
    g_idx = weight.quantized_weight().g_idx
    assert g_idx is not None and not torch.equal(g_idx, g_idx.sort().values)
    assert "act-order" not in site(report, "model.layers.0.mlp.down_proj").reason
    model(**batches()[0])


def test_a_tied_output_projection_is_untied() -> None:
    model = MODELS["qwen3"].build()
    table = model.model.embed_tokens.weight.clone()
    report = quantize(model, batches(), lm_head=True)
    assert isinstance(model.lm_head.weight, QuantizedParameter)
    assert torch.equal(model.model.embed_tokens.weight, table)
    assert site(report, "lm_head").loss is not None


class Bare(nn.Module):
    """A linear without a module: x @ w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32), requires_grad=False)
        self.unused = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_a_linear_without_a_module_and_one_without_inputs() -> None:
    model, x = Bare(), torch.randn(128, 64)
    wanted = model(x)
    report = quantize(model, [{"x": x}], bits=8)
    assert isinstance(model.w, QuantizedParameter)
    assert "no calibration input reached it" in site(report, "unused").reason
    assert isinstance(model.unused.weight, QuantizedParameter)
    assert (model(x) - wanted).norm() < 0.02 * wanted.norm()


def test_a_linear_whose_weight_is_used_otherwise_stays_dense() -> None:
    class Blocks(nn.Module):
        """A linear that is multiplied block by block, as grouped projections are."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x @ self.blocks.weight.view(2, 32, 64).mT).transpose(0, 1).flatten(1))

    model, x = Blocks().requires_grad_(False), torch.randn(128, 64)
    wanted = model(x)
    report = quantize(model, [{"x": x}], bits=8)
    assert codes(model).keys() == {"last.weight"}
    assert "used by view" in site(report, "blocks").reason
    assert (model(x) - wanted).norm() < 0.02 * wanted.norm()


def test_an_output_projection_that_is_only_a_table_says_so() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 64)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.table(ids), self.table.weight)

    model = Tied().requires_grad_(False)
    report = quantize(model, [{"ids": batches(1)[0]["input_ids"]}], lm_head=True)
    assert not codes(model)
    assert "no module to untie" in site(report, "table").reason


def test_few_tokens_work_and_are_reported() -> None:
    report = quantize(llama(), batches(1, (1, 5)))
    reason = site(report, "model.layers.0.mlp.down_proj").reason
    assert "saw 5 tokens, fewer than its 128 input features" in reason


def test_report_tells_what_calibration_measured() -> None:
    report = quantize(llama(), batches())
    for record in report.sites:
        if record.scheme is not None:
            assert 0 < record.loss < 0.1
            assert (record.tokens, record.damp) == (128, 0.05)
            assert record.seconds > 0
    assert "loss" in str(report)
    json.dumps(report.to_dict())


# --- models that are more than one graph


class Broken(nn.Module):
    """Two linears with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = y * 2
        return self.b(y)


def test_a_graph_break_is_named_and_the_way_round_it() -> None:
    model, data = Broken(), [{"x": torch.randn(16, 64)}]
    with pytest.raises(CalibrationError, match="sequential=False") as caught:
        quantize(model, data)
    assert "data-dependent" in str(caught.value).lower()
    assert not codes(model)
    report = quantize(model, data, sequential=False)
    assert {s.name for s in report.sites if s.loss is not None} == {"a", "b"}


def test_a_model_that_dynamo_gave_up_before_names_the_way_round_it() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.last = nn.LSTM(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.lstm(x)[0])

    model, data = Recurrent().requires_grad_(False), {"x": torch.randn(16, 64)}
    gptq_fx.explain(model, **data)
    with pytest.raises(CalibrationError, match="sequential=False"):
        quantize(model, [data])


def test_layers_that_share_one_graph_get_their_own_hessians() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).tanh()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                torch._dynamo.graph_break()
                x = layer(x)
            return x

    model, x = Stack(), torch.randn(256, 32)
    dense = copy.deepcopy(model)
    quantize(model, [{"x": x}], sequential=False, dynamic={r"layers\.1": {"bits": 8}})
    for i, layer in enumerate(dense.layers):
        hessian = Hessian(32)
        hessian.add(x)
        bits = 8 if i == 1 else 4
        wanted = gptq(layer.linear.weight, hessian, Scheme(bits, 32), Settings(), torch.float32)
        found = model.layers[i].linear.weight.quantized_weight().codes()
        assert (found == wanted.codes).float().mean() > 0.995
        x = layer(x)


# --- bad input: a clear error, and the model as it was


def _nan(model: nn.Module) -> None:
    model.model.layers[1].input_layernorm.weight.data[3] = float("nan")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batches"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "one dict"),
        (torch.ones(1, 4, dtype=torch.long), "one Tensor"),
        ([torch.ones(1, 4, dtype=torch.long)], "batch 0: found Tensor"),
        ([{}], "batch 0: found dict"),
        ([{"ids": torch.ones(1, 4, dtype=torch.long)}], "takes no 'ids'"),
        (
            [*batches(1), {"input_ids": torch.ones(1, 4, dtype=torch.long, device="meta")}],
            "batch 1: input_ids is on meta. Legal: cpu",
        ),
    ],
)
def test_bad_batches(data: Any, message: str) -> None:
    model = llama()
    with pytest.raises(CalibrationError, match=message):
        quantize(model, data)
    assert not codes(model)


def test_activations_that_are_no_numbers_are_named() -> None:
    model = llama()
    _nan(model)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.self_attn\.q_proj: NaN .* in batch 0"):
        quantize(model, batches())
    assert not codes(model)


def test_weights_that_are_no_numbers_are_named_before_anything_runs() -> None:
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(WeightError, match=r"layers\.1\.mlp\.down_proj"):
        quantize(model, batches())
    assert not codes(model)


@pytest.mark.parametrize("config", [{"damp_percent": 0.0}, {"mse": -1}, {"gptaq": 2.0}])
def test_bad_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        GPTQConfig(**config)


def test_resume_needs_stages(tmp_path: Path) -> None:
    for data, config in ((None, {}), (batches(), {"sequential": False})):
        with pytest.raises(ConfigError, match="resume_dir"):
            quantize(llama(), data, resume_dir=str(tmp_path), **config)


# --- interruptions


def test_an_interrupted_run_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    solve, calls = job_module.solve, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        solve(*args)

    monkeypatch.setattr(job_module, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, batches())
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_out_of_memory_names_the_stage_and_can_be_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, whole = llama(), llama()
    solve, calls = job_module.solve, []

    def full(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        solve(*args)

    monkeypatch.setattr(job_module, "solve", full)
    with pytest.raises(gptq_fx.OutOfMemoryError, match=r"stage 4 of 8 \(model\.layers\.0\.mlp\.down_proj\)"):
        quantize(model, batches(), resume_dir=str(tmp_path))
    assert not codes(model)
    quantize(model, batches(), resume_dir=str(tmp_path))
    assert len(calls) == 4 + 5
    quantize(whole, batches())
    assert same_codes(model, whole)


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch, gptq_fx
    torch.set_num_threads(1)
    from models import MODELS
    from test_calibration import batches
    model = MODELS["llama"].build(num_hidden_layers=6)
    gptq_fx.quantize(
        model, gptq_fx.GPTQConfig(group_size=32), batches(), progress=False, resume_dir={folder!r}
    )
"""


def test_a_killed_run_goes_on_and_gives_the_same_integers(tmp_path: Path) -> None:
    folder = tmp_path / "resume"
    script = textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder)))
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list(folder.glob("stage-*.safetensors"))) < 5:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(folder.glob("stage-*.safetensors")))
    assert 5 <= done < 24, "killed too early or too late"
    whole, resumed = (MODELS["llama"].build(num_hidden_layers=6) for _ in range(2))
    quantize(whole, batches())
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("stage-*.safetensors")}
    report = quantize(resumed, batches(), resume_dir=str(folder))
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # taken, not made again
    assert same_codes(whole, resumed)
    assert all(s.loss is not None for s in report.sites if s.scheme is not None)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"config": {"bits": 8}}, "config"),
        ({"data": batches(3)}, "calibration"),
        ({"layers": 3}, "model"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    quantize(llama(), batches(), resume_dir=str(tmp_path))
    model = llama(num_hidden_layers=change.get("layers", 2))
    data, config = change.get("data", batches()), change.get("config", {})
    with pytest.raises(CalibrationError, match=f"another {what}"):
        quantize(model, data, resume_dir=str(tmp_path), **config)
    assert not codes(model)


def test_a_finished_folder_gives_the_result_at_once(tmp_path: Path) -> None:
    one, other = llama(), llama()
    quantize(one, batches(), sym=False, desc_act=True, resume_dir=str(tmp_path))
    quantize(other, batches(), sym=False, desc_act=True, resume_dir=str(tmp_path))
    assert same_codes(one, other)
    for name, parameter in one.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            for a, b in zip(
                parameter.quantized_weight().tensors,
                other.get_parameter(name).quantized_weight().tensors,
                strict=True,
            ):
                assert a is None or torch.equal(a, b)
