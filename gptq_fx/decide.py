"""The decision on one weight: its scheme or none, its kernel, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from gptq_fx.config import GPTQConfig
from gptq_fx.grid import FLOATS
from gptq_fx.kernels import Kernel, LinearSpec, choose_kernel
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Rule, Scheme

LEFT_DENSE = "_gptq_left_dense"
ADDED = "added to a model that was quantized before, as adapters are: options quantize it"


@dataclass(frozen=True)
class Decision:
    """scheme None: the weight stays dense. `reason` says why, or what deviates from the request."""

    scheme: Scheme | None
    kernel: Kernel | None
    reason: str
    rule: Rule | None = None
    spec: LinearSpec | None = None

    @property
    def sorted(self) -> bool:
        """Whether the kernel takes the weight with its inputs sorted by groups."""
        return self.kernel is not None and self.spec is not None and self.kernel.sorts(self.spec)


def leave_dense(module: nn.Module, name: str, reason: str) -> None:
    """Mark the dense parameter module.`name`: a later compile must not quantize it by default.

    The mark is on the parameter, which is all that a graph has, and on the module, since copy.deepcopy
    drops the attributes of parameters.
    """
    module.__dict__.setdefault(LEFT_DENSE, {})[name] = reason
    setattr(module.get_parameter(name), LEFT_DENSE, reason)


def restore_marks(root: nn.Module | None) -> None:
    """Mark the parameters of `root` as their modules say, and what was added since it was quantized."""
    for module in root.modules() if root is not None else ():
        for name, reason in module.__dict__.get(LEFT_DENSE, {}).items():
            parameter = getattr(module, name, None)
            if isinstance(parameter, Tensor) and not isinstance(parameter, QuantizedParameter):
                setattr(parameter, LEFT_DENSE, reason)
    parameters = list(root.parameters()) if root is not None else []
    if any(isinstance(p, QuantizedParameter) for p in parameters):
        for parameter in parameters:
            if not isinstance(parameter, QuantizedParameter) and not hasattr(parameter, LEFT_DENSE):
                setattr(parameter, LEFT_DENSE, ADDED)


@contextlib.contextmanager
def marks_for_now(root: nn.Module) -> Iterator[None]:
    """restore_marks, undone at the end."""
    before = {id(p) for p in root.parameters() if hasattr(p, LEFT_DENSE)}
    restore_marks(root)
    try:
        yield
    finally:
        for parameter in root.parameters():
            if id(parameter) not in before and hasattr(parameter, LEFT_DENSE):
                delattr(parameter, LEFT_DENSE)


def decide(
    weight: Tensor,
    name: str,
    kind: str,
    config: GPTQConfig,
    *,
    kernel: str = "auto",
    transposed: bool = False,
    explicit: bool = False,
    calibrated: bool = False,
    sortable: bool = True,
) -> Decision:
    """What happens to a weight [N, K] ([K, N] if `transposed`) at the site `name` of `kind`.

    explicit: the user gave options, which then apply to weights that `quantize` left dense.
    calibrated: inputs of the weight are known, by whose importance its features can be ordered.
    sortable: there is a place where the inputs could be gathered in the order of a weight in act-order.
    Raises KernelError if no kernel, or not the one demanded, can run it.
    """
    if isinstance(weight, QuantizedParameter):
        return _quantized(weight, name, kind, config, kernel, explicit, sortable)
    if weight.dtype not in FLOATS:
        return Decision(None, None, f"{weight.dtype} weights are not quantized")
    left = getattr(weight, LEFT_DENSE, None)
    if left is not None and not explicit:
        return Decision(None, None, left)
    rule = config.rule_for(name, kind)
    if rule is None or rule.scheme is None:
        return Decision(None, None, _why_dense(rule, kind, config), rule)
    N, K = tuple(weight.shape)[-2:][:: -1 if transposed else 1]
    scheme, fitted = rule.scheme.fitted(K)
    reasons = [fitted]
    if scheme.desc_act and not calibrated:
        scheme = replace(scheme, desc_act=False)
        reasons.append("act-order needs calibration; without data the natural order is kept")
    experts = weight.shape[0] if weight.ndim == 3 else None
    spec = LinearSpec(K, N, scheme, weight.dtype, weight.device.type, experts)
    chosen, passed_over = choose_kernel(spec, kernel, name)
    return Decision(scheme, chosen, "; ".join(filter(None, [*reasons, passed_over])), rule, spec)


def _quantized(
    weight: QuantizedParameter,
    name: str,
    kind: str,
    config: GPTQConfig,
    kernel: str,
    explicit: bool,
    sortable: bool,
) -> Decision:
    rule = config.rule_for(weight.fqn or name, kind)
    sortable = sortable and weight.packed.order is not None
    chosen, reason = choose_kernel(weight.packed.spec, kernel, weight.fqn or name, sortable=sortable)
    asked = rule.scheme.fitted(weight.packed.spec.in_features)[0] if rule and rule.scheme else None
    if explicit and asked != weight.scheme:
        differs = f"quantized before; the options ask for {asked or 'dense'}"
        reason = "; ".join(filter(None, [differs, reason]))
    return Decision(weight.scheme, chosen, reason, rule, weight.packed.spec)


def _why_dense(rule: Rule | None, kind: str, config: GPTQConfig) -> str:
    if rule is not None and rule in config.user_rules:
        return f"left dense by rule {rule}"
    if kind == "lm_head":
        return "output projection, skipped by default (lm_head=True quantizes it)"
    if kind == "router":
        return "router, skipped by default (a rule that names it quantizes it)"
    return f"no rule for {kind}"
