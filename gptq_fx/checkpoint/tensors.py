"""The tensors of one quantized module of a checkpoint, checked and brought into canonical form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gptq_fx.checkpoint.files import DTYPES, TensorFiles
from gptq_fx.checkpoint.settings import CheckpointSettings
from gptq_fx.errors import CheckpointError
from gptq_fx.kernels.marlin import layout
from gptq_fx.scheme import Scheme
from gptq_fx.weight import QuantizedWeight, packed_rows, qzeros_from_v1, unpack_int32

SCALES = ("F16", "BF16", "F32")


def modules_of(files: TensorFiles, settings: CheckpointSettings) -> list[str]:
    """The quantized modules: what has a qweight, scales, qzeros or a g_idx; or their like in its layout."""
    leaves = settings.leaves
    found = {name.rpartition(".")[0] for name in files.entries if name.rpartition(".")[2] in leaves}
    return sorted(found)


def read_module(
    files: TensorFiles, settings: CheckpointSettings, module: str, in_features: int, out_features: int
) -> tuple[QuantizedWeight, Scheme]:
    """The weight [N, K] of a module, and its scheme with the group size that its tensors have.

    A g_idx that only counts the groups up is dropped, and desc_act is what the g_idx says. Symmetric
    zero points are dropped once they are found to be symmetric. Raises CheckpointError.
    """
    scheme = settings.scheme_for(module)
    if scheme is None:
        raise CheckpointError(
            f"{settings.file}: {module}: a rule leaves it dense, but the checkpoint holds it quantized"
        )
    K, N, bits = in_features, out_features, scheme.bits
    size = K if scheme.group_size in (-1, K) or scheme.group_size > K else scheme.group_size
    if K % size:
        raise CheckpointError(f"{settings.file}: {module}: group_size {size} does not divide its {K} inputs")
    G = K // size
    group_size = -1 if size == K and scheme.group_size != K else size
    if settings.format == "marlin":
        scheme = replace(scheme, group_size=group_size, desc_act=False)
        return _read_marlin(files, module, scheme, K, N, G), scheme
    for leaf in ("qweight", "scales") if scheme.sym else ("qweight", "scales", "qzeros"):
        if f"{module}.{leaf}" not in files.entries:
            raise CheckpointError(f"{files.folder.name}: {module}.{leaf}: missing")
    qweight = _get(files, f"{module}.qweight", ("I32",), (packed_rows(K, bits), N))
    scales = _scales(files, f"{module}.scales", (G, N))
    assert qweight is not None
    qzeros = _get(files, f"{module}.qzeros", ("I32",), (G, packed_rows(N, bits)))
    if qzeros is not None:
        qzeros = _zeros(files, f"{module}.qzeros", qzeros, scheme, settings.format, N)
    g_idx = _g_idx(files, f"{module}.g_idx", K, G)
    scheme = replace(scheme, group_size=group_size, desc_act=g_idx is not None)
    return QuantizedWeight(bits, K, qweight, scales, qzeros, g_idx), scheme


def _read_marlin(files: TensorFiles, module: str, scheme: Scheme, K: int, N: int, G: int) -> QuantizedWeight:
    """The weight of a module in Marlin's layout; its `workspace` is scratch memory of the kernel."""
    if K % layout.TILE_K or N % layout.TILE_N:
        raise CheckpointError(
            f"{files.folder.name}: {module}: found {K} inputs and {N} outputs. "
            f"Legal in Marlin's layout: multiples of {layout.TILE_K} and {layout.TILE_N}"
        )
    for leaf in ("B", "s"):
        if f"{module}.{leaf}" not in files.entries:
            raise CheckpointError(f"{files.folder.name}: {module}.{leaf}: missing")
    packed = _get(files, f"{module}.B", ("I32",), (K // layout.TILE_K, N * scheme.bits // 2))
    assert packed is not None
    scales = _scales(files, f"{module}.s", (G, N))
    return layout.from_marlin_tensors(packed, scales, scheme.bits)


def rows_of(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some outputs of a weight [N, K]."""
    codes, zeros = weight.codes()[:, start:stop], weight.zeros()
    zeros = None if zeros is None else zeros[:, start:stop]
    return QuantizedWeight.from_codes(codes, weight.scales[:, start:stop], zeros, weight.bits, weight.g_idx)


def _get(files: TensorFiles, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor | None:
    """The tensor, or None if there is none. dtype and shape are checked before anything is read."""
    entry = files.entries.get(name)
    if entry is None:
        return None
    if entry.dtype not in dtypes:
        legal = ", ".join(str(DTYPES[d]).removeprefix("torch.") for d in dtypes)
        raise files.error(name, f"found dtype {entry.dtype}. Legal: {legal}")
    if entry.shape != shape:
        raise files.error(name, f"found shape {list(entry.shape)}. Legal by the settings: {list(shape)}")
    return files.tensor(name)


def _scales(files: TensorFiles, name: str, shape: tuple[int, int]) -> Tensor:
    scales = _get(files, name, SCALES, shape)
    assert scales is not None
    if not torch.isfinite(scales).all():
        bad = (~torch.isfinite(scales)).nonzero()[0].tolist()
        raise files.error(name, f"NaN or Inf, first at {bad}. Legal: finite scales")
    return scales


def _zeros(
    files: TensorFiles, name: str, stored: Tensor, scheme: Scheme, version: str, out_features: int
) -> Tensor | None:
    """v2 zero points, or None where symmetric.

    Files with sym exist that are labelled v1 and store the zero points of v2: both mean the middle.
    """
    if not scheme.sym:
        return qzeros_from_v1(stored, scheme.bits, out_features) if version == "gptq" else stored
    middle = 2 ** (scheme.bits - 1)
    values = unpack_int32(stored.mT, scheme.bits, out_features)
    if any((values == value).all() for value in (middle - 1, middle)):
        return None
    raise files.error(name, "sym is true, but the zero points are not all in the middle of the grid")


def _g_idx(files: TensorFiles, name: str, in_features: int, groups: int) -> Tensor | None:
    g_idx = _get(files, name, ("I32",), (in_features,))
    if g_idx is None:
        return None
    if ((g_idx < 0) | (g_idx >= groups)).any():
        worst = int(g_idx.max()) if int(g_idx.max()) >= groups else int(g_idx.min())
        raise files.error(name, f"found group {worst}. Legal: 0 to {groups - 1}")
    counted = torch.arange(in_features, device="cpu") // (in_features // groups)
    return None if torch.equal(g_idx.long(), counted) else g_idx
