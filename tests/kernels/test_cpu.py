"""The int4 kernel of aten: the layout we read, and what happens where it is another."""

import pytest
import torch
from tolerances import LINEAR, SAME_KERNEL, relative_error

from gptq_fx import QuantizedWeight, Scheme, ops
from gptq_fx.kernels import (
    LinearSpec,
    block,
    choose_kernel,
    cpu,
    cpu_dequantize,
    cpu_experts,
    get_kernel,
    grouped,
)

SPEC = LinearSpec(64, 32, Scheme(4, 32), torch.bfloat16, "cpu")


@pytest.fixture
def here():
    if reason := cpu.available():
        pytest.skip(reason)


@pytest.fixture
def asked_anew():
    cpu.available.cache_clear()
    yield
    cpu.available.cache_clear()


def packed_codes(codes):
    """codes [K, N] in the layout of aten."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.T.contiguous().to(torch.int32), 2)


def random_codes(K, N):
    return torch.randint(16, (K, N), generator=torch.Generator().manual_seed(N))


def make(N, K=64, bits=4, size=32, sym=True):
    spec = LinearSpec(K, N, Scheme(bits, size, sym), torch.bfloat16, "cpu")
    rng = torch.Generator().manual_seed(N)
    codes = torch.randint(2**bits, (K, N), generator=rng)
    scales = (torch.rand(spec.groups, N, generator=rng) / 2**bits + 0.01).bfloat16()
    zeros = None if sym else torch.randint(2**bits, (spec.groups, N), generator=rng)
    return spec, QuantizedWeight.from_codes(codes, scales, zeros, bits)


@pytest.mark.parametrize("rest", [0, 16])
def test_the_layout_is_the_formula_of_the_docstring(here, rest):
    half, K = cpu.BLOCK // 2, 32
    N = 2 * cpu.BLOCK + rest
    codes = random_codes(K, N)
    flat = packed_codes(codes).flatten().tolist()
    for n in range(N):
        block, j = divmod(n, cpu.BLOCK)
        for k in range(K):
            if block < 2:
                byte, high = block * K * half + k * half + j % half, j >= half
            else:
                byte, high = 2 * K * half + k * (rest // 2) + j // 2, j % 2 == 1
            assert (flat[byte] >> 4 if high else flat[byte] & 15) == codes[k, n]


@pytest.mark.parametrize("N", [16, 32, 48, 64, 80, 112, 128, 208, 528])
def test_unpack_codes_reads_what_aten_packs(here, N):
    codes = random_codes(32, N)
    found = cpu.unpack_codes(packed_codes(codes))
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), codes)


def test_an_unknown_capability_gives_a_reason(monkeypatch, asked_anew):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
    monkeypatch.setattr(cpu, "BLOCK", cpu_dequantize.block())
    assert cpu.CPU_INT4.refuses(SPEC) == "the int4 layout for VSX is not known"
    kernel, why = choose_kernel(SPEC)
    assert kernel.name == "reference"
    assert "cpu_int4: the int4 layout for VSX is not known" in why


def test_another_layout_gives_a_reason(monkeypatch, here, asked_anew):
    monkeypatch.setattr(cpu, "BLOCK", 96 - cpu.BLOCK)
    assert cpu.CPU_INT4.refuses(SPEC) == "aten packs int4 weights in a layout that is not the known one"
    assert choose_kernel(SPEC)[0] is get_kernel("reference")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            LinearSpec(64, 32, Scheme(4, 32), torch.float32, "cpu"),
            "bfloat16 only, the model is torch.float32",
        ),
        (LinearSpec(64, 32, Scheme(8, 32), torch.bfloat16, "cpu"), "8-bit codes do not fit 4 bits"),
        (LinearSpec(64, 32, Scheme(4, 32, True, True), torch.bfloat16, "cpu"), "no act-order"),
        (LinearSpec(64, 40, Scheme(4, 32), torch.bfloat16, "cpu"), "out_features 40 is not a multiple of 16"),
        (LinearSpec(96, 32, Scheme(4, 48), torch.bfloat16, "cpu"), "group_size 48 is not a multiple of 32"),
        (LinearSpec(80, 32, Scheme(4, -1), torch.bfloat16, "cpu"), "group_size 80 is not a multiple of 32"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_it_refuses(spec, reason):
    assert reason in cpu.supports(spec)


def test_another_device_is_refused():
    spec = LinearSpec(64, 32, Scheme(4, 32), torch.bfloat16, "meta")
    assert cpu.CPU_INT4.refuses(spec) == "runs on cpu, the weight is on meta"


@pytest.mark.parametrize(
    ("size", "K", "runs_with"), [(-1, 96, 32), (-1, 512, 256), (192, 384, 64), (128, 256, 128)]
)
def test_the_group_it_runs_with_divides_the_group(here, size, K, runs_with):
    spec, weight = make(32, K, size=size)
    assert cpu.kernel_group(spec) == runs_with
    _, scales_mins = cpu.pack(weight, spec)
    assert scales_mins.shape == (K // runs_with, 32, 2)
    assert torch.equal(cpu.unpack(cpu.pack(weight, spec), spec).scales, weight.scales)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("N", [16, 208, 512 + 16, 2 * 512 + 64])
def test_few_rows_and_many_rows_agree(monkeypatch, here, N, bits, sym):
    spec, weight = make(N, bits=bits, sym=sym)
    tensors = cpu.pack(weight, spec)
    x = torch.randn(cpu.FEW_ROWS, 64).bfloat16()
    few = cpu.CPU_INT4.call(x, tensors, None, spec)
    monkeypatch.setattr(cpu, "FEW_ROWS", 0)
    monkeypatch.setattr(cpu, "CHUNK", 512 * 64)
    many = cpu.CPU_INT4.call(x, tensors, None, spec)
    assert relative_error(many, few) <= SAME_KERNEL[torch.bfloat16]


@pytest.mark.parametrize("fast", [True, False])
def test_many_rows_in_bf16_and_in_fp32(monkeypatch, here, fast):
    spec, weight = make(208)
    monkeypatch.setattr(ops, "_SLOW_ON_CPU", set() if fast else {torch.bfloat16})
    x = torch.randn(cpu.FEW_ROWS + 3, 64).bfloat16()
    wanted = x.double() @ weight.dequantize(torch.float64).T
    found = cpu.CPU_INT4.call(x, cpu.pack(weight, spec), None, spec)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, wanted) <= LINEAR[torch.bfloat16]


def test_the_number_of_rows_chooses_the_algorithm(here):
    spec, weight = make(32)
    tensors = cpu.pack(weight, spec)
    for rows, op in (
        (cpu.FEW_ROWS, "aten::_weight_int4pack_mm_for_cpu"),
        (cpu.FEW_ROWS + 1, "gptq::cpu_int4_many_rows"),
    ):
        with torch.profiler.profile() as profile:
            cpu.CPU_INT4.call(torch.randn(rows, 64).bfloat16(), tensors, None, spec)
        assert op in {event.name for event in profile.events()}


@pytest.mark.parametrize("bits", [2, 3])
def test_narrow_codes_are_stored_in_4_bits_and_the_report_says_so(here, bits):
    spec, weight = make(32, bits=bits)
    packed, _ = cpu.pack(weight, spec)
    assert packed.nbytes == 32 * 64 // 2
    assert choose_kernel(spec) == (cpu.CPU_INT4, f"{bits}-bit codes stored in 4 bits")
    assert torch.equal(cpu.unpack_codes(packed).long(), weight.codes().long() + 8 - 2 ** (bits - 1))


def test_4_bits_need_no_note(here):
    assert choose_kernel(SPEC) == (cpu.CPU_INT4, "")


# --- experts


def _stack(E, N, K=64, bits=4, sym=True):
    spec = LinearSpec(K, N, Scheme(bits, 32, sym), torch.bfloat16, "cpu", E)
    weights = [make(N, K, bits, sym=sym)[1] for _ in range(E)]
    stack = QuantizedWeight.stack(weights)
    return spec, stack, cpu.CPU_INT4.pack_all(stack, spec)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_rows_of_experts_against_float64(here, bits, sym):
    """By rows sorted by experts, and by rows that name their expert; some rows have none."""
    spec, stack, tensors = _stack(4, 128, bits=bits, sym=sym)
    dense, x = stack.dequantize(torch.float64), torch.randn(9, 64).bfloat16()
    ids = torch.tensor([3, 0, 0, 1, 2, 3, 3, 1, 0])
    wanted = torch.stack([row.double() @ dense[e].T for row, e in zip(x, ids, strict=True)])
    op, rest = grouped.call(cpu.CPU_INT4, "indexed", tensors, ids, spec)
    assert op.name() == "gptq::cpu_int4_indexed"
    assert relative_error(op(x, *rest), wanted) <= LINEAR[torch.bfloat16]
    ends = torch.tensor([2, 2, 5, 7], dtype=torch.int32)
    wanted = torch.zeros_like(wanted)
    for start, end, e in ((0, 2, 0), (2, 5, 2), (5, 7, 3)):
        wanted[start:end] = x[start:end].double() @ dense[e].T
    op, rest = grouped.call(cpu.CPU_INT4, "grouped", tensors, ends, spec)
    found = op(x, *rest)
    assert relative_error(found, wanted) <= LINEAR[torch.bfloat16]
    assert not found[7:].any()


def test_experts_of_few_and_of_many_rows_agree(monkeypatch, here):
    up, down = _stack(4, 128), _stack(4, 64, 64)
    x, ids, weights = torch.randn(5, 64).bfloat16(), torch.rand(5, 5).topk(3).indices, torch.rand(5, 3)
    biases = torch.randn(4, 128).bfloat16(), torch.randn(4, 64).bfloat16()
    results = []
    for pairs in (cpu_experts.FEW_PAIRS, 0):
        monkeypatch.setattr(cpu_experts, "FEW_PAIRS", pairs)
        args = [x, ids, weights.bfloat16(), list(up[2]), list(down[2]), *biases, "gpt_oss", [32], [32]]
        op, args = block.call(("cpu_int4", "cpu_int4"), args, up[0], down[0])
        assert op.name() == "gptq::cpu_int4_experts"
        results.append(op(*args))
    assert relative_error(*results) <= SAME_KERNEL[torch.bfloat16]


def test_outputs_that_fill_no_block_run_expert_by_expert(here):
    spec = LinearSpec(64, 48, Scheme(4, 32), torch.bfloat16, "cpu", 2)
    assert "not a multiple of" in cpu_experts.supports(spec)
    assert cpu.CPU_INT4.expert_ops(spec) is None


def test_without_a_compiler_experts_run_one_by_one(monkeypatch, here):
    spec, _, tensors = _stack(2, 64)
    x, ids = torch.randn(3, 64).bfloat16(), torch.tensor([1, 0, 1])
    op, rest = grouped.call(cpu.CPU_INT4, "indexed", tensors, ids, spec)
    wanted = op(x, *rest)
    monkeypatch.setattr(cpu_experts, "_compiled", lambda: None)
    assert relative_error(op(x, *rest), wanted) <= SAME_KERNEL[torch.bfloat16]
