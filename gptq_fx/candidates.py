"""The weights of a model that could be quantized, and the decision on each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from torch import Tensor, nn

from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision, decide
from gptq_fx.linear import Linear, Quantized
from gptq_fx.parameter import QuantizedParameter


@dataclass(frozen=True)
class Candidate:
    """module.`leaf` is the weight of a linear, of logical shape [K, N] if `transposed`.

    calibrated: what calibration made of it, where an input reached it.
    """

    name: str
    kind: str
    module: nn.Module
    leaf: str
    transposed: bool
    decision: Decision
    calibrated: Quantized | None = None

    @property
    def parameter(self) -> Tensor:
        weight = getattr(self.module, self.leaf)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def chosen(self) -> bool:
        return self.decision.scheme is not None and not isinstance(self.parameter, QuantizedParameter)


def candidates(model: nn.Module, config: GPTQConfig, reached: dict[int, Linear]) -> list[Candidate]:
    """Of modules that are linears, of stacks of experts, and of what calibration `reached` beside them."""
    return [*_modules(model, config, reached), *_experts(model, config, reached), *_bare(model, reached)]


def _modules(model: nn.Module, config: GPTQConfig, reached: dict[int, Linear]) -> list[Candidate]:
    """Every module that is a linear, with the decision on it; modules that share a weight share it."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: list[Candidate] = []
    first: dict[tuple[int, str], Candidate] = {}
    for name, module in model.named_modules():
        transposed = isinstance(module, _conv1d())
        if not (transposed or isinstance(module, nn.Linear)):
            continue
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.is_meta:
            continue
        linear = reached.get(id(weight))
        known = linear is not None and not (linear.refused and isinstance(weight, QuantizedParameter))
        kind = linear.kind if known and linear else _kind(model, name, id(weight) in tables)
        twin = first.get((id(weight), kind))
        calibrated = linear.quantized if linear else None
        if twin is not None:
            shared = "; ".join(filter(None, [f"shares the weight of {twin.name}", twin.decision.reason]))
            decision = replace(twin.decision, reason=shared)
        elif known and linear:
            decision = _calibrated_decision(linear)
        else:
            decision = decide(weight, name, kind, config, transposed=transposed, explicit=True)
            if not isinstance(weight, QuantizedParameter):
                decision = _note_unreached(decision, reached)
        found.append(Candidate(name, kind, module, "weight", transposed, decision, calibrated))
        first.setdefault((id(weight), kind), found[-1])
    return found


def _experts(model: nn.Module, config: GPTQConfig, reached: dict[int, Linear]) -> list[Candidate]:
    """The stacks [E, *, *] of transformers' expert modules, which say which way round they are."""
    found = []
    for path, module in model.named_modules():
        transposed = getattr(module, "is_transposed", None)
        for leaf, weight in module.named_parameters(recurse=False):
            if transposed is None or weight.ndim != 3 or id(weight) in reached:
                continue
            name = f"{path}.{leaf}"
            decision = decide(weight, name, "grouped_linear", config, transposed=transposed, explicit=True)
            found.append(
                Candidate(
                    name, "grouped_linear", module, leaf, transposed, _note_unreached(decision, reached)
                )
            )
    return found


def _note_unreached(decision: Decision, reached: dict[int, Linear]) -> Decision:
    if not reached or decision.scheme is None:
        return decision
    unreached = "rounded to nearest: no calibration input reached it"
    return replace(decision, reason="; ".join(filter(None, [unreached, decision.reason])))


def _calibrated_decision(linear: Linear) -> Decision:
    """The decision on a weight that calibration reached, with what there is to say of its inputs."""
    if linear.quantized is None:
        if linear.scheme is None or isinstance(linear.parameter, QuantizedParameter):
            return linear.decision
        return Decision(None, None, "the linears that share it do not want the same of it")
    tokens, K = linear.quantized.measured.tokens, linear.shape[-1]
    few = f"saw {tokens} tokens, fewer than its {K} input features" if tokens < K else ""
    reasons = [linear.quantized.note or few, linear.decision.reason]
    return replace(linear.decision, reason="; ".join(filter(None, reasons)))


def _bare(model: nn.Module, reached: dict[int, Linear]) -> list[Candidate]:
    """Weights that a graph multiplies by without a module that is a linear, such as x @ self.w."""
    owners = {
        (id(p), name): owner
        for owner in model.modules()
        for name, p in owner.named_parameters(recurse=False)
        if not isinstance(owner, (nn.Linear, nn.Embedding, *_conv1d()))
    }
    return [
        Candidate(
            linear.name,
            linear.kind,
            owner,
            leaf,
            linear.transposed,
            _calibrated_decision(linear),
            linear.quantized,
        )
        for (key, leaf), owner in owners.items()
        if (linear := reached.get(key)) is not None and not linear.refused
    ]


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
