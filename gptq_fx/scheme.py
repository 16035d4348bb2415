"""What a weight is quantized to (Scheme), and which weights it applies to (Rule)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from gptq_fx.errors import ConfigError, unknown

BITS = (2, 3, 4, 8)
KINDS = ("linear", "grouped_linear", "experts", "router", "lm_head")


@dataclass(frozen=True)
class Scheme:
    """How the numbers of one weight are stored.

    bits: width of a code: 2, 3, 4 or 8.
    group_size: input features that share one scale: -1 (one group per output), or a positive multiple of 8.
    sym: the zero point is the middle of the grid, 2^(bits-1); otherwise one integer zero point per group.
    desc_act: act-order; input features are quantized by falling importance, so that a group is any
        set of features, named by g_idx.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    desc_act: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise ConfigError(f"bits={self.bits!r}. Legal: {', '.join(map(str, BITS))}")
        g = self.group_size
        if type(g) is not int or not (g == -1 or (g > 0 and g % 8 == 0)):
            raise ConfigError(f"group_size={g!r}. Legal: -1, or a positive multiple of 8")
        for field in ("sym", "desc_act"):
            if type(getattr(self, field)) is not bool:
                raise ConfigError(f"{field}={getattr(self, field)!r}. Legal: True, False")

    def __deepcopy__(self, memo: object) -> Scheme:
        return self  # a value; and Dynamo's guards compare copies of it at every call

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return " ".join(
            [f"W{self.bits}A16", group, "sym" if self.sym else "asym"] + ["desc_act"] * self.desc_act
        )

    def fitted(self, in_features: int) -> tuple[Scheme, str]:
        """This scheme with a group size that divides `in_features`, and why it differs (or "").

        The largest of 128, 64, 32 that divides `in_features` and is not above the request; else -1.
        """
        if self.group_size == -1 or in_features % self.group_size == 0:
            return self, ""
        fits = [g for g in (128, 64, 32) if g <= self.group_size and in_features % g == 0]
        group = fits[0] if fits else -1
        return replace(self, group_size=group), (
            f"group_size {group} in place of {self.group_size}, which does not divide {in_features}"
        )


W4A16 = Scheme(bits=4, group_size=128)
W8A16 = Scheme(bits=8, group_size=128)


@dataclass(frozen=True)
class Rule:
    """Which scheme some sites get; the first rule that matches a site decides.

    pattern: regular expression, matched from the start of the site's path ("" matches every path).
    kind: one of KINDS, or None for every kind. "experts" covers their stacks however they are called,
        in a whole block or as grouped linears. A rule without a kind reaches routers and lm_head only if its
        pattern names them: ".*" does not quantize what is skipped for good reason.
    scheme: what the site gets; None leaves it dense.
    """

    pattern: str = ""
    kind: str | None = None
    scheme: Scheme | None = W4A16

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as e:
            raise ConfigError(f"rule pattern {self.pattern!r} is no regular expression: {e}") from e
        if self.kind is not None and self.kind not in KINDS:
            raise unknown("rule kind", self.kind, KINDS)
        if not (self.scheme is None or isinstance(self.scheme, Scheme)):
            raise ConfigError(f"rule scheme {self.scheme!r}. Legal: a gptq_fx.Scheme, or None")

    def matches(self, name: str, kind: str) -> bool:
        if self.kind not in (None, kind) and not (self.kind == "experts" and kind == "grouped_linear"):
            return False
        if self.kind is None and self.scheme is not None and kind in ("router", "lm_head"):
            leaf = name.rpartition(".")[2]
            if leaf not in self.pattern:
                return False
        return re.match(self.pattern, name) is not None

    def __str__(self) -> str:
        what = "leave dense" if self.scheme is None else str(self.scheme)
        return f"{self.pattern!r}{f' ({self.kind})' if self.kind else ''} -> {what}"
