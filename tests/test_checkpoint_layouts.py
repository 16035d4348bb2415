"""Checkpoints in the layouts that others use, written tensor by tensor: names and bits are the test's."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EXPERTS, MODELS, ids, llama, logits, relative
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import gptq_fx
from gptq_fx import CheckpointError, QuantizedParameter
from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.inspect import inspect

GROUP = 32
EXPERT = "model.layers.1.mlp.experts.2"


def pack(values: Tensor, bits: int) -> Tensor:
    """[K, N] -> int32 [K * bits / 32, N]: all bits of a column in a row, the lowest first, cut into words."""
    shifts = torch.arange(bits)
    flat = (values.long()[:, None, :] >> shifts[:, None] & 1).flatten(0, 1)
    flat = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % 32))
    words = (flat.unflatten(0, (-1, 32)) << torch.arange(32)[:, None]).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Writer:
    """Random quantized modules, their tensors by the names of the format, and the weights they mean."""

    def __init__(self, bits: int = 4, sym: bool = True, desc_act: bool = False) -> None:
        self.bits, self.sym, self.desc_act = bits, sym, desc_act
        self.tensors: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(0)

    def dense(self, name: str, shape: torch.Size) -> Tensor:
        spread = 0.05 * torch.randn(shape, generator=self.random)
        self.tensors[name] = spread + (1 if name.endswith("norm.weight") else 0)
        return self.tensors[name]

    def module(self, name: str, N: int, K: int) -> Tensor:
        """W [N, K]"""
        top = 2**self.bits
        q = torch.randint(top, (K, N), generator=self.random)
        scales = (0.1 + torch.rand(K // GROUP, N, generator=self.random)) * 0.2 / top
        scales = scales.half().float()
        zeros = torch.full(scales.shape, top // 2)
        if not self.sym:
            zeros = torch.randint(1, top, scales.shape, generator=self.random)
        g_idx = torch.arange(K) // GROUP
        if self.desc_act:  # gate and up, which have one input, have one order; others their own
            block, _, leaf = name.rpartition(".")
            same = f"{block}.gate_up" if leaf in ("gate_proj", "up_proj", "w1", "w3") else name
            seed = torch.Generator().manual_seed(zlib.crc32(same.encode()))
            g_idx = g_idx[torch.randperm(K, generator=seed)]
        self.tensors |= {
            f"{name}.qweight": pack(q, self.bits),
            f"{name}.qzeros": pack((zeros - 1).mT, self.bits).mT.contiguous(),
            f"{name}.scales": scales.half(),
            f"{name}.g_idx": g_idx.to(torch.int32),
        }
        return ((q - zeros[g_idx]) * scales[g_idx]).mT.contiguous()

    def save(self, folder: Path, model: Any) -> None:
        folder.mkdir(exist_ok=True)
        save_file(self.tensors, folder / "model.safetensors", {"format": "pt"})
        settings = {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": GROUP,
            "sym": self.sym,
            "desc_act": self.desc_act,
        }
        body = {**json.loads(model.config.to_json_string(use_diff=False)), "quantization_config": settings}
        body["architectures"] = [type(model).__name__]
        (folder / "config.json").write_text(json.dumps(body))


# --- experts, one matrix for each: as GPTQModel, AutoGPTQ and the Hub have them

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
# block: of the experts in the files. parts: gate, up, down there. attention: its linears.
LAYOUTS: dict[str, tuple[str, tuple[str, str, str], tuple[str, ...]]] = {
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), ATTENTION),
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), ATTENTION),
    "mixtral of GPTQModel": ("mlp", ("gate_proj", "up_proj", "down_proj"), ATTENTION),
    "deepseek_v3": ("mlp", ("gate_proj", "up_proj", "down_proj"), LATENT),
}


def write_experts(name: str, writer: Writer, folder: Path) -> nn.Module:
    """The files; and the model of transformers with the dense weights that they mean."""
    block, parts, attention = LAYOUTS[name]
    model = EXPERTS[name.partition(" ")[0]].build()
    wanted: dict[str, Tensor] = {}
    linears = [f"self_attn.{leaf}" for leaf in attention]
    linears += [
        f"mlp.{shared}{leaf}"
        for shared in ("", "shared_experts.")
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    for path, tensor in model.state_dict().items():
        inner = ".".join(path.split(".")[3:])
        stem = path.removesuffix(inner)
        if inner == "mlp.experts.gate_up_proj":
            E, rows, K = tensor.shape
            both = [
                torch.cat([writer.module(f"{stem}{block}.experts.{e}.{p}", rows // 2, K) for p in parts[:2]])
                for e in range(E)
            ]
            wanted[path] = torch.stack(both)
        elif inner == "mlp.experts.down_proj":
            E, N, K = tensor.shape
            wanted[path] = torch.stack(
                [writer.module(f"{stem}{block}.experts.{e}.{parts[2]}", N, K) for e in range(E)]
            )
        elif inner.removesuffix(".weight") in linears:
            wanted[path] = writer.module(path.removesuffix(".weight"), *tensor.shape)
        else:
            in_files = path.replace(".mlp.", f".{block}.") if inner.startswith("mlp.gate.") else path
            wanted[path] = writer.dense(in_files, tensor.shape)
    writer.save(folder, model)
    model.load_state_dict(wanted, strict=True)
    return model


@pytest.mark.parametrize("bits, sym, desc_act", [(4, True, False), (3, False, False), (8, True, True)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_experts_of_the_files_are_those_of_the_model(
    name: str, bits: int, sym: bool, desc_act: bool, tmp_path: Path
) -> None:
    wanted = write_experts(name, Writer(bits, sym, desc_act), tmp_path / "in")
    loaded = gptq_fx.from_pretrained(tmp_path / "in", dtype=torch.float32)
    stacks = [p for p in loaded.parameters() if isinstance(p, QuantizedParameter) and p.ndim == 3]
    assert len(stacks) == 2 * sum("mlp.experts.down_proj" in n for n in wanted.state_dict())
    tokens = ids(2, 12)
    assert relative(logits(loaded, tokens), logits(wanted, tokens)) <= 1e-5
    # and saved again under the same names, integer for integer
    gptq_fx.save_pretrained(loaded, tmp_path / "out")
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    if "of GPTQModel" in name:  # saved in the spelling of the Hub, which vLLM and SGLang read
        in_theirs = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
        other = {n.replace(".block_sparse_moe.", ".mlp."): t for n, t in other.items()}
        for leaf, theirs in in_theirs.items():
            other = {n.replace(leaf, theirs): t for n, t in other.items()}
    assert one.keys() == other.keys()
    same = [n for n in one if n.endswith(("qweight", "g_idx", "scales"))]
    assert same and all(torch.equal(one[n], other[n]) for n in same)
    again = gptq_fx.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(loaded, tokens))


def test_one_expert_with_gate_and_up_swapped_is_seen(tmp_path: Path) -> None:
    """The logits above would show it if one matrix went to the wrong place."""
    wanted = write_experts("qwen3_moe", Writer(), tmp_path / "in")
    other = write_experts("qwen3_moe", Writer(), tmp_path / "swapped")

    def swap(tensors: dict[str, Tensor]) -> None:
        for leaf in ("qweight", "scales"):
            gate, up = f"{EXPERT}.gate_proj.{leaf}", f"{EXPERT}.up_proj.{leaf}"
            tensors[gate], tensors[up] = tensors[up], tensors[gate]

    loaded = gptq_fx.from_pretrained(rewritten(tmp_path / "swapped", swap), dtype=torch.float32)
    assert torch.equal(logits(wanted), logits(other))
    assert relative(logits(loaded), logits(wanted)) > 1e-3


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_rows_of_one_expert_in_two_orders(tmp_path: Path) -> None:
    write_experts("qwen3_moe", Writer(desc_act=True), tmp_path / "in")

    def roll(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERT}.up_proj.g_idx"] = tensors[f"{EXPERT}.up_proj.g_idx"].roll(1).contiguous()

    folder = rewritten(tmp_path / "in", roll)
    with pytest.raises(
        CheckpointError, match=rf"{EXPERT}\.gate_proj and {EXPERT}\.up_proj differ in their g_idx"
    ):
        gptq_fx.from_pretrained(folder)


def test_one_expert_in_both_spellings(tmp_path: Path) -> None:
    write_experts("mixtral", Writer(), tmp_path / "in")

    def twice(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "block_sparse_moe.experts.2.w1." in n]:
            other = name.replace("block_sparse_moe", "mlp").replace(".w1.", ".gate_proj.")
            tensors[other] = tensors[name].clone()

    with pytest.raises(CheckpointError, match=r"experts\.2\.gate_proj\.qweight: is what .*\.w1 is in"):
        gptq_fx.from_pretrained(rewritten(tmp_path / "in", twice))


def test_an_expert_in_its_natural_order_among_others(tmp_path: Path) -> None:
    """So writers leave one that saw no tokens."""
    write_experts("qwen3_moe", Writer(desc_act=True), tmp_path / "in")

    def natural(tensors: dict[str, Tensor]) -> None:
        for leaf in ("gate_proj", "up_proj"):
            g_idx = tensors[f"{EXPERT}.{leaf}.g_idx"]
            tensors[f"{EXPERT}.{leaf}.g_idx"] = g_idx.sort().values

    loaded = gptq_fx.from_pretrained(rewritten(tmp_path / "in", natural), dtype=torch.float32)
    found = loaded.model.layers[1].mlp.experts.gate_up_proj.quantized_weight().g_idx
    assert found[2].tolist() == [k // GROUP for k in range(64)] != found[1].tolist()
    assert torch.isfinite(logits(loaded)).all()


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_experts_through_transformers(tmp_path: Path) -> None:
    wanted = write_experts("mixtral", Writer(), tmp_path / "in")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "in", quantization_config=gptq_fx.HFConfig(), dtype=torch.float32
    )
    assert relative(logits(loaded), logits(wanted)) <= 1e-5
    gptq_fx.save_pretrained(loaded, tmp_path / "out")
    one, other = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    assert one.keys() == other.keys()


# --- Marlin's layout, as AutoGPTQ wrote it: B, s and workspace in place of the four tensors


def marlin_words(q: list[list[int]], bits: int) -> Tensor:
    """Codes [K][N] -> int32 [K / 16, N * bits / 2], word by word as the format is published: lane t of
    warp w holds the fragment of a matrix instruction, with its codes interleaved."""
    K, N = len(q), len(q[0])
    words = torch.zeros(K // 16 * (N * bits // 2), dtype=torch.int64)
    size = 32 * bits  # words of a tile
    for kt in range(K // 16):
        for nt in range(N // 64):
            for w in range(4):
                for t in range(32):
                    n = 64 * nt + 16 * w + t // 4
                    ks = [16 * kt + 2 * (t % 4) + j for j in (0, 1, 8, 9)]
                    v = [q[k][n] for k in ks] + [q[k][n + 8] for k in ks]
                    base = (kt * (N // 64) + nt) * size
                    if bits == 4:
                        fields = [v[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
                        words[base + 4 * t + w] = sum(f << 4 * i for i, f in enumerate(fields))
                        continue
                    for h in range(2):
                        fields = [v[4 * h + i] for i in (0, 2, 1, 3)]
                        words[base + 8 * t + 2 * w + h] = sum(f << 8 * i for i, f in enumerate(fields))
    words = torch.where(words >= 2**31, words - 2**32, words)
    return words.to(torch.int32).view(K // 16, N * bits // 2)


def marlin_scales(scales: Tensor) -> Tensor:
    order = [i + 8 * j for i in range(8) for j in range(8)]
    if len(scales) == 1:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return scales.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)


def write_marlin(tiny: nn.Module, folder: Path, bits: int, groups: bool, settings: dict[str, Any]) -> None:
    """A checkpoint in the layout of `tiny`, quantized; `folder`/plain is the same one in GPTQ's own form."""
    config = gptq_fx.GPTQConfig(bits=bits, group_size=GROUP if groups else -1)
    gptq_fx.quantize(tiny, config, progress=False)
    gptq_fx.save_pretrained(tiny, folder / "plain")
    tensors = load_file(folder / "plain" / "model.safetensors")
    for name, parameter in tiny.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            weight, stem = parameter.quantized_weight(), name.removesuffix(".weight")
            for leaf in ("qweight", "qzeros", "scales", "g_idx"):
                del tensors[f"{stem}.{leaf}"]
            tensors[f"{stem}.B"] = marlin_words(weight.codes().tolist(), bits)
            tensors[f"{stem}.s"] = marlin_scales(weight.scales).half().contiguous()
            tensors[f"{stem}.workspace"] = torch.zeros(16, dtype=torch.int32)
    body = json.loads((folder / "plain" / "config.json").read_text())
    del body["quantization_config"]
    body["quantization_config"] = {"group_size": config.group_size, **settings}
    (folder / "marlin").mkdir()
    (folder / "marlin" / "config.json").write_text(json.dumps(body))
    save_file(tensors, folder / "marlin" / "model.safetensors", {"format": "pt"})


def wide() -> nn.Module:
    return llama(1, torch.float16, num_key_value_heads=4)  # 64 outputs each


SPELLINGS: dict[str, dict[str, Any]] = {
    "GPTQModel": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin", "sym": True},
    "AutoGPTQ": {"quant_method": "gptq", "bits": 4, "is_marlin_format": True, "desc_act": False},
    "method": {"quant_method": "marlin"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("groups", [True, False])
def test_marlin(spelling: str, groups: bool, tmp_path: Path) -> None:
    write_marlin(wide(), tmp_path, 4, groups, SPELLINGS[spelling])
    same_numbers(tmp_path)


def test_marlin_of_8_bits(tmp_path: Path) -> None:
    write_marlin(wide(), tmp_path, 8, True, {**SPELLINGS["GPTQModel"], "bits": 8})
    same_numbers(tmp_path)


def same_numbers(folder: Path) -> None:
    plain, marlin = (gptq_fx.from_pretrained(folder / name) for name in ("plain", "marlin"))
    for name, parameter in plain.named_parameters():
        if isinstance(parameter, QuantizedParameter):
            one, other = parameter.quantized_weight(), marlin.get_parameter(name).quantized_weight()
            assert torch.equal(one.codes(), other.codes()) and torch.equal(one.scales, other.scales), name
            assert one.qzeros is other.qzeros is one.g_idx is other.g_idx is None
    assert torch.equal(logits(plain), logits(marlin))
    found = inspect(folder / "marlin")
    assert not found.problems and len(found.modules) == 7
    assert all("Marlin's layout" in str(reader) for reader in found.readers)
    gptq_fx.save_pretrained(marlin, folder / "again")  # in GPTQ's own form
    one, other = (load_file(folder / name / "model.safetensors") for name in ("plain", "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_marlin_through_transformers(tmp_path: Path) -> None:
    write_marlin(wide(), tmp_path, 4, True, SPELLINGS["GPTQModel"])
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "marlin", quantization_config=gptq_fx.HFConfig(), dtype=torch.float16
    )
    assert torch.equal(logits(loaded), logits(gptq_fx.from_pretrained(tmp_path / "plain")))


UP = "model.layers.0.mlp.up_proj"


def without_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}.s"]


def cut_short(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.B"] = tensors[f"{UP}.B"][:-1].contiguous()


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.s"][1, 3] = torch.nan


def floats(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.B"] = tensors[f"{UP}.B"].float()


@pytest.mark.parametrize(
    "change, settings, said",
    [
        (without_scales, {}, rf"{UP}\.s: missing"),
        (cut_short, {}, rf"{UP}\.B: found shape \[3, 256\]. Legal by the settings: \[4, 256\]"),
        (nan, {}, rf"{UP}\.s: NaN or Inf, first at \[1, 3\]"),
        (floats, {}, rf"{UP}\.B: found dtype F32"),
        (None, {"sym": False}, "sym: found false"),
        (None, {"desc_act": True}, "desc_act: found true"),
        (None, {"bits": 3}, "bits: found 3 in Marlin's layout"),
        (None, {"bits": 8}, rf"{UP}\.B: found shape|\.B: found shape"),
        (None, {"checkpoint_format": "gptq"}, r"no tensor is quantized, but config\.json says 'gptq'"),
    ],
)
def test_damaged_marlin(
    change: Callable[[dict[str, Tensor]], None] | None, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_marlin(wide(), tmp_path, 4, True, {**SPELLINGS["GPTQModel"], **settings})
    if change is not None:
        rewritten(tmp_path / "marlin", change)
    with pytest.raises(CheckpointError, match=said):
        gptq_fx.from_pretrained(tmp_path / "marlin")


def test_marlin_has_no_layout_for_narrow_outputs(tmp_path: Path) -> None:
    write_marlin(wide(), tmp_path, 4, True, SPELLINGS["GPTQModel"])
    path = tmp_path / "marlin" / "config.json"
    path.write_text(path.read_text().replace('"num_key_value_heads": 4', '"num_key_value_heads": 2'))
    with pytest.raises(CheckpointError, match=r"found 64 inputs and 32 outputs\. Legal in Marlin's layout"):
        gptq_fx.from_pretrained(tmp_path / "marlin")


@pytest.mark.parametrize("shown_as", [torch.squeeze, torch.t], ids=["without dimensions of one", "turned"])
def test_parts_of_a_stack_however_transformers_shows_them(
    monkeypatch: pytest.MonkeyPatch, shown_as: Callable[[Tensor], Tensor]
) -> None:
    """Version 5.17 drops dimensions of one."""
    model = MODELS["mixtral"].build()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    E, rows, _ = model.get_parameter(name).shape
    wanted = skeleton.parts(model, name, E, rows, False)
    names = skeleton.checkpoint_names
    monkeypatch.setattr(
        skeleton, "checkpoint_names", lambda *args: {n: shown_as(t) for n, t in names(*args).items()}
    )
    assert skeleton.parts(model, name, E, rows, False) == wanted
    assert len(wanted) == 2 * E
