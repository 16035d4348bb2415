"""Checkpoints: what is saved comes back, integer for integer, and in a form that others read."""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    EXPERTS,
    HEADS,
    MODELS,
    act_ordered,
    decoder_text,
    ids,
    linears,
    llama,
    logits,
    output,
    quantized,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gptq_fx
from gptq_fx import CheckpointError, GPTQConfig, QuantizedParameter, Scheme
from gptq_fx.checkpoint import describe, write
from gptq_fx.checkpoint.names import Part
from gptq_fx.checkpoint.readers import Stored, readers
from gptq_fx.kernels import get_kernel
from gptq_fx.packed import PackedWeight
from gptq_fx.scheme import BITS
from gptq_fx.weight import QuantizedWeight


def packed(model: nn.Module) -> dict[str, QuantizedParameter]:
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedParameter)}


def same_integers(one: nn.Module, other: nn.Module) -> None:
    """Every quantized weight has the same scheme, integers and scales in both."""
    left, right = packed(one), packed(other)
    assert left.keys() == right.keys() and left
    for name, parameter in left.items():
        assert parameter.scheme == right[name].scheme, name
        a, b = parameter.quantized_weight(), right[name].quantized_weight()
        assert torch.equal(a.codes(), b.codes()), name
        assert torch.equal(a.scales, b.scales), name
        assert (a.qzeros is None) == (b.qzeros is None), name
        if a.qzeros is not None:
            assert torch.equal(a.zeros(), b.zeros()), name
        assert (a.g_idx is None) == (b.g_idx is None), name
        if a.g_idx is not None:
            assert torch.equal(a.g_idx, b.g_idx), name


def round_trip(model: nn.Module, folder: Path, **options: Any) -> nn.Module:
    """Saved and loaded again; both compute the same."""
    gptq_fx.save_pretrained(model, folder / "out", **options)
    loaded = gptq_fx.from_pretrained(folder / "out")
    same_integers(model, loaded)
    return loaded


def settings_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    return config


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_comes_back(name: str, tmp_path: Path) -> None:
    tiny = MODELS[name]
    model, _ = quantized(tiny.build(), group_size=32)
    loaded = round_trip(model, tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(output(loaded, tiny.inputs()), output(model, tiny.inputs()))


# --- experts: one matrix for each in the files, one stack in the model

PER_EXPERT = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.3.w2.qweight",
    "qwen3_moe": "model.layers.0.mlp.experts.3.down_proj.qweight",
    "deepseek_v3": "model.layers.1.mlp.experts.3.down_proj.qweight",
    "qwen2_moe": "model.layers.0.mlp.experts.3.up_proj.qweight",
}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("name", PER_EXPERT)
def test_experts_come_back(name: str, sym: bool, tmp_path: Path) -> None:
    tiny = EXPERTS[name]
    model, _ = quantized(tiny.build(), group_size=32, sym=sym)
    loaded = round_trip(model, tmp_path)
    assert torch.equal(output(loaded, tiny.inputs()), output(model, tiny.inputs()))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert PER_EXPERT[name] in file.keys()  # noqa: SIM118
    assert any(isinstance(p, QuantizedParameter) and p.ndim == 3 for p in loaded.parameters())


@pytest.mark.parametrize("layout", ["reference", "cpu_int4"])
def test_saving_unpacks_one_expert_at_a_time(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EXPERTS["qwen3_moe"].build(torch.bfloat16, moe_intermediate_size=64)
    experts = act_ordered(whole.model.layers[0].mlp.experts)
    gptq_fx.quantize(whole, GPTQConfig(group_size=32), progress=False)
    whole.model.layers[0].mlp.experts = experts
    stacks = {n: p for n, p in packed(whole).items() if p.ndim == 3}
    before = {n: p.quantized_weight() for n, p in stacks.items()}
    for parameter in stacks.values():
        parameter.packed.lower(get_kernel(layout))
    unpacked, part, alive, most = PackedWeight.unpacked, Part.weight, weakref.WeakSet(), []

    def watched(self: Part) -> QuantizedWeight:
        weight = part(self)
        alive.add(weight)
        most.append(len(alive))
        return weight

    def unpack(self: PackedWeight) -> QuantizedWeight:
        assert self.spec.experts is None, "a whole stack was unpacked"
        return unpacked(self)

    monkeypatch.setattr(Part, "weight", watched)
    monkeypatch.setattr(PackedWeight, "unpacked", unpack)
    gptq_fx.save_pretrained(whole, tmp_path / "out")
    assert max(most) == 1
    monkeypatch.undo()
    loaded = packed(gptq_fx.from_pretrained(tmp_path / "out"))
    for name, wanted in before.items():
        for a, b in zip(wanted.tensors, loaded[name].quantized_weight().tensors, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


def test_each_expert_of_the_files_is_its_own(tmp_path: Path) -> None:
    model, _ = quantized(EXPERTS["mixtral"].build(), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    stack = model.model.layers[0].mlp.experts.gate_up_proj.quantized_weight()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for e in range(4):
            for part, rows in (("w1", slice(0, 128)), ("w3", slice(128, 256))):
                found = file.get_tensor(f"model.layers.0.block_sparse_moe.experts.{e}.{part}.qweight")
                assert torch.equal(found, stack.expert(e).qweight[:, rows])


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    model, _ = quantized(EXPERTS["mixtral"].build(), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    gone = "model.layers.1.block_sparse_moe.experts.2.w3"
    kept = {n: t for n, t in load_file(path).items() if not n.startswith(gone)}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{gone}.*missing"):
        gptq_fx.from_pretrained(tmp_path / "out")


def test_experts_that_files_keep_in_one_stack_are_refused(tmp_path: Path) -> None:
    model, _ = quantized(EXPERTS["gpt_oss"].build(), group_size=32)
    with pytest.raises(CheckpointError, match="keep these experts in one stack"):
        gptq_fx.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_grid_comes_back(bits: int, sym: bool, group_size: int, tmp_path: Path) -> None:
    model, _ = quantized(llama(1), bits=bits, sym=sym, group_size=group_size)
    loaded = round_trip(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    found = settings_of(tmp_path / "out")
    assert found["checkpoint_format"] == found["format"] == ("gptq" if sym else "gptq_v2")
    assert (found["bits"], found["sym"], found["group_size"]) == (bits, sym, group_size)


def test_act_order_comes_back(tmp_path: Path) -> None:
    model = llama(1)
    gptq_fx.quantize(model, GPTQConfig(desc_act=True, group_size=32), [decoder_text()], progress=False)
    assert any(p.quantized_weight().g_idx is not None for p in packed(model).values())
    loaded = round_trip(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert settings_of(tmp_path / "out")["desc_act"] is True


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lm_head", [True, False])
def test_heads_tied_or_not_and_quantized_or_not(tied: bool, lm_head: bool, tmp_path: Path) -> None:
    model, _ = quantized(llama(1, tie_word_embeddings=tied), group_size=32, lm_head=lm_head)
    loaded = round_trip(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(loaded.lm_head.weight, QuantizedParameter) == lm_head
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (tied and not lm_head)
    assert settings_of(tmp_path / "out")["lm_head"] is lm_head
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in names) == (not tied and not lm_head)


def test_mixed_schemes_are_rules(tmp_path: Path) -> None:
    rules = {
        r"-:.*layers\.0\.mlp\.down_proj": {},
        r".*self_attn\.[qkv]_proj": {"bits": 8, "group_size": 64},
        r".*layers\.1\.mlp\.up_proj": {"sym": False},
    }
    model, _ = quantized(llama(3), group_size=32, dynamic=rules)
    loaded = round_trip(model, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert not isinstance(loaded.model.layers[0].mlp.down_proj.weight, QuantizedParameter)
    assert settings_of(tmp_path / "out")["dynamic"] == {
        r"+:^model\.layers\.\d+\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$": {
            "bits": 8,
            "group_size": 64,
        },
        r"+:^model\.layers\.1\.mlp\.up_proj$": {"sym": False},
        r"-:^model\.layers\.0\.mlp\.down_proj$": {},
    }


def test_the_writer_is_named(saved: tuple[nn.Module, Path]) -> None:
    assert settings_of(saved[1])["meta"]["quantizer"] == [f"gptq_fx:{gptq_fx.__version__}"]


def test_rules_match_what_they_are_for_and_nothing_else() -> None:
    four, eight = Scheme(4, 128), Scheme(8, 128)
    wanted = {f"model.layers.{i}.mlp.{leaf}": four for i in range(12) for leaf in ("gate", "up")}
    wanted |= {f"model.layers.{i}.mlp.down": eight for i in range(12)}
    wanted |= {"model.layers.1.mlp.up": eight, "head": None, "model.layers_1_mlp.up": None}
    rules = describe.dynamic(wanted, four)
    for name, scheme in wanted.items():
        hits = [(k, v) for k, v in rules.items() if re.match(k[2:], name)]
        if scheme == four:
            assert not hits
        else:
            assert hits == [("+:" + hits[0][0][2:], {"bits": 8})] if scheme else [("-:" + hits[0][0][2:], {})]


def test_shards_are_an_index_of_files_below_the_size(tmp_path: Path) -> None:
    model, _ = quantized(llama(2), group_size=32)
    report = gptq_fx.save_pretrained(model, tmp_path / "out", max_shard_size="40KB")
    shards = [name for name in report.files if name.endswith(".safetensors")]
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118
    total = sum(t.nbytes for s in shards for t in load_file(tmp_path / "out" / s).values())
    assert index["metadata"]["total_size"] == total
    same_integers(model, gptq_fx.from_pretrained(tmp_path / "out"))


def test_per_module_names_and_dtypes(tmp_path: Path) -> None:
    model, _ = quantized(llama(1, torch.float16), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stem = "model.layers.0.mlp.down_proj"
    assert tensors[f"{stem}.qweight"].shape == (128 // 8, 64)
    assert tensors[f"{stem}.qzeros"].shape == (4, 64 // 8)
    assert tensors[f"{stem}.scales"].shape == (4, 64)
    assert tensors[f"{stem}.scales"].dtype == torch.float16
    assert tensors[f"{stem}.g_idx"].tolist() == [k // 32 for k in range(128)]
    assert (tensors[f"{stem}.qzeros"] == 0x77777777).all()
    quantized_names = {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")}
    assert quantized_names == linears(model) - HEADS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_float16_where_that_loses_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = quantized(llama(1).to(dtype), group_size=32)
    report = gptq_fx.save_pretrained(model, tmp_path / "fits")
    assert not any("scales" in note for note in report.notes)
    if dtype is torch.bfloat16:
        scales = model.model.layers[0].mlp.up_proj.weight.packed.tensors[1]
        scales[0, 0] = 1e-9  # less than float16 has
        report = gptq_fx.save_pretrained(model, tmp_path / "out")
        assert any("bfloat16" in note for note in report.notes)
        same_integers(model, gptq_fx.from_pretrained(tmp_path / "out"))


def test_dtype_and_generation_config_and_tokenizer_files(tmp_path: Path) -> None:
    model, _ = quantized(llama(1), group_size=32)
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "tokenizer.json").write_text("{}")
    (tmp_path / "origin" / "secret.txt").write_text("no")
    model.config.name_or_path = str(tmp_path / "origin")
    model.generation_config.max_new_tokens = 7
    report = gptq_fx.save_pretrained(model, tmp_path / "out")
    assert "tokenizer.json" in report.files and "secret.txt" not in report.files
    loaded = gptq_fx.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    again = gptq_fx.save_pretrained(loaded, tmp_path / "again")
    assert "tokenizer.json" in again.files


class Allocations(TorchDispatchMode):
    """The largest floating-point tensor that is made off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            real = isinstance(t, torch.Tensor) and not isinstance(t, QuantizedParameter)
            if real and t.is_floating_point() and not t.is_meta:
                self.shapes.add(tuple(t.shape))
        return result


def test_no_dense_weight_of_a_quantized_site_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode sees its own thread only
    model, _ = quantized(llama(2), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    dense = {tuple(p.shape) for p in packed(model).values()}
    with Allocations() as seen:
        loaded = gptq_fx.from_pretrained(tmp_path / "out")
    assert (96, 64) in seen.shapes  # the embedding: the test would see one
    assert not seen.shapes & (dense | {shape[::-1] for shape in dense})
    assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))


def test_the_model_compiles_and_generates(tmp_path: Path) -> None:
    model, _ = quantized(llama(1), group_size=32)
    loaded = round_trip(model, tmp_path)
    loaded.compile(backend="gptq", options={"inner_backend": "eager"})
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    tokens = loaded.generate(ids(1, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 7)


@pytest.mark.parametrize("wrap", [True, False])
def test_a_model_that_was_lowered_and_merged_is_saved(wrap: bool, tmp_path: Path) -> None:
    model, _ = quantized(llama(1, torch.bfloat16), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "before")
    options = {"inner_backend": "eager"}
    call: Any = model
    if wrap:
        call = torch.compile(model, backend="gptq", options=options)
    else:
        model.compile(backend="gptq", options=options)
    logits(call)
    gptq_fx.save_pretrained(call, tmp_path / "after")
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("before", "after"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert settings_of(tmp_path / "before") == settings_of(tmp_path / "after")
    gptq_fx.from_pretrained(tmp_path / "after")


# --- what others write


def rewrite(folder: Path, change: Any = None, **settings: Any) -> Path:
    """The checkpoint with changed tensors and settings; a setting None is removed."""
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        tensors = change(tensors) or tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path]:
    model, _ = quantized(llama(1), group_size=32)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    return model, tmp_path / "out"


def test_missing_g_idx_and_minimal_settings(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    bare = {"checkpoint_format": None, "format": None, "pack_dtype": None, "meta": None, "method": None}
    rewrite(folder, lambda t: {n: x for n, x in t.items() if not n.endswith("g_idx")}, **bare)
    same_integers(model, gptq_fx.from_pretrained(folder))


def test_quantize_config_alone(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    alone = json.loads((folder / "quantize_config.json").read_text())
    del alone["quant_method"]
    (folder / "quantize_config.json").write_text(json.dumps(alone))
    same_integers(model, gptq_fx.from_pretrained(folder))


def test_symmetric_zero_points_of_v2_labelled_v1(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    rewrite(folder, lambda t: {n: x + 0x11111111 if "qzeros" in n else x for n, x in t.items()})
    same_integers(model, gptq_fx.from_pretrained(folder))


def test_auto_round(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    packing = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    extra = {"model.layers.0.mlp.up_proj": {"bits": 4}, ".*lm_head": {"bits": 16}}
    rewrite(folder, **packing, extra_config=extra, dynamic=None)
    same_integers(model, gptq_fx.from_pretrained(folder))


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_v1_with_every_zero_point(bits: int, tmp_path: Path) -> None:
    """As its writers make it: 1 less on whole words, so that a 0 borrows from its neighbour."""
    model, _ = quantized(llama(1), group_size=32, sym=False, bits=bits)
    for parameter in packed(model).values():
        qzeros = parameter.packed.tensors[2]
        assert qzeros is not None
        qzeros.random_(-(2**31), 2**31)
    gptq_fx.save_pretrained(model, tmp_path / "out")
    of = {n: p.quantized_weight() for n, p in packed(model).items()}

    def to_v1(tensors: dict[str, torch.Tensor]) -> None:
        for name, weight in of.items():
            tensors[name.removesuffix("weight") + "qzeros"] = weight.qzeros_v1()

    rewrite(tmp_path / "out", to_v1, checkpoint_format="gptq", format="gptq")
    same_integers(model, gptq_fx.from_pretrained(tmp_path / "out"))


def test_zero_biases_that_the_model_lacks_are_skipped(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    rewrite(folder, lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(128)}))
    same_integers(model, gptq_fx.from_pretrained(folder))


# --- whole or not at all


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = quantized(llama(1), group_size=32)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "sync", crash)
    with pytest.raises(KeyboardInterrupt):
        gptq_fx.save_pretrained(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_crash_keeps_the_checkpoint_that_was_there(
    saved: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = saved
    rename = Path.rename

    def crash(self: Path, to: Any) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no space left")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(OSError, match="no space"):
        gptq_fx.save_pretrained(model, folder, overwrite=True)
    same_integers(model, gptq_fx.from_pretrained(folder))
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_only_a_checkpoint_is_replaced_and_only_if_asked(saved: tuple[nn.Module, Path]) -> None:
    model, folder = saved
    with pytest.raises(CheckpointError, match="overwrite=True"):
        gptq_fx.save_pretrained(model, folder)
    loaded = gptq_fx.from_pretrained(folder)  # mapped from the files that are replaced
    gptq_fx.save_pretrained(loaded, folder, overwrite=True)
    same_integers(model, gptq_fx.from_pretrained(folder))
    same_integers(model, loaded)
    (folder / "quantize_config.json").unlink()
    with pytest.raises(CheckpointError, match="no quantized checkpoint"):
        gptq_fx.save_pretrained(model, folder, overwrite=True)
    empty = folder.parent / "empty"
    empty.mkdir()
    gptq_fx.save_pretrained(model, empty)
    assert oct(os.stat(empty).st_mode & 0o777) == "0o755"


@pytest.mark.parametrize(
    "size, legal", [("5GB", True), (10**9, True), ("1.5 MiB", True), ("many", False), (0, False), (-1, False)]
)
def test_shard_sizes(size: Any, legal: bool, tmp_path: Path) -> None:
    model, _ = quantized(llama(1), group_size=32)
    if legal:
        gptq_fx.save_pretrained(model, tmp_path / "out", max_shard_size=size)
    else:
        with pytest.raises(CheckpointError, match="Legal"):
            gptq_fx.save_pretrained(model, tmp_path / "out", max_shard_size=size)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is quantized"):
        gptq_fx.save_pretrained(llama(1), tmp_path / "out")
    with pytest.raises(CheckpointError, match="no config"):
        gptq_fx.save_pretrained(nn.Linear(8, 8), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- who reads it


def reasons(scheme: Scheme, program: str, *, mixed: bool = False, shape: tuple[int, int] = (128, 128)) -> str:
    found = readers({"m": Stored(scheme, *shape, "torch.float16")}, mixed=mixed)
    return next("; ".join(r.reasons) for r in found if r.name.startswith(program))


def test_readers() -> None:
    assert not any(reasons(Scheme(4, 128), name) for name in ("GPTQModel", "vLLM", "SGLang", "transformers"))
    assert "not 4 or 8 bits" in reasons(Scheme(3, 128), "vLLM")
    assert "asymmetric" in reasons(Scheme(4, 128, sym=False), "vLLM")
    assert not reasons(Scheme(4, 128, sym=False), "GPTQModel")
    assert "desc_act" in reasons(Scheme(4, 128, desc_act=True), "vLLM")
    assert not reasons(Scheme(4, -1, desc_act=True), "vLLM")
    assert "dynamic" in reasons(Scheme(4, 128), "transformers", mixed=True)
    assert "multiple of 64" in reasons(Scheme(4, 128), "SGLang", shape=(128, 96))
    mixed = {
        f"a.{n}_proj": Stored(Scheme(8 if n == "k" else 4), 128, 128, "torch.float16")
        for n in ("q", "k", "v")
    }
    assert any("are one linear there" in r for r in readers(mixed, mixed=True)[1].reasons)
    alone = {"a.up_proj": Stored(Scheme(4), 128, 128, "torch.float16")}
    assert not readers(alone)[1].reasons
    assert "a: gate_proj, up_proj differ" in readers(alone, ["a.gate_proj"])[1].reasons[0]


def test_readers_of_experts() -> None:
    def found(name: str) -> dict[str, str]:
        stored = {name: Stored(Scheme(4, 128), 128, 128, "torch.float16")}
        return {reader.name.split()[0]: "; ".join(reader.reasons) for reader in readers(stored)}

    qwen = found("model.layers.0.mlp.experts.0.up_proj")
    assert not qwen["GPTQModel"] and not qwen["vLLM"] and "random numbers" in qwen["transformers"]
    mixtral = found("model.layers.0.block_sparse_moe.experts.0.w1")
    assert "gate_proj" in mixtral["GPTQModel"] and not mixtral["vLLM"]
    assert not any(found("model.layers.0.mlp.up_proj").values())
