"""The kernel of humming-kernels without a GPU: its layout, its ops by emulation, what is missing where."""

import importlib.metadata
import importlib.util
import itertools

import humming_emulation
import pytest
import test_contract as contract
import torch
from humming_emulation import HERE
from tolerances import LINEAR, relative_error
from torch import nn

from gptq_fx import KernelError, QuantizedWeight, Scheme, quantize
from gptq_fx.kernels import LinearSpec, choose_kernel, humming, humming_experts, humming_library, registry
from gptq_fx.kernels.humming_layout import pack
from gptq_fx.kernels.humming_library import Problem
from gptq_fx.scheme import BITS

DTYPES = [torch.float16, torch.bfloat16]

every_width = pytest.mark.parametrize("bits", BITS)
every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def emulated():
    with humming_emulation.emulated():
        yield


def make_spec(K=256, N=128, bits=4, size=64, sym=True, dtype=torch.bfloat16, experts=None, act=False):
    return LinearSpec(K, N, Scheme(bits, size, sym, act), dtype, "cpu", experts)


def make(spec):
    lead = () if spec.experts is None else (spec.experts,)
    K, N, G, bits = spec.in_features, spec.out_features, spec.groups, spec.scheme.bits
    codes = torch.randint(2**bits, (*lead, K, N))
    scales = ((torch.rand(*lead, G, N) + 0.1) / 2**bits).to(spec.dtype)
    zeros = None if spec.scheme.sym else torch.randint(2**bits, (*lead, G, N))
    return QuantizedWeight.from_codes(codes, scales, zeros, bits)


# --- layout


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_words_are_as_the_module_says(bits):
    spec = make_spec(K=128, N=256, bits=bits, dtype=torch.float16)
    weight = make(spec)
    words, scales, zeros = pack(weight, spec)
    codes = weight.codes()
    assert zeros is None
    assert words.shape == (128 // 16, 256 * bits // 2)
    for tile_k, tile_n, lane in [(0, 0, 0), (1, 2, 13), (3, 3, 31)]:
        mine = [
            int(codes[16 * tile_k + 8 * a + 2 * (lane % 4) + b, 64 * tile_n + 16 * c + 8 * d + lane // 4])
            for c, d, a, b in itertools.product(range(4), range(2), range(2), range(2))
        ]
        count = 32 // bits
        for j in range(bits):
            shared = mine[j * count : (j + 1) * count]
            expected = sum(code << bits * i for i, code in enumerate(shared[::2] + shared[1::2]))
            assert int(words[tile_k, (32 * tile_n + lane) * bits + j]) & 0xFFFFFFFF == expected
    place = torch.arange(256).view(-1, 8, 8).mT.flatten()
    assert torch.equal(scales, weight.scales[:, place])


def test_codes_of_8_bits_get_a_sign_for_bfloat16():
    codes = torch.arange(256).repeat(128, 1).T.contiguous()
    scales = torch.ones(1, 128, dtype=torch.bfloat16)
    spec = make_spec(K=256, N=128, bits=8, size=-1)
    stored = humming.unpack(
        pack(QuantizedWeight.from_codes(codes, scales, None, 8), spec),
        make_spec(256, 128, 8, -1, dtype=torch.float16),
    )
    assert stored.codes()[:, 0].tolist() == [255 - q if q < 128 else q - 128 for q in range(256)]


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 128])
def test_unpack_undoes_pack(bits, sym, dtype, size):
    contract.test_unpack_undoes_pack_bit_by_bit(HERE, "cpu", bits, sym, dtype, size)


@every_width
@every_grid
@every_dtype
def test_unpack_undoes_pack_of_stacks(bits, sym, dtype, monkeypatch):
    spec = make_spec(N=200, bits=bits, sym=sym, dtype=dtype, experts=5)
    weight = make(spec)
    at_once = pack(weight, spec)
    monkeypatch.setattr("gptq_fx.kernels.humming_layout.CHUNK", 2 * 256 * 200)
    tensors = pack(weight, spec)
    one = make_spec(N=200, bits=bits, sym=sym, dtype=dtype)
    for whole, again, *parts in zip(
        at_once, tensors, *(pack(weight.expert(e), one) for e in range(5)), strict=True
    ):
        assert (whole is None) == (again is None)
        if whole is not None:
            assert torch.equal(whole, again)
            assert torch.equal(whole, torch.stack(parts))
    back = HERE.unpack_all(tensors, spec)
    for name in ("qweight", "scales", "qzeros"):
        before, after = getattr(weight, name), getattr(back, name)
        assert (before is None and after is None) or torch.equal(before, after)


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32])
def test_a_cut_is_the_pack_of_the_part(bits, sym, dtype, size):
    contract.test_a_cut_of_a_merged_pack_is_the_pack_of_the_part(HERE, "cpu", bits, sym, dtype, size)


def test_the_format_does_not_hang_on_the_codes():
    """The library re-encodes a layer in which no code is 0; here the same words hold the same codes."""
    spec = make_spec()
    full = make(spec)
    without = QuantizedWeight.from_codes(full.codes().clamp_min(1), full.scales, None, 4)
    a, b = humming.unpack(pack(without, spec), spec), humming.unpack(pack(full, spec), spec)
    assert torch.equal(a.codes(), without.codes())
    assert torch.equal(b.codes(), full.codes())


# --- ops


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 128])
@pytest.mark.parametrize("N", [256, 200])
def test_numbers(bits, sym, dtype, size, N):
    contract.check_numbers(HERE, make_spec(256, N, bits, size, sym, dtype))


@every_dtype
def test_x_in_other_forms(dtype):
    contract.test_leading_dimensions_are_rows(HERE, "cpu", dtype, (2, 3))
    contract.test_x_may_be_strided(HERE, "cpu", dtype)
    contract.test_the_op_on_fake_tensors_has_the_same_shape_and_dtype(HERE, "cpu", dtype, (2, 3))


def test_no_rows():
    spec = make_spec()
    y = HERE.call(torch.empty(2, 0, 256, dtype=spec.dtype), pack(make(spec), spec), None, spec)
    assert y.shape == (2, 0, 128)


@every_grid
@every_dtype
@pytest.mark.parametrize("S", [0, 1, 40])
def test_grouped_and_indexed(sym, dtype, S):
    spec = make_spec(N=200, sym=sym, dtype=dtype, experts=5)
    weight = make(spec)
    tensors, W = pack(weight, spec), weight.dequantize(torch.float64)
    x, ids = torch.randn(S, 256).to(dtype), torch.randint(5, (S,))
    expected = (x.double()[:, None] @ W[ids].mT)[:, 0]
    ops = humming_experts.EXPERTS
    y = ops.indexed(x, *tensors, ids, *HERE.op_args(spec))
    assert y.shape == (S, 200)
    ids = ids.sort().values
    used = S * 3 // 4
    ends = torch.searchsorted(ids[:used], torch.arange(5), right=True).to(torch.int32)
    z = ops.grouped(x, *tensors, ends, *HERE.op_args(spec))
    assert not z[used:].any()
    if S:
        assert relative_error(y, expected) <= LINEAR[dtype]
        sorted_expected = (x.double()[:, None] @ W[ids].mT)[:used, 0]
        assert used == 0 or relative_error(z[:used], sorted_expected) <= LINEAR[dtype]


@pytest.mark.parametrize("T", [3, 90], ids=["indexed", "grouped"])
@pytest.mark.parametrize("activation", humming_experts.ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_block(T, activation, bias):
    E, k, H, inner = 5, 2, 256, 128
    up, down = make_spec(H, 2 * inner, experts=E), make_spec(inner, H, experts=E)
    weights = [make(up), make(down)]
    assert humming_experts.block_supports(up, down, activation) is None
    x, scores = torch.randn(T, H).bfloat16(), torch.rand(T, k)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(T)])
    ids[0, 1] = E  # no expert
    biases = [torch.randn(E, 2 * inner).bfloat16(), torch.randn(E, H).bfloat16()] if bias else [None, None]
    found = humming_experts.humming_block(
        x, ids, scores, *(pack(w, s) for w, s in zip(weights, (up, down), strict=True)), *biases, activation,
        HERE.op_args(up), HERE.op_args(down),
    )  # fmt: skip
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t, j in itertools.product(range(T), range(k)):
        e = int(ids[t, j])
        if e < E:
            W = [weight.expert(e).dequantize(torch.float64).T for weight in weights]
            both = x[t].double() @ W[0]
            both = both if biases[0] is None else both + biases[0][e].double()
            y = (
                humming_emulation.act(both[None], activation)[0]
                @ weights[1].expert(e).dequantize(torch.float64).T
            )
            expected[t] += scores[t, j] * (y if biases[1] is None else y + biases[1][e].double())
    assert relative_error(found, expected) <= 2 * LINEAR[torch.bfloat16]


def test_block_refusals():
    up, down = make_spec(256, 256, experts=4), make_spec(128, 256, experts=4)
    assert "relu" in humming_experts.block_supports(up, down, "relu")
    assert "twice" in humming_experts.block_supports(up, up, "silu")


# --- compiled models


class Attention(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(256, n, bias=n == 256, dtype=dtype) for n in (256, 128, 128))
        self.o = nn.Linear(256, 256, bias=False, dtype=dtype)

    def forward(self, x):
        return self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], -1))


@pytest.fixture
def here(monkeypatch):
    """The kernel registered for the CPU, before every other; the specs that it was told to prepare."""
    from dataclasses import replace

    told = []
    kernel = replace(HERE, order=1, prepare=told.append)
    monkeypatch.setitem(registry._KERNELS, "humming", kernel)
    return told


def test_a_model_is_merged_prepared_and_right(here, plans):
    model = Attention().eval()
    quantize(model)
    x = torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="gptq", options={"inner_backend": "eager"})
        found = compiled(x)
        assert relative_error(found, expected) <= 2 * LINEAR[torch.bfloat16]
        assert relative_error(model(x), expected) <= 2 * LINEAR[torch.bfloat16]  # parts of a merged pack
    assert sorted(spec.out_features for (specs,) in [here] for spec in specs) == [256, 512]
    assert {o.kernel.name for o in plans[0].operands} == {"humming"}
    assert model.q.weight.packed.merged is model.v.weight.packed.merged is not None


# --- what it refuses


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"act": True}, "act-order"),
        ({"size": 16}, "group_size 16"),
        ({"K": 48, "size": 48}, "in_features 48"),
        ({"N": 130}, "out_features 130"),
        ({"dtype": torch.float32}, "float32"),
    ],
    ids=str,
)
def test_refusals(change, reason):
    assert reason in humming.supports(make_spec(**change))


def test_bfloat16_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(humming_library, "_capability", lambda: (7, 5))
    assert "compute capability 8.0" in humming.supports(make_spec())
    assert humming.supports(make_spec(dtype=torch.float16)) is None


@pytest.fixture
def machine(monkeypatch):
    """A machine that has everything; a test takes something away."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: humming_library.VERSION)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setattr(humming_library, "_missing_compiler", lambda: None)
    humming_library.available.cache_clear()
    yield monkeypatch
    humming_library.available.cache_clear()


def gone(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        (importlib.util, "find_spec", lambda name: None, "pip install humming-kernels==0.1.19"),
        (importlib.metadata, "version", gone, "not humming-kernels"),
        (importlib.metadata, "version", lambda name: "0.2.0", "0.2.0, this kernel knows 0.1.19 only"),
        (torch.version, "cuda", None, "not built for NVIDIA"),
        (torch.cuda, "is_available", lambda: False, "no NVIDIA GPU"),
        (torch.cuda, "get_device_capability", lambda *device: (7, 0), "7.0 is below 7.5"),
    ],
)
def test_what_is_missing_is_said(machine, where, name, value, reason):
    assert humming_library.available() is None
    humming_library.available.cache_clear()
    machine.setattr(where, name, value)
    assert reason in humming_library.available()


def test_missing_headers_are_said(machine):
    machine.undo()
    machine.setattr(torch.version, "cuda", "13.0")

    def broken():
        raise RuntimeError("No suitable CUDA 13 environment found")

    machine.setattr(humming_library, "_import", broken)
    reason = humming_library._missing_compiler()
    assert "No suitable CUDA 13 environment found" in reason
    assert "humming-kernels[cu13]" in reason


def test_nothing_is_imported_for_other_devices(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail(f"looked for {name}"))
    kernel, _ = choose_kernel(make_spec())
    assert kernel.name != "humming"


def test_a_forced_kernel_gives_every_reason():
    with pytest.raises(KernelError, match="humming: runs on cuda, the weight is on cpu") as error:
        choose_kernel(make_spec(), "humming", "model.q_proj")
    for name in ("model.q_proj", "reference", "ascend"):
        assert name in str(error.value)


# --- tables of compiled kernels


@pytest.fixture
def compiler(monkeypatch):
    """In place of the library's heuristics and compiler: tiles of 8 rows up to 16, of 64 up to all."""
    compiled = []

    def compile_one(problem, config):
        if config["block_shape"][0] == 64 and problem.in_features == 999:
            raise RuntimeError("ptxas failed")
        compiled.append((problem, config))
        return 1000 + len(compiled)

    def steps(problem):
        rows = humming_library.EXPERT_ROWS if problem.experts else humming_library.ROWS
        return [
            (0, 16, {"block_shape": (8, 128, 64)}),
            (16, rows[-1], {"block_shape": (64, 128, 64), "num_sms": 7}),
        ]

    monkeypatch.setattr(humming_library, "_import", lambda: None)
    monkeypatch.setattr(humming_library, "_compile", compile_one)
    monkeypatch.setattr(humming_library, "_steps", steps)
    monkeypatch.setattr(humming_library, "_sms", lambda device: 132)
    monkeypatch.setattr(humming_library, "locks", lambda device, stream: None)
    monkeypatch.setattr(humming_library, "_TABLES", {})
    monkeypatch.setitem(
        __import__("sys").modules,
        "humming.utils.cpu",
        type("cpu", (), {"get_parallel_build_workers": lambda: 2}),
    )
    return compiled


def a_problem(**change):
    fields = dict(
        device=0, in_features=256, out_features=128, padding=0, bits=4, group_size=64, zeros=False,
        dtype=torch.bfloat16, experts=0, form="dense",
    )  # fmt: skip
    return Problem(**fields | change)


def test_a_table_is_compiled_once(compiler):
    problems = [a_problem(), a_problem(bits=8), a_problem()]
    humming_library.prepare(problems)
    assert len(compiled := list(compiler)) == 4
    humming_library.prepare(problems)
    assert compiler == compiled
    table = humming_library._TABLES[a_problem()]
    assert table.configs.dtype == torch.int64
    rows = table.configs.view(-1, 4).tolist()
    assert [row[:2] for row in rows] == [[0, 16], [16, humming_library.ROWS[-1]]]
    assert [row[3] for row in rows] == [132, 7]
    assert (table.tile(1), table.tile(16), table.tile(17)) == (8, 8, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 8},
        {"zeros": True},
        {"group_size": 128},
        {"dtype": torch.float16},
        {"padding": 8},
        {"device": 1},
    ],
)
def test_what_is_prepared_hangs_on_all_of_the_configuration(compiler, change):
    humming_library.prepare([a_problem()])
    before = len(compiler)
    humming_library.prepare([a_problem(**change)])
    assert len(compiler) == before + 2


def test_a_failure_names_the_problem(compiler):
    with pytest.raises(KernelError, match=r"in_features=999.*ptxas failed"):
        humming_library.prepare([a_problem(in_features=999)])
    assert not humming_library._TABLES
