"""What a checkpoint says of itself: quantization_config in config.json, or quantize_config.json."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from gptq_fx.checkpoint.files import read_json
from gptq_fx.errors import CheckpointError, ConfigError
from gptq_fx.scheme import Scheme

FORMATS = ("gptq", "gptq_v2", "marlin")
LEAVES = ("qweight", "scales", "qzeros", "g_idx")
MARLIN_LEAVES = ("B", "s", "workspace")
PATTERN_SECONDS = 1.0  # for one match; and for all matches of a checkpoint:
TOTAL_SECONDS = 10.0
MAX_PATTERN = 4096
MAX_REPEATS = 10_000  # the product of the counts in a pattern, which a compiled one may write out
FIELDS = ("bits", "group_size", "sym", "desc_act")


@dataclass(frozen=True)
class Override:
    """A rule of the checkpoint. values None: the modules stay dense."""

    text: str
    matches: Callable[[str], bool]
    values: Mapping[str, Any] | None


@dataclass(frozen=True)
class CheckpointSettings:
    """file: where it was found. format: "gptq" (v1) and "gptq_v2" differ in their zero points; "marlin"
    is the layout of the kernel of that name."""

    file: str
    scheme: Scheme
    format: str
    lm_head: bool
    overrides: tuple[Override, ...]
    raw: Mapping[str, Any]

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of a module of the checkpoint; the first rule that matches decides. None: dense."""
        for rule in self.overrides:
            if rule.matches(module):
                return None if rule.values is None else _scheme(self.file, {**self._base, **rule.values})
        return self.scheme

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of the tensors of a quantized module."""
        return MARLIN_LEAVES if self.format == "marlin" else LEAVES

    @property
    def _base(self) -> dict[str, Any]:
        return {name: getattr(self.scheme, name) for name in FIELDS}


def read_settings(folder: Path) -> CheckpointSettings:
    """Read and check the settings. Raises CheckpointError, naming the file and the key."""
    config = read_json(folder, "config.json")
    file, found = "config.json", None
    if config is not None:
        found = config.get("quantization_config")
        text = config.get("text_config")
        if found is None and isinstance(text, dict):
            found = text.get("quantization_config")
    if found is None:
        file, found = "quantize_config.json", read_json(folder, "quantize_config.json")
    if found is None:
        raise CheckpointError(
            f"{folder}: no GPTQ checkpoint: neither quantization_config in config.json nor "
            "quantize_config.json is there"
        )
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: quantization_config: found {found!r:.80}. Legal: a JSON object")
    return parse(file, found)


def parse(file: str, found: Mapping[str, Any]) -> CheckpointSettings:
    """The settings in the JSON object `found` of `file`."""
    method = _method(file, found)
    if method == "marlin":  # of those files the kernel alone says what the numbers are
        found = {"bits": 4, "checkpoint_format": "marlin", **found}
    for key in ("bits", "group_size"):
        if key not in found:
            raise CheckpointError(f"{file}: {key}: missing")
    scheme = _scheme(file, found)
    pack = found.get("pack_dtype") or "int32"
    if pack not in ("int32", "torch.int32"):
        raise CheckpointError(f"{file}: pack_dtype: found {pack!r:.80}. Legal: 'int32'")
    lm_head = found.get("lm_head") or False
    if not isinstance(lm_head, bool):
        raise CheckpointError(f"{file}: lm_head: found {lm_head!r:.80}. Legal: true, false")
    budget = _Budget(file)
    if method == "auto-round":
        overrides = _extra_config(file, found.get("extra_config"), budget)
    else:
        overrides = _dynamic(file, found.get("dynamic"), budget)
    settings = CheckpointSettings(file, scheme, _format(file, found), lm_head, overrides, found)
    if settings.format == "marlin":
        _check_marlin(file, scheme)
    for rule in overrides:
        if rule.values is not None:
            _scheme(f"{file}: {rule.text}", {**settings._base, **rule.values})
    return settings


def _method(file: str, found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if method is None and file == "quantize_config.json":
        method = "gptq"  # files of AutoGPTQ have no such key
    if method in ("auto-round", "intel/auto-round"):
        packing = found.get("packing_format")
        if packing != "auto_round:auto_gptq":
            raise CheckpointError(
                f"{file}: packing_format: found {packing!r:.80}. Legal: 'auto_round:auto_gptq'"
            )
        return "auto-round"
    if method not in ("gptq", "marlin"):
        legal = "'gptq', 'marlin', 'auto-round'"
        raise CheckpointError(f"{file}: quant_method: found {method!r:.80}. Legal: {legal}")
    return str(method)


def _format(file: str, found: Mapping[str, Any]) -> str:
    name = found.get("checkpoint_format") or found.get("format") or "gptq"
    if found.get("is_marlin_format"):  # AutoGPTQ up to 0.7.1
        name = "marlin"
    if name not in FORMATS:
        raise CheckpointError(f"{file}: checkpoint_format: found {name!r:.80}. Legal: {FORMATS}")
    return str(name)


def _check_marlin(file: str, scheme: Scheme) -> None:
    """Files of the layout have neither zero points nor a g_idx."""
    if scheme.bits not in (4, 8):
        raise CheckpointError(f"{file}: bits: found {scheme.bits} in Marlin's layout. Legal there: 4, 8")
    if not scheme.sym:
        raise CheckpointError(f"{file}: sym: found false. Legal in Marlin's layout: true")
    if scheme.desc_act and scheme.group_size != -1:
        raise CheckpointError(f"{file}: desc_act: found true. Legal in Marlin's layout with groups: false")


def _scheme(where: str, values: Mapping[str, Any]) -> Scheme:
    try:
        return Scheme(
            values["bits"], values["group_size"], values.get("sym", True), values.get("desc_act") or False
        )
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from None


class _Budget:
    """Patterns come with the file: one that never ends must not hang whoever loads it."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.left = TOTAL_SECONDS

    def compiled(self, key: str, pattern: str, *, full: bool) -> Callable[[str], bool]:
        if len(pattern) > MAX_PATTERN:
            raise CheckpointError(f"{self.file}: {key!r:.80}: a pattern of {len(pattern)} characters")
        if (repeats := _repeats(pattern)) > MAX_REPEATS:
            raise CheckpointError(f"{self.file}: {key!r:.80}: a pattern that repeats {repeats} times")
        try:
            compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{self.file}: {key!r:.80}: no regular expression: {error}") from None
        match = compiled.fullmatch if full else compiled.match

        def matches(name: str) -> bool:
            start = time.monotonic()
            try:
                found = match(name, timeout=max(1e-3, min(PATTERN_SECONDS, self.left)))
            except TimeoutError:
                raise CheckpointError(
                    f"{self.file}: {key!r:.80}: matching {name!r} takes for ever; the pattern backtracks"
                ) from None
            self.left -= time.monotonic() - start
            return found is not None

        return matches


def _repeats(pattern: str) -> int:
    """No less than how often a part of the pattern may be written out by its counts, such as a{2,5}."""
    counts = [re.findall(r"\d+", braces) for braces in re.findall(r"\{[^{}]*\}", pattern)]
    return math.prod(max(1, *map(int, numbers)) for numbers in counts if numbers)


def _dynamic(file: str, found: Any, budget: _Budget) -> tuple[Override, ...]:
    """Rules in the syntax of GPTQModel; what they override beside the scheme does not matter here."""
    rules = []
    for key, values in _table(file, "dynamic", found).items():
        skip = key.startswith("-:")
        pattern = key[2:] if key[:2] in ("-:", "+:") else key
        if not skip and not isinstance(values, dict):
            raise CheckpointError(f"{file}: dynamic[{key!r:.80}]: found {values!r:.80}. Legal: an object")
        kept = None if skip else {name: values[name] for name in FIELDS if name in values}
        rules.append(Override(f"dynamic[{key!r:.80}]", budget.compiled(key, pattern, full=False), kept))
    return tuple(rules)


def _extra_config(file: str, found: Any, budget: _Budget) -> tuple[Override, ...]:
    """AutoRound's table: exact names first, then patterns of whole names; 16 bits or more are dense."""
    exact, patterns = [], []
    for key, values in _table(file, "extra_config", found).items():
        if not isinstance(values, dict):
            raise CheckpointError(
                f"{file}: extra_config[{key!r:.80}]: found {values!r:.80}. Legal: an object"
            )
        bits = values.get("bits")
        dense = isinstance(bits, int) and bits >= 16
        kept = None if dense else {name: values[name] for name in FIELDS if values.get(name) is not None}
        text = f"extra_config[{key!r:.80}]"
        exact.append(Override(text, key.__eq__, kept))
        patterns.append(Override(text, budget.compiled(key, key, full=True), kept))
    return (*exact, *patterns)


def _table(file: str, name: str, found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: {name}: found {found!r:.80}. Legal: an object of patterns")
    return found
