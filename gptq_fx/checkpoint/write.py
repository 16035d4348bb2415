"""save_pretrained: a quantized model as a standard GPTQ checkpoint, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_fx.checkpoint.describe import describe
from gptq_fx.checkpoint.files import INDEX, SINGLE
from gptq_fx.checkpoint.names import Part, dense_linears, heads_of, is_bare, named
from gptq_fx.checkpoint.publish import check_target, publish, sync
from gptq_fx.checkpoint.readers import Reader, Stored, readers
from gptq_fx.errors import CheckpointError
from gptq_fx.parallel import LOCAL
from gptq_fx.weight import QuantizedWeight, packed_rows

# What belongs to a tokenizer or processor, and is carried over from the folder a model came from.
CARRIED = (
    "*token*.json",
    "*.jinja",
    "*.model",
    "*vocab*",
    "merges.txt",
    "chat_template.json",
    "*processor_config.json",
)
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class SaveReport:
    """path, files, nbytes: what was written. readers: which programs can read it, or why not."""

    path: str
    files: tuple[str, ...]
    nbytes: int
    readers: tuple[Reader, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.files)} files, {self.nbytes / 1e6:.1f} MB", "read by"]
        return "\n".join([*lines, *(f"  {reader}" for reader in self.readers), *self.notes])


@dataclass(frozen=True)
class _Unit:
    """Tensors that go into the same file; made when that file is written."""

    nbytes: int
    make: Callable[[], dict[str, Tensor]]


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> SaveReport:
    """Write a model of transformers with QuantizedParameters as a GPTQ checkpoint.

    tokenizer: saved beside; without one, the files of the folder that the model came from are copied.
    max_shard_size: bytes of a file, such as "5GB".
    overwrite: replace a quantized checkpoint at `path`. Anything else there that is not an empty folder
        is refused.

    Zero points are stored as "gptq" where all are symmetric, else as "gptq_v2". Scales are stored as
    float16, which all readers take, if that loses nothing, else in their own dtype. All is written to a
    folder beside `path`, which gets that name at the end: a crash leaves no half checkpoint under it.
    Raises CheckpointError on what cannot be written.
    """
    target = Path(path)
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    limit = _bytes(max_shard_size)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_json_file"):
        raise CheckpointError(f"{type(model).__name__}: has no config. Legal: a model of transformers")
    if any(getattr(module, LOCAL, False) for module in model.modules()):
        raise CheckpointError(
            f"{type(model).__name__}: this rank holds a part of it. Legal: a model that one process holds"
        )
    check_target(target, overwrite)
    dense, quantized = named(model)
    if not quantized:
        raise CheckpointError(f"{type(model).__name__}: nothing is quantized. Legal: after gptq_fx.quantize")
    heads = heads_of(model, dense, quantized)
    schemes = {name: p.scheme for name, p in quantized.items()}
    bare = [n for n, p in quantized.items() if is_bare(model, p)]
    linears = dense_linears(model, dense)
    described = describe(schemes, linears, heads, bare)
    scales = _scales_dtype(quantized)
    v1 = described["checkpoint_format"] == "gptq"
    units = [_dense_unit(name, tensor) for name, tensor in dense.items()]
    units += [_unit(name, part, scales, v1) for name, part in quantized.items()]

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _write_tensors(partial, units, limit)
        _write_configs(partial, model, described)
        notes = _carry(partial, model, tokenizer)
        sync(partial)
        files = tuple(sorted(p.name for p in partial.iterdir()))
        nbytes = sum(p.stat().st_size for p in partial.iterdir())
        partial.chmod(0o755)  # mkdtemp's folders are the owner's alone
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    stored = {
        name: Stored(p.scheme, p.in_features, p.out_features, str(scales)) for name, p in quantized.items()
    }
    who = readers(stored, linears, mixed=bool(described["dynamic"]))
    if scales is not torch.float16:
        notes = (*notes, f"scales are {str(scales).removeprefix('torch.')}: float16 would change them")
    return SaveReport(str(target), files, nbytes, who, notes)


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise CheckpointError(f"max_shard_size={size!r}. Legal: a number of bytes, or such as '5GB'")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _scales_dtype(quantized: Mapping[str, Part]) -> torch.dtype:
    """float16 if every scale is one, else the dtype that the scales have."""
    for part in quantized.values():
        scales = part.weight().scales
        if not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
            return scales.dtype
    return torch.float16


def _dense_unit(name: str, tensor: Tensor) -> _Unit:
    return _Unit(tensor.numel() * tensor.element_size(), lambda: {name: _own(tensor)})


def _unit(name: str, part: Part, scales: torch.dtype, v1: bool) -> _Unit:
    bits, K, N, G = part.scheme.bits, part.in_features, part.out_features, part.parameter.packed.spec.groups
    words = packed_rows(K, bits) * N + K
    nbytes = 4 * (words + G * packed_rows(N, bits)) + G * N * scales.itemsize
    return _Unit(nbytes, lambda: module_tensors(name, part.weight(), scales, v1))


def module_tensors(name: str, weight: QuantizedWeight, scales: torch.dtype, v1: bool) -> dict[str, Tensor]:
    """The tensors of a module, all of them: some readers miss a g_idx or zero points that say nothing."""
    qzeros = weight.qzeros
    if v1:
        qzeros = weight.qzeros_v1()
    elif qzeros is None:
        codes = torch.zeros(weight.scales.shape, device="cpu")
        middle = torch.full_like(codes, 2 ** (weight.bits - 1), dtype=torch.int64)
        qzeros = QuantizedWeight.from_codes(codes, weight.scales.cpu(), middle, weight.bits).qzeros
    g_idx = weight.g_idx
    if g_idx is None:
        inputs = torch.arange(weight.in_features, dtype=torch.int32, device="cpu")
        g_idx = inputs // weight.group_size
    assert qzeros is not None
    return {
        f"{name}.qweight": _own(weight.qweight),
        f"{name}.qzeros": _own(qzeros),
        f"{name}.scales": _own(weight.scales.to(scales)),
        f"{name}.g_idx": _own(g_idx.to(torch.int32)),
    }


def _own(tensor: Tensor) -> Tensor:
    """The tensor on the host, contiguous, and alone in its storage, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_tensors(folder: Path, units: Sequence[_Unit], limit: int) -> None:
    shards: list[list[_Unit]] = [[]]
    for unit in units:
        if shards[-1] and sum(u.nbytes for u in shards[-1]) + unit.nbytes > limit:
            shards.append([])
        shards[-1].append(unit)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in (pair for unit in shard for pair in unit.make().items()):
            shared = tensor.untyped_storage().data_ptr() in storages  # such as the g_idx of q, k and v
            tensors[name] = tensor.clone() if shared else tensor
            storages.add(tensor.untyped_storage().data_ptr())
        total += sum(tensor.nbytes for tensor in tensors.values())
        weight_map |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        _json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_configs(folder: Path, model: Any, described: Mapping[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.quantization_config = dict(described)
    config.to_json_file(folder / "config.json")
    _json(folder / "quantize_config.json", described)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        _json(folder / "generation_config.json", json.loads(generation.to_json_string()))


def _carry(folder: Path, model: Any, tokenizer: Any) -> tuple[str, ...]:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return ()
    name = model.config.name_or_path
    origin = Path(name or "")
    if not name or not origin.is_dir():
        if not (name and _cached_tokenizer(name, folder)):
            return ("no tokenizer is known: pass tokenizer= to save it beside",)
        return ()
    written = {path.name for path in folder.iterdir()}
    for path in {path for pattern in CARRIED for path in origin.glob(pattern)}:
        if path.is_file() and path.name not in written and not path.name.endswith(".safetensors"):
            shutil.copyfile(path, folder / path.name)
    return ()


def _cached_tokenizer(name: str, folder: Path) -> bool:
    """Save the tokenizer of a repository of the Hub, if its files are in the cache."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(name, local_files_only=True).save_pretrained(folder)
    except Exception:  # whatever is wrong with it: the model is worth saving without
        return False
    return True


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
