"""transformers' own loading, step by step: the only file that calls its inner functions.

Its from_pretrained would allocate every weight that the files do not hold as dense; here the quantized
ones take their place between the steps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_fx.checkpoint.files import TensorFiles, read_json
from gptq_fx.errors import CheckpointError

# GPTQModel names the matrices of all experts alike, transformers' table those of Mixtral as its authors did.
SPELLINGS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
EXPERT = re.compile(r"(\.experts\.\d+)\.(gate_proj|up_proj|down_proj)\.")
MAX_BUFFERS = 1 << 30  # bytes of tables a model may compute, or as much as the checkpoint has


def read_config(folder: Path, tensors: int) -> Any:
    """The model's config, of a class of transformers; code beside the checkpoint is never run.

    Raises CheckpointError on what no model can be made of. `tensors` bounds the number of layers: a
    damaged number must not keep the machine busy.
    """
    from transformers import AutoConfig

    found = read_json(folder, "config.json")
    if found is None:
        raise CheckpointError(f"{folder}: config.json is missing")
    for key, value in _numbers(found):
        if "layers" in key and value > tensors:
            raise CheckpointError(f"config.json: {key}: found {value}, but there are {tensors} tensors")
    found.pop("quantization_config", None)
    if isinstance(found.get("text_config"), dict):
        found["text_config"].pop("quantization_config", None)
    model_type = found.pop("model_type", None)
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: model_type: found {model_type!r:.80}. Legal: a string")
    try:
        config = AutoConfig.for_model(model_type, **found)
    except Exception as error:  # config classes raise whatever a wrong value leads to
        raise CheckpointError(f"config.json: {_line(error)}") from error
    config.name_or_path = str(folder)
    return config


def model_class(config: Any) -> type[Any]:
    """The class that config.json names under `architectures`."""
    import transformers

    names = config.architectures
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json: architectures: found {names!r:.80}. Legal: a model class of transformers"
        )
    return cls


def build(config: Any, dtype: torch.dtype) -> Any:
    """The model with all weights on the meta device."""
    cls = model_class(config)
    try:
        with ExitStack() as stack:
            for context in cls.get_init_context(dtype, False, False, None):
                stack.enter_context(context)
            model = cls(config)
    except Exception as error:
        raise CheckpointError(f"config.json: no {cls.__name__} can be made of it: {_line(error)}") from error
    return model.eval()


class Names:
    """From names in the checkpoint to paths in the model, by the table that transformers has of them."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.transforms: list[Any] = [*get_model_conversion_mapping(model)]
        self.renamings = [t for t in self.transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in self.transforms if isinstance(t, WeightConverter)]
        self.prefix = model.base_model_prefix
        self.state = model.state_dict()

    def find(self, name: str) -> tuple[str, bool]:
        """The path of a checkpoint's tensor, and whether it is only a part of what is there."""
        found = self._find(name)
        if found[0] not in self.state:
            other = EXPERT.sub(lambda m: f"{m[1]}.{SPELLINGS[m[2]]}.", name)
            found = self._find(other) if self._find(other)[0] in self.state else found
        return found

    def _find(self, name: str) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        path, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.state)
        if path not in self.state and name in self.state:
            path, pattern = rename_source_key(name, [], [], self.prefix, self.state)
        return path, pattern is not None


def load_dense(
    model: Any, files: TensorFiles, dense: Sequence[str], dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """Load the named tensors. Returns what `finish` needs."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    load = LoadStateDictConfig(
        device_map={"": device},
        device_mesh=getattr(model, "_device_mesh", None),
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=Names(model).transforms,
    )
    try:
        info, _ = convert_and_load_state_dict_in_model(model, {n: files.lazy(n) for n in dense}, load)
    except Exception as error:
        raise CheckpointError(f"{files.folder.name}: {_line(error)}") from error
    for name, found, legal in sorted(info.mismatched_keys, key=str):
        raise CheckpointError(
            f"{files.folder.name}: {name}: found shape {list(found)}. Legal by config.json: {list(legal)}"
        )
    for name, what in info.conversion_errors.items():
        raise CheckpointError(f"{files.folder.name}: {name}: {_line(what)}")
    return load, info


def check_complete(model: Any, missing: Collection[str], files: TensorFiles) -> None:
    """Raise CheckpointError if weights are missing that the model cannot do without."""
    tied = model.all_tied_weights_keys
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    left = sorted(
        name
        for name in missing
        if not (name in tied and tied[name] not in missing) and not any(p.search(name) for p in ignored)
    )
    # tying goes both ways: the source may be filled from its target
    sources = {source for target, source in tied.items() if target not in missing}
    left = [name for name in left if name not in sources and tied.get(name) not in sources]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"{files.folder.name}: {left[0]}{more}: missing")


def check_buffers(model: Any, nbytes: int) -> None:
    """Raise CheckpointError where the config asks for tables beyond all measure."""
    total = sum(b.numel() * b.element_size() for _, b in model.named_buffers())
    if total > max(MAX_BUFFERS, nbytes):
        raise CheckpointError(f"config.json: the model computes tables of {total} bytes")


def finish(model: Any, load: Any, info: Any) -> None:
    """Compute the tables that no file holds, such as rotary frequencies, and tie what is tied."""
    model._finalize_model_loading(model, load, info)


def ignored_unexpected(model: Any) -> list[re.Pattern[str]]:
    """Names that checkpoints may hold though the model has no place for them, by its own word."""
    extra = [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$"]
    return [re.compile(p) for p in (*(model._keys_to_ignore_on_load_unexpected or ()), *extra)]


def checkpoint_names(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict of a model under the names of its checkpoints, the inverse of `Names`."""
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Any] = revert_weight_conversion(model, dict(state))
    return reverted


def keep_converters(model: Any) -> None:
    """Let `checkpoint_names` know of the experts that we stacked.

    transformers remembers, for saving, the converters that it used itself: none where all experts are ours.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    used = model._weight_conversions
    known = {tuple(t.source_patterns) for t in used}
    table = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    model._weight_conversions = [*used, *(t for t in table if tuple(t.source_patterns) not in known)]


def parts(
    model: Any, name: str, experts: int, rows: int, transposed: bool
) -> dict[str, tuple[int, int, int]]:
    """The modules that checkpoints keep a stack of experts in: module -> (expert, first row, last row + 1).

    transformers' table tells it of a stack whose rows are numbered through. Raises CheckpointError where
    checkpoints do not keep one matrix, of some rows in a run, for each expert.
    """
    # Two columns: transformers 5.17 drops dimensions of one.
    numbered = torch.arange(experts * rows, device="cpu").view(experts, rows, 1).expand(-1, -1, 2)
    shown = checkpoint_names(model, {name: numbered.mT if transposed else numbered})
    found = {}
    for module, part in shown.items():
        run = _run(part)
        if run is None or run[0] // rows != (run[1] - 1) // rows:
            raise CheckpointError(
                f"{name}: checkpoints keep these experts in one stack ({module}), for which the GPTQ format "
                "has no place"
            )
        start = run[0] % rows
        found[module.removesuffix(".weight")] = (run[0] // rows, start, start + run[1] - run[0])
    return found


def _run(part: torch.Tensor) -> tuple[int, int] | None:
    """(first, last + 1) of a matrix of two columns, or of two rows, that counts up; else None."""
    if part.ndim == 2:
        for matrix in (part, part.mT):
            first, count = int(matrix[0, 0]), len(matrix)
            counted = torch.arange(first, first + count, device="cpu")[:, None].expand(count, 2)
            if torch.equal(matrix, counted):
                return first, first + count
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module keeps its weight as [K, N]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder itself, or where the Hub's cache has the repository of that id; only data is fetched."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not folder.exists():
        from huggingface_hub import snapshot_download

        kinds = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        try:
            return Path(snapshot_download(str(path), allow_patterns=kinds))
        except Exception as error:
            raise CheckpointError(
                f"{path}: neither a folder, nor to be had from the Hub: {_line(error)}"
            ) from None
    raise CheckpointError(f"{path}: no such folder")


def _numbers(found: Any, key: str = "") -> list[tuple[str, int]]:
    if isinstance(found, dict):
        return [pair for name, value in found.items() for pair in _numbers(value, str(name))]
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return [(key, int(found) if abs(found) < 1e300 else 2**63)]
    return []


def _line(error: object) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text:.300}" if isinstance(error, Exception) else f"{text:.300}"
