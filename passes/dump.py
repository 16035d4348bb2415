"""dump: the graph before and behind each pass, as files to read and to compare."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from gptq_fx.passes.plan import Plan

VARIABLE = "GPTQ_FX_DUMP"
log = logging.getLogger(__name__)


class Dump:
    """A folder of its own for one graph: graph_0, graph_1, ... in the order of compiling, and for each stage
    NN_name.txt with the code, the table of nodes and that of sites. Without `parent` nothing is written."""

    def __init__(self, parent: str | None) -> None:
        self.folder = _new_folder(Path(parent)) if parent else None
        self.count = 0
        if self.folder is not None:
            log.info("graphs are written to %s", self.folder)

    def __call__(self, name: str, gm: fx.GraphModule, plan: Plan) -> None:
        if self.folder is None:
            return
        gm.recompile()
        parts = [gm.print_readable(print_output=False), nodes(gm), sites(plan)]
        path = self.folder / f"{self.count:02}_{name}.txt"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        self.count += 1


def _new_folder(parent: Path) -> Path:
    number = 0
    while True:
        try:
            folder = parent / f"graph_{number}"
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not parent.is_dir():
                raise
            number += 1


def nodes(gm: fx.GraphModule) -> str:
    """One line for each node: name, kind, what it calls, on what, and what it gives."""
    rows = [
        (
            node.name,
            node.op,
            "" if node.op in ("placeholder", "output") else str(node.target),
            ", ".join(map(str, (*node.args, *(f"{k}={v}" for k, v in node.kwargs.items())))),
            _value(node.meta.get("example_value")),
        )
        for node in gm.graph.nodes
    ]
    return _table(("node", "kind", "target", "arguments", "value"), rows)


def sites(plan: Plan) -> str:
    """One line for each weight: what is to become of it, and why."""
    rows = [
        (
            site.name,
            site.kind,
            str(site.scheme or "dense"),
            site.decision.kernel.name if site.decision and site.decision.kernel else "",
            site.node.name if site.node else "",
            (site.decision.reason if site.decision else "") or site.refusal,
        )
        for site in plan.sites
    ]
    return _table(("site", "kind", "scheme", "kernel", "node", "why"), rows)


def _value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} {value.device}"
    return "" if value is None else type(value).__name__


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
