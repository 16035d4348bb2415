"""The integer grid, and rounding to it."""

import pytest
import torch
from tolerances import NEAREST_CODE

from gptq_fx import Scheme, WeightError
from gptq_fx.grid import FLOATS, check_finite, find_grid, relative_error, round_to_nearest
from gptq_fx.scheme import BITS

every_grid = pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
every_width = pytest.mark.parametrize("bits", BITS)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def dense(N, K, dtype=torch.float32, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_width
@every_dtype
def test_symmetric_scale_is_twice_absmax_over_the_number_of_steps(bits, dtype):
    W = dense(6, 64, dtype)
    weight = round_to_nearest(W, Scheme(bits, 32))
    absmax = W.float().unflatten(1, (2, 32)).abs().amax(2).T
    assert torch.equal(weight.scales, (2 * absmax / (2**bits - 1)).to(dtype))
    assert weight.qzeros is None
    middle = weight.codes() == 2 ** (bits - 1)
    assert (weight.dequantize().mT[middle] == 0).all()


@every_width
@every_grid
@every_dtype
def test_codes_are_the_nearest_on_the_stored_scale(bits, sym, dtype):
    W = dense(5, 64, dtype, seed=bits)
    weight = round_to_nearest(W, Scheme(bits, 32, sym))
    steps = weight.scales.double().repeat_interleave(32, 0).mT
    zeros = 2 ** (bits - 1) if sym else weight.zeros().double().repeat_interleave(32, 0).mT
    every_value = torch.stack([steps * (c - zeros) for c in range(2**bits)])
    best = (every_value - W.double()).abs().amin(0)
    error = (weight.dequantize(torch.float64) - W.double()).abs()
    assert ((error - best) / steps).max() <= NEAREST_CODE


@every_width
def test_asymmetric_range_is_that_of_the_group(bits):
    W = dense(5, 64) + 0.5
    groups = W.unflatten(1, (2, 32))
    weight = round_to_nearest(W, Scheme(bits, 32, sym=False))
    spread = (groups.amax(2) - groups.amin(2)).T
    torch.testing.assert_close(weight.scales, spread / (2**bits - 1), rtol=1e-6, atol=0)
    half_a_step = weight.scales.repeat_interleave(32, 0).mT / 2
    assert ((weight.dequantize() - W).abs() <= half_a_step * 1.001).all()


@every_width
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_range_holds_0(bits, sign):
    W = sign * (5 + torch.rand(3, 32))
    weight = round_to_nearest(W, Scheme(bits, 32, sym=False))
    assert (weight.zeros() == (0 if sign > 0 else 2**bits - 1)).all()
    torch.testing.assert_close(weight.scales[0], W.abs().amax(1) / (2**bits - 1))


@every_width
@every_grid
@every_dtype
def test_a_group_of_zeros_stays_0(bits, sym, dtype):
    W = dense(4, 64, dtype)
    W[:, :32] = 0
    weight = round_to_nearest(W, Scheme(bits, 32, sym))
    assert (weight.scales[0] == 1).all()
    assert (weight.dequantize()[:, :32] == 0).all()
    assert weight.dequantize()[:, 32:].any()


@every_grid
@every_dtype
@pytest.mark.parametrize("bits", [2, 4])
def test_the_largest_finite_weight_stays_finite(bits, sym, dtype):
    W = torch.full((2, 32), torch.finfo(dtype).max, dtype=dtype)
    W[:, ::2] *= -1
    assert torch.isfinite(round_to_nearest(W, Scheme(bits, 32, sym)).scales).all()


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (-float("inf"), "Inf")]
)
@every_dtype
def test_a_value_that_is_not_finite_is_named_with_its_place(value, kind, dtype):
    W = dense(4, 32, dtype)
    W[2, 7] = W[3, 1] = value
    with pytest.raises(WeightError, match=rf"layers\.3\.up: {kind} among 2 non-finite.*first at \[2, 7\]"):
        round_to_nearest(W, Scheme(4, 32), "layers.3.up")


@pytest.mark.parametrize(
    ("weight", "found"),
    [
        (torch.ones(4, 32, dtype=torch.int32), r"torch.int32 \[4, 32\]"),
        (torch.ones(4, 32, dtype=torch.float64), r"torch.float64 \[4, 32\]"),
        (torch.ones(32), r"torch.float32 \[32\]"),
        (torch.ones(0, 32), r"torch.float32 \[0, 32\]"),
    ],
    ids=["integers", "double", "vector", "empty"],
)
def test_what_is_no_floating_point_matrix_is_refused(weight, found):
    with pytest.raises(WeightError, match=f"up: found {found}. Legal: a non-empty matrix of float32"):
        check_finite(weight, "up")


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(WeightError, match="up: group_size 32 does not divide its 48 input features"):
        round_to_nearest(torch.ones(4, 48), Scheme(4, 32), "up")


def test_group_size_minus_1_is_one_group_per_output():
    weight = round_to_nearest(dense(4, 80), Scheme(4, -1))
    assert weight.scales.shape == (1, 4)
    assert weight.group_size == 80


@every_grid
def test_experts_are_quantized_each_as_if_alone(sym):
    W = dense(6, 64).view(2, 3, 64)
    stacked = round_to_nearest(W, Scheme(4, 32, sym)).dequantize()
    alone = torch.stack([round_to_nearest(w, Scheme(4, 32, sym)).dequantize() for w in W])
    assert torch.equal(stacked, alone)


def test_the_weight_is_left_as_it_was():
    W = dense(4, 64)
    before = W.clone()
    round_to_nearest(W, Scheme(4, 32, sym=False))
    assert torch.equal(W, before)


def test_relative_error_is_the_frobenius_ratio():
    W = dense(4, 64)
    weight = round_to_nearest(W, Scheme(3, 32))
    expected = (weight.dequantize() - W).norm() / W.norm()
    assert relative_error(W, weight) == pytest.approx(float(expected), rel=1e-6)
    assert 0.05 < relative_error(W, weight) < 0.5


def test_find_grid_gives_zero_points_that_are_codes():
    groups = torch.randn(3, 32, 7) - 4
    scales, zeros = find_grid(groups, 4, False, torch.bfloat16)
    assert scales.shape == zeros.shape == (3, 7)
    assert scales.dtype == torch.bfloat16
    assert (zeros == zeros.round()).all()
    assert zeros.min() >= 0
    assert zeros.max() <= 15
