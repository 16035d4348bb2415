"""quantize: replace the dense weights of a model by quantized ones, in place."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision, decide, leave_dense
from gptq_fx.errors import ConfigError
from gptq_fx.grid import check_finite, relative_error, round_to_nearest
from gptq_fx.names import names_by_id
from gptq_fx.packed import PackedWeight
from gptq_fx.parameter import QuantizedParameter, as_parameter
from gptq_fx.progress import progress as with_progress
from gptq_fx.report import Report


@dataclass(frozen=True)
class _Weight:
    """A linear's weight: module.weight, of logical shape [K, N] if `transposed`."""

    name: str
    kind: str
    module: nn.Module
    transposed: bool
    decision: Decision

    @property
    def dense(self) -> Tensor:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight


def quantize(
    model: nn.Module,
    config: GPTQConfig | None = None,
    calibration: Iterable[dict[str, Any]] | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    resume_dir: str | None = None,
    max_memory: str | None = None,
) -> Report:
    """Quantize the linears of `model` in place, and free their dense weights.

    calibration: None rounds to nearest. Without inputs there is no graph to read, so that the linears
        are the modules that are one: nn.Linear and its subclasses, and transformers' Conv1D.
    device: where to compute; the weights stay on their own.
    progress: show a bar for what takes over two seconds.

    The model is changed only once nothing can be refused any more. Raises WeightError, naming the
    weight, on NaN or Inf; KernelError where nothing can run a site; ConfigError on what is not legal.
    """
    config = config or GPTQConfig()
    for name, value in (
        ("calibration", calibration),
        ("resume_dir", resume_dir),
        ("max_memory", max_memory),
    ):
        if value is not None:
            raise ConfigError(
                f"{name}={value!r}: calibrated quantization is not in this version. Legal: None "
                "(round to nearest)"
            )
    weights, report = _find(model, config), Report()
    chosen = [w for w in weights if w.decision.scheme is not None and _is_dense(w)]
    for weight in with_progress(chosen, "checking weights", show=progress):
        check_finite(weight.dense, weight.name)
    replaced: dict[tuple[int, bool], QuantizedParameter] = {}
    for weight in with_progress(chosen, "quantizing", show=progress):
        _replace(weight, replaced, device)
    _untie(model, chosen)
    for weight in weights:
        if weight.decision.scheme is None:
            leave_dense(weight.module, "weight", f"left dense by quantize: {weight.decision.reason}")
        report.add(weight.name, weight.kind, weight.dense, weight.decision)
    _report_others(model, weights, report)
    report.note_unused(config, {weight.decision.rule for weight in weights})
    return report


def _is_dense(weight: _Weight) -> bool:
    return not isinstance(weight.dense, QuantizedParameter)


def _find(model: nn.Module, config: GPTQConfig) -> list[_Weight]:
    """Every module that is a linear, with the decision on it; modules that share a weight share it."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: list[_Weight] = []
    first: dict[tuple[int, str], _Weight] = {}
    for name, module in model.named_modules():
        transposed = isinstance(module, _conv1d())
        if not (transposed or isinstance(module, nn.Linear)):
            continue
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.is_meta:
            continue
        kind = _kind(model, name, id(weight) in tables)
        twin = first.get((id(weight), kind))
        if twin is None:
            decision = decide(weight, name, kind, config, transposed=transposed, explicit=True)
        else:
            shared = "; ".join(filter(None, [f"shares the weight of {twin.name}", twin.decision.reason]))
            decision = replace(twin.decision, reason=shared)
        found.append(_Weight(name, kind, module, transposed, decision))
        first.setdefault((id(weight), kind), found[-1])
    return found


def _conv1d() -> tuple[type, ...]:
    """transformers' Conv1D: a linear with its weight as [K, N]; nothing where it is not imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module else ()


def _kind(model: nn.Module, name: str, tied: bool) -> str:
    parent, _, leaf = name.rpartition(".")
    if tied or leaf in ("lm_head", "embed_out"):
        return "lm_head"
    beside_experts = hasattr(model.get_submodule(parent), "experts") if parent else False
    return "router" if leaf == "router" or (leaf == "gate" and beside_experts) else "linear"


def _replace(
    weight: _Weight,
    replaced: dict[tuple[int, bool], QuantizedParameter],
    device: torch.device | str | None,
) -> None:
    """One dense weight, also where several modules share it (never an embedding's: that is untied)."""
    key = (id(weight.dense), weight.transposed)
    if key not in replaced:
        scheme = weight.decision.scheme
        assert scheme is not None
        with torch.no_grad():
            dense = weight.dense.detach().to(device)
            dense = dense.mT if weight.transposed else dense
            rounded = round_to_nearest(dense, scheme, weight.name)
            error = relative_error(dense, rounded)
            packed = PackedWeight(rounded.to(weight.dense.device), scheme, error)
        parameter = as_parameter(QuantizedParameter(packed, weight.name, weight.transposed))
        replaced[key] = parameter
    weight.module.weight = replaced[key]


def _untie(model: nn.Module, chosen: list[_Weight]) -> None:
    """An output projection that was tied has a weight of its own now: transformers must not tie it."""
    config = getattr(model, "config", None)
    if any(w.kind == "lm_head" for w in chosen) and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def _report_others(model: nn.Module, weights: list[_Weight], report: Report) -> None:
    """Every matrix that belongs to no linear module stays dense, here and when compiled later."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = {id(weight.dense) for weight in weights}
    for key, names in names_by_id(model).items():
        parameter = model.get_parameter(names[0])
        if key in known or parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        kind, reason = "other", "not the weight of a linear module; compiling sees it in the graph"
        if key in tables:
            kind, reason = "embedding", "embedding tables are looked up, not multiplied"
        else:
            owner, _, leaf = names[0].rpartition(".")
            leave_dense(model.get_submodule(owner), leaf, f"left dense by quantize: {reason}")
        report.add(names[0].removesuffix(".weight"), kind, parameter, Decision(None, None, reason))
