"""A picture of a report: error and bits of each quantized weight over the depth of the model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gptq_fx.errors import ConfigError

if TYPE_CHECKING:
    from gptq_fx.report import Report, SiteRecord


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """See Report.plot. The error of a site is that of its weight, ||W - W_quantized|| / ||W||; where it was
    calibrated, the error of its output on the calibration data is drawn below, on a scale of powers."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("Report.plot needs matplotlib: pip install gptq-fx[plot]") from None
    lines = by_leaf(report)
    if not lines:
        raise ConfigError("the report has no quantized weight to plot")
    rows = ["error", "loss", "bits"] if any(s.loss is not None for s in report.sites) else ["error", "bits"]
    figure = Figure(figsize=(9, 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), sharex=True, squeeze=False)[:, 0]
    for row, axis in zip(rows, axes, strict=True):
        for leaf, sites in lines.items():
            points = [(x, value(s, row)) for x, s in sites]
            found = [(x, y) for x, y in points if y is not None]
            if found:
                axis.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=1, label=leaf)
        axis.set_ylabel({"error": "error of the weight", "loss": "error of the output"}.get(row, row))
        axis.grid(alpha=0.3)
    axes[rows.index("bits")].set_ylim(0, 9)
    if "loss" in rows:
        axes[rows.index("loss")].set_yscale("log")
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes[rows.index("bits")].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)


def by_leaf(report: Report) -> dict[str, list[tuple[int, SiteRecord]]]:
    """The quantized weights of each name, such as "mlp.up_proj", with the number of their layer.

    The number is the first in the path; weights without one stand behind the last layer.
    """
    placed = [(_layer(s.name), s) for s in report.sites if s.scheme is not None]
    behind = max((layer for layer, _ in placed if layer is not None), default=-1) + 1
    lines: dict[str, list[tuple[int, SiteRecord]]] = {}
    for layer, site in placed:
        leaf = ".".join([p for p in site.name.split(".") if not p.isdigit()][-2:])
        lines.setdefault(leaf, []).append((behind if layer is None else layer, site))
    return lines


def value(site: SiteRecord, row: str) -> float | None:
    if row == "bits":
        return site.scheme.bits if site.scheme else None
    return site.loss if row == "loss" else site.error


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
