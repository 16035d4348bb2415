"""The ops of the library `gptq`: each fits torch's contract, and gptq::linear is its equation."""

import pytest
import torch
from tolerances import LINEAR, relative_error

from gptq_fx import QuantizedWeight, Scheme, ops
from gptq_fx.experts import quantized_experts
from gptq_fx.gradients import grouped_gradient, linear_gradient, trained_experts, trained_indexed
from gptq_fx.handles import handle_block, handle_experts, handle_grouped, handle_linear
from gptq_fx.kernels import LinearSpec, block, grouped, kernels
from gptq_fx.ops import linear
from gptq_fx.order import gather_grouped, gather_indexed
from gptq_fx.packed import PackedWeight
from gptq_fx.scheme import BITS

K, N = 64, 32


def make(sym=True, dtype=torch.float32, bits=4):
    rng = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (K, N), generator=rng)
    zeros = None if sym else torch.randint(2**bits, (2, N), generator=rng)
    return QuantizedWeight.from_codes(codes, torch.rand(2, N, generator=rng).to(dtype), zeros, bits)


def _kernel_samples(kernel):
    """The op of a kernel as it is called, for few and for many rows."""
    for dtype in LINEAR:
        spec = LinearSpec(K, N, Scheme(4, 32), dtype, kernel.device or "cpu")
        if kernel.refuses(spec) is None:
            tensors = kernel.pack(make(dtype=dtype).to(spec.device), spec)
            for rows in ((2, 3), (40,)):
                x = torch.randn(*rows, K, device=spec.device, dtype=dtype)
                bias = torch.randn(N, device=spec.device, dtype=dtype)
                yield (x, *tensors, bias, *kernel.op_args(spec))


def from_codes(codes):
    return QuantizedWeight.from_codes(codes, torch.rand(1, codes.shape[1]), None, 4)


KEPT = PackedWeight(make(), Scheme(4, 32), None)  # handles name a weight only while it is alive


def _handle_samples():
    for rows in ((3,), (2, 3)):
        yield torch.randn(*rows, K, requires_grad=True), KEPT.handle, torch.randn(N, requires_grad=True), N


STACK = PackedWeight(QuantizedWeight.stack([make(), make(), make()]), Scheme(4, 32), None)


def _grouped_samples():
    ends = torch.tensor([2, 2, 5])
    yield torch.randn(5, K), *grouped.call(STACK.kernel, "grouped", STACK.call_tensors(), ends, STACK.spec)[1]


def _indexed_samples():
    ids = torch.tensor([2, 0, 0, 1, 2])
    yield torch.randn(5, K), *grouped.call(STACK.kernel, "indexed", STACK.call_tensors(), ids, STACK.spec)[1]


DOWN = PackedWeight(
    QuantizedWeight.stack([from_codes(torch.randint(16, (16, K))) for _ in range(3)]), Scheme(4, -1), None
)


def _routed():
    ids, weights = torch.tensor([[2, 0], [1, 3]]), torch.rand(2, 2)  # 3: no expert
    return torch.randn(2, K), ids, weights


def _block_samples():
    tensors = list(STACK.call_tensors()), list(DOWN.call_tensors())
    for biases in ((None, None), (torch.randn(3, N), torch.randn(3, K))):
        yield *_routed(), *tensors, *biases, "silu", [4], [4], "reference", "reference"


def _handle_block_samples():
    yield *_routed(), STACK.handle, DOWN.handle, None, None, "gpt_oss"


def _dense_block_samples():
    yield *_routed(), torch.randn(3, N, K), torch.randn(3, K, N // 2), None, None, "gelu_tanh"


def _handle_grouped_samples():
    yield torch.randn(5, K, requires_grad=True), STACK.handle, torch.tensor([2, 2, 4]), N


def _gradient_samples():
    for rows in ((3,), (2, 3)):
        yield torch.randn(*rows, N, requires_grad=True), KEPT.handle, K, False


def _grouped_gradient_samples():
    yield torch.randn(5, N, requires_grad=True), STACK.handle, torch.tensor([2, 2, 4]), K, False


def _trained_samples():
    yield torch.randn(5, K, requires_grad=True), STACK.handle, torch.tensor([2, 0, 0, 1, 2]), N, 3, False


def _trained_block_samples():
    x, ids, weights = _routed()
    biases = torch.randn(3, N, requires_grad=True), torch.randn(3, K, requires_grad=True)
    yield x.requires_grad_(), ids, weights.requires_grad_(), STACK.handle, DOWN.handle, *biases, "silu", 3, N


def _handle_experts_samples():
    yield STACK.handle, torch.tensor([[2, 0], [0, 1]]), [N, K], torch.float32


def _many_rows_samples():
    kernel = next(k for k in kernels() if k.name == "cpu_int4")
    for args in _kernel_samples(kernel):
        x = args[0].reshape(-1, K)
        yield x, args[1], args[2], x.new_empty(x.shape[0], args[1].shape[0])


def _gather_samples(which):
    order = torch.stack([torch.randperm(K) for _ in range(3)])
    yield torch.randn(5, K), order, torch.tensor(which)


def _cpu_stack(shape):
    kernel = next(k for k in kernels() if k.name == "cpu_int4")
    spec = LinearSpec(shape[2], shape[1], Scheme(4, 32), torch.bfloat16, "cpu", shape[0])
    if kernel.refuses(spec) is not None:
        return None
    codes, scales = (
        torch.randint(16, (shape[0], shape[2], shape[1])),
        torch.rand(shape[0], shape[2] // 32, shape[1]),
    )
    return kernel.pack_all(QuantizedWeight.from_codes(codes, scales.bfloat16(), None, 4), spec)


def _cpu_rows_samples(which):
    tensors = _cpu_stack((3, 64, K))
    if tensors is not None:
        yield torch.randn(5, K).bfloat16(), *tensors, which, 32


def _cpu_block_samples():
    up, down = _cpu_stack((3, 128, K)), _cpu_stack((3, K, 64))
    if up is not None and down is not None:
        x, ids, weights = _routed()
        biases = torch.randn(3, 128), torch.randn(3, K)
        yield x.bfloat16(), ids, weights.bfloat16(), list(up), list(down), *biases, "silu", [32], [32]


def _own_stack_samples(kernel, form):
    """The kernel's own op for stacks, where it can run here."""
    spec = LinearSpec(K, N, Scheme(4, 32), torch.float32, kernel.device or "cpu", 3)
    if kernel.refuses(spec) is None and kernel.experts.supports(spec) is None:
        which = torch.tensor([2, 2, 5]) if form == "grouped" else torch.tensor([2, 0, 0, 1, 2])
        tensors = kernel.pack_all(QuantizedWeight.stack([make(), make(), make()]).to(spec.device), spec)
        x = torch.randn(5, K, device=spec.device)
        yield x, *tensors, which.to(spec.device), *kernel.op_args(spec)


def _own_block_samples(kernel):
    up = LinearSpec(K, N, Scheme(4, 32), torch.float32, kernel.device or "cpu", 3)
    down = LinearSpec(N // 2, K, Scheme(4, -1), torch.float32, up.device, 3)
    if kernel.refuses(up) is None and kernel.experts.block_supports(up, down, "silu") is None:
        stacks = QuantizedWeight.stack([make(), make(), make()]), DOWN.unpacked()
        packs = [list(kernel.pack_all(w.to(up.device), s)) for w, s in zip(stacks, (up, down), strict=True)]
        args = [list(kernel.op_args(up)), list(kernel.op_args(down))]
        yield *(t.to(up.device) for t in _routed()), *packs, None, None, "silu", *args


def _own_samples():
    """The ops of all kernels that run whole stacks."""
    for k in kernels():
        if k.experts is not None:
            for form in ("grouped", "indexed"):
                op = getattr(k.experts, form)
                yield op.name(), (op, lambda k=k, form=form: _own_stack_samples(k, form))
            if k.experts.block is not None:
                yield k.experts.block.name(), (k.experts.block, lambda k=k: _own_block_samples(k))


SAMPLES = {
    # of two kernels with one op, the preferred one
    **{k.op.name(): (k.op, lambda k=k: _kernel_samples(k)) for k in reversed(kernels())},
    **dict(reversed(list(_own_samples()))),
    # what humming_linear is made of: checked in kernels/test_cuda.py
    "gptq::humming_matmul": (torch.ops.gptq.humming_matmul.default, lambda: ()),
    "gptq::handle_linear": (handle_linear, _handle_samples),
    "gptq::handle_grouped": (handle_grouped, _handle_grouped_samples),
    "gptq::linear_gradient": (linear_gradient, _gradient_samples),
    "gptq::grouped_gradient": (grouped_gradient, _grouped_gradient_samples),
    "gptq::trained_indexed": (trained_indexed, _trained_samples),
    "gptq::trained_experts": (trained_experts, _trained_block_samples),
    "gptq::cpu_int4_grouped": (
        torch.ops.gptq.cpu_int4_grouped.default,
        lambda: _cpu_rows_samples(torch.tensor([2, 2, 4])),
    ),
    "gptq::cpu_int4_indexed": (
        torch.ops.gptq.cpu_int4_indexed.default,
        lambda: _cpu_rows_samples(torch.tensor([2, 0, 0, 1, 2])),
    ),
    "gptq::cpu_int4_experts": (torch.ops.gptq.cpu_int4_experts.default, _cpu_block_samples),
    "gptq::experts": (block.experts, _block_samples),
    "gptq::quantized_experts": (quantized_experts, _dense_block_samples),
    "gptq::handle_block": (handle_block, _handle_block_samples),
    "gptq::handle_experts": (handle_experts, _handle_experts_samples),
    "gptq::grouped_linear": (grouped.grouped_linear, _grouped_samples),
    "gptq::indexed_linear": (grouped.indexed_linear, _indexed_samples),
    "gptq::gather_grouped": (gather_grouped, lambda: _gather_samples([2, 2, 4])),
    "gptq::gather_indexed": (gather_indexed, lambda: _gather_samples([2, 0, 1, 1, 2])),
    "gptq::cpu_int4_many_rows": (torch.ops.gptq.cpu_int4_many_rows.default, _many_rows_samples),
}
OPS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gptq::"))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    assert name in SAMPLES, f"{name} has no sample: add one"
    op, samples = SAMPLES[name]
    samples = list(samples())
    if not samples:
        pytest.skip(f"no kernel of {name} is available here")
    for args in samples:
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("name", OPS)
def test_schemas_hold_plain_types_only(name):
    """Tensors, ints, floats, bools, strings and lists of them: what compilers and exporters can carry."""
    schema = SAMPLES[name][0]._schema
    plain = {"Tensor", "Optional[Tensor]", "List[Optional[Tensor]]", "int", "List[int]", "float", "bool"}
    plain |= {"str"}
    assert {str(argument.type) for argument in schema.arguments} <= plain
    written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
    assert written == (["out"] if schema.is_mutable else [])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_linear_is_its_equation(bits, sym):
    weight, x, bias = make(sym, bits=bits), torch.randn(2, 3, K), torch.randn(N)
    q, z = (
        weight.codes().double(),
        2 ** (bits - 1) if sym else weight.zeros().double().repeat_interleave(32, 0),
    )
    W = weight.scales.double().repeat_interleave(32, 0) * (q - z)
    y = linear(x, *weight.tensors, bias, bits)
    assert relative_error(y, x.double() @ W + bias.double()) <= LINEAR[torch.float32]


def test_linear_follows_g_idx():
    g_idx = torch.arange(K, dtype=torch.int32) % 2
    plain = make(sym=False)
    weight = QuantizedWeight(4, K, plain.qweight, plain.scales, plain.qzeros, g_idx)
    x = torch.randn(3, K)
    table = weight.scales.double()[g_idx.long()], weight.zeros().double()[g_idx.long()]
    expected = x.double() @ (table[0] * (weight.codes().double() - table[1]))
    found = linear(x, *weight.tensors, None, 4)
    assert relative_error(found, expected) <= LINEAR[torch.float32]
    assert relative_error(linear(x, *plain.tensors, None, 4), expected) > 0.1


def test_linear_gives_the_dtype_of_x():
    assert linear(torch.randn(3, K).bfloat16(), *make().tensors, None, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slow", [True, False])
def test_linear_in_the_dtype_of_x_and_in_fp32_where_that_is_slow(monkeypatch, slow, dtype):
    monkeypatch.setattr(ops, "_SLOW_ON_CPU", {dtype} if slow else set())
    weight = make(sym=False, dtype=dtype)
    x, bias = torch.randn(5, K, dtype=dtype), torch.randn(N, dtype=dtype)
    y = linear(x, *weight.tensors, bias, 4)
    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert y.dtype == dtype
    assert relative_error(y, expected) <= LINEAR[dtype]
    assert ops.product_dtype(x.device.type, dtype) == (torch.float32 if slow else dtype)
    assert ops.product_dtype("meta", dtype) == dtype


def test_linear_has_a_gradient_for_x():
    weight = make(dtype=torch.float64)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: linear(x, *weight.tensors, None, 4), x)


def test_a_handle_lives_as_long_as_its_weight():
    packed = PackedWeight(make(), Scheme(4, 32), None)
    handle, x = packed.handle, torch.randn(3, K)
    assert torch.equal(handle_linear(x, handle, None, N), packed.linear(x, None))
    del packed
    with pytest.raises(KeyError):
        handle_linear(x, handle, None, N)
