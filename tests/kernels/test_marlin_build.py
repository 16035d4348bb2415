"""Compiling the Marlin kernels by NVRTC, which needs no GPU, and keeping what came out."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_fx.errors import KernelError
from gptq_fx.kernels.marlin import nvrtc, variants
from gptq_fx.kernels.marlin.variants import TILES, Variant

# KiB of shared memory, of a multiprocessor and of a block.
ARCHITECTURES = {
    "sm_80": (164, 163),
    "sm_86": (100, 99),
    "sm_89": (100, 99),
    "sm_90a": (228, 227),
    "sm_100": (228, 227),
    "sm_120": (100, 99),
}
EVERY = list(variants.every())
SAMPLE = EVERY[::41]
EVERY_WIDE = list(variants.every_wide())
WIDE_SAMPLE = EVERY_WIDE[::23]
EVERY_DECODE = list(variants.every_decode())
DECODE_SAMPLE = EVERY_DECODE[::13]
WITH_CLUSTERS = ("sm_90a", "sm_100", "sm_120")

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """NVRTC with an empty cache."""
    if reason := nvrtc.available():
        pytest.skip(reason)
    monkeypatch.setenv("GPTQ_FX_CACHE", str(tmp_path))
    return tmp_path


def test_the_sample_has_every_value_of_every_field():
    for field in Variant.__dataclass_fields__:
        if field != "tile":
            assert {getattr(v, field) for v in SAMPLE} == {getattr(v, field) for v in EVERY}, field
    assert {v.tile.tokens for v in SAMPLE} == {v.tile.tokens for v in EVERY}


@every_architecture
def test_every_variant_fits_every_architecture(arch):
    per_multiprocessor, per_block = (1024 * kib for kib in ARCHITECTURES[arch])
    for variant in EVERY:
        stages, blocks = variant.fit(per_multiprocessor, per_block)
        assert variant.shared_bytes(stages) <= per_block
        assert blocks * (variant.shared_bytes(stages) + 1024) <= per_multiprocessor
        assert stages > 2 or blocks == 1


def build(variant, arch):
    stages, blocks = variant.fit(*(1024 * kib for kib in ARCHITECTURES[arch]))
    return nvrtc.compile(variant.source(stages, blocks), arch, "marlin_gemm")


@pytest.mark.parametrize("nth", range(len(ARCHITECTURES)), ids=list(ARCHITECTURES).__getitem__)
def test_a_sample_of_the_variants_compiles(compiler, nth):
    """Each of the sample on two architectures; test_every_variant_compiles has them all."""
    arch = list(ARCHITECTURES)[nth]
    for variant in SAMPLE[nth % 3 :: 3]:
        assert build(variant, arch).startswith(b"\x7fELF")
    for bf16 in (False, True):
        assert b"marlin_align" in nvrtc.compile(variants.moe_source(bf16), arch, "marlin_align")
        source = variants.dense_source(4 if bf16 else 8, bf16, bf16, 8 * bf16)
        assert b"marlin_dequantize" in nvrtc.compile(source, arch, "marlin_dequantize")


@pytest.mark.slow
@every_architecture
def test_every_variant_compiles(compiler, arch):
    for variant in EVERY:
        assert build(variant, arch).startswith(b"\x7fELF")


def build_wide(variant):
    stages = variant.fit(*(1024 * kib for kib in ARCHITECTURES["sm_90a"]))
    return nvrtc.compile(variant.source(stages), "sm_90a", "marlin_wide")


def test_the_sample_of_wgmma_has_every_value_of_every_field():
    for field in variants.WideVariant.__dataclass_fields__:
        assert {getattr(v, field) for v in WIDE_SAMPLE} == {getattr(v, field) for v in EVERY_WIDE}, field


def test_a_sample_of_wgmma_compiles(compiler):
    for variant in WIDE_SAMPLE:
        assert build_wide(variant).startswith(b"\x7fELF")


@pytest.mark.slow
def test_every_variant_of_wgmma_compiles(compiler):
    for variant in EVERY_WIDE:
        assert build_wide(variant).startswith(b"\x7fELF")


def test_the_sample_of_decode_has_every_value_of_every_field():
    for field in variants.DecodeVariant.__dataclass_fields__:
        assert {getattr(v, field) for v in DECODE_SAMPLE} == {getattr(v, field) for v in EVERY_DECODE}, field


@pytest.mark.parametrize("nth", range(len(WITH_CLUSTERS)), ids=list(WITH_CLUSTERS).__getitem__)
def test_a_sample_of_decode_compiles(compiler, nth):
    for variant in DECODE_SAMPLE[nth :: len(WITH_CLUSTERS)]:
        assert nvrtc.compile(variant.source(), WITH_CLUSTERS[nth], "marlin_decode").startswith(b"\x7fELF")


@pytest.mark.slow
@pytest.mark.parametrize("arch", WITH_CLUSTERS)
def test_every_variant_of_decode_compiles(compiler, arch):
    for variant in EVERY_DECODE:
        assert nvrtc.compile(variant.source(), arch, "marlin_decode").startswith(b"\x7fELF")


def test_decode_spills_no_registers(compiler):
    for variant in EVERY_DECODE:
        if (variant.bits, variant.bf16, variant.asym, variant.group_tiles) == (4, True, False, 8):
            log = nvrtc.resources(variant.source(), "sm_90a", "marlin_decode")
            assert "0 bytes spill stores, 0 bytes spill loads" in log, variant


@pytest.mark.parametrize("tile", variants.WIDE_TILES, ids=lambda tile: f"{tile.tokens} rows")
def test_wgmma_neither_spills_registers_nor_waits_for_each_product(compiler, tile):
    variant = variants.WideVariant(4, True, False, 8, False, tile)
    stages = variant.fit(*(1024 * kib for kib in ARCHITECTURES["sm_90a"]))
    log = nvrtc.resources(variant.source(stages), "sm_90a", "marlin_wide")
    assert " 0 bytes spill stores" in log
    assert "serialized" not in log


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_hot_variants_spill_no_registers(compiler, arch):
    for tile in (*TILES[4], TILES[8][0]):
        bits = 4 if tile in TILES[4] else 8
        variant = Variant(bits, True, False, 8, False, False, tile)
        stages, blocks = variant.fit(*(1024 * kib for kib in ARCHITECTURES[arch]))
        log = nvrtc.resources(variant.source(stages, blocks), arch, "marlin_gemm")
        assert "0 bytes spill stores, 0 bytes spill loads" in log


GOOD = 'extern "C" __global__ void f(int* x) { *x = 1; }'


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_compiled_is_kept(compiler, monkeypatch):
    code = nvrtc.compile(GOOD, "sm_80", "f")
    assert len(files(compiler)) == 1
    monkeypatch.setattr(nvrtc, "_compile", lambda *args: pytest.fail("compiled again"))
    assert nvrtc.compile(GOOD, "sm_80", "f") == code


def test_another_source_architecture_or_compiler_is_another_entry(compiler, monkeypatch):
    nvrtc.compile(GOOD, "sm_80", "f")
    nvrtc.compile(GOOD + " ", "sm_80", "f")
    nvrtc.compile(GOOD, "sm_90a", "f")
    monkeypatch.setattr(nvrtc, "version", lambda: "0.0")
    nvrtc.compile(GOOD, "sm_80", "f")
    monkeypatch.setattr(nvrtc, "OPTIONS", (*nvrtc.OPTIONS, "--use_fast_math"))
    nvrtc.compile(GOOD, "sm_80", "f")
    assert len(files(compiler)) == 5


@settings(deadline=None, max_examples=10)
@given(at=st.integers(0, 10**6))
def test_a_damaged_entry_is_made_again(at):
    if reason := nvrtc.available():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("GPTQ_FX_CACHE", folder)
        code = nvrtc.compile(GOOD, "sm_80", "f")
        (entry,) = files(Path(folder))
        content = bytearray(entry.read_bytes())
        content[at % len(content)] ^= 1
        entry.write_bytes(content)
        assert nvrtc.compile(GOOD, "sm_80", "f") == code
        entry.write_bytes(content[: at % len(content)])
        assert nvrtc.compile(GOOD, "sm_80", "f") == code


def test_a_cache_that_cannot_be_written_costs_only_time(compiler, monkeypatch, caplog):
    (compiler / "file").write_text("")
    monkeypatch.setenv("GPTQ_FX_CACHE", str(compiler / "file"))
    assert nvrtc.compile(GOOD, "sm_80", "f").startswith(b"\x7fELF")
    assert "every process compiles its own" in caplog.text


def test_a_source_that_is_wrong_is_an_error_with_the_compilers_words(compiler):
    with pytest.raises(KernelError, match=r"(?s)f for sm_80 by NVRTC .*f\.cu\(1\): error"):
        nvrtc.compile(GOOD.replace("int*", "nothing*"), "sm_80", "f")
    assert files(compiler) == []


def test_an_architecture_that_is_not_known_is_an_error_with_those_that_are(compiler):
    with pytest.raises(KernelError, match=r"Legal: sm_80, .*sm_90"):
        nvrtc.compile(GOOD, "sm_33", "f")


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(nvrtc, "library", lambda: None)
    with pytest.raises(KernelError, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.compile(GOOD, "sm_80", "f")


def test_the_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("GPTQ_FX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / "gptq_fx"
    monkeypatch.setenv("GPTQ_FX_CACHE", str(tmp_path / "own"))
    assert nvrtc.cache_folder() == tmp_path / "own"
