"""quantize_exported: programs of torch.export, before and after, saved, and in a process of their own."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import EXPERTS, MLP, MODELS, dequantized, ids, llama, logits, quantized, relative
from tolerances import LINEAR
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import gptq_fx
from gptq_fx import CalibrationError, ConfigError, GPTQConfig, KernelError, WeightError, quantize_exported

FP32, BF16 = LINEAR[torch.float32], LINEAR[torch.bfloat16]
G32 = GPTQConfig(group_size=32)
ROOT = Path(gptq_fx.__file__).parents[1]


class Spellings(nn.Module):
    """One linear for each way to say it, a weight used twice, and what is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.linear = nn.Linear(64, 64)
        for name in ("mm", "addmm", "einsum", "twice"):
            setattr(self, name, nn.Parameter(torch.randn(64, 64) / 8))
        self.register_buffer("shift", torch.randn(64))
        self.last = nn.Linear(64, 32)

    def forward(self, tokens: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        x = self.linear(self.table(tokens) + self.shift)
        x = F.silu(x @ self.mm.t()) * scale
        x = torch.addmm(self.shift, x.flatten(0, 1), self.addmm).view_as(x)
        x = torch.einsum("...k,nk->...n", x, self.einsum)
        x = F.linear(F.linear(x, self.twice).relu(), self.twice)
        return {"hidden": x, "last": self.last(x)}


class Logits(nn.Module):
    """A model of transformers that returns a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits


FREE = ({0: Dim.AUTO, 1: Dim.AUTO},)


@functools.cache
def program() -> ExportedProgram:
    """Of a small llama, for texts of any number and length."""
    return export(Logits(llama(1)), (ids(),), dynamic_shapes=FREE, strict=False)


def run(program: ExportedProgram, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return program.module()(*args, **kwargs)


def ops(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def report(program: ExportedProgram) -> gptq_fx.Report:
    return program.graph_module.meta["gptq_report"]


# --- the program


@pytest.mark.parametrize("decomposed", [False, True])
def test_every_spelling_is_quantized(decomposed: bool) -> None:
    model, tokens = Spellings(), torch.randint(20, (2, 3))
    source = export(model, (tokens,), {"scale": 0.5})
    if decomposed:
        source = source.run_decompositions()
    found = quantize_exported(source, G32)
    assert {s.name for s in report(found).sites if s.scheme} == (
        {"linear", "mm", "addmm", "twice", "last"} | ({"einsum"} if not decomposed else set())
    )
    reasons = {s.name: s.reason for s in report(found).sites if s.scheme is None}
    assert "embedding tables" in reasons["table"]
    twin = model_of(found, model)
    y, wanted = run(found, tokens, scale=0.5), twin(tokens, scale=0.5)
    assert max(relative(y[name], wanted[name]) for name in wanted) <= FP32


def model_of(program: ExportedProgram, model: nn.Module) -> nn.Module:
    """`model` with the weights that the report says were quantized, by their equation."""
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    parameters = dict(twin.named_parameters())
    for site in report(program).sites:
        if site.scheme is not None:
            weight = parameters.get(site.name, parameters.get(f"{site.name}.weight"))
            transposed = site.name == "addmm"
            dense = weight.detach().mT if transposed else weight.detach()
            dense = gptq_fx.grid.round_to_nearest(dense, site.scheme, site.name).dequantize()
            weight.data = dense.mT if transposed else dense
    return twin.requires_grad_(False)


def test_packed_tensors_are_buffers_and_dense_weights_are_gone() -> None:
    source = program()
    before = list(source.state_dict), str(source.graph)
    found = quantize_exported(source, G32)
    names = {f"model.model.layers.0.{n}" for n in ("self_attn.o_proj", "mlp.gate_proj_up_proj")}
    buffers = set(found.graph_signature.buffers)
    packed = {f"{n}_reference_{i}" for n in names for i in (0, 1)}
    assert packed <= buffers & set(found.state_dict)
    assert not [name for name in found.state_dict if name.endswith("proj.weight")]
    assert set(found.graph_signature.inputs_to_parameters.values()) <= set(found.state_dict)
    assert ops(found).count("gptq.linear.default") == 4  # q/k/v and gate/up are one each
    assert (list(source.state_dict), str(source.graph)) == before
    stored = sum(t.nbytes for name, t in found.state_dict.items() if "_reference_" in name)
    assert stored == sum(s.bytes for s in report(found).sites if s.scheme)


def test_a_weight_with_two_linears_has_its_buffers_once() -> None:
    found = quantize_exported(export(Spellings(), (torch.randint(20, (2, 3)),)), G32)
    assert [name for name in found.state_dict if name.startswith("twice")] == [
        "twice_reference_0",
        "twice_reference_1",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_that_were_free_stay_free(dtype: torch.dtype) -> None:
    """Also where the kernel has one way for few rows, and another for many."""
    model = MLP().to(dtype).requires_grad_(False)
    source = export(model, (torch.randn(4, 64, dtype=dtype),), dynamic_shapes=({0: Dim("rows", max=50)},))
    found = quantize_exported(source, GPTQConfig())
    assert str(found.range_constraints) == str(source.range_constraints)
    twin = dequantized(model)
    for rows in (2, 4, 29, 50):
        x = torch.randn(rows, 64, dtype=dtype)
        assert relative(run(found, x), twin.float()(x.float())) <= 2 * LINEAR[dtype]
    with pytest.raises(Exception, match="50"):
        run(found, torch.randn(51, 64, dtype=dtype))


def test_the_program_agrees_with_the_compiled_model() -> None:
    compiled = torch.compile(llama(1), backend="gptq", options={"group_size": 32, "inner_backend": "eager"})
    found = quantize_exported(program(), G32)
    for shape in ((2, 12), (3, 7)):
        assert relative(run(found, ids(*shape)), logits(compiled, ids(*shape))) <= FP32


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
def test_experts_in_a_program(form: str) -> None:
    dense = EXPERTS["mixtral"].build(num_hidden_layers=1)
    dense.set_experts_implementation(form)
    found = quantize_exported(export(Logits(dense), (ids(),), strict=False), G32)
    assert sum(s.kind == "grouped_linear" and s.scheme is not None for s in report(found).sites) == 2
    assert relative(run(found, ids()), logits(dequantized(dense, G32))) <= FP32


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_model_that_was_quantized_before(name: str) -> None:
    tiny = EXPERTS.get(name) or MODELS[name]
    model, _ = quantized(tiny.build(), G32)
    found = quantize_exported(export(Logits(model), (ids(),), strict=False))
    assert not [op for op in ops(found) if "handle" in op]
    assert not [v for v in found.state_dict.values() if isinstance(v, gptq_fx.QuantizedParameter)]
    assert relative(run(found, ids()), logits(model)) <= FP32


# --- calibration


@pytest.mark.parametrize("sequential", [True, False])
def test_calibration_makes_the_error_smaller(sequential: bool) -> None:
    """The weights are the ones that `quantize` makes of the model."""
    config = GPTQConfig(bits=3, group_size=32, desc_act=True, sequential=sequential)
    batches = [{"tokens": torch.randint(3, 90, (4, size))} for size in (12, 16)]
    found = quantize_exported(program(), config, batches, progress=False)
    exact = logits(llama(1))
    error = relative(run(found, ids()), exact)
    rounded = quantize_exported(program(), GPTQConfig(bits=3, group_size=32))
    assert error < 0.95 * relative(run(rounded, ids()), exact)
    records = {s.name: s for s in report(found).sites}
    assert records["model.model.layers.0.mlp.down_proj"].tokens == 4 * (12 + 16)
    assert records["model.model.layers.0.mlp.down_proj"].scheme.desc_act
    model = llama(1)
    gptq_fx.quantize(model, config, [{"input_ids": b["tokens"]} for b in batches], progress=False)
    assert relative(run(found, ids()), logits(model)) <= 1e-3


def test_batches_may_leave_out_what_is_no_tensor() -> None:
    source = export(Spellings(), (torch.randint(20, (2, 3)),), {"scale": 0.5})
    found = quantize_exported(source, G32, [{"tokens": torch.randint(20, (2, 3))}], progress=False)
    assert {s.tokens for s in report(found).sites if s.scheme} == {6, 12}


BAD = {
    "a name": ([{"ids": ids()}], r"batch 0.*no 'ids'.*Legal: tokens"),
    "no name": ([{"tokens": ids(), "x": 1}], r"batch 0.*no 'x'"),
    "a shape": ([{"tokens": ids(2, 3, 4)}], r"batch 0: tokens is \[2, 3, 4\].*Legal: \[s\d+, s\d+\]"),
    "a dtype": ([{"tokens": ids().float()}], r"batch 0: tokens is .*float32.*Legal:.*int64"),
    "no tensor": ([{"tokens": 3}], r"batch 0: tokens is int"),
    "one batch": ({"tokens": ids()}, "found one dict"),
    "none": ([], "no batches"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_batch_that_the_program_does_not_take(case: str) -> None:
    batches, message = BAD[case]
    with pytest.raises(CalibrationError, match=message):
        quantize_exported(program(), G32, batches, progress=False)


# --- what is refused


def test_what_is_no_program() -> None:
    with pytest.raises(ConfigError, match=r"found MLP.*torch\.export\.export"):
        quantize_exported(MLP())
    with pytest.raises(ConfigError, match="made by quantize_exported"):
        quantize_exported(quantize_exported(program(), G32), G32)
    with pytest.raises(ConfigError, match=r"kernel 'cpu_int5'.*cpu_int4"):
        quantize_exported(program(), G32, kernel="cpu_int5")
    with pytest.raises(KernelError, match="bfloat16"):
        quantize_exported(program(), G32, kernel="cpu_int4")


def test_a_weight_with_nan_is_named() -> None:
    model = MLP()
    model.up.weight.data[3, 5] = float("nan")
    with pytest.raises(WeightError, match="up"):
        quantize_exported(export(model, (torch.randn(3, 64),)))


# --- files, and processes of their own


def alone(code: str, *args: Any) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = """
import sys, torch, gptq_fx
program = torch.export.load(sys.argv[1] + "/q.pt2")
inputs, wanted = torch.load(sys.argv[1] + "/io.pt")
with torch.no_grad():
    found = program.module()(inputs)
assert "transformers" not in sys.modules
print(float((found.double() - wanted.double()).norm() / wanted.double().norm()))
"""


def test_a_saved_program_runs_in_a_process_without_the_model(tmp_path: Path) -> None:
    found = quantize_exported(program(), G32)
    torch.export.save(found, tmp_path / "q.pt2")
    compiled = torch.compile(llama(1), backend="gptq", options={"group_size": 32, "inner_backend": "eager"})
    torch.save((ids(3, 7), logits(compiled, ids(3, 7))), tmp_path / "io.pt")
    assert float(alone(LOADED, tmp_path)) <= FP32


PACKAGE = """
import sys, torch
if sys.argv[2] == "ops":
    import gptq_fx
run = torch._inductor.aoti_load_package(sys.argv[1] + "/a.pt2")
inputs, wanted = torch.load(sys.argv[1] + "/io.pt")
found = run(inputs)
assert ("gptq_fx" in sys.modules) == (sys.argv[2] == "ops")
print(float((found.double() - wanted.double()).norm() / wanted.double().norm()))
"""


@pytest.mark.parametrize(
    ("dtype", "rows", "needs"),
    [
        pytest.param(torch.float32, 5, "nothing", id="reference"),
        pytest.param(torch.bfloat16, 5, "nothing", id="few-rows", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, 40, "ops", id="many-rows", marks=pytest.mark.slow),
    ],
)
def test_a_package_of_aot_inductor(tmp_path: Path, dtype: torch.dtype, rows: int, needs: str) -> None:
    """A process that runs it needs the ops, if any is written in Python, and nothing else."""
    model = MLP().to(dtype).requires_grad_(False)
    x = torch.randn(rows, 64, dtype=dtype)
    found = quantize_exported(export(model, (x,), dynamic_shapes=({0: Dim.AUTO},)))
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(found, package_path=str(tmp_path / "a.pt2"))
    torch.save((x[:-1], dequantized(model, dtype=torch.float32)(x[:-1].float())), tmp_path / "io.pt")
    assert float(alone(PACKAGE, tmp_path, needs)) <= 2 * LINEAR[dtype]


def runs_alone(program: ExportedProgram, x: Tensor, folder: Path) -> bool:
    """Whether a new process can load a package of it and run it."""
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "a.pt2"))
    torch.save((x, torch.ones(())), folder / "io.pt")
    try:
        alone(PACKAGE, folder, "nothing")
    except AssertionError:
        return False
    return True


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [5, 40])
def test_a_package_for_a_gpu(tmp_path: Path, rows: int) -> None:
    model = MLP(256, 512).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(rows, 256, dtype=torch.bfloat16, device="cuda")
    dense = export(model, (x,), dynamic_shapes=({0: Dim.AUTO},))
    if not runs_alone(dense, x, tmp_path):
        pytest.skip("PyTorch cannot run a package of a dense model on this GPU")
    found = quantize_exported(dense)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(found, package_path=str(tmp_path / "a.pt2"))
    torch.save((x[:-1], dequantized(model, dtype=torch.float32)(x[:-1].float())), tmp_path / "io.pt")
    assert float(alone(PACKAGE, tmp_path, "ops")) <= 2 * BF16
