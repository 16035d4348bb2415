"""The Marlin kernels without a GPU: their own source runs on the CPU (marlin_host.h), behind the real ops."""

from dataclasses import replace

import pytest
import torch
from marlin_host import A_GPU, CXX, HostFunction, text
from tolerances import LINEAR, relative_error

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.kernels import LinearSpec, block, marlin
from gptq_fx.kernels.marlin import decode, gemm, launch, ops, routes, variants

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
CACHED = (
    gemm.gemm_function,
    gemm.wide_function,
    gemm._dense_functions,
    routes._moe_functions,
    decode.decode_function,
)
OLDER = replace(A_GPU, arch="sm_80")
# 0.0025 is for many outputs (test_marlin_cuda.py). Of a thousand, the error of a kernel that rounds weights
# and result to bf16, 0.0023, is now and then 7 % more.
LIMIT = 0.0028


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """The GPU is the host; fresh memory is full of NaN."""
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    zeros = torch.zeros(launch.COUNTERS, dtype=torch.int32)
    for module in (gemm, decode, routes):
        monkeypatch.setattr(module, "Function", HostFunction)
        monkeypatch.setattr(module, "device", lambda index: A_GPU)
    monkeypatch.setattr(gemm, "counters", lambda index: zeros.data_ptr())
    monkeypatch.setattr(variants, "text", text)
    monkeypatch.setattr(HostFunction, "order", 0)
    HostFunction.launches.clear()
    HostFunction.clusters_launched.clear()
    for cached in CACHED:
        cached.cache_clear()
    yield
    torch.use_deterministic_algorithms(False)
    for cached in CACHED:
        cached.cache_clear()
    assert not zeros.any(), "counters are left as they were found"


def make(N, K, bits=4, size=128, sym=True, dtype=torch.bfloat16, desc_act=False, experts=None):
    spec = LinearSpec(K, N, Scheme(bits, size, sym, desc_act), dtype, "cpu", experts)
    lead = () if experts is None else (experts,)
    codes = torch.randint(2**bits, (*lead, K, N))
    scales = ((torch.rand(*lead, spec.groups, N) + 0.1) / 2**bits).to(dtype)
    zeros = None if sym else torch.randint(2**bits, (*lead, spec.groups, N))
    g_idx = None
    if desc_act:
        g_idx = torch.stack([torch.randperm(K) for _ in range(experts or 1)]) // spec.group_size
        g_idx = g_idx.to(torch.int32).reshape(*lead, K)
    return spec, QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx)


def run(spec, weight, x, bias=None):
    tensors = marlin.MARLIN.pack_all(weight, spec)
    y = ops.linear(x, *tensors, bias, *marlin.MARLIN.op_args(spec))
    assert torch.equal(marlin.MARLIN.bound(tensors, spec)(x, bias), y)
    return y


def check(spec, weight, M):
    x = torch.randn(M, spec.in_features).to(spec.dtype)
    bias = torch.randn(spec.out_features).to(spec.dtype)
    W = weight.dequantize(torch.float64)
    for b in (None, bias):
        y = run(spec, weight, x, b)
        expected = x.double() @ W.T + (0 if b is None else b.double())
        assert y.dtype == spec.dtype
        assert relative_error(y, expected) <= LIMIT < LINEAR[torch.bfloat16]


GRIDS = [
    (4, 128, True, torch.bfloat16),
    (4, 64, False, torch.float16),
    (4, 32, False, torch.bfloat16),
    (4, -1, True, torch.float16),
    (8, 128, False, torch.bfloat16),
    (8, 32, True, torch.float16),
    (8, -1, False, torch.bfloat16),
    (3, 96, False, torch.bfloat16),
]


@pytest.mark.parametrize("older", [False, True], ids=["decode", "gemm"])
@pytest.mark.parametrize(("bits", "size", "sym", "dtype"), GRIDS)
def test_a_few_rows(monkeypatch, bits, size, sym, dtype, older):
    """Several output tiles, split over blocks; widths and lengths that fill no tile."""
    if older:
        monkeypatch.setattr(gemm, "device", lambda index: OLDER)
    for M in (1, 8) if older else (2, 11):
        check(
            *make(200, 672, bits, size, sym, dtype)
            if size == 96
            else make(200, 1152, bits, size, sym, dtype),
            M,
        )


@pytest.mark.parametrize("cluster", [1, 2, 3])
@pytest.mark.parametrize("warps_k", [1, 3, 4])
def test_decode_however_the_work_is_cut(monkeypatch, cluster, warps_k):
    """Units one after the other, blocks and warps that share a unit; parts of unequal length."""
    plan = decode._plan

    def only(kernel, work, size, warps, waves):
        return plan(kernel, work, size, warps, waves) if (size, warps) == (cluster, warps_k) else None

    monkeypatch.setattr(decode, "_plan", only)
    decode.plan.cache_clear()
    check(*make(1000, 1792, sym=False), 3)
    assert set(HostFunction.launches) == {"marlin_decode"}
    assert HostFunction.clusters_launched == {cluster}
    decode.plan.cache_clear()


def test_sums_that_do_not_fit_at_once(monkeypatch):
    """Two blocks at a time, each with room for x and few sums: the work is cut into more."""
    device = replace(A_GPU, multiprocessors=1, shared_per_block=60 * 1024)
    monkeypatch.setattr(decode, "device", lambda index: device)
    spec, weight = make(1500, 640, sym=False)
    check(spec, weight, 14)
    assert set(HostFunction.launches) == {"marlin_decode"}
    kernel = decode.decode_function(4, True, True, 8, False, variants.PLAIN, variants.DECODE_TILES[1], 0)
    p = decode.plan(kernel, decode.Work(variants.PLAIN, 24, 640, 14))
    assert p.clusters > kernel.function.clusters(p.cluster)


@pytest.mark.parametrize("units", [1, 16, 64, 96, 448, 2004])
@pytest.mark.parametrize("in_features", [64, 256, 768, 1000, 2048, 4096, 14336])
def test_no_warp_is_without_work(units, in_features):
    """What it does not write is read."""
    kernel = decode.decode_function(4, True, False, 8, False, variants.PLAIN, variants.DECODE_TILES[0], 0)
    wide = replace(kernel, function=Resident(kernel.function))
    p = decode.plan(wide, decode.Work(variants.PLAIN, units, in_features, 4))
    assert p.warps_k <= -(-in_features // kernel.batch) // p.cluster
    assert p.clusters <= units


class Resident:
    """A GPU of 132 multiprocessors, which holds fewer blocks of larger clusters."""

    def __init__(self, function):
        self.threads, self.shared = function.threads, function.shared

    def clusters(self, size):
        return [132, 66, 39, 30, 22, 17, 15, 15][size - 1]


def test_x_that_fits_no_shared_memory_goes_to_the_gemm(monkeypatch):
    monkeypatch.setattr(decode, "device", lambda index: replace(A_GPU, shared_per_block=4 * 1024))
    check(*make(72, 1152), 8)
    assert set(HostFunction.launches) == {"marlin_gemm"}


@pytest.mark.parametrize(("M", "desc_act"), [(8, False), (2, True), (70, False)])
def test_more_units_of_work_than_stages(monkeypatch, M, desc_act):
    """Two blocks of threads: each stage is filled again, through the ends of tiles."""
    monkeypatch.setattr(gemm, "device", lambda index: replace(OLDER, multiprocessors=1))
    check(*make(328, 1152, 4, 128, False, desc_act=desc_act), M)


@pytest.mark.parametrize("M", [13, 30, 40, 70])
def test_the_gemm_of_more_rows(monkeypatch, M):
    monkeypatch.setattr(gemm, "device", lambda index: OLDER)
    check(*make(328, 640, 4, 128, False), M)
    check(*make(328, 640, 4, 128, True, desc_act=True), M)
    assert set(HostFunction.launches) == {"marlin_gemm"} | ({"marlin_permute"})


@pytest.mark.parametrize(("bits", "size", "sym", "dtype"), GRIDS)
def test_many_rows_by_wgmma(bits, size, sym, dtype):
    """Tiles that outputs, K and rows do not fill."""
    check(*make(328, 672 if size == 96 else 1152, bits, size, sym, dtype), 30)
    assert set(HostFunction.launches) == {"marlin_wide"}


@pytest.mark.parametrize("M", [64, 90, 140])
def test_each_tile_of_wgmma(M):
    check(*make(328, 640, 4, 128, False), M)
    check(*make(264, 640, 4, 128, True, desc_act=True), M)
    check(*make(40, 160, 8, 32), M)  # most outputs of a tile do not exist
    assert set(HostFunction.launches) == {"marlin_permute", "marlin_wide"}


def test_rows_are_cut_into_the_blocks_that_cost_least():
    rows = {17: 32, 32: 32, 33: 64, 64: 64, 96: 96, 97: 128, 128: 128, 192: 96, 193: 128, 256: 128, 2048: 128}
    assert {M: variants.wide_tile_for(M).tokens for M in rows} == rows


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("N", [1160, 1100])
def test_tiles_that_two_blocks_of_wgmma_share(monkeypatch, N, bits):
    """More tiles than blocks: the last to come adds the other's part, whichever of the two it is."""
    monkeypatch.setattr(gemm, "device", lambda index: replace(A_GPU, multiprocessors=2))
    spec, weight = make(N, 608, bits, 32 if N % 8 else -1, sym=False)
    check(spec, weight, 200)
    x, found = torch.randn(200, 608).to(spec.dtype), []
    for order in (0, 1, 5):
        monkeypatch.setattr(HostFunction, "order", order)
        found.append(run(spec, weight, x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert HostFunction.clusters_launched == {1}


def test_as_many_tiles_for_each_block_of_wgmma(monkeypatch):
    """Eight tiles for four blocks: none is shared."""
    monkeypatch.setattr(gemm, "device", lambda index: replace(A_GPU, multiprocessors=2))
    check(*make(1000, 160, 4, 32), 140)
    assert HostFunction.clusters_launched == {1}


@pytest.mark.parametrize("order", [0, 1])
def test_experts_whose_tiles_two_blocks_share(monkeypatch, order):
    monkeypatch.setattr(gemm, "device", lambda index: replace(A_GPU, multiprocessors=2))
    monkeypatch.setattr(HostFunction, "order", order)
    spec, weight = make(520, 400, size=-1, experts=3)
    tensors = marlin.MARLIN.pack_all(weight, spec)
    x, ids = torch.randn(200, 400).to(spec.dtype), torch.arange(200) % 4  # nine tiles for four blocks
    y = ops.marlin_indexed(x, *tensors, ids, *marlin.MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, ids.tolist())) <= LIMIT
    assert HostFunction.clusters_launched == {1}


@pytest.mark.parametrize(("experts", "rows"), [(3, 70), (2, 250)])
def test_experts_with_many_rows_by_wgmma(experts, rows):
    spec, weight = make(328, 256, sym=False, experts=experts)
    tensors = marlin.MARLIN.pack_all(weight, spec)
    x, ids = torch.randn(rows, 256).to(spec.dtype), torch.randint(experts + 1, (rows,))
    y = ops.marlin_indexed(x, *tensors, ids, *marlin.MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, ids.tolist())) <= LIMIT
    assert set(HostFunction.launches) == {"marlin_align", "marlin_wide"}


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order(monkeypatch, bits):
    """By the kernel that multiplies, while the rows of x are few and fit; then by one of its own."""
    spec, weight = make(72, 288, bits, 32, False, desc_act=True)
    for M in (2, 5):
        check(spec, weight, M)
        assert set(HostFunction.launches) == {"marlin_decode"}
    check(spec, weight, 12)
    assert set(HostFunction.launches) == {"marlin_decode", "marlin_permute"}
    HostFunction.launches.clear()
    monkeypatch.setattr(gemm, "device", lambda index: OLDER)
    check(spec, weight, 2)
    assert set(HostFunction.launches) == {"marlin_gemm"}


@pytest.mark.parametrize(("K", "dtype"), [(40, torch.float16), (1000, torch.bfloat16)])
def test_in_features_that_fill_no_tile(K, dtype):
    check(*make(24, K, 4, -1, True, dtype), 2)


def test_rows_that_are_not_contiguous():
    spec, weight = make(64, 256)
    x = torch.randn(6, 512).to(spec.dtype)
    for rows in (x[:, :256], x[:, 3:259], x[::2, 256:], x.T[:256].T[:, :256]):
        expected = run(spec, weight, rows.contiguous())
        assert torch.equal(run(spec, weight, rows), expected)


def test_the_order_of_blocks_changes_no_bit(monkeypatch):
    spec, weight = make(200, 2048)
    x = torch.randn(5, 2048).to(spec.dtype)
    results = []
    for order in (0, 1, 2, 3):
        monkeypatch.setattr(HostFunction, "order", order)
        results.append(run(spec, weight, x))
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize(("bits", "size", "sym", "dtype"), GRIDS)
def test_many_rows_are_multiplied_by_dequantized_weights(monkeypatch, bits, size, sym, dtype):
    monkeypatch.setattr(ops, "MANY_ROWS_OF_WGMMA", 4)
    monkeypatch.setattr(ops, "DENSE_OUTPUTS", 64)
    monkeypatch.setattr(gemm, "SCRATCH_BYTES", 2 * 64 * 1152 * 2)
    check(*make(200, 672 if size == 96 else 1152, bits, size, sym, dtype), 6)
    assert set(HostFunction.launches) == {"marlin_dequantize"}


def test_narrow_outputs_stay_with_the_gemm_for_any_rows(monkeypatch):
    monkeypatch.setattr(ops, "MANY_ROWS_OF_WGMMA", 4)
    check(*make(200, 1152, 4, 128, True, torch.bfloat16), 6)
    assert "marlin_dequantize" not in HostFunction.launches


def test_many_rows_in_act_order(monkeypatch):
    monkeypatch.setattr(ops, "MANY_ROWS_OF_WGMMA", 4)
    monkeypatch.setattr(ops, "DENSE_OUTPUTS", 64)
    check(*make(72, 288, 4, 32, False, desc_act=True), 6)
    assert set(HostFunction.launches) == {"marlin_permute", "marlin_dequantize"}


def expected_rows(weight, x, experts):
    """Row s times the weight of experts[s]; zeros for an expert that is none."""
    W = weight.dequantize(torch.float64)
    rows = [
        x[s].double() @ W[e].T if 0 <= e < len(W) else W.new_zeros(W.shape[1]) for s, e in enumerate(experts)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("desc_act", [False, True])
def test_grouped(dtype, desc_act):
    spec, weight = make(72, 256, experts=5, desc_act=desc_act)
    tensors = marlin.MARLIN.pack_all(weight, spec)
    x = torch.randn(30, 256).to(spec.dtype)
    ends = torch.tensor([3, 3, 20, 27, 28], dtype=dtype)
    owner = torch.searchsorted(ends.long(), torch.arange(30), right=True)
    y = ops.marlin_grouped(x, *tensors, ends, *marlin.MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, owner.tolist())) <= LIMIT
    assert not y[28:].any()


@pytest.mark.parametrize(("experts", "rows"), [(4, 1), (4, 11), (64, 3)])
def test_indexed(experts, rows):
    spec, weight = make(72, 256, sym=False, experts=experts)
    tensors = marlin.MARLIN.pack_all(weight, spec)
    x = torch.randn(rows, 256).to(spec.dtype)
    ids = torch.randint(experts, (rows,))
    if rows > 1:
        ids[1] = experts  # no expert
    y = ops.marlin_indexed(x, *tensors, ids, *marlin.MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, ids.tolist())) <= LIMIT


def test_more_blocks_of_threads_than_units_of_work(monkeypatch):
    """How many units there are, only the GPU knows: some of its blocks have none."""
    monkeypatch.setattr(gemm, "device", lambda index: replace(A_GPU, multiprocessors=11))
    spec, weight = make(128, 768, experts=4)
    x = torch.randn(3, 768).to(spec.dtype)
    tensors = marlin.MARLIN.pack_all(weight, spec)
    ids = torch.tensor([2, 2, 2])
    y = ops.marlin_indexed(x, *tensors, ids, *marlin.MARLIN.op_args(spec))
    assert relative_error(y, expected_rows(weight, x, ids.tolist())) <= LIMIT


@pytest.mark.parametrize("activation", routes.ACTIVATIONS)
@pytest.mark.parametrize(("T", "biased"), [(1, True), (9, False), (40, True)])
def test_a_block_of_experts(activation, T, biased):
    E, H, inner, k = 6, 128, 96, 2
    up_spec, up = make(2 * inner, H, experts=E)
    down_spec, down = make(H, inner, size=32, experts=E)
    x, ids = torch.randn(T, H).to(up_spec.dtype), torch.randint(E, (T, k))
    if T == 1:
        ids = torch.tensor([[4, 1]])
    ids[-1, 0] = E  # no expert
    weights = torch.rand(T, k)
    biases = [torch.randn(E, 2 * inner).bfloat16(), torch.randn(E, H).bfloat16()] if biased else [None, None]
    packs = [marlin.MARLIN.pack_all(w, s) for w, s in ((up, up_spec), (down, down_spec))]
    args = [list(marlin.MARLIN.op_args(s)) for s in (up_spec, down_spec)]
    y = ops.marlin_experts(x, ids, weights, *packs, *biases, activation, *args)
    W1, W2 = up.dequantize(torch.float64), down.dequantize(torch.float64)
    b1, b2 = (b.double() if b is not None else torch.zeros(E, 1) for b in biases)
    expected = block.run_block(
        x.double(),
        ids,
        weights.double(),
        lambda e, rows: rows @ W1[e].T + b1[e],
        lambda e, rows: rows @ W2[e].T + b2[e],
        activation,
        E,
    )
    assert relative_error(y, expected) <= 2 * LINEAR[torch.bfloat16]
    assert ("marlin_align" in HostFunction.launches) == (T > 1)


@pytest.mark.parametrize(("activation", "sym"), [("silu", True), ("gelu_tanh", False)])
@pytest.mark.parametrize("T", [1, 2])
def test_few_routes_take_two_kernels(T, activation, sym):
    E, H, inner, k = 16, 192, 256, 3
    up_spec, up = make(2 * inner, H, size=32, sym=sym, experts=E)
    down_spec, down = make(H, inner, sym=sym, experts=E)
    x, ids = torch.randn(T, H).to(up_spec.dtype), torch.rand(T, E).topk(k).indices.int()
    ids[-1, 0] = E  # no expert
    weights = torch.rand(T, k).to(x.dtype if sym else torch.float32)
    packs = [marlin.MARLIN.pack_all(w, s) for w, s in ((up, up_spec), (down, down_spec))]
    args = [list(marlin.MARLIN.op_args(s)) for s in (up_spec, down_spec)]
    y = ops.marlin_experts(x, ids, weights, *packs, None, None, activation, *args)
    W1, W2 = up.dequantize(torch.float64), down.dequantize(torch.float64)
    expected = block.run_block(
        x.double(),
        ids,
        weights.double(),
        lambda e, rows: rows @ W1[e].T,
        lambda e, rows: rows @ W2[e].T,
        activation,
        E,
    )
    assert relative_error(y, expected) <= 2 * LINEAR[torch.bfloat16]
    assert HostFunction.launches == ["marlin_decode"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    spec, weight = make(64, 256, dtype=dtype)
    tensors, args = marlin.MARLIN.pack(weight, spec), marlin.MARLIN.op_args(spec)
    bias = torch.randn(64).to(dtype)
    torch.library.opcheck(ops.marlin_linear, (torch.randn(2, 3, 256).to(dtype), *tensors, bias, *args))
    spec, weight = make(64, 256, dtype=dtype, experts=3)
    down_spec, down = make(256, 32, size=-1, dtype=dtype, experts=3)
    tensors, args = marlin.MARLIN.pack_all(weight, spec), marlin.MARLIN.op_args(spec)
    x = torch.randn(5, 256).to(dtype)
    torch.library.opcheck(ops.marlin_grouped, (x, *tensors, torch.tensor([2, 2, 5]), *args))
    torch.library.opcheck(ops.marlin_indexed, (x, *tensors, torch.tensor([2, 0, 0, 1, 2]), *args))
    packs = [list(tensors), list(marlin.MARLIN.pack_all(down, down_spec))]
    routed = x, torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    lists = [list(args), list(marlin.MARLIN.op_args(down_spec))]
    torch.library.opcheck(ops.marlin_experts, (*routed, *packs, None, None, "silu", *lists))
