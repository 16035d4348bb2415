"""Which other programs can read a checkpoint: facts about them, as data that one can argue with."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from gptq_fx.checkpoint.describe import FUSED
from gptq_fx.scheme import Scheme


@dataclass(frozen=True)
class Stored:
    """A module of the checkpoint: its scheme and size; scales: the name of their dtype."""

    scheme: Scheme
    in_features: int
    out_features: int
    scales: str

    @property
    def grouped_order(self) -> bool:
        return self.scheme.desc_act and self.scheme.group_size != -1


@dataclass(frozen=True)
class Reader:
    """reasons: why it cannot read the checkpoint, each with the first module that it refuses."""

    name: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {'no: ' + '; '.join(self.reasons) if self.reasons else 'yes'}"


Check = tuple[str, Callable[[Stored], bool]]
MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 16, 32, 64, 128, 256, 512, 1024)

_ASYM: Check = ("asymmetric", lambda m: not m.scheme.sym)
_ORDER: Check = ("desc_act with groups", lambda m: m.grouped_order)
_MARLIN_BITS: Check = ("not 4 or 8 bits", lambda m: m.scheme.bits not in (4, 8))
_MARLIN_GROUP: Check = (
    f"group_size not in {MARLIN_GROUPS}",
    lambda m: m.scheme.group_size not in MARLIN_GROUPS,
)
_WORDS: Check = (
    "outputs or inputs no multiple of 32",
    lambda m: bool(m.in_features % 32 or m.out_features % 32),
)

CHECKS: dict[str, tuple[Check, ...]] = {
    "GPTQModel 7.7": (
        (
            f"group_size not in {GPTQMODEL_GROUPS}",
            lambda m: m.scheme.group_size not in GPTQMODEL_GROUPS,
        ),
        _WORDS,
    ),
    "vLLM": (_MARLIN_BITS, _ASYM, _ORDER, _MARLIN_GROUP, _WORDS),
    "SGLang": (
        _MARLIN_BITS,
        _ASYM,
        _MARLIN_GROUP,
        (
            "outputs no multiple of 64, or inputs none of 128",
            lambda m: bool(m.out_features % 64 or m.in_features % 128),
        ),
    ),
}
CHECKS["transformers + optimum"] = CHECKS["GPTQModel 7.7"]


def readers(
    modules: Mapping[str, Stored],
    dense: Collection[str] = (),
    *,
    mixed: bool = False,
    marlin: bool = False,
) -> tuple[Reader, ...]:
    """What each program makes of a checkpoint. dense: its other modules. mixed: it has `dynamic` rules.

    marlin: its files hold the layout of that kernel, which only old versions of these programs wrote.
    """
    found = []
    for program, checks in CHECKS.items():
        reasons = ["Marlin's layout: load it and save it again"] if marlin else []
        for what, refuses in checks:
            bad = [name for name, module in modules.items() if refuses(module)]
            if bad:
                more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                reasons.append(f"{what} ({bad[0]}{more})")
        if program in ("vLLM", "SGLang"):
            reasons += _fused(modules, dense)
        if program.startswith("transformers") and mixed:
            reasons.append("does not know `dynamic`, which this checkpoint needs")
        reasons += [f"{what} ({name})" for what, name in _experts(program, modules)]
        found.append(Reader(program, tuple(reasons)))
    return tuple(found)


def _experts(program: str, modules: Collection[str]) -> list[tuple[str, str]]:
    """What programs make of matrices of single experts, as examples/benchmarks/peers.py finds it."""
    name = next((m for m in modules if re.search(r"\.experts\.\d+\.", m)), None)
    if name is None:
        return []
    if program.startswith("transformers"):
        return [("fills the experts of a model of transformers v5 with random numbers", name)]
    if program.startswith("GPTQModel") and ".block_sparse_moe." in name:
        return [("looks for mlp.experts.*.gate_proj, while vLLM and SGLang read the names here", name)]
    return []


def _fused(modules: Mapping[str, Stored], dense: Collection[str]) -> list[str]:
    """Linears that servers make one of must have one scheme, or all be dense."""
    schemes: dict[str, Scheme | None] = dict.fromkeys(dense)
    schemes |= {name: module.scheme for name, module in modules.items()}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        for parts in FUSED.values():
            siblings = [schemes[f"{parent}.{p}"] for p in parts if f"{parent}.{p}" in schemes]
            if leaf in parts and len(set(siblings)) > 1:
                return [f"{parent}: {', '.join(parts)} differ in their scheme, and are one linear there"]
    return []
