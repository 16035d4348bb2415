"""The Ascend kernel by emulation: what is asked of torch_npu, and what a right torch_npu answers."""

import os
import subprocess
import sys
from dataclasses import replace

import npu_emulation
import pytest
import test_contract as contract
import torch
from tolerances import LINEAR, relative_error
from torch.fx.experimental.proxy_tensor import make_fx

from gptq_fx import QuantizedWeight, Scheme, WeightError
from gptq_fx.kernels import LinearSpec, ascend, ascend_layout, registry
from gptq_fx.kernels.ascend import ascend_linear
from gptq_fx.merged import can_merge
from gptq_fx.scheme import BITS

# The same kernel for tensors of the CPU, where the emulation is.
HERE = replace(ascend.ASCEND, device="cpu")

DTYPES = [torch.float16, torch.bfloat16]

every_width = pytest.mark.parametrize("bits", BITS)
every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_group = pytest.mark.parametrize("size", [32, 64, 128, -1])


@pytest.fixture(scope="module", autouse=True)
def emulated():
    with npu_emulation.emulated():
        yield


def make_spec(K=256, N=64, bits=4, size=64, sym=True, dtype=torch.float16, act=False):
    return LinearSpec(K, N, Scheme(bits, size, sym, act), dtype, "cpu")


def make(spec, experts=None):
    """A weight, or a stack of them, in which every code and zero point occurs."""
    lead = () if experts is None else (experts,)
    K, N, G, bits = spec.in_features, spec.out_features, spec.groups, spec.scheme.bits
    codes = torch.randint(2**bits, (*lead, K, N))
    scales = ((torch.rand(*lead, G, N) + 0.1) / 2**bits).to(spec.dtype)
    zeros = None if spec.scheme.sym else torch.randint(2**bits, (*lead, G, N))
    g_idx = None
    if spec.scheme.desc_act:
        g_idx = (torch.randperm(K) // spec.group_size).to(torch.int32)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx)


def exact(weight, x, bias=None):
    y = x.double() @ weight.dequantize(torch.float64).mT
    return y if bias is None else y + bias.double()


def same(found, expected):
    """Whether two tuples of tensors are the same bits."""
    return all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b))
        for a, b in zip(found, expected, strict=True)
    )


# --- numbers


@every_width
@every_grid
@every_group
@every_dtype
@pytest.mark.parametrize("act", [False, True], ids=["", "desc_act"])
def test_numbers(bits, sym, size, dtype, act):
    spec = make_spec(bits=bits, size=size, sym=sym, dtype=dtype, act=act)
    weight = make(spec)
    tensors = ascend_layout.pack(weight, spec)
    bias = torch.randn(spec.out_features).to(dtype)
    for rows, b in [((1,), bias), ((5,), None), ((2, 3), bias), ((70,), bias)]:
        x = torch.randn(*rows, spec.in_features).to(dtype)
        y = HERE.call(x, tensors, b, spec)
        assert (y.shape, y.dtype) == ((*rows, spec.out_features), dtype)
        assert relative_error(y, exact(weight, x, b)) <= LINEAR[dtype]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_other_sign_of_the_offset_would_be_noticed(bits):
    """z - 2^(bits-1) in place of 2^(bits-1) - z: right where symmetric, and only there."""
    spec = make_spec(bits=bits, sym=False)
    weight, x = make(spec), torch.randn(5, spec.in_features).half()
    packed, scales, offsets, order = ascend_layout.pack(weight, spec)
    found = HERE.call(x, (packed, scales, -offsets, order), None, spec)
    assert relative_error(found, exact(weight, x)) > 1


@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_of_v1_and_v2_zero_points(bits):
    """offset = 2^(bits-1) - z, where z is what v2 stores and what v1 stores plus one."""
    from gptq_fx.weight import qzeros_from_v1, unpack_int32

    spec = make_spec(bits=bits, sym=False)
    weight = make(spec)
    # z = 0 is stored as a borrow from its neighbours: see test_weight.py
    zeros = weight.zeros().clamp_min(1)
    weight = QuantizedWeight.from_codes(weight.codes(), weight.scales, zeros, bits)
    _, _, offsets, _ = ascend_layout.pack(weight, spec)
    middle = 2 ** (bits - 1)
    assert torch.equal(offsets, (middle - weight.zeros().int()).to(offsets.dtype))
    v1 = weight.qzeros_v1()
    read = replace(weight, qzeros=qzeros_from_v1(v1, bits, spec.out_features))
    assert same(ascend_layout.pack(read, spec), ascend_layout.pack(weight, spec))
    stored = unpack_int32(v1.mT, bits, spec.out_features).mT
    assert torch.equal(offsets, (middle - 1 - stored).to(offsets.dtype))


@every_dtype
@pytest.mark.parametrize("bits", [4, 8])
def test_offsets_are_exact(bits, dtype):
    spec = make_spec(32, 2**bits, bits=bits, size=-1, sym=False, dtype=dtype)
    zeros = torch.arange(2**bits)[None]
    weight = QuantizedWeight.from_codes(
        torch.zeros(32, 2**bits), torch.ones(1, 2**bits, dtype=dtype), zeros, bits
    )
    assert torch.equal(ascend_layout.unpack(ascend_layout.pack(weight, spec), spec).zeros().long(), zeros)
    # w + offset lies between -(2^bits - 1) and 2^bits - 1: whole numbers that both dtypes hold
    x = torch.ones(1, 32, dtype=dtype)
    y = HERE.call(x, ascend_layout.pack(weight, spec), None, spec)
    assert torch.equal(y.double(), (-32.0 * zeros).to(dtype).double())


@every_width
@every_grid
@every_dtype
@pytest.mark.parametrize("size", [-1, 32, 48])
def test_the_contract_of_every_kernel(bits, sym, dtype, size):
    contract.test_numbers(HERE, "cpu", bits, sym, dtype, size)
    contract.test_unpack_undoes_pack_bit_by_bit(HERE, "cpu", bits, sym, dtype, size)
    if size != 48:
        contract.test_a_cut_of_a_merged_pack_is_the_pack_of_the_part(HERE, "cpu", bits, sym, dtype, size)


@every_dtype
def test_the_rest_of_the_contract(dtype):
    for rows in ((1,), (70,), (2, 3), (2, 2, 2)):
        contract.test_leading_dimensions_are_rows(HERE, "cpu", dtype, rows)
        contract.test_the_op_on_fake_tensors_has_the_same_shape_and_dtype(HERE, "cpu", dtype, rows)
    contract.test_x_may_be_strided(HERE, "cpu", dtype)
    contract.test_the_pack_is_no_larger_than_4_bits_and_its_grid(HERE, "cpu")


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_no_rows(rows):
    """The op takes no empty tensor, and is not asked to."""
    spec = make_spec()
    x = torch.empty(*rows, spec.in_features, dtype=spec.dtype)
    assert HERE.call(x, ascend_layout.pack(make(spec), spec), None, spec).shape == (*rows, spec.out_features)


# --- layout


def test_the_words_are_those_of_npu_convert_weight_to_int4pack():
    values = torch.randint(-8, 8, (16, 64), dtype=torch.int32)
    assert torch.equal(ascend_layout.pack_int4(values), torch.ops.npu.npu_convert_weight_to_int4pack(values))
    assert torch.equal(ascend_layout.unpack_int4(ascend_layout.pack_int4(values)), values)


def test_the_first_value_lies_in_the_low_bits():
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8]])
    assert ascend_layout.pack_int4(values).item() == 0x87654321 - 2**32


@every_width
@every_grid
def test_unpack_restores_act_order(bits, sym):
    spec = make_spec(bits=bits, sym=sym, act=True)
    weight = make(spec)
    tensors = ascend_layout.pack(weight, spec)
    assert not torch.equal(tensors[3], torch.arange(spec.in_features))
    assert same(ascend_layout.unpack(tensors, spec).tensors, weight.tensors)


def test_groups_of_unequal_size_are_no_runs_of_rows():
    spec = make_spec(act=True)
    weight = make(spec)
    g_idx = weight.g_idx.clone()
    g_idx[g_idx.argmax()] = 0
    with pytest.raises(WeightError, match=r"groups of 63 to 65 input features\. Legal here: 64 in each"):
        ascend_layout.pack(replace(weight, g_idx=g_idx), spec)


def test_symmetric_weights_have_no_offsets():
    spec = make_spec(bits=3)
    assert ascend_layout.pack(make(spec), spec)[2] is None


# --- refusals


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (make_spec(dtype=torch.float32), "x must be float16 or bfloat16, the model is torch.float32"),
        (make_spec(96, size=48), "group_size 48 is not a multiple of 32"),
        (make_spec(size=16), "group_size 16 is not a multiple of 32"),
        (make_spec(2**16), "in_features 65536 is more than 65535"),
        (make_spec(N=128256), "out_features 128256 is more than 65535"),
        (make_spec(N=20), "out_features 20 is not a multiple of 8, which share a word"),
        (make_spec(N=20, bits=2), "out_features 20 is not a multiple of 8, which share a word"),
        (make_spec(N=20, bits=8), None),
        (make_spec(48, size=-1), None),
        (make_spec(48, size=48), None),
        (make_spec(size=96, K=192, act=True), None),
    ],
)
def test_what_it_refuses(spec, reason):
    assert ascend.supports(spec) == reason
    if reason is None and spec.in_features * spec.out_features < 2**16:
        weight, x = make(spec), torch.randn(3, spec.in_features).half()
        y = HERE.call(x, ascend_layout.pack(weight, spec), None, spec)
        assert relative_error(y, exact(weight, x)) <= LINEAR[spec.dtype]


@pytest.mark.parametrize("size, given", [(-1, 0), (256, 0), (64, 64), (128, 128)])
def test_one_group_is_told_as_0(size, given):
    """The op refuses -1 and K."""
    assert ascend.op_group(make_spec(size=size)) == given


@pytest.mark.parametrize("group", [-1, 256, 48, 16])
def test_the_emulation_refuses_what_the_op_refuses(group):
    spec = make_spec()
    packed, scales, _, _ = ascend_layout.pack(make(spec), spec)
    x = torch.randn(3, 256).half()
    with pytest.raises(RuntimeError, match="antiquant_group_size"):
        torch.ops.npu.npu_weight_quant_batchmatmul(x, packed, scales, antiquant_group_size=group)


EIGHT_BITS_IN_GROUPS = (
    "npu_grouped_matmul takes 8-bit weights with one scale per output only, not with groups"
)


@pytest.mark.parametrize(
    ("bits", "experts", "note"),
    [
        (4, None, None),
        (8, None, None),
        (2, None, "2-bit codes stored in 4 bits"),
        (3, 4, "3-bit codes stored in 4 bits"),
        (8, 4, f"experts run one by one: {EIGHT_BITS_IN_GROUPS}"),
    ],
)
def test_what_the_report_says(bits, experts, note):
    assert ascend.note(replace(make_spec(bits=bits), experts=experts)) == note


# --- FRACTAL_NZ

HERE_NZ = replace(ascend.ASCEND_NZ, device="cpu")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (make_spec(), None),
        (make_spec(size=128, bits=2, sym=False), None),
        (make_spec(bits=3, act=True), None),
        (make_spec(bits=8), "8 bits"),
        (make_spec(size=32), "group_size 32 is neither 64 nor 128"),
        (make_spec(size=-1), "group_size -1 is neither 64 nor 128"),
        (make_spec(64, size=64), "group_size 64 is neither 64 nor 128"),  # one group
        (make_spec(N=96), "out_features 96 is not a multiple of 64"),
    ],
)
@every_dtype
def test_what_fits_becomes_fractal_nz(spec, reason, dtype):
    spec = replace(spec, dtype=dtype)
    weight, x, bias = make(spec), torch.randn(5, spec.in_features).to(dtype), torch.randn(spec.out_features)
    tensors = HERE_NZ.pack(weight, spec)
    assert getattr(tensors[0], "npu_format", "ND") == ("ND" if reason else "FRACTAL_NZ")
    noted = HERE_NZ.note(spec) or ""
    assert (f"in ND, not FRACTAL_NZ: {reason}" in noted) if reason else "ND" not in noted
    y = HERE_NZ.call(x, tensors, bias.to(dtype), spec)
    assert relative_error(y, exact(weight, x, bias.to(dtype))) <= LINEAR[dtype]
    assert same(HERE_NZ.unpack(tensors, spec).tensors, weight.tensors)


@pytest.mark.parametrize("size", [64, 128, -1])
@every_dtype
def test_fractal_nz_keeps_the_contract(size, dtype):
    for bits, sym in ((4, True), (4, False), (3, False), (8, False)):
        contract.test_numbers(HERE_NZ, "cpu", bits, sym, dtype, size)
        contract.test_unpack_undoes_pack_bit_by_bit(HERE_NZ, "cpu", bits, sym, dtype, size)
        contract.test_a_cut_of_a_merged_pack_is_the_pack_of_the_part(HERE_NZ, "cpu", bits, sym, dtype, size)


def test_the_emulation_refuses_fractal_nz_where_the_op_does():
    for spec in (make_spec(size=32), make_spec(size=-1), make_spec(N=96), make_spec(bits=8)):
        tensors = ascend_layout.pack_nz(make(spec), spec, True)
        with pytest.raises(RuntimeError, match="FRACTAL_NZ"):
            HERE_NZ.call(torch.randn(3, 256).half(), tensors, None, spec)


def test_fractal_nz_is_taken_only_by_name():
    here = replace(make_spec(), device="npu")
    assert [kernel.name for kernel in registry.kernels() if kernel.device == "npu"] == ["ascend", "ascend_nz"]
    assert can_merge([make_spec(), make_spec()], HERE)
    assert not can_merge([make_spec(), make_spec()], HERE_NZ)  # it cannot be cut
    assert ascend.ASCEND_NZ.supports(here) is ascend.ASCEND.supports(here) is None
    assert ascend.ASCEND_NZ.supports(replace(here, out_features=20)) == "as ascend"


# --- availability


def in_a_new_process(code, **env):
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, check=True
    )
    return run.stdout.strip().splitlines()[-1]


ASK = "from gptq_fx.kernels import ascend; import sys; print('torch_npu' in sys.modules, ascend.available())"


def test_without_torch_npu(tmp_path):
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = "
    hide += "lambda name, *a: None if name == 'torch_npu' else f(name, *a)\n"
    found = in_a_new_process(hide + ASK, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert found == "False torch_npu is not installed"


def test_torch_npu_that_is_there_and_not_imported(tmp_path):
    """gptq_fx does not import it, so that a broken one harms nobody who does not ask for it."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    found = in_a_new_process(ASK, PYTHONPATH=path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert found == (
        "False torch_npu is not imported, and TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from doing so"
    )


def test_a_torch_npu_without_the_op(monkeypatch):
    monkeypatch.setattr(torch._C, "_jit_get_schemas_for_operator", lambda name: [])
    monkeypatch.setitem(sys.modules, "torch_npu", None)
    assert ascend.available() == "this torch_npu has no npu_weight_quant_batchmatmul"
    monkeypatch.delitem(sys.modules, "torch_npu")
    monkeypatch.setattr(ascend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert ascend.available() == "torch_npu is not imported; `import torch_npu` tells what it misses"


def test_another_device_is_refused():
    assert ascend.ASCEND.refuses(make_spec()) == "runs on npu, the weight is on cpu"
    assert registry.choose_kernel(make_spec())[0].name == "reference"


# --- compilers


@every_grid
def test_tracing_shows_the_op_of_torch_npu_and_nothing_of_the_reference(sym):
    spec = make_spec(sym=sym, dtype=torch.bfloat16, act=True)
    tensors = ascend_layout.pack(make(spec), spec)
    bias = torch.randn(spec.out_features).bfloat16()

    def call(x, *tensors):
        return HERE.call(x, tensors[:-1], tensors[-1], spec)

    x = torch.randn(2, 3, 256).bfloat16()
    graph = make_fx(call, tracing_mode="symbolic")(x, *tensors, bias)
    names = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert [n for n in names if n.startswith("npu.")] == ["npu.npu_weight_quant_batchmatmul.default"]
    assert names.count("aten.index_select.default") == 1
    more = torch.randn(4, 5, 256).bfloat16()
    assert torch.equal(graph(more, *tensors, bias), call(more, *tensors, bias))


@pytest.mark.parametrize("rows", [(2, 3), (40,)], ids=str)
def test_opcheck(rows):
    spec = make_spec(sym=False, act=True)
    tensors = ascend_layout.pack(make(spec), spec)
    x, bias = torch.randn(*rows, 256).half(), torch.randn(64).half()
    torch.library.opcheck(ascend_linear, (x, *tensors, bias, 64))
