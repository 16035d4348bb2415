"""GPTQConfig: the ecosystem's field names, translated to one ordered list of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gptq_fx.errors import ConfigError, unknown
from gptq_fx.scheme import Rule, Scheme

CALIBRATION_FIELDS = (
    "act_group_aware",
    "static_groups",
    "damp_percent",
    "mse",
    "scale_search",
    "gptaq",
    "sequential",
    "route_all",
    "min_tokens",
)
SCHEME_FIELDS = tuple(f.name for f in fields(Scheme))


@dataclass(frozen=True)
class GPTQConfig:
    """What to quantize and how.

    bits, group_size, sym, desc_act: the default Scheme.
    act_group_aware, static_groups, damp_percent, mse, scale_search, gptaq: settings of the calibrated
        algorithm (gptq_fx.gptq.Settings).
    sequential: calibrate stage by stage, each on what the quantized stages before it give; or all at
        once, on what the dense model gives, whatever graphs it has.
    route_all: calibrate the first linear of every expert on the tokens of all experts of its layer.
    min_tokens: experts that saw fewer are rounded to nearest.
    lm_head: quantize the output projection too; a tied one is untied, the embedding stays dense.
    dynamic: regex -> overrides of bits, group_size, sym, desc_act. A key "-:REGEX" leaves the sites
        dense; "+:REGEX" or a bare REGEX overrides. Matched from the start of the path, first wins.
    rules: a list of Rule, asked after `dynamic`, for what paths cannot say (kinds).

    Raises ConfigError on any value that is not legal.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False
    act_group_aware: bool = True
    static_groups: bool = False
    damp_percent: float = 0.05
    mse: float = 0.0
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] | None = None
    rules: Sequence[Rule] | None = None
    sequential: bool = True
    route_all: bool | None = None
    min_tokens: int | None = None
    scale_search: bool = True
    gptaq: float = 0.5
    # derived: `dynamic` and `rules` as given by the user, and the defaults that follow them
    user_rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)
    all_rules: tuple[Rule, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("act_group_aware", "static_groups", "scale_search", "lm_head", "sequential"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r}. Legal: True, False")
        _check("damp_percent", self.damp_percent, lambda v: 0 < v < 1, "a number between 0 and 1")
        _check("mse", self.mse, lambda v: v >= 0, "0 (off) or a positive exponent")
        _check("gptaq", self.gptaq, lambda v: 0 <= v <= 1, "a number from 0 (off) to 1")
        if self.route_all not in (None, True, False):
            raise ConfigError(f"route_all={self.route_all!r}. Legal: True, False, None")
        if self.min_tokens is not None:
            _check("min_tokens", self.min_tokens, lambda v: v >= 0, "a number of tokens, or None")
        object.__setattr__(self, "rules", _checked(self.rules))
        default = self.scheme
        user = (*_from_dynamic(self.dynamic, default), *(self.rules or ()))
        head = () if self.lm_head else (Rule("", "lm_head", None),)
        defaults = (
            Rule("", "router", None),
            *head,
            *(Rule("", k, default) for k in _DEFAULT_KINDS),
        )
        object.__setattr__(self, "user_rules", user)
        object.__setattr__(self, "all_rules", user + defaults)

    @property
    def scheme(self) -> Scheme:
        """The scheme of a site that no rule of the user's names."""
        return Scheme(self.bits, self.group_size, self.sym, self.desc_act)

    @property
    def by_path(self) -> bool:
        """Whether two sites of one kind may get different schemes because of their paths."""
        return any(rule.pattern for rule in self.user_rules)

    @property
    def calibration_settings(self) -> list[str]:
        """Settings, as the user gave them, that mean nothing without calibration."""
        given = self.to_dict()
        return [f"{name}={given[name]!r}" for name in CALIBRATION_FIELDS if name in given]

    def rule_for(self, name: str, kind: str) -> Rule | None:
        """The first rule that matches, or None where no rule knows the kind."""
        return next((rule for rule in self.all_rules if rule.matches(name, kind)), None)

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, as plain data."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        plain["rules"] = [asdict(r) for r in self.rules] if self.rules is not None else None
        return {k: v for k, v in plain.items() if v != getattr(GPTQConfig, k)}


_DEFAULT_KINDS = ("linear", "grouped_linear", "experts", "lm_head")


def _from_dynamic(dynamic: Mapping[str, Mapping[str, Any]] | None, default: Scheme) -> tuple[Rule, ...]:
    if dynamic is None:
        return ()
    if not isinstance(dynamic, Mapping):
        raise ConfigError(f"dynamic={dynamic!r}. Legal: a dict of regex -> overrides, or None")
    rules = []
    for key, override in dynamic.items():
        sign, pattern = re.fullmatch(r"([+-]:)?(.*)", str(key), re.DOTALL).groups()  # type: ignore[union-attr]
        if sign == "-:":
            rules.append(Rule(pattern, None, None))
            continue
        if not isinstance(override, Mapping):
            raise ConfigError(f"dynamic[{key!r}]={override!r}. Legal: a dict of overrides")
        for name in override:
            if name not in SCHEME_FIELDS:
                raise unknown(f"override in dynamic[{key!r}]:", name, SCHEME_FIELDS)
        try:
            rules.append(Rule(pattern, None, replace(default, **override)))
        except ConfigError as error:
            raise ConfigError(f"dynamic[{key!r}]: {error}") from None
    return tuple(rules)


def _checked(rules: Iterable[Rule] | None) -> tuple[Rule, ...] | None:
    if rules is None:
        return None
    if not isinstance(rules, Iterable):
        raise ConfigError(f"rules={rules!r}. Legal: a list of gptq_fx.Rule, or None")
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ConfigError(f"rules holds {rule!r}. Legal: gptq_fx.Rule")
    return rules


def _check(name: str, value: Any, legal: Callable[[Any], bool], what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not legal(value):
        raise ConfigError(f"{name}={value!r}. Legal: {what}")
