"""A picture of a graph before and after the passes, as SVG.

Calls between two linears are folded into one box, and layers that repeat into one: what is left is what the
passes see. Linears stand in the odd rows, in the even ones everything between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from gptq_fx.sketch import Call, GraphRecord

WIDTH, HEIGHT, GAP, MARGIN = 164, 56, 24, 30  # of the box of a linear, and the space around it
FOLDED = 38  # height of a box of folded calls
TOP = 64
MOST = 6  # linears side by side that are drawn each by itself
# Calls that only give a tensor another form; a folded box is not named after them.
FORMS = """
_log_api_usage_once chunk clone contiguous expand flatten float getitem permute reshape size split squeeze to
transpose type type_as unflatten unsqueeze view
"""
STYLE = """
.card { fill: #ffffff } text { font: 12px system-ui, sans-serif; fill: #1f2937; text-anchor: middle }
.title { font-size: 15px; font-weight: 600 } .note { font-size: 11px; fill: #6b7280 }
.op { font: 11px ui-monospace, monospace } .fate { font-size: 10.5px; fill: #4b5563 }
.dense { fill: #fef3c7; stroke: #d97706 } .packed { fill: #d1fae5; stroke: #059669 }
.folded { fill: #f3f4f6; stroke: #d1d5db } .edge { fill: none; stroke: #9ca3af }
.frame { fill: none; stroke: #9ca3af; stroke-dasharray: 5 4 } .times { font-weight: 600; text-anchor: end }
"""


@dataclass(frozen=True)
class Row:
    """Calls of one level: linears side by side, or what stands between two levels of them."""

    level: int
    calls: tuple[int, ...]

    @property
    def linears(self) -> bool:
        return self.level % 2 == 1


def svg(graph: GraphRecord) -> str:
    """The picture, with as many rows as the graph needs: 30 equal layers take as many as one."""
    columns = [_Column("before", graph.before), _Column("after", graph.after)]
    height = max(c.height for c in columns) + MARGIN
    parts, x = [], 0.0
    for column in columns:
        parts.append(f'<g transform="translate({x:g} 0)">{"".join(column.parts)}</g>')
        x += column.width
    size = f'width="{x:g}" height="{height:g}" viewBox="0 0 {x:g} {height:g}"'
    card = '<rect class="card" width="100%" height="100%" rx="8"/>'
    # Selectors of an SVG within a page hold for the whole page: each begins with the picture's own class.
    style = re.sub(r"(?m)(^|} )(?=[.a-z])", r"\1.gptq-graph ", STYLE)
    title = "<title>The graph before and after the passes</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="gptq-graph" role="img" {size}>'
    return f"{head}{title}<style>{style}</style>{card}{''.join(parts)}</svg>"


def rows(calls: Sequence[Call]) -> list[Row]:
    """The calls by level: how many linears stand at most before them, twice, and one more if it is one."""
    levels: list[int] = []
    for call in calls:
        before = [levels[i] for i in call.inputs]
        above = max(before, default=0)
        levels.append((above + 1) | 1 if call.weights else above + above % 2)
    by_level: dict[int, list[int]] = {}
    for i, level in enumerate(levels):
        by_level.setdefault(level, []).append(i)
    return [Row(level, tuple(by_level[level])) for level in sorted(by_level)]


def repeats(signs: Sequence[object]) -> Iterator[tuple[int, int, int]]:
    """(start, length, times): a sequence cut into runs that repeat, each as often as it pays most."""
    start = 0
    while start < len(signs):
        best = (0, 1, 1)
        for length in range(1, (len(signs) - start) // 2 + 1):
            if signs[start] != signs[start + length]:
                continue
            period, times = signs[start : start + length], 1
            while signs[start + times * length : start + (times + 1) * length] == period:
                times += 1
            best = max(best, ((times - 1) * length, length, times), key=lambda b: b[0])
        _, length, times = best
        yield start, length, times
        start += length * times


class _Column:
    """One of the two graphs. parts: its elements; width, height: of them, with the margin."""

    def __init__(self, when: str, calls: Sequence[Call]) -> None:
        self.calls, self.parts = calls, list[str]()
        found = rows(calls)
        widest = max((len(self._groups(row)) for row in found if row.linears), default=1)
        self.width = 2 * MARGIN + max(2, widest) * (WIDTH + 10) + 20
        self.middle = self.width / 2
        self._text(self.middle, 26, when, "title")
        self._text(self.middle, 44, f"{len(calls)} calls", "note")
        self.y: float = TOP
        self.boxes: dict[int, tuple[float, float, float]] = {}  # call -> middle, top and bottom of its box
        self.levels = {i: row.level for row in found for i in row.calls}
        for start, length, times in repeats([repr(self._sign(row)) for row in found]):
            top = self.y
            for n, row in enumerate(found[start : start + length]):
                self._row(row)
                for other in found[start + n + length : start + times * length : length]:
                    self.boxes |= {
                        i: self.boxes[j] for i, j in zip(other.calls, self._twins(row, other), strict=True)
                    }
            if times > 1:
                self._frame(top - 10, self.y - GAP + 10, times)
        self.height = self.y - GAP
        self.parts[:0] = self._edges()

    def _sign(self, row: Row) -> object:
        """What two rows of equal layers have in common."""
        return [self._kind(i) for i in row.calls] if row.linears else self._named(row)

    def _kind(self, i: int) -> tuple[str, ...]:
        """What two linears have in common that differ only in the numbers of their path."""
        call = self.calls[i]
        return call.op, re.sub(r"\d+", "#", " ".join(call.weights)), call.output, call.fate

    def _groups(self, row: Row) -> list[list[int]]:
        """The linears of a row box by box: those of one kind share one where there are too many."""
        groups: dict[object, list[int]] = {}
        for i in row.calls:
            groups.setdefault(i if len(row.calls) <= MOST else self._kind(i), []).append(i)
        return list(groups.values())

    def _named(self, row: Row) -> list[str]:
        """The ops that a folded box is named after, the longest name, which says most, first."""
        names = {self.calls[i].op for i in row.calls} - set(FORMS.split())
        return sorted(names, key=lambda name: (-len(name), name))

    def _twins(self, row: Row, other: Row) -> tuple[int, ...]:
        """For each call of `other`, which is not drawn, one of the equal row that is."""
        return row.calls if row.linears else row.calls[:1] * len(other.calls)

    def _row(self, row: Row) -> None:
        if row.linears:
            groups = self._groups(row)
            left = self.middle - (len(groups) - 1) * (WIDTH + 10) / 2
            for n, group in enumerate(groups):
                self._linear(left + n * (WIDTH + 10), group)
            self.y += HEIGHT + GAP
            return
        names = self._named(row)
        what = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        width = min(self.width - 2 * MARGIN, max(150, 7 * len(what) + 20))
        self._box(self.middle, width, FOLDED, "folded", row.calls, "")
        self._text(self.middle, self.y + 15, f"{len(row.calls)} call{'s' * (len(row.calls) > 1)}", "note")
        self._text(self.middle, self.y + 30, what, "op")
        self.y += FOLDED + GAP

    def _linear(self, x: float, group: Sequence[int]) -> None:
        call, times = self.calls[group[0]], f" x {len(group)}" if len(group) > 1 else ""
        leaves = [name.rpartition(".")[2].removesuffix("_proj") for name in call.weights]
        tip = "\n".join([*call.weights, call.fate])
        self._box(x, WIDTH, HEIGHT, "packed" if call.op.startswith("gptq.") else "dense", group, tip)
        below = _short(call)
        top = self.y + (17 if below else 25)
        self._text(x, top, " | ".join(leaves) + times)
        self._text(x, top + 16, call.op.lstrip("_"), "op")
        self._text(x, top + 31, below, "fate")

    def _box(self, x: float, width: float, height: float, kind: str, calls: Iterable[int], tip: str) -> None:
        for i in calls:
            self.boxes[i] = (x, self.y, self.y + height)
        title = f"<title>{escape(tip)}</title>" if tip else ""
        place = f'x="{x - width / 2:g}" y="{self.y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect class="{kind}" rx="6" {place}>{title}</rect>')

    def _frame(self, top: float, bottom: float, times: int) -> None:
        place = f'x="12" y="{top:g}" width="{self.width - 24:g}" height="{bottom - top:g}"'
        self.parts.append(f'<rect class="frame" rx="10" {place}/>')
        self._text(self.width - 20, bottom - 8, f"{times} times", "times")

    def _text(self, x: float, y: float, text: str, kind: str = "") -> None:
        if not text:
            return
        shown = text if len(text) <= 60 else text[:57] + "..."
        name = f' class="{kind}"' if kind else ""
        self.parts.append(f'<text{name} x="{x:g}" y="{y:g}">{escape(shown)}</text>')

    def _edges(self) -> list[str]:
        """A line for each pair of boxes where a call of one takes a result of the other; those that pass
        linears by, as residuals do, run along the side, unless they come from far away."""
        lines = dict[str, None]()
        for i, call in enumerate(self.calls):
            for j in call.inputs:
                (x0, top, bottom), (x1, y1, _) = self.boxes[j], self.boxes[i]
                apart = self.levels[i] - self.levels[j]
                if y1 < bottom:  # in one box, or back from one of equal layers to the first
                    continue
                if apart == 1:
                    bend = (bottom + y1) / 2
                    lines[f"M{x0:g} {bottom:g}C{x0:g} {bend:g} {x1:g} {bend:g} {x1:g} {y1:g}"] = None
                elif apart in (4, 6):
                    side, start, end = MARGIN + 8 - 2 * apart, top + FOLDED / 2, y1 + FOLDED / 2
                    down = f"q-8 0 -8 8V{end - 8:g}q0 8 8 8"
                    lines[f"M{self.middle:g} {start:g}H{side + 8:g}{down}H{self.middle:g}"] = None
        return [f'<path class="edge" d="{line}"/>' for line in lines]


def _short(call: Call) -> str:
    """What fits into a box: scheme and kernel of what is quantized, once it is."""
    if not call.quantized:
        return "stays dense"
    return call.fate if call.op.startswith("gptq.") else ""
