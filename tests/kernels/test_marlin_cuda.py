"""The Marlin kernels on a GPU: errors against fp32, the same bits at each run, CUDA graphs, experts.

Hundreds of variants are compiled: `pytest -m cuda -n 16` does so on as many cores.
"""

import itertools

import pytest
import torch
from tolerances import relative_error

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec, block
from gptq_fx.kernels.marlin import MARLIN, ops, routes

pytestmark = pytest.mark.cuda
LIMIT = 0.0025  # of the error against fp32; bf16's own rounding of the result makes 0.0017
ROWS = (1, 2, 5, 8, 9, 16, 17, 32, 33, 48, 49, 64, 65, 128, 200, 256, 257, 1000, 4096)
GRIDS = list(itertools.product((4, 8), (128, 64, 32, -1), (True, False), (torch.bfloat16, torch.float16)))


@pytest.fixture(scope="module", autouse=True)
def a_gpu():
    if reason := MARLIN.available():
        pytest.skip(reason)
    torch.backends.cuda.matmul.allow_tf32 = False


def make(N, K, bits=4, size=128, sym=True, dtype=torch.bfloat16, desc_act=False, experts=None):
    spec = LinearSpec(K, N, Scheme(bits, size, sym, desc_act), dtype, "cuda", experts)
    lead = () if experts is None else (experts,)
    codes = torch.randint(2**bits, (*lead, K, N), device="cuda", dtype=torch.uint8)
    scales = ((torch.rand(*lead, spec.groups, N, device="cuda") + 0.1) / 2**bits).to(dtype)
    zeros = None if sym else torch.randint(2**bits, (*lead, spec.groups, N), device="cuda")
    g_idx = None
    if desc_act:
        g_idx = torch.stack([torch.randperm(K, device="cuda") for _ in range(experts or 1)])
        g_idx = (g_idx // spec.group_size).to(torch.int32).reshape(*lead, K)
    return spec, QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx)


def check(spec, weight, rows):
    tensors = MARLIN.pack_all(weight, spec)
    again = MARLIN.unpack_all(tensors, spec)
    assert torch.equal(again.dequantize(), weight.dequantize())
    W = weight.dequantize(torch.float32)
    for M in rows:
        x = torch.randn(M, spec.in_features, device="cuda").to(spec.dtype)
        y = ops.linear(x, *tensors, None, *MARLIN.op_args(spec))
        assert relative_error(y, x.float() @ W.T) <= LIMIT, M


@pytest.mark.parametrize(("bits", "size", "sym", "dtype"), GRIDS, ids=str)
@pytest.mark.parametrize("desc_act", [False, True])
def test_errors(bits, size, sym, dtype, desc_act):
    check(*make(1024, 2048, bits, size, sym, dtype, desc_act), ROWS)


@pytest.mark.parametrize(
    ("N", "K"), [(4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (1000, 96), (8, 32), (151, 4000)]
)
@pytest.mark.parametrize("sym", [True, False])
def test_errors_of_shapes(N, K, sym):
    check(*make(N, K, sym=sym, size=128 if K % 128 == 0 else 32), ROWS)


@pytest.mark.parametrize("bits", [2, 3])
def test_errors_of_fewer_bits(bits):
    check(*make(512, 1024, bits, 64, False), (1, 40, 300))


def test_a_bias_and_leading_dimensions():
    spec, weight = make(200, 512)
    tensors = MARLIN.pack_all(weight, spec)
    bias = torch.randn(200, device="cuda").bfloat16()
    for M in (3, 300):
        x = torch.randn(2, M, 512, device="cuda").bfloat16()
        y = ops.marlin_linear(x, *tensors, bias, *MARLIN.op_args(spec))
        assert relative_error(y, x.float() @ weight.dequantize(torch.float32).T + bias.float()) <= LIMIT


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("M", [1, 16, 64, 128])
def test_the_same_bits_at_each_run(M, desc_act):
    spec, weight = make(4096, 4096, desc_act=desc_act)
    tensors = MARLIN.pack_all(weight, spec)
    x = torch.randn(M, 4096, device="cuda").bfloat16()
    first = ops.linear(x, *tensors, None, *MARLIN.op_args(spec))
    for _ in range(50):
        assert torch.equal(ops.linear(x, *tensors, None, *MARLIN.op_args(spec)), first)


def test_streams_at_once():
    spec, weight = make(4096, 4096)
    tensors = MARLIN.pack_all(weight, spec)
    xs = [torch.randn(5, 4096, device="cuda").bfloat16() for _ in range(4)]
    expected = [ops.linear(x, *tensors, None, *MARLIN.op_args(spec)) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        found = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.linear(x, *tensors, None, *MARLIN.op_args(spec)))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("M", [1, 300])
def test_a_cuda_graph_replays_the_numbers(M):
    spec, weight = make(2048, 2048, desc_act=True)
    tensors = MARLIN.pack_all(weight, spec)
    x = torch.randn(M, 2048, device="cuda").bfloat16()
    ops.linear(x, *tensors, None, *MARLIN.op_args(spec))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, *tensors, None, *MARLIN.op_args(spec))
        y = ops.linear(y, *tensors, None, *MARLIN.op_args(spec))
    for _ in range(3):
        x.copy_(torch.randn_like(x) / 64)
        graph.replay()
        once = ops.linear(x, *tensors, None, *MARLIN.op_args(spec))
        assert torch.equal(y, ops.linear(once, *tensors, None, *MARLIN.op_args(spec)))


def expected_rows(weight, x, experts):
    W = weight.dequantize(torch.float32)
    out = torch.zeros(x.shape[0], W.shape[1], device="cuda")
    for e in range(len(W)):
        out[experts == e] = x[experts == e].float() @ W[e].T
    return out


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 8, 64, 500, 3000])
def test_linears_of_experts(rows, bits, desc_act):
    E = 32
    spec, weight = make(768, 512, bits, experts=E, desc_act=desc_act)
    tensors = MARLIN.pack_all(weight, spec)
    x = torch.randn(rows, 512, device="cuda").bfloat16()
    ids = torch.randint(E + 1, (rows,), device="cuda")
    y = ops.marlin_indexed(x, *tensors, ids, *MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, ids)) <= LIMIT or rows == 1
    ids = ids.sort().values
    ends = torch.bincount(ids, minlength=E + 1)[:E].cumsum(0).to(torch.int32)
    y = ops.marlin_grouped(x, *tensors, ends, *MARLIN.op_args(spec))
    expected = expected_rows(weight, x, ids)
    assert (y.float() - expected).norm() <= LIMIT * expected.norm()
    again = ops.marlin_grouped(x, *tensors, ends, *MARLIN.op_args(spec))
    assert torch.equal(y, again)


@pytest.mark.parametrize("activation", routes.ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 2, 8, 64, 512, 2000])
@pytest.mark.parametrize("biased", [True, False])
def test_a_block_of_experts(activation, T, biased):
    E, H, inner, k = 16, 1024, 768, 4
    up_spec, up = make(2 * inner, H, experts=E)
    down_spec, down = make(H, inner, experts=E)
    x = torch.randn(T, H, device="cuda").bfloat16()
    ids = torch.rand(T, E + 1, device="cuda").topk(k).indices  # E: no expert
    weights = torch.rand(T, k, device="cuda")
    added = [torch.randn(E, n, device="cuda").bfloat16() * biased for n in (2 * inner, H)]
    biases = added if biased else [None, None]
    packs = [MARLIN.pack_all(w, s) for w, s in ((up, up_spec), (down, down_spec))]
    args = [list(MARLIN.op_args(s)) for s in (up_spec, down_spec)]

    def run():
        return ops.marlin_experts(x, ids, weights, *packs, *biases, activation, *args)

    W1, W2 = up.dequantize(torch.float32), down.dequantize(torch.float32)
    expected = block.run_block(
        x.float(),
        ids,
        weights,
        lambda e, rows: rows @ W1[e].T + added[0][e].float(),
        lambda e, rows: rows @ W2[e].T + added[1][e].float(),
        activation,
        E,
    )
    y = run()
    # Two linears, and what lies between them is rounded twice to bf16.
    assert relative_error(y, expected) <= 2.5 * LIMIT
    assert torch.equal(y, run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert torch.equal(y, captured)
