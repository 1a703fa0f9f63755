"""One HTML page of results, complete in itself: tables that sort and filter, plots, every run in a line."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.parts import CAPTION, by_part, by_size
from bench.plots import plots
from bench.runs import (
    CNNOPS,
    HEADS,
    LEGEND,
    NEVER,
    RESULTS,
    Group,
    Measured,
    Run,
    Timing,
    conditions,
    duration,
    failed,
    newest_of_each_device,
    not_measured,
    stamp,
    summary,
)


@dataclass(frozen=True)
class Cell:
    """One cell of an HTML table: plain text, escaped when written. A number is sorted by its `value`."""

    text: str
    value: float | None = None
    kind: str = ""
    title: str = ""

    def html(self) -> str:
        order = "" if self.value is None else f' data-order="{self.value!r}"'
        title = f' title="{html.escape(self.title)}"' if self.title else ""
        return f'<td class="{self.kind}"{order}{title}>{html.escape(self.text)}</td>'


Line = Sequence["Cell | str"]


def _number(value: float | None, text: str = "{}", kind: str = "", title: str = "") -> Cell:
    """`value` written with the format `text`; a dash for None."""
    return Cell("–" if value is None else text.format(value), value, f"number {kind}", title)


def _html_table(head: Sequence[str], body: Iterable[Line], kind: str = "") -> str:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [
        "<tr>" + "".join((Cell(c) if isinstance(c, str) else c).html() for c in cells) + "</tr>"
        for cells in body
    ]
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    )


def _summary_html(rows: Iterable[Measured], fields: Sequence[str], rivals: Sequence[str]) -> str:
    cells = summary(rows, fields, rivals)
    return _cells_html(cells, (*cells[0][: len(fields)], "worst row"))


def _cells_html(cells: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """The first row of `cells` is the head, of which `words` stand over no numbers."""
    head, *body = cells

    def line(texts: Sequence[str]) -> Line:
        named = zip(head, texts, strict=True)
        return [t if name in words else Cell(t, _first(t), "number") for name, t in named]

    return _html_table(head, map(line, body), "sortable")


def _first(text: str) -> float | None:
    number = re.match(r"[\d.]+", text)
    return float(number[0]) if number else None


def _spread(timing: Timing) -> str:
    if timing.samples == 1:
        return "1 sample"
    return (
        f"10 to 90 % of {timing.samples} samples: "
        f"{duration(timing.p10_s)} to {duration(timing.p90_s)}"
    )


def _time_cell(row: Measured, rival: str) -> Cell:
    """The main variant's median, with its spread and the other variants on hover; else why there is none."""
    variants = "\n".join(
        f"{variant}: {duration(t.median_s)}, {_spread(t)}"
        for variant, t in row.times.get(rival, {}).items()
    )
    if (median := row.seconds(rival)) is not None:
        return Cell(duration(median), median, "number", variants)
    reason = row.absent.get(rival, "")
    if failed(reason):
        return Cell(reason, None, "failed")
    return Cell(f"{NEVER}: {reason}" if reason else NEVER, None, "absent", variants)


def _measured_html(rows: Sequence[Measured], fields: Sequence[str], rivals: Sequence[str]) -> str:
    """Every one of `rows` with all its times."""

    def cells(row: Measured) -> Line:
        ratio, error = row.speed_up, row.errors.get(CNNOPS)
        return [
            *(str(getattr(row, name)) for name in fields),
            *(_time_cell(row, rival) for rival in rivals),
            _number(ratio, "{:.2f}", "" if ratio is None else "faster" if ratio >= 1 else "slower"),
            row.best_rival or "–",
            Cell(duration(row.floor_s or None), row.floor_s, "number"),
            _number(row.percent_of_floor(), "{:.0f} %"),
            _number(error, "{:.1e}"),
        ]

    names = [HEADS.get(name, name) for name in fields]
    head = [*names, *rivals, "speed-up", "best rival", "floor", "% of floor", "error"]
    return _html_table(head, map(cells, rows), "sortable")


def _run_html(run: Run) -> str:
    problems, timed = run.problems, (*run.ours, *run.rivals)
    origin = f'<p class="stamp">{html.escape(stamp(run))}. {html.escape(conditions(run))}.</p>'
    parts = [f"<h2>{html.escape(str(run.machine['device']))}</h2>{origin}"]
    parts.append(f"<p>{html.escape(not_measured(run))}</p>")
    if problems:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in problems)
        parts.append(f'<h3>Failures</h3><ul class="failed">{lines}</ul>')
    if cells := by_part(run):
        parts.append(
            f"<h3>Parts of networks: speed-up</h3><p>{html.escape(CAPTION.capitalize())}.</p>"
        )
        parts.append(_cells_html(cells, (cells[0][0], "worst")))
    if cells := by_size(run):
        parts.append("<h3>Small and large convolutions</h3>" + _cells_html(cells, cells[0][:1]))
    parts.append("<h3>Operations: speed-up</h3>")
    if run.rows:
        parts.append(_summary_html(run.rows, ("suite", "dtype", "layout"), run.rivals))
        parts.append(_summary_html(run.rows, ("op", "direction", "dtype"), run.rivals))
    else:
        parts.append(f"<p>{NEVER}</p>")
    parts.append("<h3>Networks: time of a batch</h3>")
    if run.models:
        parts.append(
            _measured_html(run.models, ("model", "phase", "batch", "dtype", "layout"), timed)
        )
    else:
        parts.append(f"<p>{NEVER}</p>")
    for name, picture in plots(run).items():
        data = base64.b64encode(picture).decode()
        alt = html.escape(f"{name}: {stamp(run)}")
        parts.append(f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"></figure>')
    if run.rows:
        parts.append(
            f"<h3>All {len(run.rows)} rows</h3>{origin}\n"
            "<p>A click on a head sorts; over a time the mouse shows its spread.</p>\n"
            '<input type="search" placeholder="only rows with these words" aria-label="filter">'
        )
        fields = ("suite", "case", "op", "direction", "dtype", "layout", "problem", "source")
        parts.append(_measured_html(run.rows, fields, timed))
    if run.tests:
        counts = ("passed", "failed", "skipped", "seconds")
        body: list[Line] = [
            [str(test.get("file")), *(_number(test.get(count)) for count in counts)]
            for test in run.tests
        ]
        parts.append(f"<h3>Tests</h3>{_html_table(['file', *counts], body)}")
    known = {**run.machine, **run.settings, "ceilings": run.ceilings, "file": run.path.name}
    told = [[k, v if isinstance(v, str) else json.dumps(v)] for k, v in known.items()]
    details = _html_table(["", ""], told)
    parts.append(f"<details><summary>machine and settings</summary>{details}</details>")
    return f"<section>{chr(10).join(parts)}</section>"


def _history_html(found: Sequence[Run]) -> str:
    body: list[Line] = []
    for run in reversed(found):
        mean = Group((), run.rows).against_best()
        speed_up = Cell(str(mean or "–"), mean.value if mean else None, "number")
        counts = _number(len(run.rows)), speed_up, _number(len(run.problems))
        body.append([stamp(run), *counts, run.path.name])
    head = ["run", "rows", "vs best", "failures", "file"]
    return f"<section><h2>All runs</h2>{_html_table(head, body)}</section>"


_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d4d9df; --soft: #667079;
        --stripe: #f5f7f9; --good: #005b8f; --bad: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e2e6ea; --paper: #14171a; --line: #363c42; --soft: #98a2ab; --stripe: #1c2024;
          --good: #6cbcf0; --bad: #ff9a52; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
       padding: 0 1.5rem; max-width: 90rem; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); }
.stamp, .absent { color: var(--soft); }
.wide { overflow: auto; max-height: 85vh; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 3px 12px 3px 4px;
         border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--paper); white-space: nowrap; }
.sortable th { cursor: pointer; }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
tbody tr:nth-child(even) { background: var(--stripe); }
td.number { text-align: right; white-space: nowrap; }
td.absent, td.failed { max-width: 14rem; font-size: 12px; }
.faster { color: var(--good); } .slower, .failed { color: var(--bad); }
figure { margin: 1.5rem 0; } img { max-width: 100%; background: #fff; border-radius: 6px; }
input { font: inherit; padding: 3px 8px; margin-bottom: 8px; width: 22rem; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll(".sortable th")) head.onclick = () => {
  const way = head.ariaSort === "ascending" ? -1 : 1, body = head.closest("table").tBodies[0];
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = way > 0 ? "ascending" : "descending";
  const numbers = [...body.rows].some(row => row.cells[head.cellIndex].dataset.order);
  const key = row => { const cell = row.cells[head.cellIndex];
    return numbers ? parseFloat(cell.dataset.order ?? way * Infinity) : cell.textContent; };
  body.append(...[...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    return way * (numbers ? (x === y ? 0 : x - y) : x.localeCompare(y, "en", {numeric: true})); }));
};
for (const filter of document.querySelectorAll("input[type=search]")) filter.oninput = () => {
  const words = filter.value.toLowerCase().split(/\\s+/);
  for (const row of filter.nextElementSibling.querySelectorAll("tbody tr"))
    row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
};
"""


def page(found: Sequence[Run], folder: Path | str = RESULTS) -> str:
    """One HTML page, complete in itself: the newest of `found` on every device, and a line for each run.

    Dry runs are left out. `folder` is where runs were looked for; a page without any names it.
    """
    found = [run for run in found if not run.dry]
    parts = []
    for kind, name in (("gpu", "NVIDIA GPU"), ("cpu", "CPU")):
        shown = [run for run in newest_of_each_device(found) if run.machine["kind"] == kind]
        parts += [_run_html(run) for run in shown]
        if not shown:
            where = html.escape(str(folder))
            parts.append(f"<section><h2>{name}</h2><p>{NEVER}: no result in {where}</p></section>")
    if found:
        parts.append(_history_html(found))
    title = "cnnops: benchmarks"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body><h1>{title}</h1>"
        f"<p>{html.escape(LEGEND)}</p>\n{chr(10).join(parts)}\n"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
