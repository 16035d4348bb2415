"""The finished stages of a calibration in a folder, so that a run that was killed goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_fx.config import GPTQConfig
from gptq_fx.errors import CalibrationError
from gptq_fx.linear import Linear, Measured, Quantized
from gptq_fx.weight import QuantizedWeight

FORMAT = "1"
TENSORS = ("qweight", "scales", "qzeros", "g_idx")


class Store:
    """One file for each finished stage. Without a folder it keeps nothing.

    Raises CalibrationError if the folder holds stages of another model, config or data.
    """

    def __init__(
        self,
        folder: str | None,
        model: nn.Module | None,
        config: GPTQConfig,
        batches: Sequence[Mapping[str, Any]],
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None or model is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own = {
            "format": FORMAT,
            "config": _digest([repr(sorted(config.to_dict().items()))]),
            "model": _digest([item for pair in model.state_dict().items() for item in pair]),
            "calibration": _digest([x for b in batches for pair in sorted(b.items()) for x in pair]),
        }
        path = self.folder / "run.json"
        if path.exists():
            found = json.loads(path.read_text())
            other = [name for name in own if found.get(name) != own[name]]
            if other:
                raise CalibrationError(
                    f"resume_dir={folder!r} holds a run with another {', '.join(other)}. "
                    "Legal: an empty folder, or the one of a run with the same"
                )
        _write(path, lambda to: to.write_text(json.dumps(own)))

    def load(self, number: int, linears: Sequence[Linear]) -> bool:
        """Fill in the weights of a stage, if it is there."""
        path = self._path(number)
        if path is None or not path.exists():
            return False
        with safe_open(path, "pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            measured = json.loads(file.metadata()["measured"])
        for linear in linears:
            scheme = linear.scheme
            assert scheme is not None
            tensors = [kept.get(f"{linear.name}.{kind}") for kind in TENSORS]
            weight = QuantizedWeight(scheme.bits, linear.shape[-1], *tensors)  # type: ignore[arg-type]
            error, note, *rest = measured[linear.name]
            weight = weight.to(linear.parameter.device)
            linear.quantized = Quantized(weight, scheme, error, Measured(*rest), note)
        return True

    def save(self, number: int, linears: Sequence[Linear]) -> None:
        path = self._path(number)
        if path is None:
            return
        tensors: dict[str, Tensor] = {}
        measured = {}
        for linear in linears:
            assert linear.quantized is not None
            named = zip(TENSORS, linear.quantized.weight.tensors, strict=True)
            tensors |= {f"{linear.name}.{k}": t.clone() for k, t in named if t is not None}
            done = linear.quantized
            measured[linear.name] = (done.error, done.note, *asdict(done.measured).values())
        _write(path, lambda to: save_file(tensors, to, {"measured": json.dumps(measured)}))

    def _path(self, number: int) -> Path | None:
        return None if self.folder is None else self.folder / f"stage-{number:05}.safetensors"


def _write(path: Path, write: Any) -> None:
    """Wholly, or not at all."""
    partial = path.with_suffix(".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def _digest(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().contiguous().cpu()
            digest.update(repr((part.dtype, part.shape)).encode())
            digest.update(part.flatten().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()
