"""What every kernel must do, measured against float64 on the dequantized weights.

A kernel of a GPU or NPU runs here too, under its marker: `pytest -m cuda tests/kernels`.
"""

import itertools
import zlib
from dataclasses import replace

import pytest
import torch
from tolerances import BLOCK, LINEAR, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

from gptq_fx import QuantizedParameter, QuantizedWeight, Scheme
from gptq_fx.kernels import Kernel, LinearSpec, kernels
from gptq_fx.kernels.block import ACTIVATIONS, run_block
from gptq_fx.packed import PackedWeight
from gptq_fx.scheme import BITS

MARKED = (
    "cuda",
    "npu",
    "xpu",
)  # device types that need a marker; a kernel of every device is tried on these too
ROWS = (1, 5, 70)


def _places():
    """(kernel, device type) for each kernel, marked by the device."""
    for kernel in kernels():
        for device in (kernel.device,) if kernel.device else ("cpu", *MARKED):
            marks = [getattr(pytest.mark, device)] if device in MARKED else []
            yield pytest.param(kernel, device, id=f"{kernel.name}-{device}", marks=marks)


every_place = pytest.mark.parametrize(("kernel", "device"), list(_places()))
every_width = pytest.mark.parametrize("bits", BITS)
every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
every_dtype = pytest.mark.parametrize("dtype", list(LINEAR), ids=str)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_stack = pytest.mark.parametrize(
    ("kernel", "device"), [place for place in _places() if place.values[0].experts is not None]
)


def make_spec(device, N, K, dtype, bits, size, sym):
    return LinearSpec(K, N, Scheme(bits, size, sym), dtype, device)


def is_here(device: str) -> bool:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


def can_run(kernel: Kernel, spec: LinearSpec) -> bool:
    """Whether the kernel takes the spec; a refusal must have a reason. Skips where it is not available."""
    if not is_here(spec.device):
        pytest.skip(f"no {spec.device} here")
    if reason := kernel.available():
        pytest.skip(f"{kernel.name}: {reason}")
    reason = kernel.supports(spec)
    if reason is None:
        return True
    assert isinstance(reason, str)
    assert len(reason) > 5
    assert kernel.refuses(spec) == reason
    return False


def random_weight(spec: LinearSpec, seed: int = 0) -> QuantizedWeight:
    """Every code and every zero point occurs; the seed is the spec, and a number."""
    rng = torch.Generator().manual_seed(zlib.crc32(repr(spec).encode()) + seed)
    K, N, G, bits = spec.in_features, spec.out_features, spec.groups, spec.scheme.bits
    codes = torch.randint(2**bits, (K, N), generator=rng)
    scales = ((torch.rand(G, N, generator=rng) + 0.1) / 2**bits).to(spec.dtype)
    zeros = None if spec.scheme.sym else torch.randint(2**bits, (G, N), generator=rng)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits).to(spec.device)


def normal(*shape, like: LinearSpec):
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).to(like.device, like.dtype)


def check_numbers(kernel, spec, rows=ROWS):
    weight = random_weight(spec)
    tensors = kernel.pack(weight, spec)
    W = weight.to("cpu").dequantize(torch.float64)  # not every device has float64
    bias = normal(spec.out_features, like=spec)
    for M, b in itertools.product(rows, (None, bias)):
        x = normal(M, spec.in_features, like=spec)
        y = kernel.call(x, tensors, b, spec)
        assert y.shape == (M, spec.out_features)
        assert y.dtype == spec.dtype
        expected = x.cpu().double() @ W.T + (0 if b is None else b.cpu().double())
        assert relative_error(y.cpu(), expected) <= LINEAR[spec.dtype], (M, b is not None)


@every_place
@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 48, 64, 128])
def test_numbers(kernel, device, bits, sym, dtype, size):
    spec = make_spec(device, 208, 384, dtype, bits, size, sym)
    if can_run(kernel, spec):
        check_numbers(kernel, spec)


@every_place
@every_width
@every_grid
@pytest.mark.parametrize(("N", "K"), [(200, 96), (16, 384), (16, 96), (72, 64), (24, 32)])
def test_numbers_of_awkward_shapes(kernel, device, bits, sym, N, K):
    for dtype, size in itertools.product(LINEAR, (-1, 32)):
        spec = make_spec(device, N, K, dtype, bits, size, sym)
        if can_run(kernel, spec):
            check_numbers(kernel, spec, rows=(1, 70))


@pytest.mark.slow
@every_place
@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize(("N", "K"), [(2048, 1024), (1040, 2048), (528, 768)])
def test_numbers_of_large_shapes(kernel, device, bits, sym, dtype, N, K):
    for size in (-1, 32, 64, 128, 256):
        spec = make_spec(device, N, K, dtype, bits, size, sym)
        if can_run(kernel, spec):
            check_numbers(kernel, spec, rows=(1, 16, 17, 300))


@every_place
@every_dtype
@pytest.mark.parametrize("rows", [(2, 3), (2, 40), (1, 1), (2, 2, 2)], ids=str)
def test_leading_dimensions_are_rows(kernel, device, dtype, rows):
    spec = make_spec(device, 48, 64, dtype, 4, 32, True)
    if not can_run(kernel, spec):
        return
    tensors = kernel.pack(random_weight(spec), spec)
    bias = normal(48, like=spec)
    x = normal(*rows, 64, like=spec)
    y = kernel.call(x, tensors, bias, spec)
    assert y.shape == (*rows, 48)
    flat = kernel.call(x.reshape(-1, 64), tensors, bias, spec)
    assert relative_error(y.reshape(-1, 48), flat) <= LINEAR[dtype]


@every_place
@every_dtype
def test_x_may_be_strided(kernel, device, dtype):
    spec = make_spec(device, 48, 64, dtype, 4, 32, True)
    if not can_run(kernel, spec):
        return
    tensors = kernel.pack(random_weight(spec), spec)
    for x in (
        normal(64, 5, like=spec).T,
        normal(5, 128, like=spec)[:, ::2],
        normal(1, 64, like=spec).expand(5, 64),
    ):
        contiguous = kernel.call(x.contiguous(), tensors, None, spec)
        assert relative_error(kernel.call(x, tensors, None, spec), contiguous) <= LINEAR[dtype]


@every_place
@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 48, 64, 128])
def test_unpack_undoes_pack_bit_by_bit(kernel, device, bits, sym, dtype, size):
    for N in (208, 200, 16, 1):
        spec = make_spec(device, N, 384, dtype, bits, size, sym)
        if not can_run(kernel, spec):
            continue
        weight = random_weight(spec)
        back = kernel.unpack(kernel.pack(weight, spec), spec)
        assert (back.bits, back.in_features) == (bits, 384)
        for name in ("qweight", "scales", "qzeros", "g_idx"):
            before, after = getattr(weight, name), getattr(back, name)
            assert (before is None) == (after is None), name
            if before is not None:
                assert after.dtype == before.dtype, name
                assert torch.equal(after, before), name


@every_place
@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 128])
def test_a_cut_of_a_merged_pack_is_the_pack_of_the_part(kernel, device, bits, sym, dtype, size):
    whole = make_spec(device, 320, 128, dtype, bits, size, sym)
    if not can_run(kernel, whole):
        return
    weight = random_weight(whole)
    codes, scales, zeros = weight.codes(), weight.scales, weight.zeros()
    tensors = kernel.pack(weight, whole)
    step = kernel.cut_at(whole)
    assert step > 0
    if step >= whole.out_features:
        return  # a layout that cannot be cut: nothing is merged
    far = 319 // step * step
    for start, stop in {(0, step), (step, 320), (0, far), (far, 320)}:
        part = make_spec(device, stop - start, 128, dtype, bits, size, sym)
        if not can_run(kernel, part):
            continue
        alone = QuantizedWeight.from_codes(
            codes[:, start:stop], scales[:, start:stop], None if sym else zeros[:, start:stop], bits
        )
        found = kernel.cut(tensors, whole, start, stop)
        for a, b, source in zip(found, kernel.pack(alone, part), tensors, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a, b)
                assert a.untyped_storage().data_ptr() == source.untyped_storage().data_ptr(), "no view"


@every_place
@every_dtype
@pytest.mark.parametrize("rows", [(1,), (70,), (2, 3)], ids=str)
def test_the_op_on_fake_tensors_has_the_same_shape_and_dtype(kernel, device, dtype, rows):
    spec = make_spec(device, 48, 64, dtype, 4, 32, False)
    if not can_run(kernel, spec):
        return
    tensors = kernel.pack(random_weight(spec), spec)
    x, bias = normal(*rows, 64, like=spec), normal(48, like=spec)
    real = kernel.call(x, tensors, bias, spec)
    with FakeTensorMode() as mode:
        fakes = tuple(None if t is None else mode.from_tensor(t) for t in tensors)
        fake = kernel.call(mode.from_tensor(x), fakes, mode.from_tensor(bias), spec)
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@every_place
def test_the_pack_is_no_larger_than_4_bits_and_its_grid(kernel, device):
    """One copy of the bytes: a kernel keeps no second form of the weight."""
    for dtype, sym in itertools.product(LINEAR, (True, False)):
        spec = make_spec(device, 128, 512, dtype, 4, 64, sym)
        if can_run(kernel, spec):
            stored = sum(
                t.numel() * t.element_size() for t in kernel.pack(random_weight(spec), spec) if t is not None
            )
            codes, grid = 128 * 512 // 2, 128 * 8 * dtype.itemsize
            assert codes + grid <= stored <= codes + 2 * grid


@every_place
@every_dtype
@pytest.mark.parametrize("size", [-1, 64, 128])
def test_numbers_of_any_rows(kernel, device, dtype, size):
    """Every algorithm that a GPU chooses by the number of rows."""
    if device not in MARKED:
        return
    spec = make_spec(device, 512, 1024, dtype, 4, size, True)
    if can_run(kernel, spec):
        check_numbers(kernel, spec, rows=(1, 2, 3, 8, 16, 17, 33, 64, 128, 257, 600, 1100, 4096))


# --- stacks of experts


def random_stack(spec: LinearSpec) -> QuantizedWeight:
    assert spec.experts is not None
    one = replace(spec, experts=None, device="cpu")
    parts = [random_weight(one, seed=e) for e in range(spec.experts)]
    return QuantizedWeight.stack(parts).to(spec.device)


def stack_or_skip(kernel, device, N, K, E, dtype, bits, size, sym):
    """(spec, packed, W in float64), or None where the kernel refuses stacks of this spec."""
    spec = replace(make_spec(device, N, K, dtype, bits, size, sym), experts=E)
    if not can_run(kernel, spec):
        return None
    reason = kernel.experts.supports(spec)
    if reason is not None:
        assert len(reason) > 5
        return None
    weight = random_stack(spec)
    return spec, kernel.pack_all(weight, spec), weight.to("cpu").dequantize(torch.float64)


def row_by_row(x, ids, W):
    """Row s of x times W[ids[s]], in float64; 0 for an id of E."""
    rows = [r @ W[i].T if i < len(W) else r.new_zeros(W.shape[1]) for r, i in zip(x, ids, strict=True)]
    return torch.stack(rows)


@every_stack
@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize(("E", "size"), [(5, -1), (5, 64), (40, 32)])
def test_rows_of_a_stack_meet_their_experts(kernel, device, bits, sym, dtype, E, size):
    check_stack(kernel, device, bits, sym, dtype, E, size, rows=(1, 3, 18, 150))


def check_stack(kernel, device, bits, sym, dtype, E, size, rows):
    made = stack_or_skip(kernel, device, 80, 192, E, dtype, bits, size, sym)
    if made is None:
        return
    spec, tensors, W = made
    rng = torch.Generator().manual_seed(E)
    for S in rows:
        x = normal(S, 192, like=spec)
        ids = torch.randint(E + 1, (S,), generator=rng).sort().values  # E: behind the last end
        ends = torch.bincount(ids, minlength=E)[:E].cumsum(0)
        for index in (torch.int32, torch.int64):
            y = kernel.experts.grouped(x, *tensors, ends.to(device, index), *kernel.op_args(spec))
            assert (y.shape, y.dtype) == ((S, 80), dtype)
            expected = row_by_row(x.cpu().double(), ids.tolist(), W)
            assert (y.cpu().double() - expected).norm() <= LINEAR[dtype] * expected.norm(), (S, index)
        ids = torch.randint(E, (S,), generator=rng)
        y = kernel.experts.indexed(x, *tensors, ids.to(device), *kernel.op_args(spec))
        assert relative_error(y.cpu(), row_by_row(x.cpu().double(), ids.tolist(), W)) <= LINEAR[dtype], S


@every_stack
@every_grid
@every_dtype
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("bits", "size", "E"), [(4, 32, 6), (4, -1, 40), (8, 32, 6), (3, 32, 6), (2, 32, 6)])
def test_a_whole_block(kernel, device, bits, sym, dtype, activation, with_bias, size, E):
    check_block(kernel, device, bits, sym, dtype, activation, with_bias, size, E, tokens=(1, 2, 7, 90))


def check_block(kernel, device, bits, sym, dtype, activation, with_bias, size, E, tokens, repeat=True):
    H, middle, k = 96, 64, 3
    up = stack_or_skip(kernel, device, 2 * middle, H, E, dtype, bits, size, sym)
    down = stack_or_skip(kernel, device, H, middle, E, dtype, bits, size, sym)
    if up is None or down is None or kernel.experts.block is None:
        return
    if reason := kernel.experts.block_supports(up[0], down[0], activation):
        assert len(reason) > 5
        return
    up_bias = normal(E, 2 * middle, like=up[0]) if with_bias else None
    down_bias = normal(E, H, like=down[0]) if with_bias else None

    def linear(W, bias):
        return lambda e, rows: rows @ W[e].T + (0 if bias is None else bias[e].cpu().double())

    rng = torch.Generator().manual_seed(E)
    for T in tokens:
        x = normal(T, H, like=up[0])
        ids = torch.randint(E + 1, (T, k), generator=rng)
        weights = torch.rand(T, k, generator=rng).to(device)
        args = [list(up[1]), list(down[1]), up_bias, down_bias, activation]
        args += [list(kernel.op_args(up[0])), list(kernel.op_args(down[0]))]
        y = kernel.experts.block(x, ids.to(device), weights, *args)
        expected = run_block(
            x.cpu().double(), ids, weights.cpu().double(), linear(up[2], up_bias), linear(down[2], down_bias),
            activation, E,
        )  # fmt: skip
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert (y.cpu().double() - expected).norm() <= BLOCK[dtype] * expected.norm(), T
        if repeat:
            again = kernel.experts.block(x, ids.to(device), weights, *args)
            assert torch.equal(y, again), "not deterministic"


@every_place
@every_dtype
def test_inputs_get_the_gradient_of_the_dequantized_weight(kernel, device, dtype):
    spec = make_spec(device, 256, 512, dtype, 4, 128, True)
    if not can_run(kernel, spec):
        return
    weight = random_weight(spec)
    packed = PackedWeight(weight, spec.scheme, None)
    packed.lower(kernel)
    x, seed = normal(70, 512, like=spec).requires_grad_(), normal(70, 256, like=spec)
    torch.nn.functional.linear(x, QuantizedParameter(packed, "w")).backward(seed)
    expected = seed.cpu().double() @ weight.to("cpu").dequantize(torch.float64)
    assert relative_error(x.grad.cpu(), expected) <= LINEAR[dtype]
