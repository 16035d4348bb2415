"""gptq_fx.gptq: the algorithm on plain tensors, against a textbook one and against rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_fx.errors import CalibrationError
from gptq_fx.gptq import Result, Settings, gptq, inverse_factor
from gptq_fx.grid import find_grid, round_to_grid, round_to_nearest
from gptq_fx.hessian import Hessian, check
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight

PLAIN = Settings(scale_search=False, gptaq=0.0, act_group_aware=False)
STATIC = Settings(static_groups=True, scale_search=False)


def inputs(K: int, tokens: int = 512, seed: int = 0, outliers: int = 0) -> Tensor:
    """x [tokens, K] with correlated features, some of them `outliers` twenty times as large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + 0.5 * torch.eye(K)
    x = torch.randn(tokens, K, generator=generator) @ mix
    loud = torch.randperm(K, generator=generator)[:outliers]
    x[:, loud] *= 20
    return x


def weights(N: int, K: int, seed: int = 1) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def hessian(x: Tensor, original: Tensor | None = None) -> Hessian:
    made = Hessian(x.shape[1])
    made.add(x, original)
    return made


def dense(result: Result, bits: int) -> Tensor:
    return QuantizedWeight.from_codes(
        result.codes, result.scales, result.zeros, bits, result.g_idx
    ).dequantize()


def solve(W: Tensor, x: Tensor, scheme: Scheme, how: Settings) -> Tensor:
    return dense(gptq(W, hessian(x), scheme, how, torch.float32), scheme.bits)


def output_error(W: Tensor, Wq: Tensor, x: Tensor) -> float:
    return float((x.double() @ (W - Wq).double().T).norm() / (x.double() @ W.double().T).norm())


# --- the textbook: one column at a time, the inverse of what is left written out, float64


def textbook(W: Tensor, H: Tensor, bits: int, group_size: int, sym: bool, damp: float) -> Tensor:
    W, H = W.double().clone(), H.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    Wq = torch.empty_like(W)
    for i in range(W.shape[1]):
        if i % group_size == 0:
            group = W[:, i : i + group_size].T[None].float()
            scales, zeros = find_grid(group, bits, sym, torch.float32)
        codes = round_to_grid(W[:, i][None, None].float(), scales, zeros, bits)[0, 0].double()
        z = 2 ** (bits - 1) if zeros is None else zeros[0].double()
        Wq[:, i] = scales[0].double() * (codes - z)
        Hinv = torch.linalg.inv(H[i:, i:])  # of the columns that are still free
        error = (W[:, i] - Wq[:, i]) / Hinv[0, 0]
        W[:, i:] -= error[:, None] * Hinv[0]
    return Wq


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("K", "group_size"), [(64, 16), (160, 32), (192, 48), (320, 160), (96, 96)])
def test_same_as_the_textbook(K: int, group_size: int, sym: bool) -> None:
    W, x = weights(24, K), inputs(K)
    found = solve(W, x, Scheme(4, group_size, sym), PLAIN)
    wanted = textbook(W, hessian(x).matrix / len(x), 4, group_size, sym, PLAIN.damp_percent)
    rows = ((found - wanted).abs() < 1e-3).all(1).float().mean()
    assert rows > 0.8  # a tie may fall either way, and the rest of its row follows


# --- properties


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from((3, 4, 8)),
    group_size=st.sampled_from((-1, 16, 32, 48, 64)),
    sym=st.booleans(),
    desc_act=st.booleans(),
    static=st.booleans(),
    aware=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_output_error_below_rounding_weight_error_above(
    bits: int, group_size: int, sym: bool, desc_act: bool, static: bool, aware: bool, seed: int
) -> None:
    K = 192
    W, x = weights(32, K, seed), inputs(K, seed=seed + 1, outliers=4)
    scheme = Scheme(bits, group_size, sym, desc_act)
    how = Settings(0.01, aware, static, scale_search=False, gptaq=0.0)
    found = solve(W, x, scheme, how)
    rounded = round_to_nearest(W, Scheme(bits, group_size, sym)).dequantize()
    assert output_error(W, found, x) < output_error(W, rounded, x)
    if static:  # on the grid of rounding, no code can be nearer than the nearest
        assert (W - found).norm() > (W - rounded).norm()


@pytest.mark.parametrize("sym", [True, False])
def test_two_bits_need_searched_scales(sym: bool) -> None:
    """Errors made up for widen the range of what is left, which four levels cannot cover."""
    W, x = weights(32, 192), inputs(192, outliers=4)
    rounded = round_to_nearest(W, Scheme(2, 32, sym)).dequantize()
    found = solve(W, x, Scheme(2, 32, sym), Settings())
    assert output_error(W, found, x) < 0.8 * output_error(W, rounded, x)


def test_act_order_helps_where_some_features_are_loud() -> None:
    W, x = weights(64, 256), inputs(256, 1024, outliers=12)
    natural, aware, ordered = (
        output_error(W, solve(W, x, Scheme(4, 64, desc_act=desc_act), how), x)
        for desc_act, how in (
            (False, PLAIN),
            (False, Settings(scale_search=False, gptaq=0.0)),
            (True, PLAIN),
        )
    )
    assert ordered < aware < natural


def test_searched_scales_lower_the_error() -> None:
    W, x = weights(64, 256), inputs(256, 1024, outliers=12)
    plain = output_error(W, solve(W, x, Scheme(3, 64), Settings(scale_search=False, gptaq=0.0)), x)
    searched = output_error(W, solve(W, x, Scheme(3, 64), Settings(gptaq=0.0)), x)
    assert searched < 0.95 * plain


def test_scales_are_searched_for_what_an_error_in_a_feature_costs() -> None:
    """scale_search weighs errors by diag(H); mse alone does not. Each is best by its own measure."""
    W, x = weights(64, 256), inputs(256, 1024, outliers=12)
    loud = hessian(x).matrix.diagonal() / len(x)

    def cost(how: Settings, importance: Tensor) -> float:
        scales = gptq(W, hessian(x), Scheme(3, 64), how, torch.float32).scales
        groups = W.T.unflatten(0, (-1, 64))
        codes = round_to_grid(groups, scales, None, 3)
        error = ((codes.float() - 4) * scales.unsqueeze(1) - groups).square()
        return float((error.flatten(0, 1) * importance[:, None]).sum())

    weighted = Settings(static_groups=True, gptaq=0.0)
    plain = Settings(static_groups=True, gptaq=0.0, scale_search=False, mse=2.0)
    assert cost(weighted, loud) < 0.95 * cost(plain, loud)
    assert cost(plain, torch.ones(256)) < cost(weighted, torch.ones(256))


def test_drift_of_the_inputs_is_made_up_for() -> None:
    original = inputs(128, 1024)
    x = original + 0.2 * inputs(128, 1024, seed=9)
    W = weights(32, 128)
    errors = []
    for part in (0.0, 0.5, 1.0):
        result = gptq(W, hessian(x, original), Scheme(8, 32), Settings(gptaq=part), torch.float32)
        errors.append(float((x @ dense(result, 8).T - original @ W.T).norm()))
    assert errors[2] < errors[1] < errors[0]


def test_without_drift_gptaq_changes_nothing() -> None:
    W, x = weights(16, 64), inputs(64)
    with_it = gptq(W, hessian(x, x), Scheme(4, 32), Settings(gptaq=1.0), torch.float32)
    without = gptq(W, hessian(x), Scheme(4, 32), Settings(gptaq=0.0), torch.float32)
    assert torch.equal(with_it.codes, without.codes)


def test_rows_do_not_know_of_each_other() -> None:
    W, x = weights(48, 128), inputs(128)
    whole = gptq(W, hessian(x), Scheme(4, 32), Settings(), torch.float32)
    part = gptq(W[16:32], hessian(x), Scheme(4, 32), Settings(), torch.float32)
    assert torch.equal(whole.codes[:, 16:32], part.codes)
    torch.testing.assert_close(whole.error[16:32], part.error)


def test_groups_stay_in_place_unless_desc_act() -> None:
    W, x = weights(16, 128), inputs(128, outliers=8)
    for desc_act, static, moved in ((False, False, False), (True, True, False), (True, False, True)):
        how = Settings(static_groups=static, gptaq=0.0)
        result = gptq(W, hessian(x), Scheme(4, 32, desc_act=desc_act), how, torch.float32)
        assert (result.g_idx is not None) == moved
        if result.g_idx is not None:
            assert result.g_idx.bincount().tolist() == [32] * 4
            order = hessian(x).matrix.diagonal().argsort(descending=True)
            assert set(result.g_idx[order[:32]].tolist()) == {0}  # the loudest features together


def test_static_scales_are_those_of_the_original_weights() -> None:
    W, x = weights(16, 128), inputs(128)
    result = gptq(
        W, hessian(x), Scheme(4, 32), Settings(static_groups=True, scale_search=False), torch.float32
    )
    scales, _ = find_grid(W.T.unflatten(0, (-1, 32)), 4, True, torch.float32)
    torch.testing.assert_close(result.scales, scales)


def test_scales_are_rounded_to_their_dtype_before_codes_are_chosen() -> None:
    W, x = weights(16, 128), inputs(128)
    result = gptq(W, hessian(x), Scheme(4, 32), Settings(), torch.bfloat16)
    assert result.scales.dtype is torch.bfloat16
    E = W - ((result.codes.float() - 8) * result.scales.float().repeat_interleave(32, 0)).T
    torch.testing.assert_close(result.error, ((E @ (hessian(x).matrix / len(x))) * E).sum(1))


def test_same_inputs_same_integers() -> None:
    W, x = weights(16, 128), inputs(128)
    first, second = (gptq(W, hessian(x), Scheme(), Settings(), torch.float32) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


# --- inputs that say little


def test_a_feature_that_was_never_seen_is_rounded_to_nearest() -> None:
    W, x = weights(16, 64), inputs(64)
    x[:, [3, 40]] = 0
    result = gptq(
        W, hessian(x), Scheme(4, 32), Settings(static_groups=True, scale_search=False), torch.float32
    )
    rounded = round_to_nearest(W, Scheme(4, 32))
    assert torch.equal(result.codes[[3, 40]], rounded.codes()[[3, 40]])


def test_no_input_at_all_rounds_to_nearest() -> None:
    W = weights(16, 64)
    result = gptq(W, Hessian(64), Scheme(4, 32), Settings(scale_search=False), torch.float32)
    assert torch.equal(result.codes, round_to_nearest(W, Scheme(4, 32)).codes())


def test_fewer_tokens_than_features() -> None:
    W, x = weights(16, 128), inputs(128, tokens=5)
    found = solve(W, x, Scheme(4, 32), Settings())
    assert output_error(W, found, x) < output_error(W, round_to_nearest(W, Scheme(4, 32)).dequantize(), x)


def test_damping_grows_until_the_hessian_can_be_factorized() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 1.2  # eigenvalues -0.2 and 2.2
    fine = torch.eye(8)
    U, added, damp = inverse_factor(torch.stack([H, fine]), 0.01)
    assert 0.2 < damp[0] < 0.23
    assert damp[1] == 0.01
    for u, h, a in zip(U, (H, fine), added, strict=True):
        torch.testing.assert_close(u.T @ u, torch.linalg.inv(h + a.diag()), rtol=1e-3, atol=1e-3)


def test_a_hessian_beyond_damping_is_refused() -> None:
    H = torch.eye(8)
    H[0, 1] = H[1, 0] = 5.0
    with pytest.raises(CalibrationError, match="not positive definite"):
        inverse_factor(H[None], 0.05)


def test_float64_where_float32_is_not_enough() -> None:
    x = inputs(64, 4096).double()
    x[:, 1] = x[:, 0] * (1 + 1e-5)
    x[:, 0] *= 1e4
    H = (x.T @ x).float()
    U, _, damp = inverse_factor(H[None], 1e-9)
    assert torch.isfinite(U).all()
    assert damp[0] <= 0.02


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_activations_that_are_no_numbers_are_named(value: float, word: str) -> None:
    x = inputs(64)
    x[3, 5] = value
    found = Hessian(64)
    found.add(inputs(64), batch=3)
    found.add(x, batch=4)
    found.add(inputs(64), batch=5)
    with pytest.raises(CalibrationError, match=f"{word} among the activations, in batch 4"):
        check([Hessian(64), found])


def test_hessians_add_up() -> None:
    x, y = inputs(32, 100), inputs(32, 60, seed=5)
    total = Hessian.sum([hessian(x, x + 1), hessian(y, y)])
    whole = hessian(torch.cat([x, y]), torch.cat([x + 1, y]))
    torch.testing.assert_close(total.matrix, whole.matrix)
    torch.testing.assert_close(total.drift, whole.drift)
    assert total.tokens == 160
