"""Damaged and hostile checkpoints: each is one clear error that names the file and the tensor."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import llama, quantized
from safetensors.torch import load_file, save_file
from torch import Tensor

import gptq_fx
from gptq_fx import CheckpointError

INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound checkpoints: symmetric, asymmetric, and in shards."""
    folder = tmp_path_factory.mktemp("whole")
    for name, options in {"sym": {}, "asym": {"sym": False}}.items():
        model, _ = quantized(llama(1), group_size=32, **options)
        gptq_fx.save_pretrained(model, folder / name)
    gptq_fx.save_pretrained(model, folder / "shards", max_shard_size="20KB")
    return {name: folder / name for name in ("sym", "asym", "shards")}


# --- ways to damage one


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return damage


def setting(**values: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda c: c["quantization_config"].update(values))


def without(*keys: str) -> Callable[[Path], None]:
    return edit_json("config.json", lambda c: [c["quantization_config"].pop(k) for k in keys])


def model_config(**values: Any) -> Callable[[Path], None]:
    return edit_json("config.json", lambda c: c.update(values))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors")

    return damage


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({name: change(found[name])}))


def gone(name: str) -> Callable[[Path], None]:
    return tensors(lambda found: found.pop(name))


def put(where: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(t: Tensor) -> Tensor:
        t[where] = value
        return t

    return change


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return edit_json(INDEX, lambda found: change(found["weight_map"]))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def linked(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def duplicated(folder: Path) -> None:
    found = load_file(first_shard(folder))
    save_file(found, folder / "extra.safetensors")
    index(lambda m: m.update({"extra": "extra.safetensors"}))(folder)


SYM, ASYM, SHARDS = "sym", "asym", "shards"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # files
    "no weights": (SYM, lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "truncated file": (SYM, raw("model.safetensors", lambda b: b[:-100]), "model.safetensors: damaged"),
    "empty file": (SYM, raw("model.safetensors", lambda b: b""), "model.safetensors: damaged"),
    "file of noise": (SYM, raw("model.safetensors", lambda b: b"\xff" * 64), "model.safetensors: damaged"),
    "oversized header": (
        SYM,
        raw("model.safetensors", lambda b: struct.pack("<Q", 2**62) + b[8:]),
        "model.safetensors: damaged",
    ),
    "header that is no JSON": (
        SYM,
        raw("model.safetensors", lambda b: b[:8] + b"!" + b[9:]),
        "model.safetensors: damaged",
    ),
    "offsets beyond the file": (
        SYM,
        raw("model.safetensors", lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)),
        "model.safetensors: damaged",
    ),
    "pickled weights": (SYM, pickled, "pytorch_model.bin: pickled weights are never loaded"),
    "link out of the folder": (SYM, linked, "model.safetensors: a link to .* outside"),
    "missing shard": (SHARDS, lambda f: first_shard(f).unlink(), "model-00001-of.*: missing"),
    "truncated shard": (
        SHARDS,
        lambda f: raw(first_shard(f).name, lambda b: b[: len(b) // 2])(f),
        "model-00001-of.*: damaged",
    ),
    "shards without their index": (SHARDS, lambda f: (f / INDEX).unlink(), f"without {INDEX}"),
    "index outside of the folder": (
        SHARDS,
        index(lambda m: m.update({UP + ".scales": "../model.safetensors"})),
        rf"{INDEX}: {UP}.scales: found the file '../model",
    ),
    "index with an absolute path": (
        SHARDS,
        index(lambda m: m.update({UP + ".scales": "/etc/x.safetensors"})),
        rf"{INDEX}: {UP}.scales: found the file '/etc",
    ),
    "index to a pickle": (
        SHARDS,
        index(lambda m: m.update({UP + ".scales": "model.bin"})),
        rf"{INDEX}: {UP}.scales: found the file 'model.bin'",
    ),
    "index with a tensor that is nowhere": (
        SHARDS,
        index(lambda m: m.update({"ghost": sorted(m.values())[0]})),
        "ghost: not in the file",
    ),
    "index with the wrong shard": (
        SHARDS,
        index(lambda m: m.update({UP + ".scales": sorted(m.values())[0]})),
        f"{UP}.scales: is in ",
    ),
    "index without a map": (SHARDS, edit_json(INDEX, lambda c: c.pop("weight_map")), f"{INDEX}: weight_map"),
    "index with numbers": (SHARDS, index(lambda m: m.update(x=3)), f"{INDEX}: weight_map"),
    "tensor in two shards": (SHARDS, duplicated, "also in"),
    # config files
    "no config": (SYM, lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (SYM, raw("config.json", lambda b: b[:-20]), "config.json: no JSON"),
    "config is no text": (SYM, raw("config.json", lambda b: b"\xff\xfe" + b), "config.json: no JSON"),
    "config is a list": (SYM, raw("config.json", lambda b: b"[1]"), "config.json: found list"),
    "config nested without end": (
        SYM,
        raw("config.json", lambda b: b'{"a":' * 10**5),
        "config.json: no JSON",
    ),
    "no quantization config": (
        SYM,
        lambda f: (
            edit_json("config.json", lambda c: c.pop("quantization_config"))(f),
            (f / "quantize_config.json").unlink(),
        ),
        "no GPTQ checkpoint",
    ),
    "unknown model type": (SYM, model_config(model_type="nonesuch"), "config.json: .*nonesuch"),
    "no model type": (SYM, model_config(model_type=None), "config.json: model_type"),
    "architecture that is no model": (
        SYM,
        model_config(architectures=["PreTrainedTokenizerBase"]),
        "config.json: architectures",
    ),
    "architecture that is code elsewhere": (
        SYM,
        model_config(architectures=["../evil.Model"], auto_map={"AutoModel": "evil.Model"}),
        "config.json: architectures",
    ),
    "a billion layers": (SYM, model_config(num_hidden_layers=10**9), "num_hidden_layers: found 1000000000"),
    "a trillion features": (SYM, model_config(hidden_size=10**12), "found shape|config.json"),
    "negative size": (SYM, model_config(hidden_size=-64), "config.json"),
    "size of the wrong type": (SYM, model_config(hidden_size="wide"), "config.json"),
    "one layer more than the files have": (SYM, model_config(num_hidden_layers=2), "layers.1.*: missing"),
    "one layer less": (SYM, model_config(num_hidden_layers=0), r"q_proj|down_proj.*the model has no"),
    # what the settings say
    "unknown quant_method": (SYM, setting(quant_method="awq"), "quant_method: found 'awq'"),
    "no quant_method": (SYM, without("quant_method"), "quant_method: found None"),
    "auto-round in another packing": (
        SYM,
        setting(quant_method="auto-round", packing_format="auto_round:auto_awq"),
        "packing_format: found 'auto_round:auto_awq'",
    ),
    "no bits": (SYM, without("bits"), "bits: missing"),
    "5 bits": (SYM, setting(bits=5), "config.json: bits=5"),
    "bits in words": (SYM, setting(bits="4"), "config.json: bits='4'"),
    "bits that are not those of the tensors": (SYM, setting(bits=8), r"qweight: found shape \[16, .*Legal"),
    "group size 0": (SYM, setting(group_size=0), "config.json: group_size=0"),
    "group size -7": (SYM, setting(group_size=-7), "config.json: group_size=-7"),
    "group size that divides nothing": (SYM, setting(group_size=48), "group_size 48 does not divide"),
    "another group size": (SYM, setting(group_size=64), r"scales: found shape \[4, .*Legal"),
    "sym in words": (SYM, setting(sym="yes"), "config.json: sym='yes'"),
    "unknown format": (SYM, setting(checkpoint_format="gptq_v3"), "checkpoint_format: found 'gptq_v3'"),
    "Marlin's layout": (SYM, setting(checkpoint_format="marlin"), "but config.json says 'marlin'"),
    "another pack_dtype": (SYM, setting(pack_dtype="int8"), "pack_dtype: found 'int8'"),
    "lm_head in words": (SYM, setting(lm_head="no"), "lm_head: found 'no'"),
    "sym that is a lie": (ASYM, setting(sym=True), r"qzeros: sym is true, but"),
    "dynamic is a list": (SYM, setting(dynamic=[1]), "dynamic: found"),
    "dynamic with a bad override": (SYM, setting(dynamic={".*up": {"bits": 7}}), "dynamic.*bits=7"),
    "dynamic without an override": (SYM, setting(dynamic={".*up": 4}), "dynamic.*found 4"),
    "dynamic is no pattern": (SYM, setting(dynamic={"(": {"bits": 8}}), "no regular expression"),
    "dynamic that never ends": (
        SYM,
        setting(dynamic={r"(.|\w|[a-z._])+[A-Z]": {"bits": 8}}),
        "takes for ever",
    ),
    "dynamic that fills the memory": (
        SYM,
        setting(dynamic={r"(?:(?:a{6000}){6000}){6000}": {"bits": 8}}),
        "repeats 216000000000 times",
    ),
    "dynamic of great length": (SYM, setting(dynamic={"a" * 10**5: {"bits": 8}}), "100000 characters"),
    "dynamic leaves dense what is not": (SYM, setting(dynamic={"-:.*up_proj": {}}), f"{UP}: a rule leaves"),
    # tensors
    "qweight missing": (SYM, gone(f"{UP}.qweight"), f"{UP}.qweight: missing"),
    "scales missing": (SYM, gone(f"{UP}.scales"), f"{UP}.scales: missing"),
    "asymmetric without zero points": (ASYM, gone(f"{UP}.qzeros"), f"{UP}.qzeros: missing"),
    "qweight of another shape": (
        SYM,
        tensor(f"{UP}.qweight", lambda t: t[:-1]),
        rf"model.safetensors: {UP}.qweight: found shape \[7, 128\]. Legal.*\[8, 128\]",
    ),
    "qweight of another dtype": (
        SYM,
        tensor(f"{UP}.qweight", lambda t: t.short()),
        f"model.safetensors: {UP}.qweight: found dtype I16. Legal: int32",
    ),
    "scales of another shape": (SYM, tensor(f"{UP}.scales", lambda t: t.mT), f"{UP}.scales: found shape"),
    "scales that are integers": (SYM, tensor(f"{UP}.scales", Tensor.int), f"{UP}.scales: found dtype I32"),
    "scales with NaN": (
        SYM,
        tensor(f"{UP}.scales", put((1, 3), torch.nan)),
        rf"model.safetensors: {UP}.scales: NaN or Inf, first at \[1, 3\]",
    ),
    "scales with Inf": (SYM, tensor(f"{UP}.scales", put((0, 0), torch.inf)), f"{UP}.scales: NaN or Inf"),
    "qzeros of another shape": (
        ASYM,
        tensor(f"{UP}.qzeros", lambda t: t[:, :-1]),
        f"{UP}.qzeros: found shape",
    ),
    "g_idx too large": (
        SYM,
        tensor(f"{UP}.g_idx", put((5,), 2)),
        f"{UP}.g_idx: found group 2. Legal: 0 to 1",
    ),
    "g_idx negative": (SYM, tensor(f"{UP}.g_idx", put((5,), -1)), f"{UP}.g_idx: found group -1"),
    "g_idx too short": (SYM, tensor(f"{UP}.g_idx", lambda t: t[:-1]), f"{UP}.g_idx: found shape"),
    "g_idx of floats": (SYM, tensor(f"{UP}.g_idx", Tensor.float), f"{UP}.g_idx: found dtype F32"),
    "dense and quantized at once": (
        SYM,
        tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)})),
        f"{UP}.weight: is dense, but",
    ),
    "a bias that the model lacks": (
        SYM,
        tensors(lambda t: t.update({f"{UP}.bias": torch.ones(128)})),
        f"{UP}.bias: a bias that is not zero",
    ),
    "a quantized module that the model lacks": (
        SYM,
        tensors(lambda t: t.update({"model.extra.qweight": t[f"{UP}.qweight"].clone()})),
        "model.extra.qweight: the model has no model.extra",
    ),
    "dense weight missing": (SYM, gone("model.norm.weight"), "model.norm.weight: missing"),
    "embedding missing": (SYM, gone("model.embed_tokens.weight"), "embed_tokens.weight: missing"),
    "dense weight of another shape": (
        SYM,
        tensor("model.norm.weight", lambda t: t[:-1]),
        r"model.norm.weight: found shape \[63\]. Legal.*\[64\]",
    ),
    "dense weight of integers": (
        SYM,
        tensor("model.norm.weight", Tensor.int),
        "model.norm.weight: found dtype I32",
    ),
    "a quantized site missing": (
        SYM,
        tensors(lambda t: [t.pop(f"{DOWN}.{leaf}") for leaf in ("qweight", "scales", "qzeros", "g_idx")]),
        "down_proj.weight: missing",
    ),
    "nothing quantized": (
        SYM,
        tensors(lambda t: [t.pop(n) for n in list(t) if n.rpartition(".")[2] not in ("weight",)]),
        "no tensor is quantized",
    ),
    "broken generation config": (
        SYM,
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_one_clear_error(name: str, whole: dict[str, Path], tmp_path: Path) -> None:
    which, damage, message = DAMAGES[name]
    folder = tmp_path / "out"
    shutil.copytree(whole[which], folder)
    damage(folder)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        gptq_fx.from_pretrained(folder)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_the_sound_ones_load(whole: dict[str, Path]) -> None:
    for folder in whole.values():
        gptq_fx.from_pretrained(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        gptq_fx.from_pretrained(tmp_path / "nothing")


def test_a_link_into_the_cache_of_the_hub_is_followed(whole: dict[str, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "main"
    shutil.copytree(whole[SYM], snapshot)
    (tmp_path / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    gptq_fx.from_pretrained(snapshot)


FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4)


def flipped(content: bytes, flips: list[tuple[int, int]], length: int) -> bytes:
    """The content with some of its first `length` bytes changed."""
    changed = bytearray(content)
    for where, by in flips:
        changed[where % length] ^= by
    return bytes(changed)


def loads_or_complains(folder: Path) -> None:
    with contextlib.suppress(CheckpointError):
        gptq_fx.from_pretrained(folder)


@FUZZ
@given(flips=FLIPS)
def test_flipped_bytes_of_a_header(
    flips: list[tuple[int, int]], whole: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    shutil.copytree(whole[ASYM], folder)
    content = (folder / "model.safetensors").read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    (folder / "model.safetensors").write_bytes(flipped(content, flips, length))
    loads_or_complains(folder)
    shutil.rmtree(folder)


@FUZZ
@given(flips=FLIPS, name=st.sampled_from(["config.json", "generation_config.json"]))
def test_flipped_bytes_of_a_config(
    flips: list[tuple[int, int]],
    name: str,
    whole: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "out"
    shutil.copytree(whole[SYM], folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(flipped(content, flips, len(content)))
    loads_or_complains(folder)
    shutil.rmtree(folder)
