"""The canonical form: packing is the identity, and the layout is what checkpoints hold."""

import re
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import DEQUANTIZE

from gptq_fx import QuantizedWeight, WeightError
from gptq_fx.scheme import BITS
from gptq_fx.weight import pack_int32, packed_rows, qzeros_from_v1, unpack_int32

FEW = settings(max_examples=60, deadline=None)
all_bits = st.sampled_from(BITS)


def random_codes(shape, bits, seed):
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def codes_of_any_shape(draw):
    bits = draw(all_bits)
    shape = (*draw(st.sampled_from([(), (1,), (3,)])), draw(st.integers(1, 70)), draw(st.integers(1, 5)))
    return random_codes(shape, bits, draw(st.integers(0, 2**32))), bits


@st.composite
def weights(draw):
    """A small QuantizedWeight, and the plain tensors (codes, zeros) it was made of."""
    bits, sym = draw(all_bits), draw(st.booleans())
    lead = draw(st.sampled_from([(), (2,)]))
    groups, size = draw(st.integers(1, 4)), draw(st.sampled_from([8, 24, 32]))
    N, K, seed = draw(st.integers(1, 9)), groups * size, draw(st.integers(0, 2**32))
    codes = random_codes((*lead, K, N), bits, seed)
    zeros = None if sym else random_codes((*lead, groups, N), bits, seed + 1)
    rng = torch.Generator().manual_seed(seed + 2)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    scales = (torch.rand(*lead, groups, N, generator=rng) + 0.01).to(dtype)
    g_idx = None
    if draw(st.booleans()):
        order = torch.rand(*lead, K, generator=rng).argsort(-1)
        g_idx = (order // size).to(torch.int32)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx), codes, zeros


@FEW
@given(codes_of_any_shape())
def test_unpack_undoes_pack(case):
    codes, bits = case
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*codes.shape[:-2], packed_rows(codes.shape[-2], bits), codes.shape[-1])
    assert torch.equal(unpack_int32(packed, bits, codes.shape[-2]).long(), codes)


@FEW
@given(codes_of_any_shape())
def test_layout_is_a_little_endian_bit_stream(case):
    codes, bits = case
    rows, columns = codes.shape[-2:]
    packed = pack_int32(codes, bits).reshape(-1, packed_rows(rows, bits), columns)
    for e, matrix in enumerate(codes.reshape(-1, rows, columns).tolist()):
        for c in range(columns):
            stream = sum(matrix[r][c] << (r * bits) for r in range(rows))
            words = [(stream >> (32 * w)) & 0xFFFFFFFF for w in range(ceil(rows * bits / 32))]
            assert [w & 0xFFFFFFFF for w in packed[e, :, c].tolist()] == words


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
def test_shapes_are_those_of_the_docstring(bits, lead):
    K, N, G = 96, 10, 3
    weight = QuantizedWeight.from_codes(
        random_codes((*lead, K, N), bits, 0),
        torch.ones(*lead, N, G).mT,
        random_codes((*lead, G, N), bits, 1),
        bits,
        torch.zeros(*lead, K, dtype=torch.int32),
    )
    rows = re.findall(r"^ +(\w+) +(int32|float) \[\*, (.+?)\]", QuantizedWeight.__doc__, re.MULTILINE)
    assert [name for name, _, _ in rows] == ["qweight", "scales", "qzeros", "g_idx"]
    for name, dtype, shape in rows:
        dims = eval(f"({shape},)", {"ceil": ceil, "K": K, "N": N, "G": G, "bits": bits})
        tensor = getattr(weight, name)
        assert tensor.shape == (*lead, *dims), name
        assert tensor.dtype == (torch.int32 if dtype == "int32" else torch.float32), name
        assert tensor.is_contiguous(), name
    assert weight.codes().shape == (*lead, K, N)
    assert weight.zeros().shape == (*lead, G, N)
    assert weight.dequantize().shape == (*lead, N, K)
    assert (weight.in_features, weight.out_features, weight.group_size) == (K, N, K // G)


@FEW
@given(weights())
def test_codes_and_zeros_come_back(case):
    weight, codes, zeros = case
    assert torch.equal(weight.codes().long(), codes)
    if zeros is None:
        assert weight.zeros() is None
    else:
        assert torch.equal(weight.zeros().long(), zeros)


@FEW
@given(weights())
def test_dequantize_is_the_equation(case):
    weight, codes, zeros = case
    groups = weight.scales.shape[-2]
    K, N = codes.shape[-2:]
    exact = torch.empty(*codes.shape[:-2], N, K, dtype=torch.float64)
    for e in [()] if codes.ndim == 2 else [(i,) for i in range(codes.shape[0])]:
        for k in range(K):
            g = k // (K // groups) if weight.g_idx is None else int(weight.g_idx[(*e, k)])
            for n in range(N):
                z = 2 ** (weight.bits - 1) if zeros is None else int(zeros[(*e, g, n)])
                s = float(weight.scales[(*e, g, n)])
                exact[(*e, n, k)] = s * (int(codes[(*e, k, n)]) - z)
    assert torch.equal(weight.dequantize(torch.float64), exact)
    dense = weight.dequantize()
    assert dense.dtype == weight.scales.dtype
    limit = DEQUANTIZE[dense.dtype] * exact.abs().max()
    assert (dense.double() - exact).abs().max() <= limit


def with_zeros(zeros, bits):
    """A weight of the zero points [G, N], all codes 0."""
    zeros = torch.as_tensor(zeros)
    G, N = zeros.shape
    return QuantizedWeight.from_codes(torch.zeros(8 * G, N), torch.ones(G, N), zeros, bits)


@pytest.mark.parametrize("bits", BITS)
def test_v1_zero_points_round_trip_for_every_value(bits):
    values = torch.arange(2**bits).repeat(2)[None, :-1]  # a count that fills no word
    weight = with_zeros(values, bits)
    assert torch.equal(qzeros_from_v1(weight.qzeros_v1(), bits, values.shape[1]), weight.qzeros)


@pytest.mark.parametrize("bits", BITS)
def test_v1_stores_one_less_where_no_zero_point_is_0(bits):
    values = torch.arange(1, 2**bits).repeat(32)[None]
    stored = unpack_int32(with_zeros(values, bits).qzeros_v1().mT, bits, values.shape[1]).mT
    assert torch.equal(stored, values - 1)


@pytest.mark.parametrize("bits, ones", [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_v1_is_arithmetic_on_whole_words(bits, ones):
    """A zero point of 0 borrows from the field above it, as in the files of the known writers."""
    values = random_codes((5, 64), bits, 0)
    values[:, ::7] = 0
    weight = with_zeros(values, bits)
    wanted = (weight.qzeros.long() - ones) % 2**32
    assert torch.equal(weight.qzeros_v1().long() % 2**32, wanted)
    assert torch.equal(qzeros_from_v1(weight.qzeros_v1(), bits, 64), weight.qzeros)


def test_v1_zero_points_of_3_bits_wrap_by_themselves():
    stored = unpack_int32(with_zeros([[0, 1, 0, 7]], 3).qzeros_v1().mT, 3, 4).mT
    assert stored.tolist() == [[7, 0, 7, 6]]


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_weights_write_out_their_v1_zero_points(bits):
    weight = QuantizedWeight.from_codes(torch.zeros(16, 5), torch.ones(2, 5), None, bits)
    stored = unpack_int32(weight.qzeros_v1().mT, bits, 5).mT
    assert stored.shape == (2, 5)
    assert (stored == 2 ** (bits - 1) - 1).all()
    written = qzeros_from_v1(weight.qzeros_v1(), bits, 5)
    same = QuantizedWeight(bits, 16, weight.qweight, weight.scales, written)
    assert torch.equal(same.dequantize(), weight.dequantize())


def test_to_changes_the_scales_only():
    codes, zeros = random_codes((16, 4), 4, 0), random_codes((1, 4), 4, 1)
    weight = QuantizedWeight.from_codes(codes, torch.rand(1, 4), zeros, 4)
    half = weight.to(dtype=torch.bfloat16)
    assert half.scales.dtype == torch.bfloat16
    assert torch.equal(half.qweight, weight.qweight)
    assert torch.equal(half.qzeros, weight.qzeros)


@pytest.mark.parametrize("scales", [(3, 4), (2, 5)], ids=["groups that do not divide K", "another N"])
def test_codes_and_scales_that_do_not_fit_are_refused(scales):
    with pytest.raises(WeightError, match=rf"codes \[16, 4\].*scales \[{scales[0]}, {scales[1]}\].*Legal"):
        QuantizedWeight.from_codes(torch.zeros(16, 4), torch.ones(scales), None, 4)
