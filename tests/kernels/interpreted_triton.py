"""The contract of kernels for our Triton kernels, by Triton's interpreter on the CPU.

test_triton.py runs this file in a process of its own, since TRITON_INTERPRET=1 must be set before Triton is
imported. By hand: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_triton.py
"""

import itertools
import os
from dataclasses import replace

import pytest
import test_contract as contract
import torch
from tolerances import LINEAR, relative_error

from gptq_fx.kernels.triton import TRITON, supports
from gptq_fx.kernels.triton.layout import pack
from gptq_fx.kernels.triton.weight import Packed
from gptq_fx.scheme import BITS

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1", allow_module_level=True)

from gptq_fx.kernels.triton import linear, matmul, spelled_out
from gptq_fx.kernels.triton.gemv import gemv
from gptq_fx.kernels.triton.route import route

HERE = replace(TRITON, device="cpu", available=lambda: None)
DTYPES = list(LINEAR)


def _in_pairs(*parameters):
    """Every combination of three values, each pair of them in one that is not slow."""
    first, second, third = parameters
    for (i, a), (j, b), (k, c) in itertools.product(enumerate(first), enumerate(second), enumerate(third)):
        yield pytest.param(a, b, c, marks=() if (i + j + k) % 2 == 0 else pytest.mark.slow)


# Groups of one, many and odd numbers of slabs; tails.
SHAPES = ((33, 96, 48), (24, 256, 64), (16, 72, -1), (16, 384, 128))


@pytest.mark.parametrize(("bits", "sym", "shape"), list(_in_pairs(BITS, (True, False), SHAPES)))
def test_every_algorithm_is_right(bits, sym, shape):
    """Each of them, whatever rows it is meant for."""
    N, K, size = shape
    algorithms = {gemv: (1, 3), matmul.matmul: (5, 40), spelled_out.spelled_out: (9,)}
    dtype = DTYPES[(SHAPES.index(shape) + bits + sym) % 3]
    spec = contract.make_spec("cpu", N, K, dtype, bits, size, sym)
    weight = contract.random_weight(spec)
    packed = Packed.of(pack(weight, spec), bits)
    W, bias = weight.dequantize(torch.float64), contract.normal(N, like=spec)
    for algorithm, rows in algorithms.items():
        for M in rows:
            x = contract.normal(M, K, like=spec)
            expected = x.double() @ W.T + bias.double()
            assert relative_error(algorithm(x, packed, bias), expected) <= LINEAR[dtype], (algorithm, M)


def test_tiles_of_every_size(monkeypatch):
    spec = contract.make_spec("cpu", 96, 256, torch.float16, 4, 128, True)
    weight = contract.random_weight(spec)
    packed = Packed.of(pack(weight, spec), 4)
    for M in (8, 30, 60, 130):
        x = contract.normal(M, 256, like=spec)
        found = matmul.matmul(x, packed, None)
        expected = x.double() @ weight.dequantize(torch.float64).T
        assert relative_error(found, expected) <= LINEAR[torch.float16], M
    # K in parts, and a weight that is spelled out in three steps, of which the last is shorter
    monkeypatch.setattr(matmul, "split", lambda programs, blocks, device: 2)
    assert relative_error(matmul.matmul(x, packed, None), expected) <= LINEAR[torch.float16]
    monkeypatch.setattr(spelled_out, "SPELLED_OUT", 1)
    spec = contract.make_spec("cpu", 300, 64, torch.float16, 4, 32, False)
    weight = contract.random_weight(spec)
    packed = Packed.of(pack(weight, spec), 4)
    x = contract.normal(7, 64, like=spec)
    expected = x.double() @ weight.dequantize(torch.float64).T
    assert relative_error(spelled_out.spelled_out(x, packed, None), expected) <= LINEAR[torch.float16]


def test_rows_decide_the_algorithm(monkeypatch):
    called = []
    for name in ("gemv", "matmul", "spelled_out"):
        monkeypatch.setattr(linear, name, lambda x, w, b, name=name: called.append(name) or x)
    spec = contract.make_spec("cpu", 16, 64, torch.float32, 4, -1, True)
    packed = Packed.of(pack(contract.random_weight(spec), spec), 4)
    for M in (1, linear.GEMV_ROWS, linear.GEMV_ROWS + 1, linear.MATMUL_ROWS, 5000):
        linear.linear(torch.zeros(M, 64), packed, None)
    assert called == ["gemv", "gemv", "matmul", "matmul", "spelled_out"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_and_strides_of_x(dtype):
    for rows in ((2, 3), (1, 1), (2, 2, 2)):
        contract.test_leading_dimensions_are_rows(HERE, "cpu", dtype, rows)
    contract.test_x_may_be_strided(HERE, "cpu", dtype)
    contract.test_the_op_on_fake_tensors_has_the_same_shape_and_dtype(HERE, "cpu", dtype, (2, 3))
    spec = contract.make_spec("cpu", 48, 64, dtype, 4, 32, True)
    tensors = HERE.pack(contract.random_weight(spec), spec)
    assert HERE.call(torch.empty(0, 64, dtype=dtype), tensors, None, spec).shape == (0, 48)


@pytest.mark.parametrize(("bits", "sym", "rows"), list(_in_pairs(BITS, (True, False), (3, 20))))
def test_stacks(bits, sym, rows):
    """Rows that read the weights of their own expert, and rows that are sorted."""
    dtype = DTYPES[(bits + sym) % 3]
    contract.check_stack(HERE, "cpu", bits, sym, dtype, 5, 64 if sym else 32, rows=(rows,))


def test_a_stack_of_many_experts():
    contract.check_stack(HERE, "cpu", 4, True, torch.bfloat16, 40, 32, rows=(4,))


BLOCKS = {  # bits, dtype, experts, group size, tokens
    "few experts": (4, torch.bfloat16, 6, 32, (1, 9)),
    "3 bits": (3, torch.float16, 6, 32, (9,)),
    "many experts": (4, torch.float32, 40, -1, (7,)),
}


def _blocks():
    """Each with each activation; those of one activation and of few experts are not slow."""
    for activation, name in itertools.product(contract.ACTIVATIONS, BLOCKS):
        fast = name == "few experts" or activation == "silu"
        yield pytest.param(activation, name, marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize(("activation", "name"), list(_blocks()))
def test_blocks(activation, name):
    bits, dtype, E, size, tokens = BLOCKS[name]
    sym = with_bias = activation != "silu"
    contract.check_block(
        HERE, "cpu", bits, sym, dtype, activation, with_bias, size, E, tokens=tokens, repeat=False
    )


@pytest.mark.parametrize(("slots", "experts"), [(1, 1), (7, 8), (64, 128), (700, 6), (4200, 20), (40, 1000)])
def test_route_sorts_as_a_stable_sort_does(slots, experts):
    rng = torch.Generator().manual_seed(slots)
    ids = torch.randint(experts + 1, (slots,), generator=rng)
    order, ends = route(ids, experts)
    counts = torch.bincount(ids, minlength=experts)[:experts]
    assert torch.equal(ends.long(), counts.cumsum(0))
    used = int(counts.sum())
    assert torch.equal(order[:used].long(), ids.argsort(stable=True)[:used])


def test_supported_specs_are_those_the_layout_can_hold():
    spec = contract.make_spec("cpu", 48, 96, torch.float16, 4, 24, True)
    assert "24 is not a multiple of 16" in supports(spec)
    assert supports(contract.make_spec("cpu", 48, 24, torch.float16, 4, -1, True)) is None
    odd = contract.make_spec("cpu", 7, 24, torch.float16, 4, -1, False)
    contract.check_numbers(HERE, odd, rows=(1, 20))
