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

from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.describe import describe
from gptq_fx.checkpoint.files import INDEX, SINGLE
from gptq_fx.checkpoint.readers import Reader, Stored, readers
from gptq_fx.checkpoint.tensors import rows_of
from gptq_fx.errors import CheckpointError
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter
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
    check_target(target, overwrite)
    dense, quantized = _named(model)
    if not quantized:
        raise CheckpointError(f"{type(model).__name__}: nothing is quantized. Legal: after gptq_fx.quantize")
    heads = _heads(model, dense, quantized)
    schemes = {name: p.scheme for name, p in quantized.items()}
    # no module of its own tells which way a bare matrix lies
    bare = [n for n, p in quantized.items() if p.transposed and not _is_conv1d(model, p)]
    linears = _dense_linears(model, dense)
    described = describe(schemes, linears, heads, bare)
    scales = _scales_dtype(quantized)
    v1 = described["checkpoint_format"] == "gptq"
    units = [_dense_unit(name, tensor) for name, tensor in dense.items()]
    units += [_unit(name, parameter, scales, v1) for name, parameter in quantized.items()]

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        _write_tensors(partial, units, limit)
        _write_configs(partial, model, described)
        notes = _carry(partial, model, tokenizer)
        _sync(partial)
        files = tuple(sorted(p.name for p in partial.iterdir()))
        nbytes = sum(p.stat().st_size for p in partial.iterdir())
        partial.chmod(0o755)  # mkdtemp's folders are the owner's alone
        _publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    stored = {
        name: Stored(p.scheme, p.packed.spec.in_features, p.packed.spec.out_features, str(scales))
        for name, p in quantized.items()
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


def check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError where save_pretrained would refuse the folder."""
    if not (target.exists() or target.is_symlink()) or (target.is_dir() and not any(target.iterdir())):
        return
    ours = target.is_dir() and not target.is_symlink() and (target / "quantize_config.json").is_file()
    if not ours:
        raise CheckpointError(f"{target}: exists, and is no quantized checkpoint. Legal: a new folder")
    if not overwrite:
        raise CheckpointError(f"{target}: exists. Legal: a new folder, or overwrite=True")


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, QuantizedParameter]]:
    """Dense tensors, and quantized parameters by module, both under the names of checkpoints."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = model.state_dict(keep_vars=True)
    once = {n: t for n, t in state.items() if not (n in tied and t is state.get(tied[n]))}
    stand_ins: dict[int, tuple[str, QuantizedParameter]] = {}
    shown: dict[str, Tensor] = {}
    stacks: dict[str, QuantizedParameter] = {}
    for name, tensor in once.items():
        shown[name] = tensor
        if isinstance(tensor, QuantizedParameter) and tensor.ndim == 3:
            del shown[name]
            stacks[name] = tensor
        elif isinstance(tensor, QuantizedParameter):
            shown[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            stand_ins[id(shown[name])] = (name, tensor)
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: is on the meta device, without numbers to save")
    dense: dict[str, Tensor] = {}
    quantized: dict[str, QuantizedParameter] = {}
    for name, tensor in skeleton.checkpoint_names(model, shown).items():
        if id(tensor) in stand_ins:
            quantized[name.removesuffix(".weight")] = stand_ins.pop(id(tensor))[1]
        elif tensor.is_meta:
            raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
        else:
            dense[name] = tensor.detach()
    if stand_ins:
        name, _ = next(iter(stand_ins.values()))
        raise CheckpointError(f"{name}: stored in parts, which is not in this version for quantized ones")
    for name, stack in stacks.items():
        quantized |= _experts(model, name, stack)
    return dense, quantized


def _experts(model: nn.Module, name: str, stack: QuantizedParameter) -> dict[str, QuantizedParameter]:
    """The matrices that checkpoints keep a stack of experts in."""
    spec, weight = stack.packed.spec, stack.quantized_weight()
    assert spec.experts is not None
    cut = skeleton.parts(model, name, spec.experts, spec.out_features, stack.transposed)
    made = {}
    for module, (expert, start, stop) in cut.items():
        part = rows_of(weight.expert(expert), start, stop)
        made[module] = QuantizedParameter(PackedWeight(part, stack.scheme, None), module)
    return made


def _heads(model: Any, dense: Mapping[str, Tensor], quantized: Mapping[str, QuantizedParameter]) -> set[str]:
    """The names of the output projection."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    names = {n for n, p in quantized.items() if p is weight}
    names |= {n for n in (*dense, *quantized) if n.rpartition(".")[2] in ("lm_head", "embed_out")}
    if isinstance(weight, Tensor) and not isinstance(weight, QuantizedParameter):
        place = weight.data_ptr()
        names |= {n.removesuffix(".weight") for n, t in dense.items() if t.data_ptr() == place}
    return names


def _dense_linears(model: nn.Module, dense: Mapping[str, Tensor]) -> list[str]:
    """The linears that stay dense: readers quantize every linear that no rule leaves out."""
    linears, tables = set(), set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(weight, QuantizedParameter):
            continue
        if isinstance(module, nn.Linear) or skeleton.is_conv1d(module):
            linears.add(weight.data_ptr())
        elif isinstance(module, nn.Embedding):
            tables.add(weight.data_ptr())
    return [
        name.removesuffix(".weight")
        for name, tensor in dense.items()
        if name.endswith(".weight") and tensor.data_ptr() in linears - tables
    ]


def _is_conv1d(model: nn.Module, parameter: QuantizedParameter) -> bool:
    return any(skeleton.is_conv1d(m) and m.weight is parameter for m in model.modules())


def _scales_dtype(quantized: Mapping[str, QuantizedParameter]) -> torch.dtype:
    """float16 if every scale is one, else the dtype that the scales have."""
    for parameter in quantized.values():
        scales = parameter.quantized_weight().scales
        if not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
            return scales.dtype
    return torch.float16


def _dense_unit(name: str, tensor: Tensor) -> _Unit:
    return _Unit(tensor.numel() * tensor.element_size(), lambda: {name: _own(tensor)})


def _unit(name: str, parameter: QuantizedParameter, scales: torch.dtype, v1: bool) -> _Unit:
    spec, bits = parameter.packed.spec, parameter.scheme.bits
    words = packed_rows(spec.in_features, bits) * spec.out_features + spec.in_features
    zeros = spec.groups * packed_rows(spec.out_features, bits)
    nbytes = 4 * (words + zeros) + spec.groups * spec.out_features * scales.itemsize
    return _Unit(nbytes, lambda: module_tensors(name, parameter.quantized_weight(), scales, v1))


def module_tensors(name: str, weight: QuantizedWeight, scales: torch.dtype, v1: bool) -> dict[str, Tensor]:
    """The tensors of a module, all of them: some readers miss a g_idx or zero points that say nothing."""
    qzeros = weight.qzeros
    if v1:
        qzeros = weight.qzeros_v1()
    elif qzeros is None:
        middle = torch.full(weight.scales.shape, 2 ** (weight.bits - 1))
        qzeros = QuantizedWeight.from_codes(
            torch.zeros(weight.scales.shape), weight.scales.cpu(), middle, weight.bits
        ).qzeros
    g_idx = weight.g_idx
    if g_idx is None:
        g_idx = torch.arange(weight.in_features, dtype=torch.int32) // weight.group_size
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


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _publish(partial: Path, target: Path) -> None:
    """Give the folder its final name. A checkpoint that was there steps aside first, and is then removed.

    No system call known everywhere swaps two folders: a crash between the two renames leaves nothing
    under the final name, and both checkpoints whole beside it.
    """
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
        target.rename(old)
    elif target.is_dir():
        target.rmdir()
    try:
        partial.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    number = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
