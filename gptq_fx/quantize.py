"""quantize: replace the dense weights of a model by quantized ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_fx.calibration import calibrate
from gptq_fx.candidates import Candidate, candidates
from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision, leave_dense
from gptq_fx.errors import ConfigError
from gptq_fx.experts import install
from gptq_fx.grid import check_finite, relative_error, round_to_nearest
from gptq_fx.linear import Linear, Quantized
from gptq_fx.modes import plain
from gptq_fx.names import names_by_id
from gptq_fx.packed import PackedWeight
from gptq_fx.parallel import gathered, is_split, part_of, run_local
from gptq_fx.parameter import QuantizedParameter, as_parameter
from gptq_fx.progress import progress as with_progress
from gptq_fx.report import Report
from gptq_fx.scheme import Scheme
from gptq_fx.shard import cut
from gptq_fx.split import ranks_of
from gptq_fx.streaming import parse_bytes


@plain()
def quantize(
    model: nn.Module,
    config: GPTQConfig | None = None,
    calibration: Iterable[Mapping[str, Any]] | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    resume_dir: str | None = None,
    max_memory: str | None = None,
    process_group: Any = None,
) -> Report:
    """Quantize the linears of `model` in place, and free their dense weights.

    calibration: batches, dicts of what the model's forward takes, on its device; every linear of its
        graph is quantized by GPTQ on what reaches it, and one that nothing reaches is rounded to nearest.
        None rounds all to nearest. Without inputs there is no graph to read, so that the linears are the
        modules that are one: nn.Linear and its subclasses, and transformers' Conv1D.
    device: where weights are solved; those of the model stay on their own.
    A model that transformers has split between ranks (tp_plan) is quantized by a call on every rank: each
        weight is gathered, quantized and cut, so that its integers do not depend on the number of ranks, but
        for sums in another order. With calibration all pass the same batches (gptq_fx/split.py).
    max_memory: bytes of `device` ("8GB"), for a model on the CPU that does not fit it: everything is computed
        there, with the weights of one stage and the activations of one batch at a time. With a process_group,
        each rank has so much.
    progress: show a bar for what takes over two seconds.
    resume_dir: a folder for the finished stages of a calibration in sequence. A run that was killed
        goes on behind the last of them when it is started again, and gives the same integers.
    process_group: of torch.distributed; its ranks share the calibration. Each has the whole model, calls
        this with the same arguments, and gets the same integers (gptq_fx/ranks.py).

    Autocast and inference mode are off meanwhile: the model is run in its own dtype.
    The model is changed at the very end, once nothing can be refused or interrupted any more: until then
    the quantized weights are held beside the dense ones.
    Raises CalibrationError on batches that the model cannot take, WeightError, naming the weight, on NaN
    or Inf; KernelError where nothing can run a site; ConfigError on what is not legal.
    """
    config = config or GPTQConfig()
    budget = None if max_memory is None else _budget(model, config, calibration, device, max_memory)
    if resume_dir is not None and (calibration is None or not config.sequential):
        raise ConfigError(f"resume_dir={resume_dir!r}: only calibration with sequential=True has stages")
    if process_group is not None and (calibration is None or resume_dir is not None):
        raise ConfigError(
            "process_group: without calibration there is no work to share, and with resume_dir "
            "it is not in this version. Legal: with calibration, without resume_dir"
        )
    reached: dict[int, Linear] = {}
    phases = None
    if calibration is not None:
        reached, phases = calibrate(
            model,
            calibration,
            config,
            device=device,
            progress=progress,
            resume_dir=resume_dir,
            max_memory=budget,
            ranks=ranks_of(model, process_group, resume_dir=resume_dir, max_memory=max_memory),
        )
    weights = candidates(model, config, reached)
    chosen, report = [w for w in weights if w.chosen], Report()
    if phases is not None:
        report.seconds = dict(phases.seconds)
        report.notes.append(f"calibration: {phases}")
    rounded = [w for w in chosen if w.calibrated is None]  # the others were checked before
    for weight in with_progress(rounded, "checking weights", show=progress):
        check_finite(gathered(weight.parameter), weight.name)
    made: dict[tuple[int, bool], QuantizedParameter] = {}
    for weight in with_progress(chosen, "quantizing", show=progress):
        _make(weight, made, device)
    for weight in chosen:
        if is_split(weight.parameter):
            run_local(weight.module)
        setattr(weight.module, weight.leaf, made[_same(weight)])
    _untie(model, chosen)
    install(model)
    for weight in weights:
        if weight.decision.scheme is None:
            reason = f"left dense by quantize: {weight.decision.reason}"
            leave_dense(weight.module, weight.leaf, reason)
        measured = weight.calibrated.measured if weight.calibrated else None
        report.add(weight.name, weight.kind, weight.parameter, weight.decision, measured)
    _report_others(model, weights, reached, report)
    report.note_unused(config, {weight.decision.rule for weight in weights})
    if calibration is None and config.calibration_settings:
        report.notes.append(f"without effect without calibration: {', '.join(config.calibration_settings)}")
    return report


def _budget(
    model: nn.Module,
    config: GPTQConfig,
    calibration: object,
    device: torch.device | str | None,
    max_memory: object,
) -> int:
    budget = parse_bytes(max_memory)
    given = f"max_memory={max_memory!r}"
    if device is None:
        raise ConfigError(f"{given}: found no device. Legal: with device, whose memory it is of")
    if calibration is None or not config.sequential:
        raise ConfigError(f"{given}: only calibration with sequential=True has stages")
    if any(isinstance(p, QuantizedParameter) for p in model.parameters()):
        raise ConfigError(f"{given}: the model holds quantized weights. Legal: a dense model")
    found = sorted({str(p.device) for p in model.parameters()} - {"cpu"})
    if found:
        raise ConfigError(f"{given}: the model is on {', '.join(found)}. Legal: a model on the CPU")
    return budget


def _same(weight: Candidate) -> tuple[int, bool]:
    return id(weight.parameter), weight.transposed


def _make(
    weight: Candidate,
    made: dict[tuple[int, bool], QuantizedParameter],
    device: torch.device | str | None,
) -> None:
    """One weight, also where several modules share it (never an embedding's: that is untied)."""
    if _same(weight) in made:
        return
    scheme = weight.decision.scheme
    assert scheme is not None
    packed = pack(weight.parameter, scheme, weight.name, weight.transposed, weight.calibrated, device)
    parameter = QuantizedParameter(packed, weight.name, weight.transposed)
    made[_same(weight)] = as_parameter(parameter)


def pack(
    dense: Tensor,
    scheme: Scheme,
    name: str,
    transposed: bool,
    calibrated: Quantized | None,
    device: torch.device | str | None,
) -> PackedWeight:
    """A weight [*, N, K] ([*, K, N] if `transposed`) as calibration made it, or rounded to nearest."""
    if calibrated is not None:
        return PackedWeight(calibrated.weight, calibrated.scheme, calibrated.error)
    with torch.no_grad():
        matrix = gathered(dense).to(device)
        matrix = matrix.mT if transposed else matrix
        rounded = round_to_nearest(matrix, scheme, name)
        error = relative_error(matrix, rounded)
        part = part_of(dense, transposed, name)
        if part is not None:
            rounded, scheme = cut(rounded, scheme, part)
        return PackedWeight(rounded.to(dense.device), scheme, error)


def _untie(model: nn.Module, chosen: list[Candidate]) -> None:
    """An output projection that was tied has a weight of its own now: transformers must not tie it."""
    config = getattr(model, "config", None)
    if any(w.kind == "lm_head" for w in chosen) and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]


def _report_others(
    model: nn.Module, weights: list[Candidate], reached: dict[int, Linear], report: Report
) -> None:
    """Every matrix that belongs to no linear stays dense, here and when compiled later."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    known = {id(weight.parameter) for weight in weights}
    for key, names in names_by_id(model).items():
        parameter = model.get_parameter(names[0])
        if key in known or parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        kind, reason = "other", "not the weight of a linear module; compiling sees it in the graph"
        if key in tables:
            kind, reason = "embedding", "embedding tables are looked up, not multiplied"
            if key in reached and reached[key].scheme is not None:
                reason = "multiplied too, but its only place is this table: there is no module to untie"
        else:
            if key in reached and reached[key].refused:
                kind, reason = reached[key].kind, reached[key].decision.reason
            elif reached:
                reason = "no calibration input reached it"
            owner, _, leaf = names[0].rpartition(".")
            leave_dense(model.get_submodule(owner), leaf, f"left dense by quantize: {reason}")
        report.add(names[0].removesuffix(".weight"), kind, parameter, Decision(None, None, reason))
