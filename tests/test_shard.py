"""The parts of a weight that ranks hold are the weight: put together, they give the same numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_fx.errors import WeightError
from gptq_fx.scheme import Scheme
from gptq_fx.shard import Part, chunk, cut, pick
from gptq_fx.weight import QuantizedWeight


def weight(
    N: int, K: int, groups: int, bits: int, sym: bool, ordered: bool, experts: int | None = None
) -> QuantizedWeight:
    """Random codes, scales and zero points; in act-order a random order of equal groups."""
    lead = () if experts is None else (experts,)
    codes = torch.randint(0, 2**bits, (*lead, K, N))
    scales = torch.rand(*lead, groups, N) + 0.1
    zeros = None if sym else torch.randint(0, 2**bits, (*lead, groups, N))
    g_idx = None
    if ordered:
        orders = [torch.randperm(K) % groups for _ in range(experts or 1)]
        g_idx = (orders[0] if experts is None else torch.stack(orders)).to(torch.int32)
    return QuantizedWeight.from_codes(codes, scales, zeros, bits, g_idx)


def everything(size: int) -> tuple[tuple[int, int], ...]:
    return ((0, size),)


def columns(dense: Tensor, runs: tuple[tuple[int, int], ...], dim: int) -> Tensor:
    return torch.cat([dense.narrow(dim, a, b - a) for a, b in runs], dim)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 3]),
    st.sampled_from([1, 2, 6, 12]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_parts_put_together_are_the_weight(
    bits: int,
    sym: bool,
    ordered: bool,
    experts: int | None,
    groups: int,
    ranks: int,
    split: int,
    by_outputs: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    N, K = 48, 384
    whole = weight(N, K, groups, bits, sym, ordered, experts)
    size = N if by_outputs else K
    dealt = [chunk(everything(size), rank, ranks, split) for rank in range(ranks)]
    assert sorted(i for runs in dealt for a, b in runs for i in range(a, b)) == list(range(size))
    for runs in dealt:
        part = Part(runs, everything(K)) if by_outputs else Part(everything(N), runs)
        found, scheme = cut(whole, Scheme(bits, K // groups, sym, ordered), part)
        wanted = columns(whole.dequantize(), runs, -2 if by_outputs else -1)
        assert torch.equal(found.dequantize(), wanted)
        assert part.shape == (found.out_features, found.in_features)
        assert ordered or scheme.group_size in (-1, found.group_size)


def test_a_border_between_groups_keeps_their_size() -> None:
    whole = weight(16, 128, 4, 4, True, False)
    part, scheme = cut(whole, Scheme(4, 32), Part(everything(16), ((0, 64),)))
    assert scheme == Scheme(4, 32) and part.scales.shape == (2, 16)


def test_a_border_in_a_group_makes_groups_smaller_and_repeats_their_scales() -> None:
    whole = weight(16, 96, 2, 4, True, False)  # groups 0-48, 48-96; ranks 0-32, 32-64, 64-96
    part, scheme = cut(whole, Scheme(4, 48), Part(everything(16), ((32, 64),)))
    assert scheme.group_size == 16
    assert torch.equal(part.scales, whole.scales[[0, 1]])
    first, scheme = cut(whole, Scheme(4, 48), Part(everything(16), ((0, 32),)))
    assert scheme.group_size == 32 and torch.equal(first.scales, whole.scales[:1])


def test_one_group_stays_one_group() -> None:
    whole = weight(16, 96, 1, 4, True, False)
    part, scheme = cut(whole, Scheme(4, -1), Part(everything(16), ((0, 36),)))
    assert scheme.group_size == -1 and part.scales.shape == (1, 16)


def test_act_order_keeps_all_groups_and_names_the_one_of_each_input() -> None:
    whole = weight(8, 64, 4, 4, True, True)
    part, scheme = cut(whole, Scheme(4, 16, desc_act=True), Part(everything(8), ((0, 32),)))
    assert whole.g_idx is not None and part.g_idx is not None
    assert torch.equal(part.scales, whole.scales) and torch.equal(part.g_idx, whole.g_idx[:32])
    assert scheme == Scheme(4, 8, desc_act=True)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux' account of mapped pages")
def test_of_a_mapped_file_only_the_inputs_of_the_part_are_read(tmp_path: Path) -> None:
    K, N = 8192, 8192
    file = tmp_path / "qweight"
    with file.open("wb") as handle:
        handle.truncate(K // 8 * N * 4)
    qweight = torch.from_file(str(file), shared=False, size=K // 8 * N, dtype=torch.int32).view(K // 8, N)
    whole = QuantizedWeight(4, K, qweight, torch.ones(K // 128, N))
    cut(whole, Scheme(4, 128), Part(everything(N), ((K // 4, K // 2),)))
    smaps = Path("/proc/self/smaps").read_text()
    (read,) = re.findall(rf"{re.escape(str(file))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", smaps)
    assert K * N // 2 / 4 <= 1024 * int(read) < 1.5 * K * N // 2 / 4


def test_pieces_that_are_no_legal_group_are_refused() -> None:
    whole = weight(16, 96, 6, 4, True, False)
    with pytest.raises(WeightError, match=r"pieces of 4.*multiple of 8"):
        cut(whole, Scheme(4, 16), Part(everything(16), ((0, 20),)))


def test_a_rank_without_a_part_is_refused() -> None:
    whole = weight(16, 96, 6, 4, True, False)
    with pytest.raises(WeightError, match="fewer ranks"):
        cut(whole, Scheme(4, 16), Part(chunk(everything(16), 4, 5, 4), everything(96)))


def test_runs_are_picked_as_if_laid_one_behind_the_other() -> None:
    assert pick(((0, 4), (8, 12)), 2, 6) == ((2, 4), (8, 10))
    assert chunk(((0, 10),), 1, 3) == ((4, 8),) and chunk(((0, 10),), 2, 3) == ((8, 10),)
    assert chunk(((0, 16),), 1, 2, split=2) == ((4, 8), (12, 16))
