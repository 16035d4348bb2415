"""What is in a checkpoint, and what is wrong with it, without a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.files import DTYPES, TensorFiles, open_tensors
from gptq_fx.checkpoint.read import check_names
from gptq_fx.checkpoint.readers import Reader, Stored, readers
from gptq_fx.checkpoint.settings import CheckpointSettings, read_settings
from gptq_fx.checkpoint.tensors import modules_of, read_module
from gptq_fx.errors import CheckpointError
from gptq_fx.kernels.marlin import layout
from gptq_fx.scheme import Scheme

T = TypeVar("T")
ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Module:
    """A quantized module of K inputs and N outputs; bytes of all its tensors."""

    name: str
    scheme: Scheme
    in_features: int
    out_features: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """modules: those that are sound. dense_bytes: of all other tensors. problems: one line each."""

    path: str
    settings: dict[str, Any]
    modules: tuple[Module, ...]
    dense_bytes: int
    file_bytes: int
    readers: tuple[Reader, ...]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @property
    def schemes(self) -> Counter[Scheme]:
        return Counter(module.scheme for module in self.modules)


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read headers, settings, zero points, g_idx and scales, and check them against each other.

    Raises CheckpointError where the folder is no checkpoint whose files could be opened.
    """
    folder = skeleton.local_folder(path)
    settings = read_settings(folder)
    files = open_tensors(folder)
    problems: list[str] = []
    modules = [
        found
        for name in modules_of(files, settings)
        if (found := _try(problems, lambda name=name: _module(files, settings, name))) is not None  # type: ignore[misc]
    ]
    _try(problems, lambda: check_names(folder, files, settings))
    quantized = {f"{name}.{leaf}" for name in modules_of(files, settings) for leaf in settings.leaves}
    dense = sum(_nbytes(files, name) for name in files.entries if name not in quantized)
    scales = settings.leaves[1]
    stored = {
        m.name: Stored(
            m.scheme, m.in_features, m.out_features, str(DTYPES[files.entries[f"{m.name}.{scales}"].dtype])
        )
        for m in modules
    }
    others = [name.removesuffix(".weight") for name in files.entries if name.endswith(".weight")]
    who = readers(stored, others, mixed=bool(settings.overrides), marlin=settings.format == "marlin")
    unique = tuple(dict.fromkeys(problems))
    return Inspection(str(folder), dict(settings.raw), tuple(modules), dense, files.nbytes, who, unique)


def _try(problems: list[str], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _module(files: TensorFiles, settings: CheckpointSettings, name: str) -> Module:
    scheme = settings.scheme_for(name) or settings.scheme
    codes, scales = (files.entries.get(f"{name}.{leaf}") for leaf in settings.leaves[:2])
    if codes is None or scales is None or len(codes.shape) != 2 or len(scales.shape) != 2:
        what = " and ".join(settings.leaves[:2])
        raise CheckpointError(f"{files.folder.name}: {name}: no {what} of two dimensions")
    g_idx = files.entries.get(f"{name}.g_idx")
    if settings.format == "marlin":
        K = codes.shape[0] * layout.TILE_K
    else:
        K = g_idx.shape[0] if g_idx and len(g_idx.shape) == 1 else codes.shape[0] * 32 // scheme.bits
    N = scales.shape[1]
    _, found = read_module(files, settings, name, K, N)
    nbytes = sum(_nbytes(files, f"{name}.{leaf}") for leaf in settings.leaves)
    return Module(name, found, K, N, nbytes)


def _nbytes(files: TensorFiles, name: str) -> int:
    entry = files.entries.get(name)
    size = ITEMSIZE.get(entry.dtype, 1) if entry else 0
    for n in entry.shape if entry else ():
        size *= n
    return size
