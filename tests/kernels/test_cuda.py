"""The humming kernel on an NVIDIA GPU: `pytest -m cuda tests/kernels/test_cuda.py`."""

import itertools
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import humming_emulation
import pytest
import test_contract as contract
import torch
from models import llama
from test_humming import make
from tolerances import LINEAR, relative_error
from torch import nn

from gptq_fx import GPTQConfig, QuantizedParameter, QuantizedWeight, Scheme, quantize
from gptq_fx.kernels import LinearSpec, humming, humming_experts, humming_library
from gptq_fx.kernels.humming_layout import padded
from gptq_fx.scheme import BITS

pytestmark = pytest.mark.cuda

DTYPES = [torch.float16, torch.bfloat16]
HUMMING = humming.HUMMING

every_width = pytest.mark.parametrize("bits", BITS)
every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def here():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    if reason := HUMMING.available():
        pytest.skip(reason)


@pytest.fixture
def few_kernels(monkeypatch):
    """Three steps of rows, so that wide matrices of tests do not compile for minutes."""
    monkeypatch.setattr(humming_library, "ROWS", (1, 64, 4096))
    monkeypatch.setattr(humming_library, "EXPERT_ROWS", (8, 512, 65536))
    monkeypatch.setattr(humming_library, "_TABLES", {})


def make_spec(K=512, N=384, bits=4, size=128, sym=True, dtype=torch.bfloat16, experts=None):
    return LinearSpec(K, N, Scheme(bits, size, sym), dtype, "cuda", experts)


def on_gpu(spec):
    return make(replace(spec, device="cpu")).to("cuda")


def check(spec, rows):
    assert HUMMING.refuses(spec) is None
    weight = on_gpu(spec)
    tensors, W = HUMMING.pack(weight, spec), weight.dequantize(torch.float64)
    bias = torch.randn(spec.out_features, dtype=spec.dtype, device="cuda")
    worst = 0.0
    for M, b in itertools.product(rows, (None, bias)):
        x = torch.randn(M, spec.in_features, dtype=spec.dtype, device="cuda")
        y = HUMMING.call(x, tensors, b, spec)
        assert (y.shape, y.dtype) == ((M, spec.out_features), spec.dtype)
        error = relative_error(y, x.double() @ W.T + (0 if b is None else b.double()))
        worst = max(worst, error)
        assert error <= LINEAR[spec.dtype], (M, b is not None)
    return worst


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 64, 128])
def test_numbers(few_kernels, bits, sym, dtype, size):
    check(make_spec(bits=bits, size=size, sym=sym, dtype=dtype), (1, 5, 70, 1030))


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_large_groups(few_kernels, size):
    check(make_spec(K=4096, size=size), (1, 70, 1030))


@pytest.mark.parametrize(
    ("N", "K"),
    [(8, 32), (200, 96), (576, 576), (192, 576), (576, 1536), (1536, 576), (128, 160), (1024, 14336)],
)
@pytest.mark.parametrize("size", [32, -1])
def test_awkward_shapes(few_kernels, N, K, size):
    check(make_spec(K, N, size=size), (1, 17, 300))


@every_dtype
def test_every_number_of_rows(dtype):
    start = time.perf_counter()
    spec = make_spec(4096, 1024, dtype=dtype)
    humming.prepare([spec])
    print(f"\nkernels for all rows of {dtype} ready after {time.perf_counter() - start:.1f} s")
    rows = (
        1,
        2,
        7,
        8,
        9,
        16,
        17,
        24,
        25,
        33,
        48,
        64,
        65,
        100,
        128,
        192,
        200,
        256,
        300,
        512,
        1000,
        2048,
        4096,
    )
    print(f"worst relative error {check(spec, rows):.5f}")


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("experts", [None, 3])
def test_the_pack_is_what_the_library_makes(bits, sym, dtype, experts):
    from humming.transform import (
        transform_humming_weight,
        transform_humming_weight_scale,
        transform_humming_zero_point,
    )

    spec = make_spec(bits=bits, sym=sym, dtype=dtype, experts=experts)
    assert padded(spec.out_features) == spec.out_features
    weight = on_gpu(spec)
    layer = humming_library._layer(humming.problem(spec, 0, "indexed" if experts else "dense"))
    zeros = None if sym else weight.qzeros.mT.contiguous()
    expected = [
        transform_humming_weight(
            weight.qweight.mT.contiguous(), layer.b_dtype, layer.a_dtype, zeros, packed=True
        ),
        transform_humming_weight_scale(weight.scales.mT.contiguous()),
        None if sym else transform_humming_zero_point(zeros, layer.b_dtype, packed=True),
    ]
    for found, wanted in zip(HUMMING.pack(weight, spec), expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            assert torch.equal(found, wanted)


@every_width
@every_grid
@every_dtype
def test_unpack_undoes_pack(bits, sym, dtype):
    contract.test_unpack_undoes_pack_bit_by_bit(HUMMING, "cuda", bits, sym, dtype, 128)
    contract.test_a_cut_of_a_merged_pack_is_the_pack_of_the_part(HUMMING, "cuda", bits, sym, dtype, 32)


@every_dtype
def test_x_in_other_forms(few_kernels, dtype):
    contract.test_leading_dimensions_are_rows(HUMMING, "cuda", dtype, (2, 3))
    contract.test_x_may_be_strided(HUMMING, "cuda", dtype)
    spec = make_spec(dtype=dtype)
    tensors = HUMMING.pack(on_gpu(spec), spec)
    flat = torch.randn(3 * 512 + 1, dtype=dtype, device="cuda")[1:]  # not at a multiple of 16 bytes
    x = flat.view(3, 512)
    assert torch.equal(HUMMING.call(x, tensors, None, spec), HUMMING.call(x.clone(), tensors, None, spec))
    assert HUMMING.call(x[:0], tensors, None, spec).shape == (0, 384)


def test_weights_without_a_zero_code(few_kernels):
    spec = make_spec()
    full = on_gpu(spec)
    for codes in (full.codes(), full.codes().clamp_min(1)):
        weight = QuantizedWeight.from_codes(codes, full.scales, None, 4)
        x = torch.randn(5, 512, dtype=spec.dtype, device="cuda")
        y = HUMMING.call(x, HUMMING.pack(weight, spec), None, spec)
        assert relative_error(y, x.double() @ weight.dequantize(torch.float64).T) <= LINEAR[spec.dtype]


# --- experts


@pytest.mark.parametrize("S", [1, 8, 65, 300, 4096])
@pytest.mark.parametrize(("experts", "tile"), [(8, 8), (128, 16), (128, 64), (5, 24)])
def test_align(S, experts, tile):
    for ids in (
        torch.randint(experts + 1, (S,)),
        torch.full((S,), experts),
        torch.zeros(S, dtype=torch.int64),
    ):
        rows, owners, used = (t.cpu() for t in humming_experts.align(ids.cuda(), experts, tile))
        _, expected, total = humming_emulation.align(ids, experts, tile)
        assert int(used) == int(total)
        tiles = int(used) // tile
        assert torch.equal(owners[:tiles], expected[:tiles])
        assert (rows[int(used) :] == S).all()
        given = rows[: int(used)].view(tiles, tile)
        for owner, mine in zip(owners[:tiles].tolist(), given, strict=True):
            assert (ids[mine[mine < S].long()] == owner).all()
        assert sorted(given[given < S].tolist()) == (ids < experts).nonzero().flatten().tolist()


@every_width
@every_grid
@pytest.mark.parametrize("S", [1, 40, 2000])
def test_grouped_and_indexed(few_kernels, bits, sym, S):
    spec = make_spec(512, 384, bits=bits, sym=sym, experts=8)
    weight = on_gpu(spec)
    tensors, W = HUMMING.pack(weight, spec), weight.dequantize(torch.float64)
    x = torch.randn(S, 512, dtype=spec.dtype, device="cuda")
    ids = torch.randint(8, (S,), device="cuda").sort().values
    expected = torch.stack([x[s].double() @ W[e].T for s, e in enumerate(ids.tolist())])
    used = S - S // 4
    ends = torch.searchsorted(ids[:used], torch.arange(8, device="cuda"), right=True)
    ops = humming_experts.EXPERTS
    for integers in (torch.int32, torch.int64):
        y = ops.grouped(x, *tensors, ends.to(integers), *HUMMING.op_args(spec))
        assert relative_error(y[:used], expected[:used]) <= LINEAR[spec.dtype]
        assert not y[used:].any()
    order = torch.randperm(S, device="cuda")
    y = ops.indexed(x[order], *tensors, ids[order], *HUMMING.op_args(spec))
    assert relative_error(y, expected[order]) <= LINEAR[spec.dtype]


@pytest.mark.parametrize("T", [1, 3, 64, 900], ids=lambda T: f"{T} tokens")
@pytest.mark.parametrize("activation", humming_experts.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_block(few_kernels, T, activation, bias):
    E, k, H, inner = 8, 2, 512, 256
    specs = make_spec(H, 2 * inner, experts=E), make_spec(inner, H, experts=E)
    weights = [on_gpu(spec) for spec in specs]
    packs = [HUMMING.pack(w, s) for w, s in zip(weights, specs, strict=True)]
    dense = [w.dequantize(torch.float64) for w in weights]
    x = torch.randn(T, H, dtype=torch.bfloat16, device="cuda")
    scores, ids = torch.rand(T, E, device="cuda").topk(k)
    ids[0, 1] = E  # no expert
    biases = [torch.randn(E, n, dtype=x.dtype, device="cuda") if bias else None for n in (2 * inner, H)]
    args = [HUMMING.op_args(spec) for spec in specs]

    def run():
        return humming_experts.humming_block(x, ids, scores, *packs, *biases, activation, *args)

    expected = torch.zeros(T, H, dtype=torch.float64, device="cuda")
    for e in range(E):
        token, place = (ids == e).nonzero(as_tuple=True)
        both = x[token].double() @ dense[0][e].T + (0 if biases[0] is None else biases[0][e].double())
        y = humming_emulation.act(both, activation) @ dense[1][e].T
        y = y + (0 if biases[1] is None else biases[1][e].double())
        expected.index_add_(0, token, y * scores[token, place, None].double())
    assert relative_error(run(), expected) <= 2 * LINEAR[torch.bfloat16]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    assert relative_error(y, expected) <= 2 * LINEAR[torch.bfloat16]


# --- CUDA graphs and streams


@pytest.mark.parametrize("M", [1, 70, 2048])
def test_a_recorded_call_follows_its_input(M):
    spec = make_spec(4096, 1024)
    tensors = HUMMING.pack(on_gpu(spec), spec)
    x = torch.randn(M, 4096, dtype=spec.dtype, device="cuda")
    HUMMING.call(x, tensors, None, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = HUMMING.call(x, tensors, None, spec)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, HUMMING.call(x, tensors, None, spec))


def test_streams_do_not_disturb_each_other():
    spec = make_spec(14336, 4096)
    tensors = HUMMING.pack(on_gpu(spec), spec)
    xs = [torch.randn(4, 14336, dtype=spec.dtype, device="cuda") for _ in range(4)]
    expected = [HUMMING.call(x, tensors, None, spec) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    found = [[] for _ in xs]
    for _ in range(50):
        for x, stream, ys in zip(xs, streams, found, strict=True):
            with torch.cuda.stream(stream):
                ys.append(HUMMING.call(x, tensors, None, spec))
    torch.cuda.synchronize()
    for ys, y in zip(found, expected, strict=True):
        for one in ys:
            assert relative_error(one, y.double()) <= LINEAR[spec.dtype]


# --- models


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(512, 1024, bias=False) for _ in range(2))
        self.down = nn.Linear(1024, 512, bias=True)

    def forward(self, x):
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def test_cuda_graphs_of_a_compiled_model(few_kernels, plans):
    from torch._dynamo.utils import counters

    model = nn.Sequential(*(MLP() for _ in range(3))).cuda().bfloat16().eval()
    quantize(model)
    dense = nn.Sequential(*(MLP() for _ in range(3))).cuda().double().eval()
    weights = {  # the numbers that the model has now
        name: p.dequantize() if isinstance(p, QuantizedParameter) else p
        for name, p in model.named_parameters()
    }
    dense.load_state_dict({name: w.double() for name, w in weights.items()})
    counters.clear()
    compiled = torch.compile(model, backend="gptq", options={"mode": "reduce-overhead"}, dynamic=False)

    def step():
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(1, 512, dtype=torch.bfloat16, device="cuda")
        assert relative_error(compiled(x).clone(), dense(x.double())) <= 3 * LINEAR[torch.bfloat16]

    for _ in range(4):
        step()
    assert {o.kernel.name for o in plans[0].operands} == {"humming"}
    assert len(plans[0].operands) == 6, "gate and up are one"
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] <= 1, "only x is copied"
    manager = torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager
    recorded = manager.new_graph_id().id
    for _ in range(4):
        step()
    assert manager.new_graph_id().id == recorded + 1, "recorded again"
    x = torch.randn(7, 512, dtype=torch.bfloat16, device="cuda")
    assert relative_error(model(x), dense(x.double())) <= 3 * LINEAR[torch.bfloat16]  # eager, on merged packs


@torch.no_grad()
def test_a_llama(few_kernels):
    model = llama().cuda().bfloat16().eval()
    quantize(model, GPTQConfig(group_size=32))
    ids = torch.randint(100, (2, 9), device="cuda")
    expected = model(ids).logits  # by the reference kernel
    compiled = torch.compile(model, backend="gptq", options={"mode": "reduce-overhead"}, dynamic=False)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(ids).logits.clone()
    assert relative_error(found, expected) <= 5 * LINEAR[torch.bfloat16]
    assert relative_error(model(ids).logits, expected) <= 5 * LINEAR[torch.bfloat16]


@torch.no_grad()
def test_perplexity_is_that_of_the_cpu(monkeypatch):
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.setattr(sys, "path", [*sys.path, str(examples)])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smollm2 import CACHE, checkpoint

    if not any(CACHE.glob("SmolLM2*")):
        pytest.skip("examples/smollm2.py was not run here")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :768]
    losses = {}
    for device, kernel in (("cpu", "reference"), ("cuda", "humming")):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16).eval().to(device)
        quantize(model, GPTQConfig(group_size=64))
        model.compile(backend="gptq", options={"inner_backend": "eager", "kernel": kernel})
        losses[device] = float(model(ids.to(device), labels=ids.to(device)).loss)
    print("\nperplexity", {device: math.exp(loss) for device, loss in losses.items()})
    assert math.exp(losses["cuda"]) == pytest.approx(math.exp(losses["cpu"]), rel=5e-3)
