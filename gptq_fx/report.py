"""What happened to every weight, and why."""

from __future__ import annotations

import io
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gptq_fx.config import GPTQConfig
from gptq_fx.decide import Decision
from gptq_fx.kernels import LinearSpec
from gptq_fx.linear import Measured
from gptq_fx.parameter import QuantizedParameter
from gptq_fx.scheme import Rule, Scheme
from gptq_fx.sketch import GraphRecord
from gptq_fx.weight import packed_rows


@dataclass(frozen=True)
class SiteRecord:
    """One weight. scheme None: it stays dense. error: ||W - W_quantized|| / ||W||, where known.

    dense_bytes, bytes: of the weight before and after. quantized: it is stored so already.
    loss, tokens, damp, seconds: of its calibration (see Measured), None where it had none.
    """

    name: str
    kind: str
    scheme: Scheme | None
    kernel: str | None
    reason: str
    shape: tuple[int, ...]
    dense_bytes: int
    bytes: int
    quantized: bool
    error: float | None = None
    loss: float | None = None
    tokens: int | None = None
    damp: float | None = None
    seconds: float | None = None


@dataclass
class Report:
    """sites: one record for each weight. unused_rules: rules of the user's that matched no site.

    notes: what does not belong to one site. seconds: what calibration spent on each phase.
    graphs: of `explain`, each before and after the passes.
    str() is a table; sites that differ only in their layer number share a row.
    """

    sites: list[SiteRecord] = field(default_factory=list)
    unused_rules: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    graphs: list[GraphRecord] = field(default_factory=list)

    def add(
        self, name: str, kind: str, weight: Tensor, decision: Decision, measured: Measured | None = None
    ) -> None:
        """Record the decision on a weight, quantized already or not."""
        dense = weight.numel() * weight.element_size()
        quantized = isinstance(weight, QuantizedParameter)
        stored = dense
        if quantized:
            stored = weight.nbytes
        elif decision.spec is not None:
            stored = canonical_bytes(decision.spec)
        self.sites.append(
            SiteRecord(
                name=name,
                kind=kind,
                scheme=decision.scheme,
                kernel=decision.kernel.name if decision.kernel else None,
                reason=decision.reason,
                shape=tuple(weight.shape),
                dense_bytes=dense,
                bytes=stored,
                quantized=quantized,
                error=weight.packed.error if isinstance(weight, QuantizedParameter) else None,
                **(asdict(measured) if measured else {}),
            )
        )

    def note_unused(self, config: GPTQConfig, used: Collection[Rule | None]) -> None:
        """Name the rules of the user's that decided nothing."""
        self.unused_rules += [str(rule) for rule in config.user_rules if rule not in used]

    def note_lazy(self) -> None:
        """Say what compiling costs where weights are still dense."""
        lazy = [s for s in self.sites if s.scheme is not None and not s.quantized]
        if lazy:
            self.notes.append(
                f"{len(lazy)} of them are still dense: compiling keeps both forms; gptq_fx.quantize(model) "
                f"would save {_mib(sum(s.dense_bytes for s in lazy))}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: all but the graphs, which are long."""
        return {name: value for name, value in asdict(replace(self, graphs=[])).items() if name != "graphs"}

    def to_html(self, path: str | os.PathLike[str], title: str = "gptq_fx") -> None:
        """Write one self-contained page: a table of the sites that can be sorted and filtered, and each graph
        before and after the passes. Raises OSError where it cannot be written."""
        from gptq_fx.page import page

        Path(path).write_text(page(self, title), encoding="utf-8")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture (.png, .svg, .pdf): error and bits of each quantized weight over the depth of the
        model. Raises ConfigError without matplotlib (pip install gptq-fx[plot]), or with nothing to show."""
        from gptq_fx.plot import plot

        plot(self, path)

    def __str__(self) -> str:
        calibrated = any(s.loss is not None for s in self.sites)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        groups = _grouped(self.sites)
        longest = max((len(name) for name, _ in groups), default=0)
        table.add_column("site", overflow="fold", min_width=min(longest, 60))
        for column in ("kind", "shape", "scheme", "kernel"):
            table.add_column(column, overflow="fold")
        for column in ("error", "bytes", "of dense", *(CALIBRATED if calibrated else ())):
            table.add_column(column, justify="right")
        table.add_column("why", overflow="fold")
        for name, group in groups:
            *row, why = _row(name, group)
            table.add_row(*row, *(_calibration(group) if calibrated else ()), why)
        text = io.StringIO()
        Console(file=text, width=160, force_terminal=False).print(table)
        lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
        return "\n".join([*lines, "", *self.summary()])

    def summary(self) -> list[str]:
        """What there is to say of all sites, line by line."""
        done = [s for s in self.sites if s.scheme is not None]
        dense, now = sum(s.dense_bytes for s in done), sum(s.bytes for s in done)
        ratio = f", {now / dense:.3f} of dense" if dense else ""
        count = f"{len(done)} of {len(self.sites)} weights quantized"
        return [
            f"{count}: {_mib(dense)} dense, {_mib(now)} stored{ratio}",
            *(f"unused rule: {rule}" for rule in self.unused_rules),
            *self.notes,
        ]


def canonical_bytes(spec: LinearSpec) -> int:
    """Bytes of a QuantizedWeight of this spec."""
    bits, N, G = spec.scheme.bits, spec.out_features, spec.groups
    codes = 4 * packed_rows(spec.in_features, bits) * N
    scales = G * N * spec.dtype.itemsize
    return codes + scales + (0 if spec.scheme.sym else 4 * G * packed_rows(N, bits))


def _grouped(sites: list[SiteRecord]) -> list[tuple[str, list[SiteRecord]]]:
    """Records that share all but numbers in their name, under a name such as layers.{0..29}.mlp.up."""
    groups: dict[object, list[SiteRecord]] = {}
    for site in sites:
        parts = tuple("#" if p.isdigit() else p for p in site.name.split("."))
        same = (parts, site.kind, site.scheme, site.kernel, site.reason, site.shape)
        groups.setdefault(same, []).append(site)
    return [(_common_name([s.name for s in group]), group) for group in groups.values()]


def _common_name(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_span(list(dict.fromkeys(column))) for column in columns)


def _span(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    numbers = sorted(map(int, values))
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def _row(name: str, group: list[SiteRecord]) -> tuple[str, ...]:
    site = group[0]
    dense, now = sum(s.dense_bytes for s in group), sum(s.bytes for s in group)
    errors = [s.error for s in group if s.error is not None]
    worst = f"{max(errors):.4f}" if errors else ""
    return (
        name,
        site.kind,
        " x ".join(map(str, site.shape)),
        str(site.scheme or "dense"),
        site.kernel or "",
        worst,
        _mib(now),
        f"{now / dense:.3f}" if site.scheme and dense else "",
        site.reason,
    )


CALIBRATED = ("loss", "tokens", "damp", "seconds")


def _calibration(group: list[SiteRecord]) -> tuple[str, ...]:
    """The worst loss, the fewest tokens and the most damping of a group, and all its seconds."""
    measured = [s for s in group if s.loss is not None]
    if not measured:
        return ("",) * len(CALIBRATED)
    return (
        f"{max(s.loss or 0.0 for s in measured):.2e}",
        f"{min(s.tokens or 0 for s in measured)}",
        f"{max(s.damp or 0.0 for s in measured):.2f}",
        f"{sum(s.seconds or 0.0 for s in measured):.1f}",
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:.2f} MiB"
