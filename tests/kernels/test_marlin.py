"""The Marlin layout: the formula of the format, and inverses; what the kernel takes and refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_fx import QuantizedWeight, Scheme
from gptq_fx.errors import WeightError
from gptq_fx.kernels import LinearSpec
from gptq_fx.kernels.marlin import MARLIN, layout
from gptq_fx.scheme import BITS

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from(layout.BITS), st.integers(0, 2**31))


def random_integers(seed, bits, *shape):
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("bits", layout.BITS)
def test_codes_lie_where_the_format_says(bits):
    """Word for word the published formula, written with its own names."""
    K, N = 48, 128
    q = random_integers(bits, bits, K, N).tolist()
    words = [w % 2**32 for w in layout.pack_codes(torch.tensor(q), bits).flatten().tolist()]
    per_tile = 1024 * bits // 32
    for kt in range(K // 16):
        for nt in range(N // 64):
            base = (kt * (N // 64) + nt) * per_tile
            for w in range(4):
                for t in range(32):
                    ks = [16 * kt + 2 * (t % 4) + j for j in (0, 1, 8, 9)]
                    n = 64 * nt + 16 * w + t // 4
                    v = [q[k][n] for k in ks] + [q[k][n + 8] for k in ks]
                    if bits == 4:
                        fields = [v[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
                        assert words[base + 4 * t + w] == sum(f << 4 * i for i, f in enumerate(fields))
                        continue
                    for h in (0, 1):
                        fields = [v[4 * h + i] for i in (0, 2, 1, 3)]
                        found = words[base + 8 * t + 2 * w + h]
                        assert found == sum(f << 8 * i for i, f in enumerate(fields))


@pytest.mark.parametrize("groups", [1, 3])
def test_scales_lie_where_the_format_says(groups):
    N = 192
    single = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    order = [i + 8 * j for i in range(8) for j in range(8)] if groups > 1 else single
    order = [start + i for start in range(0, N, len(order)) for i in order]
    scales = torch.rand(groups, N)
    assert torch.equal(layout.permute_scales(scales), scales[:, order])


@pytest.mark.parametrize("bits", layout.BITS)
def test_zero_points_lie_where_the_format_says(bits):
    N = 128
    zeros = random_integers(bits, bits, 3, N)
    order = [64 * block + i + 8 * j for block in range(N // 64) for i in range(8) for j in range(8)]
    interleave = (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else (0, 2, 1, 3)
    run = len(interleave)
    packed = layout.pack_zeros(zeros, bits)
    for row, words in zip(zeros[:, order].tolist(), packed.tolist(), strict=True):
        for i, word in enumerate(words):
            fields = [row[run * i + j] for j in interleave]
            assert word % 2**32 == sum(f << bits * m for m, f in enumerate(fields))


@given(SIZES)
@settings(deadline=None)
def test_unpacking_is_the_inverse(sizes):
    kt, nt, bits, seed = sizes
    codes = random_integers(seed, bits, 2, 16 * kt, 64 * nt)
    packed = layout.pack_codes(codes, bits)
    assert packed.shape == (2, kt, 64 * nt * bits // 2)
    assert torch.equal(layout.unpack_codes(packed, bits), codes)
    assert torch.equal(packed[1], layout.pack_codes(codes[1], bits))
    zeros = random_integers(seed, bits, 2, kt, 64 * nt)
    assert layout.pack_zeros(zeros, bits).shape == (2, kt, 64 * nt * bits // 32)
    assert torch.equal(layout.unpack_zeros(layout.pack_zeros(zeros, bits), bits), zeros)
    scales = torch.rand(2, kt, 64 * nt)
    assert torch.equal(layout.restore_scales(layout.permute_scales(scales)), scales)


@pytest.mark.parametrize(("K", "N", "bits"), [(24, 64, 4), (16, 32, 4), (16, 64, 2)])
def test_what_has_no_layout_is_refused(K, N, bits):
    with pytest.raises(WeightError, match="K a multiple of 16"):
        layout.pack_codes(torch.zeros(K, N), bits)


@pytest.mark.parametrize("bits", layout.BITS)
@pytest.mark.parametrize("sym", [True, False])
def test_tensors_of_a_marlin_checkpoint_are_read(bits, sym):
    codes, scales = random_integers(0, bits, 64, 128), torch.rand(2, 128)
    zeros = None if sym else random_integers(1, bits, 2, 128)
    weight = QuantizedWeight.from_codes(codes, scales, zeros, bits)
    qzeros = None if zeros is None else layout.pack_zeros(zeros, bits)
    B, s = layout.pack_codes(codes, bits), layout.permute_scales(scales)
    read = layout.from_marlin_tensors(B, s, bits, qzeros)
    assert torch.equal(read.dequantize(), weight.dequantize())
    with pytest.raises(WeightError, match="no Marlin pack"):
        layout.from_marlin_tensors(B[:, 64:], s, bits)


def test_settings_that_speak_of_marlin():
    assert layout.check_marlin_format({"checkpoint_format": "marlin"})
    assert layout.check_marlin_format({"is_marlin_format": True})
    assert not layout.check_marlin_format({"checkpoint_format": "gptq", "is_marlin_format": False})


@given(
    st.sampled_from(BITS),
    st.sampled_from([(64, 32), (96, 96), (40, -1), (256, 128), (480, 160)]),
    st.sampled_from([24, 64, 200]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60)
def test_a_pack_is_taken_apart_exactly(bits, size, N, sym, desc_act, seed):
    K, group = size
    spec = LinearSpec(K, N, Scheme(bits, group, sym, desc_act), torch.float16, "cuda")
    rng = torch.Generator().manual_seed(seed)
    scales = torch.rand(spec.groups, N, generator=rng).half()
    zeros = None if sym else random_integers(seed + 1, bits, spec.groups, N)
    g_idx = None
    if desc_act:
        g_idx = (torch.randperm(K, generator=rng) // spec.group_size).to(torch.int32)
    weight = QuantizedWeight.from_codes(random_integers(seed, bits, K, N), scales, zeros, bits, g_idx)
    again = MARLIN.unpack(MARLIN.pack(weight, spec), spec)
    for found, expected in zip(again.tensors, weight.tensors, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_part_of_a_pack_is_the_pack_of_the_part(bits, size):
    K, N, border = 64, 200, 128

    def spec(N):
        return LinearSpec(K, N, Scheme(bits, size, False), torch.float16, "cuda")

    def weight(part):
        return QuantizedWeight.from_codes(codes[:, part], scales[:, part], zeros[:, part], bits)

    G = spec(N).groups
    codes, zeros = random_integers(1, bits, K, N), random_integers(2, bits, G, N)
    scales = torch.rand(G, N).half()
    whole = MARLIN.pack(weight(slice(None)), spec(N))
    assert border % MARLIN.cut_at(spec(N)) == 0
    for start, stop in ((0, border), (border, N)):
        part = MARLIN.cut(whole, spec(N), start, stop)
        own = MARLIN.pack(weight(slice(start, stop)), spec(stop - start))
        assert all(torch.equal(a, b) for a, b in zip(part[:3], own[:3], strict=True))


def test_groups_of_unequal_size_are_refused_with_their_sizes():
    spec = LinearSpec(64, 64, Scheme(4, 32, desc_act=True), torch.float16, "cuda")
    g_idx = (torch.arange(64) >= 40).to(torch.int32)
    weight = QuantizedWeight.from_codes(random_integers(0, 4, 64, 64), torch.rand(2, 64), None, 4, g_idx)
    with pytest.raises(WeightError, match=r"24 to 40 input features\. Legal here: 32"):
        MARLIN.pack(weight, spec)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"scheme": Scheme(4, 48), "in_features": 96}, "48 is not a multiple of 32"),
        ({"in_features": 2**31}, "more than"),
        ({"scheme": Scheme(2, 96, False, True), "in_features": 192}, None),
        ({"scheme": Scheme(8, -1), "in_features": 40, "out_features": 7}, None),
    ],
    ids=str,
)
def test_what_is_supported(changes, reason):
    found = MARLIN.supports(replace(LinearSpec(256, 64, Scheme(4, 128), torch.float16, "cuda"), **changes))
    assert found == reason or reason in found


def test_stacks_and_blocks_that_are_not_supported():
    stack = LinearSpec(256, 64, Scheme(4, 128), torch.float16, "cuda", 1025)
    assert "1025 experts are more than 1024" in MARLIN.experts.supports(stack)
    assert MARLIN.experts.supports(replace(stack, experts=128)) is None
    assert MARLIN.experts.block_supports(stack, stack, "silu") is None
    assert "relu" in MARLIN.experts.block_supports(stack, stack, "relu")


def test_without_a_gpu_the_reason_says_so():
    if not torch.cuda.is_available():
        assert MARLIN.available() == "PyTorch finds no NVIDIA GPU"
