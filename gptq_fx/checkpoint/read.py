"""from_pretrained: a GPTQ checkpoint into the model of transformers that it was made of."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gptq_fx.checkpoint import skeleton
from gptq_fx.checkpoint.files import DTYPES, TensorFiles, open_tensors
from gptq_fx.checkpoint.settings import CheckpointSettings, read_settings
from gptq_fx.checkpoint.stacks import Place, read_stack
from gptq_fx.checkpoint.tensors import modules_of, read_module
from gptq_fx.errors import CheckpointError
from gptq_fx.experts import install
from gptq_fx.packed import PackedWeight
from gptq_fx.parallel import distribute, part_of, run_local
from gptq_fx.parameter import QuantizedParameter, as_parameter
from gptq_fx.shard import cut

log = logging.getLogger(__name__)


def from_pretrained(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    distributed_config: Any = None,
) -> Any:
    """Load a GPTQ checkpoint: a model of transformers with QuantizedParameters, in eval mode.

    path: a folder, or the id of a repository on the Hub. Read are "gptq" (v1), "gptq_v2", "marlin" (files
        that AutoGPTQ wrote for that kernel) and AutoRound's "auto_round:auto_gptq", 2, 3, 4 and 8 bits, as
        safetensors.
    device: where the weights go; None leaves them on the CPU, mapped from the files.
    dtype: of activations, scales and dense weights; None takes that of config.json, or of the scales.
    distributed_config: for a call on every rank of a process group: a DistributedConfig of transformers,
        or a dict such as {"tp_size": 2}, by which the ranks share the model. Each reads its own part.

    The dense weight of a quantized module is never allocated. Raises CheckpointError, naming file and
    tensor, on anything that is damaged, missing, left over or contradicts itself; pickled weights and
    code beside the checkpoint are never run, and no file outside of the folder is read.
    """
    folder = skeleton.local_folder(path)
    settings = read_settings(folder)
    files = open_tensors(folder)
    modules = modules_of(files, settings)
    if not modules:
        legal = ", ".join(f"*.{leaf}" for leaf in settings.leaves)
        raise CheckpointError(
            f"{folder}: no tensor is quantized, but {settings.file} says {settings.format!r}. Legal: {legal}"
        )
    model, places, dense = _plan(folder, files, settings, modules, dtype)
    chosen = model.config.dtype
    if distributed_config is not None:
        model = distribute(model, distributed_config)
        places = [_shared(model, place) for place in places]
    where = torch.device(device or "cpu")
    skeleton.check_buffers(model, files.nbytes)
    made = {place.target: make_parameter(place, files, settings, where) for place in places}
    load, info = skeleton.load_dense(model, files, dense, chosen, where)
    put(model, made)
    info.missing_keys -= made.keys()
    skeleton.check_complete(model, info.missing_keys, files)
    skeleton.finish(model, load, info)
    model.requires_grad_(False)
    _generation_config(model, folder)
    return model


def _shared(model: Any, place: Place) -> Place:
    """The place with what this rank takes of it."""
    owner, _, leaf = place.target.rpartition(".")
    module = model.get_submodule(owner)
    share = part_of(getattr(module, leaf), place.transposed, place.target)
    if share is not None:
        run_local(module)
    return replace(place, share=share)


def check_names(folder: Path, files: TensorFiles, settings: CheckpointSettings) -> None:
    """Raise CheckpointError where names or shapes are not those of the model of config.json."""
    model, places, dense = _plan(folder, files, settings, modules_of(files, settings), None)
    names = skeleton.Names(model)
    found = {names.find(name)[0] for name in dense} | {place.target for place in places}
    skeleton.check_complete(model, {n for n in names.state if n not in found}, files)


def _plan(
    folder: Path,
    files: TensorFiles,
    settings: CheckpointSettings,
    modules: Sequence[str],
    dtype: torch.dtype | None,
) -> tuple[Any, list[Place], list[str]]:
    """The model without weights, where the quantized ones go, and the names of the dense tensors."""
    config = skeleton.read_config(folder, len(files.entries))
    heads = [m for m in modules if m.rpartition(".")[2] in ("lm_head", "embed_out")]
    if heads and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # a quantized head is a weight of its own
    config.dtype = _dtype(dtype, config, files, modules)
    model = skeleton.build(config, config.dtype)
    return model, *plan(model, files, settings, modules)


def plan(
    model: Any, files: TensorFiles, settings: CheckpointSettings, modules: Sequence[str]
) -> tuple[list[Place], list[str]]:
    """Where the quantized modules go in a model without weights, and the names of the dense tensors."""
    names = skeleton.Names(model)
    places = _places(model, names, files, settings, modules)
    quantized = {f"{module}.{leaf}" for module in modules for leaf in settings.leaves}
    dense = _dense(model, names, files, [n for n in files.entries if n not in quantized], places)
    return places, dense


def _dtype(
    wanted: torch.dtype | None, config: Any, files: TensorFiles, modules: Sequence[str]
) -> torch.dtype:
    found = wanted or getattr(config.get_text_config(), "dtype", None) or config.dtype
    if found is None:
        entry = files.entries.get(f"{modules[0]}.scales")
        found = DTYPES.get(entry.dtype) if entry else None
    if found not in (torch.float16, torch.bfloat16, torch.float32):
        raise CheckpointError(f"config.json: dtype: found {found}. Legal: float16, bfloat16, float32")
    assert isinstance(found, torch.dtype)
    return found


def _places(
    model: Any,
    names: skeleton.Names,
    files: TensorFiles,
    settings: CheckpointSettings,
    modules: Sequence[str],
) -> list[Place]:
    """One place for each parameter that quantized modules make."""
    places: dict[str, Place] = {}
    stacks: dict[str, list[str]] = {}
    ignored = skeleton.ignored_unexpected(model)
    for module in modules:
        example = next(n for leaf in settings.leaves if (n := f"{module}.{leaf}") in files.entries)
        target, part = names.find(f"{module}.weight")
        if target not in names.state:
            bare, bare_part = names.find(module)
            target, part = (bare, bare_part) if bare in names.state else (target, part)
        if target not in names.state:
            if any(pattern.search(f"{module}.weight") for pattern in ignored):
                continue
            raise files.error(example, f"the model has no {target} (config.json: {type(model).__name__})")
        if part and names.state[target].ndim == 3:
            stacks.setdefault(target, []).append(module)
            continue
        if part:
            raise files.error(example, f"is one of several that make {target}, which is not in this version")
        if target in places:
            raise files.error(example, f"{target} is made of {places[target].modules[0]} already")
        places[target] = _place(model, names, files, settings, module, target)
    for target, members in stacks.items():
        places[target] = _stack(model, names, files, settings, members, target)
    return list(places.values())


def _stack(
    model: Any,
    names: skeleton.Names,
    files: TensorFiles,
    settings: CheckpointSettings,
    modules: Sequence[str],
    target: str,
) -> Place:
    """The place of the experts of one stack, which must all be there."""
    weight = names.state[target]
    holder = model.get_submodule(target.rpartition(".")[0])
    transposed = bool(getattr(holder, "is_transposed", False))
    rows = weight.shape[-1 if transposed else -2]
    cut = skeleton.parts(model, target, weight.shape[0], rows, transposed)
    expected = {_role(name): name for name in cut}
    found: dict[tuple[str, str], str] = {}
    for module in modules:
        role, tensor = _role(module), f"{module}.{settings.leaves[0]}"
        if role not in expected:
            raise files.error(tensor, f"is no part of {target}, to which transformers gives it")
        if role in found:
            raise files.error(tensor, f"is what {found[role]} is in {target}")
        found[role] = module
    missing = sorted(name for role, name in expected.items() if role not in found)
    if missing:
        raise CheckpointError(
            f"{files.folder.name}: {missing[0]}.{settings.leaves[0]}: missing; "
            f"{target} is made of {len(cut)} modules"
        )
    ordered = tuple(found[role] for role in expected)
    return Place(target, ordered, transposed, tuple(weight.shape), weight.dtype, tuple(cut.values()))


def _role(module: str) -> tuple[str, str]:
    """(expert, which of its matrices) of a module, in either of the two spellings."""
    holder, _, leaf = module.rpartition(".")
    return holder.rpartition(".")[2], skeleton.SPELLINGS.get(leaf, leaf)


def _place(
    model: Any,
    names: skeleton.Names,
    files: TensorFiles,
    settings: CheckpointSettings,
    module: str,
    target: str,
) -> Place:
    weight = names.state[target]
    if weight.ndim != 2:
        raise CheckpointError(f"{settings.file}: {module}: {target} has the shape {list(weight.shape)}")
    owner, _, leaf = target.rpartition(".")
    holder = model.get_submodule(owner)
    if isinstance(holder, torch.nn.Embedding):
        raise CheckpointError(f"{files.folder.name}: {module}: a quantized embedding is not read")
    transposed = skeleton.is_conv1d(holder)
    scales = files.entries.get(f"{module}.scales")
    if leaf != "weight" and scales is not None:
        # a matrix that is no linear's: only its shape, or the writer's note, tells which way it lies
        square = weight.shape[0] == weight.shape[1]
        notes = (settings.raw.get("meta") or {}).get("transposed") or ()
        transposed = module in notes if square else scales.shape[-1] == weight.shape[1]
    return Place(target, (module,), transposed, tuple(weight.shape), weight.dtype)


def _dense(
    model: Any, names: skeleton.Names, files: TensorFiles, found: Sequence[str], places: Sequence[Place]
) -> list[str]:
    """The tensors to load as they are, checked by their headers; what has no place is refused or named."""
    ignored = skeleton.ignored_unexpected(model)
    taken = {place.target: place.modules[0] for place in places}
    quantized = {place.modules[0] for place in places}
    kept = []
    for name in found:
        path, part = names.find(name)
        entry = files.entries[name]
        if path in taken:
            raise files.error(name, f"is dense, but {taken[path]} is quantized as well")
        if path in names.state:
            legal = tuple(names.state[path].shape)
            if not part and entry.shape != legal:
                raise files.error(
                    name, f"found shape {list(entry.shape)}. Legal by config.json: {list(legal)}"
                )
            if names.state[path].is_floating_point() and not entry.dtype.startswith(("F", "BF")):
                raise files.error(name, f"found dtype {entry.dtype}. Legal: a floating-point one")
            kept.append(name)
        elif part:
            kept.append(name)
        elif name.endswith(".bias") and name.removesuffix(".bias") in quantized:
            # writers add empty biases to linears that have none
            if files.tensor(name).any():
                raise files.error(name, f"a bias that is not zero, but {type(model).__name__} has none there")
        elif not any(pattern.search(name) for pattern in ignored):
            log.warning("%s: %s: the model has no place for it", entry.file, name)
    return kept


def make_parameter(
    place: Place, files: TensorFiles, settings: CheckpointSettings, device: torch.device
) -> QuantizedParameter:
    """The one parameter that the modules of a place make."""
    if place.parts:
        weight, scheme = read_stack(files, settings, place)
    else:
        (module,) = place.modules
        weight, scheme = read_module(files, settings, module, place.in_features, place.out_features)
        if place.share is not None:
            weight, scheme = cut(weight, scheme, place.share)
    packed = PackedWeight(weight.to(device, place.dtype), scheme, None)
    return as_parameter(QuantizedParameter(packed, place.target.removesuffix(".weight"), place.transposed))


def put(model: Any, made: Mapping[str, QuantizedParameter]) -> None:
    """Set the parameters, by their paths."""
    for target, parameter in made.items():
        owner, _, leaf = target.rpartition(".")
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would fill it
        setattr(model.get_submodule(owner), leaf, parameter)
    skeleton.keep_converters(model)
    tied = model.all_tied_weights_keys
    for one, other in list(tied.items()):
        if one in made or other in made:  # both are in the files, so that they are tied no longer
            del tied[one]
    install(model)


def _generation_config(model: Any, folder: Path) -> None:
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
