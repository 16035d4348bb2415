"""The report as one page of HTML that needs no other file: the sites as a table, and each graph."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from html import escape

from gptq_fx.draw import svg
from gptq_fx.report import Report, SiteRecord
from gptq_fx.sketch import Call, GraphRecord

# Title of a column, and what a site has there; numbers are sorted as such, and shown in the given form.
COLUMNS = (
    ("site", lambda s: s.name, ""),
    ("kind", lambda s: s.kind, ""),
    ("shape", lambda s: " x ".join(map(str, s.shape)), ""),
    ("scheme", lambda s: str(s.scheme or "dense"), ""),
    ("bits", lambda s: s.scheme.bits if s.scheme else None, "d"),
    ("kernel", lambda s: s.kernel or "", ""),
    ("error", lambda s: s.error, ".4f"),
    ("loss", lambda s: s.loss, ".2e"),
    ("tokens", lambda s: s.tokens, "d"),
    ("MiB", lambda s: s.bytes / 2**20, ".2f"),
    ("of dense", lambda s: s.bytes / s.dense_bytes if s.dense_bytes else None, ".3f"),
    ("why", lambda s: s.reason, ""),
)
KEPT = 2  # calls shown around those that changed

STYLE = """
:root { color-scheme: light dark }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
#sites td:last-child { white-space: normal; min-width: 16em }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid #8884; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
th button { all: unset; cursor: pointer; font-weight: 600 } th button:focus-visible { outline: 2px solid }
th[aria-sort=ascending] button::after { content: " \\25B2" }
th[aria-sort=descending] button::after { content: " \\25BC" }
#filter { padding: .35rem .6rem; width: 22em; margin: .5rem 0 } summary { cursor: pointer; margin: .8rem 0 }
.changes { font: 12px ui-monospace, monospace } .changes td { border: 0; padding: .1rem .7rem }
.gone { background: #d9770633 } .new { background: #05966933 } .same { opacity: .7 }
"""

SCRIPT = """
const body = document.querySelector("#sites tbody"), rows = [...body.rows];
const value = (row, n) => row.cells[n].dataset.sort ?? row.cells[n].textContent;
document.querySelectorAll("#sites th").forEach((head, n) => head.firstChild.addEventListener("click", () => {
  const up = head.getAttribute("aria-sort") !== "ascending";
  document.querySelectorAll("#sites th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const sign = up ? 1 : -1, numbers = rows.some(row => "sort" in row.cells[n].dataset);
  rows.sort((a, b) => {
    const [x, y] = [value(a, n), value(b, n)];
    if (x === "" || y === "") return (x === "") - (y === "");
    return sign * (numbers ? x - y : x.localeCompare(y, "en", { numeric: true }));
  });
  body.append(...rows);
}));
const shown = document.querySelector("#shown");
document.querySelector("#filter").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(" ");
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  shown.textContent = rows.filter(row => !row.hidden).length;
});
"""


def page(report: Report, title: str) -> str:
    """The page. It loads nothing, and works from a file."""
    name = escape(title)
    lines = "".join(f"<li>{escape(line)}</li>" for line in report.summary())
    graphs = "".join(_graph(i, graph) for i, graph in enumerate(report.graphs, 1))
    if not graphs:
        graphs = "<p>None: the report of <code>gptq_fx.explain</code> has them.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><h1>{name}</h1><ul>{lines}</ul>
<h2>Sites</h2>
<input id="filter" type="search" placeholder="words of a row" aria-label="rows with these words">
<span id="shown">{len(report.sites)}</span> of {len(report.sites)}
<div class="wide">{_table(report.sites)}</div>
<h2>Graphs before and after</h2>{graphs}
<script>{SCRIPT}</script></body></html>
"""


def _table(sites: Sequence[SiteRecord]) -> str:
    used = [c for c in COLUMNS if c[0] not in ("loss", "tokens") or any(c[1](s) is not None for s in sites)]
    head = "".join(f'<th scope="col"><button type="button">{title}</button></th>' for title, _, _ in used)
    rows = "".join(f"<tr>{''.join(_cell(get(s), form) for _, get, form in used)}</tr>" for s in sites)
    return f'<table id="sites"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _cell(value: object, form: str) -> str:
    if not form:
        return f"<td>{escape(str(value))}</td>"
    if value is None:
        return '<td class="number"></td>'
    return f'<td class="number" data-sort="{value}">{value:{form}}</td>'


def _graph(number: int, graph: GraphRecord) -> str:
    rows = "".join(
        f'<tr class="{kind}"><td>{before}</td><td>{after}</td></tr>' for kind, before, after in changes(graph)
    )
    return (
        f'<h3>Graph {number}</h3><div class="wide">{svg(graph)}</div>'
        "<details><summary>What changed, call by call</summary>"
        f'<div class="wide"><table class="changes">{rows}</table></div></details>'
    )


def changes(graph: GraphRecord) -> Iterator[tuple[str, str, str]]:
    """("gone" | "new" | "same", a call before, a call after), as HTML; runs of unchanged calls are cut."""
    keys = [[(c.node, c.op) for c in calls] for calls in (graph.before, graph.after)]
    matcher = difflib.SequenceMatcher(a=keys[0], b=keys[1], autojunk=False)
    for group in matcher.get_grouped_opcodes(KEPT):
        yield "same", "...", "..."
        for tag, i, j, k, m in group:
            if tag == "equal":
                for n in range(j - i):
                    yield "same", _call(graph.before[i + n]), _call(graph.after[k + n])
                continue
            for call in graph.before[i:j]:
                yield "gone", _call(call), ""
            for call in graph.after[k:m]:
                yield "new", "", _call(call)


def _call(call: Call) -> str:
    of = f"({', '.join(call.weights)})" if call.weights else ""
    fate = f" # {call.fate}" if call.fate and (call.op.startswith("gptq.") or not call.quantized) else ""
    return escape(f"{call.op}{of} {call.output}{fate}")
