"""The files of a checkpoint folder: JSON and safetensors, nothing pickled and nothing outside the folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptq_fx.errors import CheckpointError

MAX_JSON = 64 << 20  # bytes; the index of a model of a million tensors is about as large
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is and what its header says; dtype is the name that safetensors has for it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder by name. Only headers are read until a tensor is asked for."""

    folder: Path
    entries: dict[str, Entry]
    nbytes: int
    _open: dict[str, Any] = field(repr=False, default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """The tensor, mapped into memory: its pages are read when they are used."""
        try:
            tensor: Tensor = self._open[self.entries[name].file].get_tensor(name)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise self.error(name, str(error)) from error
        return tensor

    def lazy(self, name: str) -> Any:
        """A slice object of safetensors, which transformers reads when it loads."""
        return self._open[self.entries[name].file].get_slice(name)

    def error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.entries[name].file}: {name}: {what}")


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of the folder; None if there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    _stays_inside(folder, path)
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{name}: found {path.stat().st_size} bytes. Legal: at most {MAX_JSON}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name}: found {type(found).__name__}. Legal: a JSON object")
    return found


def open_tensors(folder: Path) -> TensorFiles:
    """Open the safetensors of a folder: the ones that its index names, or the single file.

    Raises CheckpointError, naming the file, on one that is missing or damaged, on an index that names
    files elsewhere or tensors that are not there, and if the weights are pickled.
    """
    index = read_json(folder, INDEX)
    weight_map = None if index is None else _weight_map(index)
    if weight_map is not None:
        files = sorted(set(weight_map.values()))
    elif (folder / SINGLE).exists():
        files = [SINGLE]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(files) != 1:
            raise _no_weights(folder, files)
    entries: dict[str, Entry] = {}
    handles: dict[str, Any] = {}
    for file in files:
        handles[file] = _open_file(folder, file)
        for name in handles[file].keys():  # noqa: SIM118
            if name in entries:
                raise CheckpointError(f"{file}: {name}: also in {entries[name].file}. Legal: one of them")
            part = handles[file].get_slice(name)
            entries[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
    for name, file in (weight_map or {}).items():
        if name not in entries:
            raise CheckpointError(f"{file}: {name}: not in the file, though {INDEX} says so")
        if entries[name].file != file:
            raise CheckpointError(f"{file}: {name}: is in {entries[name].file}, {INDEX} says otherwise")
    total = sum((folder / file).stat().st_size for file in files)
    return TensorFiles(folder, entries, total, handles)


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{INDEX}: weight_map: no mapping from tensors to files")
    for name, file in found.items():
        if Path(file).name != file or file in (".", "..") or "\\" in file or "\0" in file:
            raise CheckpointError(
                f"{INDEX}: {name}: found the file {file!r}. Legal: a name in the same folder, without a path"
            )
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX}: {name}: found the file {file!r}. Legal: *.safetensors")
    return found


def _open_file(folder: Path, file: str) -> Any:
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{file}: missing")
    _stays_inside(folder, path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged, {path.stat().st_size} bytes: {error}") from None


def _stays_inside(folder: Path, path: Path) -> None:
    """A link may lead to the blobs of the Hub's own cache, and nowhere else outside of the folder."""
    real, home = path.resolve(), folder.resolve()
    if home not in real.parents and home.parent.parent / "blobs" not in real.parents:
        raise CheckpointError(f"{path.name}: a link to {real}, outside of the folder")


def _no_weights(folder: Path, files: list[str]) -> CheckpointError:
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if files:
        return CheckpointError(f"{folder}: found {', '.join(files[:4])} without {INDEX}")
    if pickled:
        return CheckpointError(
            f"{pickled[0]}: pickled weights are never loaded: they can run code. Legal: *.safetensors"
        )
    return CheckpointError(f"{folder}: holds no weights. Legal: {SINGLE}, or {INDEX} and its files")
