"""The quantization_config of a checkpoint that we write: the most frequent scheme, and rules for the rest."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from gptq_fx.scheme import Scheme

VERSION = "0.1.0"
# vLLM and SGLang ask the rules by the names of the linears that they fuse at run time.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FIELDS = ("bits", "group_size", "sym", "desc_act")


def describe(
    schemes: Mapping[str, Scheme], dense: Sequence[str], heads: set[str], transposed: Sequence[str]
) -> dict[str, Any]:
    """The JSON object for quantized modules `schemes` and linears that stay `dense`, by checkpoint names.

    Zero points are stored as "gptq" (v1), which every reader knows, where all are symmetric, and else as
    "gptq_v2", the only form of asymmetric ones that readers agree on. heads: output projections, of
    which readers only expect that they are quantized if `lm_head` says so.
    """
    body = {name: s for name, s in schemes.items() if name not in heads}
    default = Counter((body or schemes).values()).most_common(1)[0][0]
    decisions: dict[str, Scheme | None] = {**dict.fromkeys(n for n in dense if n not in heads), **schemes}
    version = "gptq" if all(s.sym for s in schemes.values()) else "gptq_v2"
    meta: dict[str, Any] = {"quantizer": [f"gptq_fx:{VERSION}"]}
    if transposed:
        meta["transposed"] = list(transposed)
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.sym,
        "desc_act": default.desc_act,
        "lm_head": any(name in schemes for name in heads),
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "true_sequential": True,
        "dynamic": dynamic(decisions, default) or None,
        "meta": meta,
    }


def dynamic(decisions: Mapping[str, Scheme | None], default: Scheme) -> dict[str, dict[str, Any]]:
    """Rules for the modules that do not get `default`, each matching whole names of such modules only.

    Numbers in names become `\\d+` where all modules that then match agree.
    """
    shapes: dict[str, set[Scheme | None]] = defaultdict(set)
    for name, scheme in decisions.items():
        shapes[_pattern(name)].add(scheme)
    leaves: dict[tuple[str, Scheme | None], list[str]] = defaultdict(list)
    for name, scheme in decisions.items():
        if scheme == default:
            continue
        pattern = _pattern(name) if len(shapes[_pattern(name)]) == 1 else re.escape(name)
        parent, _, leaf = pattern.rpartition(r"\.")
        if leaf not in leaves[parent, scheme]:
            leaves[parent, scheme].append(leaf)
    rules: dict[str, dict[str, Any]] = {}
    for (parent, scheme), found in leaves.items():
        found += [name for name, parts in FUSED.items() if set(parts) <= set(found)]
        last = found[0] if len(found) == 1 else f"(?:{'|'.join(found)})"
        pattern = f"^{parent}{chr(92)}.{last}$" if parent else f"^{last}$"
        rules[("-:" if scheme is None else "+:") + pattern] = _override(scheme, default)
    return rules


def _override(scheme: Scheme | None, default: Scheme) -> dict[str, Any]:
    if scheme is None:
        return {}
    return {f: getattr(scheme, f) for f in FIELDS if getattr(scheme, f) != getattr(default, f)}


def _pattern(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
